"""The worker as a process: on Apache Kafka beside stream frameworks, and how long it takes to start."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np
from msgspec.structs import replace

from tests import apache_kafka
from tests.apache_kafka import ApacheKafka
from tests.bench import floor, hotpath, streams
from tests.bench.hotpath import IN_FLOAT32
from tests.bench.measure import Row
from tests.bench.streams import PARTITIONS
from tests.system import cluster
from tests.system.processes import BIN, run, wait_for
from worker import bundle
from worker.audio import Limits
from worker.broker_sqlite import SqliteBroker
from worker.config import Config
from worker.drift import MAX_BLOCKS, DriftPolicy
from worker.messages import Message, Topics
from worker.pipeline import Pipeline
from worker.states import Retention

RECORDS: Final = 20_000
SLOW_RECORDS: Final = 4_000  # for FastStream, which would take minutes for all
SLOWEST_RECORDS: Final = 800  # for the article's code
ROUNDS: Final = 3
SOURCES: Final = 8
MANY_SOURCES: Final = 400
HISTORY: Final = 10 * (MAX_BLOCKS - 1) - RECORDS // MANY_SOURCES
"""Chunks of a second that each of many microphones has been heard for: what is saved of it then is, and stays, as large
as it becomes before half of it is forgotten."""

COMPARED: Final = {
    "Earshot, exactly once": "kafka-python alone, exactly once",
    "Earshot, transforms in float32": "kafka-python alone, exactly once",
    f"Earshot, {MANY_SOURCES} microphones": "Earshot, exactly once",
    "Earshot, two processes": "Earshot, exactly once",
    "Earshot, compact, two processes": "Earshot, compact, the default",
    "Earshot, rich, two processes": "Earshot, rich",
}
"""Beside whom else a contestant is put than the first."""

LOADS: Final = (0.25, 0.5, 0.8)
LATENCY_SECONDS: Final = 20.0


def on_kafka(work: Path, chunks: Sequence[bytes]) -> Iterator[Row]:
    """Yield chunks a second of everybody on one broker by turns, and the latency of Earshot by load."""
    (work / "kafka").mkdir()
    article = str(work / "article")
    with ApacheKafka(apache_kafka.fetch(), work / "kafka") as kafka:
        at = kafka.address
        streams.create(at, ["chunks"])
        cluster.publish(at, "chunks", _messages(chunks, RECORDS))

        def apart(module: str, records: int, *arguments: str) -> Callable[[str], float]:
            def one(name: str) -> float:
                streams.create(at, [name])
                command = streams.peer(module, at, "chunks", name, *arguments)
                return streams.throughput(at, command, name, records, work / f"{name}.log")

            return one

        def earshot(*options: str, model: str = "article", sources: int = SOURCES) -> Callable[[str], float]:
            def one(name: str) -> float:
                topics = streams.earshot_topics(at, f"{name}.")
                cluster.publish(at, topics.audio_in, _messages(chunks, RECORDS, sources))
                if sources > SOURCES:
                    cluster.publish(at, topics.drift_state, _states(work / model, chunks, sources))
                command = streams.earshot(at, f"{name}.", work / model, *options)
                rate = streams.throughput(at, command, topics.predictions_out, RECORDS, work / f"{name}.log")
                streams.delete(at, topics.audio_in)
                return rate

            return one

        batch, answer = str(Config().max_batch_records), str(floor.ANSWER_BYTES)
        contestants = {
            "Quix Streams, the article's code": apart("quix_app", SLOWEST_RECORDS, article, "article"),
            "Quix Streams, Earshot's functions": apart("quix_app", RECORDS, article, "fast"),
            "FastStream, the article's code": apart("faststream_app", SLOWEST_RECORDS, article, "article"),
            "FastStream, Earshot's functions": apart("faststream_app", SLOW_RECORDS, article, "fast"),
            "kafka-python alone, exactly once": apart("floor", RECORDS, batch, answer),
            "Earshot, exactly once": earshot(),
            "Earshot, transforms in float32": earshot(model=IN_FLOAT32),
            f"Earshot, {MANY_SOURCES} microphones": earshot(sources=MANY_SOURCES),
            "Earshot, two processes": earshot("--processes", "2"),
            "Earshot, compact, the default": earshot(model="compact"),
            "Earshot, compact, two processes": earshot("--processes", "2", model="compact"),
            "Earshot, rich": earshot(model="rich"),
            "Earshot, rich, two processes": earshot("--processes", "2", model="rich"),
        }
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        for turn in range(ROUNDS):
            for number, (name, compete) in enumerate(contestants.items()):
                rates[name].append(compete(f"c{number}-{turn}"))
        first = next(iter(contestants))
        for name, each in rates.items():
            ratio = _ratio(each, rates[first])
            note = f"{median(each):6.0f}/s [{min(each):.0f}, {max(each):.0f}], {ratio:.1f} x the first"
            if name in COMPARED:
                note += f", {_ratio(each, rates[COMPARED[name]]):.2f} x {COMPARED[name]}"
            yield Row("worker on Apache Kafka, chunks a second", name, None, first, ratio, note)
        yield from _latencies(at, work, chunks, median(rates["Earshot, exactly once"]))


def _ratio(ours: Sequence[float], peers: Sequence[float]) -> float:
    return median(each / peer for each, peer in zip(ours, peers, strict=True))


def _latencies(at: str, work: Path, chunks: Sequence[bytes], capacity: float) -> Iterator[Row]:
    topics = streams.earshot_topics(at, "latency.")
    messages = _messages(chunks, len(chunks))
    cluster.publish(at, topics.audio_in, messages)
    batch = Config().max_batch_records / capacity
    section = f"from producing a chunk to reading its prediction, committed; a full batch takes {1000 * batch:.0f} ms"
    with streams.running(streams.earshot(at, "latency.", work / "article"), work / "latency.log"):
        streams.wait_until_idle(at, topics)
        found: dict[float, list[streams.Latency]] = {load: [] for load in LOADS}
        for _ in range(ROUNDS):
            for load in LOADS:
                found[load].append(streams.latency(at, topics, messages, load * capacity, LATENCY_SECONDS))
        for load, each in found.items():
            p50, p99 = (1000 * np.array([getattr(one, name) for one in each]) for name in ("p50", "p99"))
            yield Row(
                section,
                f"at {load:.0%} of capacity, {load * capacity:.0f}/s",
                None,
                note=f"p50 {np.median(p50):.0f} ms, p99 {np.median(p99):.0f} ms [{p99.min():.0f}, {p99.max():.0f}]",
            )


def start(work: Path, chunks: Sequence[bytes]) -> Iterator[Row]:
    """Yield the time from launching a worker to its first prediction, and the memory it then has."""
    topics = Topics()
    for name in ("article", "rich"):
        waits, sizes = [], []
        for turn in range(ROUNDS):
            path = work / f"start-{name}-{turn}.db"
            run("earshot-worker", "topics", "--broker", f"sqlite:///{path}")
            broker = SqliteBroker(path, topics)
            broker.publish([replace(each, topic=topics.audio_in) for each in _messages(chunks, 1)])
            began = time.perf_counter()
            command = [*_worker(work / name), "--broker", f"sqlite:///{path}"]
            with subprocess.Popen(command) as process:
                wait_for(partial(_answered, broker, topics), "a prediction", 120)
                waits.append(time.perf_counter() - began)
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
                sizes.append(int(status.split("VmRSS:")[1].split()[0]) / 1024)
                process.terminate()
            broker.close()
        note = f"{median(waits):.2f} s to the first prediction, {median(sizes):.0f} MiB resident"
        yield Row("start, on the embedded broker", f"model {name}", None, note=note)


def _answered(broker: SqliteBroker, topics: Topics) -> bool:
    return any(broker.read([topics.predictions_out]))


def _worker(model: Path) -> list[str]:
    return [str(BIN / "earshot-worker"), "run", "--model", str(model), "--log-level", "error"]


def _messages(chunks: Sequence[bytes], count: int, sources: int = SOURCES) -> list[Message]:
    """Return chunks of so many microphones, over and over, spread evenly over the partitions."""
    headers = (("content-type", b"audio/wav"),)
    return [
        Message("", f"mic-{number % sources}".encode(), chunk, headers, number % PARTITIONS)
        for number, chunk in enumerate(islice(cycle(chunks), count))
    ]


def _states(model: Path, chunks: Sequence[bytes], sources: int) -> list[Message]:
    """Return what ``drift.state`` says of so many microphones that have been heard for a while."""
    pipeline = Pipeline(bundle.load(model), Topics(), Limits(), DriftPolicy(), Retention())
    outputs = pipeline.run({}, hotpath.records(list(islice(cycle(chunks), HISTORY)))).outputs
    (state,) = (message.value for message in outputs if message.topic == Topics().drift_state)
    return [Message("", f"mic-{number}".encode(), state, partition=number % PARTITIONS) for number in range(sources)]
