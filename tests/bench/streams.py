"""Workers on one Apache Kafka: how many chunks a second, and how long from producing one to reading its prediction.

Every contestant is a process of its own that reads the same chunks and writes a topic of its own.
What is counted is what a reader of committed records sees, by the broker's clock (LogAppendTime),
in the `MIDDLE` of the answers: neither a start is in it nor an end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import confluent_kafka
import msgspec
import numpy as np
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._config import AlterConfigOpType, ConfigEntry, ConfigResource
from confluent_kafka.cimpl import NewTopic

from tests.system import cluster
from tests.system.processes import BIN, run, wait_for
from worker.config import Config
from worker.messages import Message, Topics

PARTITIONS: Final = 4
DEADLINE: Final = 600.0  # seconds for one contestant: the slowest peer takes one

BY_THE_BROKER: Final = ("message.timestamp.type", "LogAppendTime")

MIDDLE: Final = (0.4, 0.8)
"""The answers that count, as shares of all: members of a group may still be joining before them, and after them the
first member may have nothing left to do."""

MEMBER_SILENCE: Final = 60.0
"""Seconds without an answer after which a contestant has failed, rather than being slow."""


class Latency(NamedTuple):
    """Seconds from the call that produces a chunk to the poll that brings its prediction."""

    p50: float
    p99: float


def create(address: str, names: Sequence[str], partitions: int = PARTITIONS) -> None:
    """Create topics that carry the broker's own time."""
    admin = AdminClient({"bootstrap.servers": address})
    config = dict([BY_THE_BROKER])
    made = admin.create_topics([NewTopic(name, partitions, 1, config=config) for name in names])
    for answer in made.values():
        answer.result()


def earshot_topics(address: str, prefix: str) -> Topics:
    """Create the topics of one Earshot; its predictions carry the broker's own time."""
    topics = Topics(prefix)
    run(
        *("earshot-worker", "topics", "--broker", f"kafka://{address}"),
        *("--topic-prefix", prefix, "--partitions", str(PARTITIONS)),
    )
    stamped = ConfigEntry(*BY_THE_BROKER, incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ConfigResource.Type.TOPIC, topics.predictions_out, incremental_configs=[stamped])
    admin = AdminClient({"bootstrap.servers": address})
    for answer in admin.incremental_alter_configs([resource]).values():
        answer.result()
    return topics


def earshot(address: str, prefix: str, bundle: Path, *options: str) -> list[str]:
    """Return the command of a worker."""
    return [
        *(str(BIN / "earshot-worker"), "run", "--model", str(bundle), "--broker", f"kafka://{address}"),
        *("--topic-prefix", prefix, "--log-level", "error", *options),
    ]


def peer(module: str, *arguments: str) -> list[str]:
    """Return the command of a peer, a module beside this one."""
    return [sys.executable, "-m", f"tests.bench.{module}", *arguments]


