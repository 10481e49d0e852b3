"""What our consumer and our producer do beyond the client's, on a real Apache Kafka."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from kafka.errors import KafkaTimeoutError
from kafka.partitioner.default import murmur2
from kafka.producer.future import FutureProduceResult

from worker import kafka_cluster
from worker.broker_kafka import KafkaBroker
from worker.errors import Fatal
from worker.kafka_clients import Consumer, Partition, Written
from worker.kafka_cluster import Cluster
from worker.messages import Message, Record, Topics
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
            producer.deliver(producer.write([Message(topic, b"source", SOUND, partition=0)]))
            producer.commit_transaction()
        consumer.start([Partition(topic, 0)])

        assert 1 == len(consumer.records(PATIENCE))
        assert not consumer._fetcher.in_flight_fetches()


class TestWriting:
    def test_batches_that_a_topic_does_not_take(self, kafka_address: str) -> None:
        """They are divided until it takes them, and each message arrives once, in order."""
        cluster, topic = Cluster([kafka_address], OPEN), uuid.uuid4().hex
        cluster.create({topic: {"num_partitions": 1, "configs": {"max.message.bytes": str(int(2.5 * len(SOUND)))}}})
        keys = [b"%d" % number for number in range(20)]
        with closing(cluster.producer(transactional_id=topic)) as producer, closing(cluster.consumer()) as consumer:
            producer.init_transactions()
            producer.begin_transaction()
            written = producer.write(Message(topic, key, SOUND) for key in keys)
            assert 1 == len({id(each._future) for each in written}), "they are not in one batch to be divided"
            producer.deliver(written)
            producer.commit_transaction()
            consumer.start([Partition(topic, 0)])
            records: list[Record] = []
            deadline = time.monotonic() + PATIENCE
            while len(records) < len(keys):
                assert time.monotonic() < deadline, f"{len(records)} records came"
                records += consumer.records(0.1)

        assert keys == [each.key for each in records]

    def test_a_batch_that_is_not_put_together_again(self) -> None:
        """If the client fails while it divides one, that is noticed at the deadline."""
        future = FutureProduceResult(Partition("topic", 0))
        message = Written(Message("topic", b"key", SOUND), future, 0)
        Written(Message("topic", b"key", SOUND), future, 1).rebind(FutureProduceResult(Partition("topic", 0)), 0)

        with pytest.raises(KafkaTimeoutError, match="'topic' was not taken"):
            message.wait(time.monotonic() + 0.1)

    def test_a_message_that_a_topic_does_not_take(self, kafka_address: str) -> None:
        """It is named, and so is what to do."""
        cluster, topic = Cluster([kafka_address], OPEN), uuid.uuid4().hex
        cluster.create({topic: {"num_partitions": 1, "configs": {"max.message.bytes": str(len(SOUND) // 2)}}})
        with closing(cluster.producer()) as producer:
            written = producer.write([Message(topic, b"large", SOUND), Message(topic, b"small", b"")])
            with pytest.raises(Fatal, match=rf"of {len(SOUND) + 5} bytes is too large for topic '{topic}': raise"):
                producer.deliver(written)

    def test_the_partition_of_a_key(self, log: Callable[[int], str], consumer: Consumer, kafka_address: str) -> None:
        """It is the one that every client of Kafka chooses."""
        topic = log(0)
        keys = [b"mic-%d" % number for number in range(30)]
        with closing(Cluster([kafka_address], OPEN).producer()) as producer:
            producer.deliver(producer.write(Message(topic, key, b"") for key in keys))
        consumer.start([Partition(topic, number) for number in range(3)])
        chosen: dict[bytes | None, int] = {}
        deadline = time.monotonic() + PATIENCE
        while len(chosen) < len(keys):
            assert time.monotonic() < deadline, f"{len(chosen)} records came"
            chosen |= {each.key: each.partition for each in consumer.records(0.1)}

        assert {key: (murmur2(key) & 0x7FFFFFFF) % 3 for key in keys} == chosen
