"""The floor: kafka-python as it comes, moving the bytes that a worker moves, exactly once, and doing nothing with them.

`python -m tests.bench.floor ADDRESS IN OUT RECORDS_A_BATCH BYTES_OUT`: for each record of IN one of
BYTES_OUT bytes on OUT, with the offsets in the same transaction.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from kafka import KafkaConsumer, KafkaProducer
from kafka.structs import OffsetAndMetadata

ANSWER_BYTES = 700
"""Of a prediction with ten classes."""


def clients(address: str, source: str, target: str) -> tuple[KafkaConsumer, KafkaProducer]:
    """Return a consumer of one topic, in a group of its own, and a producer of transactions for another."""
    consumer = KafkaConsumer(
        source,
        bootstrap_servers=address,
        group_id=f"floor-{target}",
        isolation_level="read_committed",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        fetch_max_bytes=16 << 20,
        max_partition_fetch_bytes=16 << 20,
    )
    producer = KafkaProducer(bootstrap_servers=address, transactional_id=f"floor-{target}", compression_type=None)
    producer.init_transactions()
    return consumer, producer


def main() -> None:
    """Copy until terminated."""
    address, source, target, batch, size = sys.argv[1:]
    answer = b"x" * int(size)
    consumer, producer = clients(address, source, target)
    while True:
        polled = consumer.poll(timeout_ms=500, max_records=int(batch))
        if not polled:
            continue
        answer_all(polled, answer, target, consumer, producer)


def answer_all(
    polled: Mapping[Any, Sequence[Any]], answer: bytes, target: str, consumer: KafkaConsumer, producer: KafkaProducer
) -> None:
    """Write an answer for each record, and commit them with the offsets."""
    producer.begin_transaction()
    futures = [
        producer.send(target, answer, key=record.key, partition=record.partition)
        for records in polled.values()
        for record in records
    ]
    offsets = {at: OffsetAndMetadata(records[-1].offset + 1, "", -1) for at, records in polled.items()}
    producer.send_offsets_to_transaction(offsets, consumer.group_metadata())
    producer.flush()
    for future in futures:
        future.get()
    producer.commit_transaction()


if __name__ == "__main__":
    main()