@contextmanager
def running(
    command: Sequence[str], log: Path, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a contestant, and end it with all that it has started."""
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output, env=env) as process:
        try:
            yield process
        except BaseException:
            print(f"{log}:\n{log.read_text(errors='replace')[-3000:]}")
            raise
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def throughput(address: str, command: Sequence[str], out: str, expected: int, log: Path) -> float:
    """Run a contestant until ``expected`` answers stand on ``out``, and return the chunks a second."""
    os.sync()  # or the disk would still be busy with what was produced for it, at whoever's turn it is
    with running(command, log) as process:
        times = np.sort(_answers(address, out, expected, process))
    first, last = (times[int(share * expected)] for share in MIDDLE)
    return 1000 * float(np.count_nonzero((first < times) & (times <= last)) / (last - first))


def delete(address: str, topic: str) -> None:
    """Delete a topic: a second of sound is 32 kB, and a contestant gets thousands."""
    admin = AdminClient({"bootstrap.servers": address})
    for answer in admin.delete_topics([topic]).values():
        answer.result()


def _answers(address: str, topic: str, expected: int, process: subprocess.Popen[bytes]) -> list[int]:
    times: list[int] = []
    with _reader(address, topic) as consumer:
        heard = time.monotonic()
        while len(times) < expected:
            for message in consumer.consume(1000, 0.5):
                assert message.error() is None, message.error()
                times.append(message.timestamp()[1])
                heard = time.monotonic()
            assert process.poll() is None, f"it ended with status {process.returncode}"
            silence = DEADLINE if not times else MEMBER_SILENCE
            assert time.monotonic() < heard + silence, f"{len(times)} of {expected} answers, and then none"
    return times


@contextmanager
def _reader(address: str, topic: str) -> Iterator[confluent_kafka.Consumer]:
    consumer = confluent_kafka.Consumer(
        {
            "bootstrap.servers": address,
            "group.id": "bench",  # it joins none
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
        }
    )
    try:
        partitions = consumer.list_topics(topic, 10).topics[topic].partitions
        ends = [confluent_kafka.TopicPartition(topic, p, _end(consumer, topic, p)) for p in partitions]
        consumer.assign(ends)
        yield consumer
    finally:
        consumer.close()


def _end(consumer: confluent_kafka.Consumer, topic: str, partition: int) -> int:
    """Return where a partition ends; one that has just been made may have no leader yet."""
    deadline = time.monotonic() + MEMBER_SILENCE
    while True:
        try:
            _, end = consumer.get_watermark_offsets(confluent_kafka.TopicPartition(topic, partition), 10)
        except confluent_kafka.KafkaException:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)  # the distance between two looks
        else:
            return int(end)


class _At(msgspec.Struct):
    """Where the record of a prediction stood."""

    partition: int
    offset: int


class _Predicted(msgspec.Struct):
    record: _At


def latency(address: str, topics: Topics, chunks: Sequence[Message], rate: float, seconds: float) -> Latency:
    """Produce chunks at a steady rate, and time each of them until its prediction has been read.

    A worker serves already, and has nothing to do.
    """
    produced: dict[tuple[int, int], float] = {}
    read: dict[tuple[int, int], float] = {}
    total = int(rate * seconds)

    def feed() -> None:
        producer = confluent_kafka.Producer({"bootstrap.servers": address, "linger.ms": 0})
        began = time.perf_counter()
        for number in range(total):
            due = began + number / rate
            time.sleep(max(0.0, due - time.perf_counter()))  # the client's own wait is a busy one if it is short
            producer.poll(0)
            chunk = chunks[number % len(chunks)]
            sent = time.perf_counter()

            def delivered(error: object, message: confluent_kafka.Message, sent: float = sent) -> None:
                assert error is None, error
                produced[message.partition() or 0, message.offset() or 0] = sent

            producer.produce(
                topics.audio_in,
                chunk.value,
                chunk.key,
                number % PARTITIONS,
                headers=list(chunk.headers),
                on_delivery=delivered,
            )
        assert producer.flush(60) == 0

    decoder = msgspec.json.Decoder(_Predicted)
    os.sync()
    with _reader(address, topics.predictions_out) as consumer:
        feeder = threading.Thread(target=feed)
        feeder.start()
        deadline = time.monotonic() + seconds + MEMBER_SILENCE
        while len(read) < total:
            assert time.monotonic() < deadline, f"{len(read)} of {total} predictions came"
            message = consumer.poll(0.05)
            if message is not None:
                now = time.perf_counter()
                at = decoder.decode(message.value() or b"").record
                read[at.partition, at.offset] = now
        feeder.join()
    warm = int(0.1 * total)  # the first tenth may meet a cold cache
    waits = np.array([read[at] - sent for at, sent in sorted(produced.items(), key=lambda item: item[1])][warm:])
    return Latency(float(np.median(waits)), float(np.quantile(waits, 0.99)))


def wait_until_idle(address: str, topics: Topics) -> None:
    """Wait until a worker has answered all that is there."""
    group = f"{topics.prefix}{Config().group}"
    wait_for(lambda: cluster.lag(address, topics.audio_in, group) == 0, "an idle worker", DEADLINE)
