"""Earshot's worker: audio from Kafka in, predictions and drift events out, exactly once."""
