"""What a consumer of ours does beyond the client's, on a real Apache Kafka."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from worker import kafka_cluster
from worker.broker_kafka import KafkaBroker
from worker.kafka_cluster import Cluster, Consumer, Partition
from worker.messages import Message, Topics
from worker.security import OPEN

PATIENCE = 10.0  # seconds to wait for what must come
SOUND = random.Random(0).randbytes(10_000)


@pytest.fixture
def log(kafka_address: str) -> Iterator[Callable[[int], str]]:
    """Returns the name of a topic with so many records in each of three partitions."""
    topics = Topics(prefix=f"{uuid.uuid4().hex[:12]}.")

    def write(count: int) -> str:
        for _ in range(count):  # each call writes a batch of its own: those are not divided in a fetch
            broker.publish([Message(topics.audio_in, b"source", SOUND, partition=number) for number in range(3)])
        return topics.audio_in

    with closing(KafkaBroker([kafka_address], topics)) as broker:
        broker.create_topics(topics.layout(3))
        yield write


@pytest.fixture
def consumer(kafka_address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Consumer]:
    """A consumer that fetches less than three of the records at once."""
    monkeypatch.setattr(kafka_cluster, "PARTITION_FETCH_BYTES", int(2.5 * len(SOUND)))
    consumer = Cluster([kafka_address], OPEN).consumer()
    yield consumer
    consumer.end()


class TestFetchingAhead:
    def test_what_comes_next_comes_by_itself(self, log: Callable[[int], str], consumer: Consumer) -> None:
        """While the first records are worked on, and nobody polls, the next ones arrive."""
        consumer.start([Partition(log(9), 0)])
        first = consumer.records(PATIENCE)

        arrived = consumer._fetcher._completed_fetches
        deadline = time.monotonic() + PATIENCE
        while not arrived:
            assert time.monotonic() < deadline, "nothing came"
            time.sleep(0.01)  # the distance between two looks
        second = consumer.records(0.0)

        assert 0 < len(first) < 9
        assert [each.offset for each in first + second] == list(range(len(first) + len(second)))

    def test_not_before_all_of_the_last_is_taken(self, log: Callable[[int], str], consumer: Consumer) -> None:
        """As long as a partition of the last fetch waits to be read none is asked for: that bounds the memory."""
        topic = log(9)
        consumer.start([Partition(topic, number) for number in range(3)])

        assert 3 == len(consumer.records(PATIENCE, max_records=3))
        assert consumer._fetcher._completed_fetches, "all of it is taken, so nothing is tested"
        assert not consumer._fetcher.in_flight_fetches()

    def test_at_the_end_nothing_is_asked_ahead(self, log: Callable[[int], str], consumer: Consumer) -> None:
        """The first record that trickles in would be brought alone, and those behind it a poll later."""
        consumer.start([Partition(log(1), 0)])

        assert 1 == len(consumer.records(PATIENCE))
        assert not consumer._fetcher.in_flight_fetches()

    def test_the_marker_of_a_transaction_is_nothing_to_ask_for(
        self, kafka_address: str, log: Callable[[int], str], consumer: Consumer
    ) -> None:
        """It is the last thing in the log, and no record."""
        topic = log(0)
        with closing(Cluster([kafka_address], OPEN).producer(transactional_id=topic)) as producer:
            producer.init_transactions()
            producer.begin_transaction()
            producer.deliver([producer.write(Message(topic, b"source", SOUND, partition=0))])
            producer.commit_transaction()
        consumer.start([Partition(topic, 0)])

        assert 1 == len(consumer.records(PATIENCE))
        assert not consumer._fetcher.in_flight_fetches()
