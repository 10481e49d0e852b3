"""Earshot's trainer: labelled clips in, a model bundle for the worker out."""
