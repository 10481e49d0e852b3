"""Topics and brokers of their own for the tests of sessions on Kafka."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests import apache_kafka
from tests.conftest import missing
from tests.worker.sessions import PARTITIONS
from worker.broker_kafka import KafkaBroker
from worker.messages import Topics


@pytest.fixture
def topics() -> Topics:
    return Topics(prefix=f"{uuid.uuid4().hex[:12]}.")


@pytest.fixture
def group() -> str:
    return f"group-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def broker(kafka_address: str, topics: Topics) -> Iterator[KafkaBroker]:
    with closing(KafkaBroker([kafka_address], topics)) as broker:
        broker.create_topics(topics.layout(PARTITIONS))
        yield broker


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[apache_kafka.ApacheKafka]:
    """A broker of this module's own, which a test may stop if it starts it again."""
    try:
        jars = apache_kafka.fetch()
    except apache_kafka.Unavailable as why:
        missing(str(why))
    with apache_kafka.ApacheKafka(jars, tmp_path_factory.mktemp("mortal")) as kafka:
        yield kafka
