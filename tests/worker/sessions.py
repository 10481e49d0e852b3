"""What the tests of sessions on Kafka have in common: how they are fed, polled and looked at, and how to hurry them."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from worker import broker_kafka, kafka_clients, kafka_cluster, kafka_transactions
from worker.broker_kafka import KafkaBroker, KafkaSession
from worker.messages import Message, Record, Topics

PARTITIONS = 4
PATIENCE = 30.0  # seconds to wait for what must come


def sounds(topics: Topics, count: int) -> list[Message]:
    return [Message(topics.audio_in, b"source", b"%d" % n, partition=n % PARTITIONS) for n in range(count)]


def process(session: KafkaSession, topics: Topics, records: list[Record], *, wait: bool = True) -> None:
    """Commit one output for each record: the place where the record stood."""
    with session.transaction(wait=wait) as transaction:
        transaction.send(
            Message(topics.predictions_out, each.key, b"%d/%d" % (each.partition, each.offset)) for each in records
        )
        transaction.commit_offsets({each.partition: each.offset + 1 for each in records})


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "what must come did not come"
        time.sleep(0.02)


def poll_for(session: KafkaSession, count: int) -> list[Record]:
    records: list[Record] = []

    def enough() -> bool:
        records.extend(session.poll(0.2, 100).records)
        return len(records) >= count

    wait_for(enough)
    return records


def committed(broker: KafkaBroker, topic: str) -> list[Record]:
    """Everything that a reader of ``topic`` can see now."""
    records: list[Record] = []
    for batch in broker.follow([topic], from_beginning=True):
        if not batch:
            break
        records += batch
    return records


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten what a test would have to wait for; clients made before keep their bounds."""
    short = {
        **dict.fromkeys(("CONNECT_TIMEOUT", "REQUEST_TIMEOUT", "SILENCE", "CLOSE_TIMEOUT"), 1.0),
        **dict.fromkeys(("INIT_TIMEOUT", "DELIVERY_TIMEOUT"), 2.0),
        "TRANSACTION_TIMEOUT": 4.0,
    }
    for bound, seconds in short.items():
        modules = broker_kafka, kafka_clients, kafka_cluster, kafka_transactions
        homes = [module for module in modules if hasattr(module, bound)]
        assert homes, f"no module has a {bound}"
        for module in homes:
            monkeypatch.setattr(module, bound, seconds)
