"""The two brokers that the contract suite holds to one contract."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from worker.broker import Broker
from worker.broker_sqlite import SqliteBroker
from worker.messages import Topics

PARTITIONS = 3

Connect = Callable[[Topics], Broker]


@pytest.fixture
def topics() -> Topics:
    """The names of this test's own topics, since all tests share one Kafka."""
    return Topics(prefix=f"{uuid.uuid4().hex[:12]}.")


@pytest.fixture
def group() -> str:
    """A consumer group of this test's own."""
    return f"group-{uuid.uuid4().hex[:12]}"


@pytest.fixture(params=["sqlite", "kafka"])
def connect(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Connect]:
    """Each broker in turn: connect to it as often as you like, as separate processes would."""
    with ExitStack() as stack:

        def connect(topics: Topics) -> Broker:
            broker: Broker
            if request.param == "sqlite":
                broker = SqliteBroker(tmp_path / "earshot.db", topics)
            else:
                # Imported here, so that the embedded half of the suite needs no Kafka client.
                kafka = importlib.import_module("worker.broker_kafka")
                broker = kafka.KafkaBroker([request.getfixturevalue("kafka_address")], topics)
            return stack.enter_context(closing(broker))

        yield connect


@pytest.fixture
def broker(connect: Connect, topics: Topics) -> Broker:
    """One connection to the broker, on which this test's topics are."""
    broker = connect(topics)
    broker.create_topics(topics.layout(PARTITIONS))
    return broker
