"""`make soak`: an hour of stream at full speed, and whether the worker stays the size that it is.

One worker serves an Apache Kafka that is always ahead of it, with poison among the records. Its
resident memory, threads and open files are read from the kernel as it runs. It prints one line,
and ends with status 0 only if all three stay flat after the first tenth of the time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Final, NamedTuple

from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._config import AlterConfigOpType, ConfigEntry, ConfigResource

from tests import apache_kafka
from tests.apache_kafka import ApacheKafka
from tests.system import cluster
from tests.system.processes import run, wait_for, worker
from tests.system.stream import MAX_RECORD_BYTES, stream
from trainer.dataset import load
from trainer.simulate import simulate
from trainer.training import fit
from worker.config import Config
from worker.features import FeatureSpec
from worker.messages import Message, Topics

PARTITIONS: Final = 4
TOPICS: Final = Topics()

AHEAD: Final = 4_000
"""Records that the worker is kept behind: more than it ever polls at once, so that it never waits."""

RETENTION_BYTES: Final = 512 * 1024**2
"""Of each partition: an hour of stream would fill the disk, and all that AHEAD needs is a quarter of it."""

SAMPLE_SECONDS: Final = 5.0
WARM_UP: Final = 0.1
"""The share of the time after which everything that is allocated once has been."""

GROWTH: Final = 0.05
"""How much larger the last tenth may be than the first one after the warm-up, in resident memory."""


class Sample(NamedTuple):
    """What the kernel says of a process."""

    memory: int
    threads: int
    files: int


class Outcome(NamedTuple):
    """The size of the worker after the warm-up and at the end, and how much it has done."""

    seconds: float
    records: int
    first: Sample
    last: Sample
    peak: Sample

    @property
    def flat(self) -> bool:
        """Whether nothing has grown: memory within `GROWTH`, threads and open files not at all."""
        return (
            self.records > 0
            and self.last.memory <= self.first.memory * (1 + GROWTH)
            and self.last.threads <= self.first.threads
            and self.last.files <= self.first.files
        )

    def __str__(self) -> str:
        first, last, peak = ([s.memory / 2**20, s.threads, s.files] for s in (self.first, self.last, self.peak))
        names = ("MiB resident", "threads", "open files")
        sizes = ", ".join(
            f"{name} {a:.0f} -> {b:.0f} (peak {c:.0f})" for name, a, b, c in zip(names, first, last, peak, strict=True)
        )
        return f"soak: {self.seconds:.0f} s, {self.records} records, {self.records / self.seconds:.0f}/s: {sizes}"


def soak(kafka: ApacheKafka, bundle: Path, messages: Sequence[Message], seconds: float, work: Path) -> Outcome:
    """Keep a worker busy for so long, and return how large it was."""
    at = ("--broker", f"kafka://{kafka.address}")
    run("earshot-worker", "topics", "--partitions", str(PARTITIONS), *at)
    bound_the_disk(kafka.address)
    options = ("--model", bundle, *at, "--max-record-bytes", str(MAX_RECORD_BYTES), "--log-level", "warning")
    with feeding(kafka.address, messages) as sent, worker(work / "worker.log", *options) as serving:
        wait_for(lambda: done(kafka.address, sent[0]) > 0, "the first record", 120)
        began, before = time.monotonic(), done(kafka.address, sent[0])
        samples: list[Sample] = []
        while time.monotonic() < began + seconds:
            time.sleep(SAMPLE_SECONDS)  # the distance between two samples
            samples.append(sample(serving.process.pid))
        records = done(kafka.address, sent[0]) - before
        assert serving.stop() == 0, "the worker did not drain"
    tenth = max(1, round(len(samples) * WARM_UP))
    return Outcome(
        time.monotonic() - began,
        records,
        first=_typical(samples[tenth : 2 * tenth] or samples),
        last=_typical(samples[-tenth:]),
        peak=Sample(*(max(column) for column in zip(*samples, strict=True))),
    )


@contextmanager
def feeding(address: str, messages: Sequence[Message]) -> Iterator[list[int]]:
    """Keep the topic `AHEAD` of the group, over and over the same messages; the count of what was sent is lent."""
    sent = [0]
    over = Event()
    endless = cycle(messages)

    def feed() -> None:
        while not over.is_set():
            behind = cluster.lag(address, TOPICS.audio_in, Config().group)
            missing = 0 if behind is None else AHEAD - behind
            if missing > AHEAD // 4:
                cluster.publish(address, TOPICS.audio_in, islice(endless, missing))
                sent[0] += missing
            over.wait(0.5)

    thread = Thread(target=feed, daemon=True)
    thread.start()
    try:
        yield sent
    finally:
        over.set()
        thread.join()


def bound_the_disk(address: str) -> None:
    """Let the broker forget what the worker has long since answered."""
    retention = ConfigEntry("retention.bytes", str(RETENTION_BYTES), incremental_operation=AlterConfigOpType.SET)
    names = (TOPICS.audio_in, TOPICS.audio_dlq, TOPICS.predictions_out)
    topics = [ConfigResource(ConfigResource.Type.TOPIC, name, incremental_configs=[retention]) for name in names]
    admin = AdminClient({"bootstrap.servers": address})
    for answer in admin.incremental_alter_configs(topics).values():
        answer.result()


def done(address: str, sent: int) -> int:
    """Return how many records have been committed."""
    behind = cluster.lag(address, TOPICS.audio_in, Config().group)
    return 0 if behind is None else sent - behind


def sample(pid: int) -> Sample:
    """Read the size of a process from Linux's /proc."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Sample(int(status["VmRSS"].split()[0]) * 1024, int(status["Threads"]), files)


def _typical(samples: Sequence[Sample]) -> Sample:
    """Return the size between two calls: those have a thread, and may have a file, of their own."""
    memory, threads, files = zip(*samples, strict=True)
    return Sample(round(median(memory)), min(threads), min(files))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the soak and return the exit status."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0)
    seconds = parser.parse_args(argv).seconds
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        simulate(work / "clips", clips=144)
        fit(load(work / "clips"), work / "bundle", name="soak", spec=FeatureSpec())
        (work / "kafka").mkdir()
        with ApacheKafka(apache_kafka.fetch(), work / "kafka") as kafka:
            clips = sorted((work / "clips" / "audio").glob("*.wav"))
            messages = list(stream(clips, 2 * AHEAD, PARTITIONS, seed=0))
            outcome = soak(kafka, work / "bundle", messages, seconds, work)
    print(outcome)
    return 0 if outcome.flat else 1


if __name__ == "__main__":
    sys.exit(main())
