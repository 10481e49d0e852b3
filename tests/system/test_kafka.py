"""On Apache Kafka: an independent client writes and reads, and two workers share the partitions."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import confluent_kafka
import msgspec
import numpy as np

from tests.system.processes import run, wait_for, worker
from worker.audio import from_container, resample
from worker.messages import Classification

CHUNKS = 2_000
PARTITIONS = 8
SOURCES = 24


def chunks_of(recordings: Path) -> Iterator[bytes]:
    """Yield whole seconds of real recordings as 16-bit PCM at 16 kHz, from the first clip again after the last."""
    for clip in cycle(sorted((recordings / "audio").glob("*.ogg"))):
        sound = from_container(clip.read_bytes())
        samples = resample(sound.samples, sound.sample_rate, 16_000)
        pcm = np.clip(np.rint(samples * 32767), -32768, 32767).astype("<i2")
        for start in range(0, len(pcm) - 15_999, 16_000):
            yield pcm[start : start + 16_000].tobytes()


def produce(address: str, topic: str, recordings: Path) -> set[tuple[int, int]]:
    """Send the chunks with librdkafka and return where each of them was written."""
    written: set[tuple[int, int]] = set()

    def delivered(error: confluent_kafka.KafkaError | None, message: confluent_kafka.Message) -> None:
        assert error is None, error
        written.add((message.partition() or 0, message.offset() or 0))

    producer = confluent_kafka.Producer({"bootstrap.servers": address, "linger.ms": 20})
    for number, chunk in enumerate(islice(chunks_of(recordings), CHUNKS)):
        producer.produce(
            topic,
            chunk,
            f"mic-{number % SOURCES}",
            headers={"content-type": b"audio/pcm;rate=16000;format=s16le"},
            on_delivery=delivered,
        )
        producer.poll(0)
    assert 0 == producer.flush(60)
    return written


def consume(address: str, topic: str, count: int, seconds: float) -> list[confluent_kafka.Message]:
    """Read committed records of a topic with librdkafka: ``count`` of them, and all that are there besides."""
    consumer = confluent_kafka.Consumer(
        {
            "bootstrap.servers": address,
            "group.id": f"reader-{uuid.uuid4()}",
            "isolation.level": "read_committed",
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
        }
    )
    consumer.subscribe([topic])
    records: list[confluent_kafka.Message] = []
    ended: set[int] = set()

    def all_read() -> bool:
        for message in consumer.consume(500, 0.2):
            error = message.error()
            if error is None:
                records.append(message)
                ended.discard(message.partition() or 0)
            else:
                assert confluent_kafka.KafkaError._PARTITION_EOF == error.code(), error
                ended.add(message.partition() or 0)
        return len(records) >= count and len(ended) == PARTITIONS

    try:
        wait_for(all_read, f"{count} records of {topic}", seconds)
    finally:
        consumer.close()
    return records


def test_two_workers_answer_each_of_2000_real_chunks_once(
    kafka_address: str, machine_bundle: Path, esc10: Path, tmp_path: Path
) -> None:
    """Read with read_committed there are 2,000 predictions, one for each chunk, and both workers have worked."""
    prefix = f"{uuid.uuid4()}."
    cluster = ("--broker", f"kafka://{kafka_address}", "--topic-prefix", prefix)
    serve = ("--model", machine_bundle, *cluster, "--max-batch-records", "64", "--log-level", "debug")
    run("earshot-worker", "topics", "--partitions", str(PARTITIONS), *cluster)
    with (
        worker(tmp_path / "a.log", *serve, "--instance", "a") as first,
        worker(tmp_path / "b.log", *serve, "--instance", "b") as second,
    ):
        for each in (first, second):
            wait_for(partial(each.events, "assigned"), "a share of the partitions")
        written = produce(kafka_address, f"{prefix}audio.in", esc10)
        records = consume(kafka_address, f"{prefix}predictions.out", CHUNKS, 120)
        assert 0 == first.stop()
        assert 0 == second.stop()
        shares = [sum(entry["records"] for entry in each.events("committed")) for each in (first, second)]

    assert CHUNKS == len(written)
    predictions = [msgspec.json.decode(record.value() or b"", type=Classification) for record in records]
    answered = Counter((prediction.record.partition, prediction.record.offset) for prediction in predictions)
    assert dict.fromkeys(written, 1) == dict(answered)
    assert [(prediction.source.encode(),) for prediction in predictions] == [(record.key(),) for record in records]
    assert CHUNKS == sum(shares)
    assert all(shares), f"one worker did everything: {shares}"
    headers: list[dict[str, bytes]] = [dict(record.headers() or []) for record in records]  # type: ignore[arg-type]
    assert CHUNKS == len({each["ce_id"] for each in headers})
