"""Apache Kafka through librdkafka, which shares no code with the client of the worker.

What the chaos test writes to a cluster and reads from it, it writes and reads here. This module
knows nothing of what a record means.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Final

import confluent_kafka
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from worker.messages import Message, Record

READ_TIMEOUT: Final = 90.0
"""Seconds until a topic must have been read: longer than a transaction that was left open stays undecided."""

PATIENCE: Final = 180.0
"""Seconds for what has been sent through outages to be written, on a machine that is busy with starting a broker."""

ANSWER_TIMEOUT: Final = 10.0
"""Seconds for one answer of a broker that runs."""


def read(address: str, topic: str, *, isolation: str = "read_committed") -> list[Record]:
    """Read a topic up to its present end, partition by partition in offset order.

    Raises:
        AssertionError: the end is not reached in time, as when a transaction is still open.
    """
    consumer = confluent_kafka.Consumer(
        {
            "bootstrap.servers": address,
            "group.id": "oracle",  # it joins none, but librdkafka wants a name
            "isolation.level": isolation,
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "log_level": 0,
        }
    )
    try:
        partitions = consumer.list_topics(topic, ANSWER_TIMEOUT).topics[topic].partitions
        ends = {p: consumer.get_watermark_offsets(TopicPartition(topic, p), ANSWER_TIMEOUT)[1] for p in partitions}
        consumer.assign([TopicPartition(topic, p, confluent_kafka.OFFSET_BEGINNING) for p in partitions])
        behind = set(partitions)
        records: list[Record] = []
        deadline = time.monotonic() + READ_TIMEOUT
        while behind:
            assert time.monotonic() < deadline, f"partitions {sorted(behind)} of {topic} cannot be read to their ends"
            for message in consumer.consume(500, 0.2):
                error = message.error()
                if error is None:
                    records.append(_record(message))
                elif error.code() != KafkaError._PARTITION_EOF:
                    assert error.retriable(), error
                elif (message.offset() or 0) >= ends[message.partition() or 0]:
                    behind.discard(message.partition() or 0)
    finally:
        consumer.close()
    return sorted(records, key=lambda record: (record.partition, record.offset))


def copy(address: str, source: str, target: str) -> list[Record]:
    """Copy a topic into an empty one, to the same partitions and offsets, and return its records."""
    records = read(address, source)
    messages = (Message("", each.key, each.value, each.headers, each.partition, each.timestamp) for each in records)
    written = publish(address, target, messages)
    assert {(each.partition, each.offset) for each in records} == written, "the copy has other offsets"
    return records


def publish(address: str, topic: str, messages: Iterable[Message]) -> set[tuple[int, int]]:
    """Write messages with librdkafka, once and in order, and return where they were written."""
    written: set[tuple[int, int]] = set()

    def delivered(error: confluent_kafka.KafkaError | None, message: confluent_kafka.Message) -> None:
        assert error is None, error
        written.add((message.partition() or 0, message.offset() or 0))

    producer = confluent_kafka.Producer(
        {
            "bootstrap.servers": address,
            "enable.idempotence": True,
            "queue.buffering.max.messages": 10_000_000,  # an outage must not lose one
            "log_level": 0,  # outages are what we are here for
        }
    )
    for each in messages:
        producer.produce(
            topic,
            each.value,
            each.key,
            -1 if each.partition is None else each.partition,
            timestamp=each.timestamp or 0,
            headers=list(each.headers),
            on_delivery=delivered,
        )
        producer.poll(0)
    assert producer.flush(PATIENCE) == 0, "not everything could be written"
    return written


def lag(address: str, topic: str, group: str) -> int | None:
    """Return how many records of a topic the group has not committed yet; None if the broker cannot tell yet."""
    consumer = confluent_kafka.Consumer(
        {"bootstrap.servers": address, "group.id": group, "enable.auto.commit": False, "log_level": 0}
    )
    try:
        partitions = consumer.list_topics(topic, ANSWER_TIMEOUT).topics[topic].partitions
        committed = consumer.committed([TopicPartition(topic, p) for p in partitions], ANSWER_TIMEOUT)
        ends = [consumer.get_watermark_offsets(each, ANSWER_TIMEOUT)[1] for each in committed]
    except KafkaException:  # it, or the coordinator of the group, is not up yet
        return None
    finally:
        consumer.close()
    return sum(end - max(0, each.offset) for each, end in zip(committed, ends, strict=True))


def _record(message: Any) -> Record:  # librdkafka's types allow for messages that stand nowhere
    """Return a message of librdkafka as one of ours."""
    return Record(
        message.topic(),
        message.partition(),
        message.offset(),
        message.timestamp()[1],
        message.key(),
        message.value(),
        tuple((name, data or b"") for name, data in message.headers() or ()),
    )
