"""`make chaos`: exactly once, proven by killing it.

Workers share a stream of real sound on an Apache Kafka of their own. They are killed with SIGKILL at
random moments and started again, and so is the broker. Then one worker that nothing happens to is
given a copy of the same log, and what the two runs have committed is compared: predictions,
rejections, drift events and detector states. It prints one line, and ends with status 0 only if
nothing was lost, nothing doubled, and nothing differs.
"""

from __future__ import annotations

import argparse
import heapq
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Event
from typing import Final, NamedTuple

from tests import apache_kafka
from tests.apache_kafka import ApacheKafka
from tests.conftest import SHARED_DATA
from tests.system import cluster, oracle
from tests.system.members import Member, MemberFailed, members, tell
from tests.system.oracle import PLAIN, Verdict
from tests.system.processes import wait_for
from tests.system.stream import EXPECTED, MAX_RECORD_BYTES, as_wav, stream
from trainer.dataset import load
from trainer.simulate import simulate
from trainer.training import fit
from worker.broker_kafka import SESSION_TIMEOUT, KafkaBroker
from worker.config import Config
from worker.errors import Retryable
from worker.features import FeatureSpec
from worker.messages import Message, Record, Topics

PARTITIONS: Final = 6
GROUP: Final = Config().group
STORM: Final = "storm."
CALM: Final = "calm."

# Seconds.
PACE: Final = 4.0  # between two kills on average: a worker needs about as long to start and join on a busy machine
DOWNTIME: Final = SESSION_TIMEOUT + 2.0  # of every fourth kill: the group notices, and others take the partitions
OUTAGE: Final = 6.0  # of the broker at the most, and its start comes on top
START: Final = 120.0  # for all workers to load the model
DRAIN: Final = 180.0  # for what is left to do after the storm; a transaction left open may hold it up for a minute

MISMATCHES: Final = 10
"""How many of them are shown."""

SENSITIVE: Final = ("--drift-block-seconds", "1", "--drift-quorum", "2")
"""So that a short stream has several drift events; here it is no matter which of them are false alarms."""

FORGETFUL: Final = ("--forget-after", "8")
"""So that the state of a source that rests is deleted, and begins anew when it is back; others come more often."""

STORM_BATCH: Final = 4
"""Records in a transaction: so few that a worker catches up slowly, and most kills find it in a transaction. The
calm worker cuts the log in another way."""


class ChaosFailed(Exception):
    """The run shows nothing, since it did not go as it must."""


class Plan(NamedTuple):
    """What is to happen; with the same seed the same, as far as a machine can do things twice."""

    records: int = 5_000
    kills: int = 30
    broker_restarts: int = 3
    workers: int = 3
    seed: int = 0


class Outcome(NamedTuple):
    """What has happened, and the verdict on it; ``aborted`` counts results of transactions that were cut off."""

    kills: int
    broker_restarts: int
    records: int
    drifts: int
    aborted: int
    verdict: Verdict

    def __str__(self) -> str:
        lost, doubled, differing, _ = self.verdict
        return (
            f"chaos: {self.kills} kills, {self.broker_restarts} restarts of the broker, {self.records} records: "
            f"{lost} lost, {doubled} doubled, {differing} differing"
        )


def chaos(kafka: ApacheKafka, bundle: Path, clips: Sequence[Path], plan: Plan, work: Path) -> Outcome:
    """Run the storm and then the calm on a running broker, and compare them.

    Args:
        kafka: the broker; it is stopped and started, and runs when this returns.
        bundle: the model to serve.
        clips: sounds at `tests.system.stream.RATE`.
        plan: what is to happen.
        work: an empty folder for logs.

    Raises:
        MemberFailed: a worker ended by itself.
        ChaosFailed: nothing happened that could have gone wrong.
    """
    written = storm(kafka, bundle, stream(clips, plan.records, PARTITIONS, plan.seed), plan, work)
    create_topics(kafka.address, CALM)
    audio = cluster.copy(kafka.address, f"{STORM}{PLAIN.audio_in}", f"{CALM}{PLAIN.audio_in}")
    if len(audio) != plan.records or {(each.partition, each.offset) for each in audio} != written:
        raise ChaosFailed(f"{len(written)} of {plan.records} records were acknowledged, and {len(audio)} are there")
    calm(kafka, bundle, work)
    expected = outputs(kafka.address, CALM)
    actual = outputs(kafka.address, STORM)
    check(audio, expected)
    if all(each.value is not None for each in actual[PLAIN.drift_state]):  # the calm worker's batches span the rests
        raise ChaosFailed("no source was forgotten, and so none could come back from the dead")
    everything = cluster.read(kafka.address, f"{STORM}{PLAIN.predictions_out}", isolation="read_uncommitted")
    return Outcome(
        plan.kills,
        plan.broker_restarts,
        plan.records,
        drifts=len(expected[PLAIN.drift_events]) // 2,
        aborted=len(everything) - len(actual[PLAIN.predictions_out]),
        verdict=oracle.compare(expected, actual),
    )


def storm(
    kafka: ApacheKafka, bundle: Path, messages: Iterable[Message], plan: Plan, work: Path
) -> set[tuple[int, int]]:
    """Feed the stream while workers and the broker are killed, and return where its records were written."""
    create_topics(kafka.address, STORM)
    chance = random.Random(plan.seed)
    seconds = plan.kills * PACE
    options = (*serve(kafka.address, STORM, bundle), "--max-batch-records", str(STORM_BATCH))
    with members([Member(f"worker-{n}", work, *options) for n in range(plan.workers)]) as group:
        _wait_for_all(group)
        over = Event()
        with ThreadPoolExecutor(2) as threads:
            try:
                fed = threads.submit(feed, kafka.address, messages, seconds / plan.records, over)
                outages = threads.submit(restart_broker, kafka, plan, seconds, over)
                kill(group, sorted(chance.uniform(0, seconds) for _ in range(plan.kills)), chance)
                written = fed.result()
                outages.result()
            finally:
                over.set()
        tell("the storm is over")
        _drain(kafka.address, STORM, group)
        _wait_for_all(group)
        for each in group:
            each.stop()
    return written


def calm(kafka: ApacheKafka, bundle: Path, work: Path) -> None:
    """Let one worker that nothing happens to serve the copy of the log."""
    with members([Member("calm", work, *serve(kafka.address, CALM, bundle))]) as group:
        _drain(kafka.address, CALM, group)
        group[0].stop()


def kill(group: Sequence[Member], moments: Iterable[float], chance: random.Random) -> None:
    """Kill a member at each of the moments (seconds from now), and start it again, sometimes late.

    Two of three kills are for members at work, if there are any: by chance alone most would meet one that starts.
    """
    began = time.monotonic()
    agenda: list[tuple[float, Member | None]] = [(moment, None) for moment in moments]
    number = 0
    while agenda:
        moment, dead = heapq.heappop(agenda)
        time.sleep(max(0.0, began + moment - time.monotonic()))
        for each in group:
            each.look_after()
        if dead is not None:
            dead.start()
        elif alive := [each for each in group if each.alive]:
            at_work = [each for each in alive if each.serving] if number % 3 else []
            victim = chance.choice(at_work or alive)
            victim.kill()
            number += 1
            tell(f"kill {number}: {victim.name}")
            heapq.heappush(agenda, (moment + (DOWNTIME if number % 4 == 0 else 0.0), victim))
        else:
            heapq.heappush(agenda, (moment + 1.0, None))


def restart_broker(kafka: ApacheKafka, plan: Plan, seconds: float, over: Event) -> None:
    """Stop and start the broker, in good order and as a power cut does in turn, spread over the time."""
    chance = random.Random(~plan.seed)
    began = time.monotonic()
    for number in range(plan.broker_restarts):
        moment = (number + chance.uniform(0.2, 0.8)) / plan.broker_restarts * seconds
        if over.wait(max(0.0, began + moment - time.monotonic())):
            return
        end = kafka.kill if number % 2 == 0 else kafka.stop
        tell(f"broker: {end.__name__}")
        end()
        time.sleep(chance.uniform(0, OUTAGE))
        kafka.start()
        tell("broker: up again")


def feed(address: str, messages: Iterable[Message], interval: float, over: Event) -> set[tuple[int, int]]:
    """Send a message every ``interval`` seconds, through all outages, and return where they were written."""
    began = time.monotonic()

    def paced() -> Iterator[Message]:
        for number, message in enumerate(messages):
            if over.wait(max(0.0, began + number * interval - time.monotonic())):
                return
            yield message

    return cluster.publish(address, f"{STORM}{PLAIN.audio_in}", paced())


def outputs(address: str, prefix: str) -> oracle.Log:
    """Read everything that the workers of a run have committed."""
    return {
        name: [oracle.without(prefix, record) for record in cluster.read(address, f"{prefix}{name}")]
        for name in oracle.WRITTEN
    }


def check(audio: Sequence[Record], calm: oracle.Log) -> None:
    """Hold the calm run against its input: what it must say of each record is known in part."""
    reasons = {(str(each.partition), str(each.offset)): dict(each.headers).get(EXPECTED) for each in audio}
    poisoned = {place: reason for place, reason in reasons.items() if reason is not None}
    rejected = {oracle.origin(each)[:2]: dict(each.headers)["earshot_reason"] for each in calm[PLAIN.audio_dlq]}
    if poisoned != rejected or len(calm[PLAIN.audio_dlq]) != len(rejected):
        raise ChaosFailed(f"{len(poisoned)} records were poisoned, and {len(rejected)} others were rejected")
    heard = Counter(oracle.origin(each)[:2] for each in calm[PLAIN.predictions_out])
    if heard != Counter(reasons.keys() - poisoned.keys()):
        raise ChaosFailed(f"{len(reasons) - len(poisoned)} records were fine, and {heard.total()} are predicted")
    if len(calm[PLAIN.drift_events]) < 4:  # two events, each with its request for retraining
        raise ChaosFailed("there was hardly any drift, and so nothing to lose of it")


def create_topics(address: str, prefix: str) -> None:
    """Create the topics, however long a busy machine takes for it."""

    def created() -> bool:
        topics = Topics(prefix)
        with closing(KafkaBroker([address], topics)) as broker:
            try:
                broker.create_topics(topics.layout(PARTITIONS))
            except Retryable:
                return False
        return True

    wait_for(created, "topics", START)


def serve(address: str, prefix: str, bundle: Path) -> tuple[str | Path, ...]:
    """Return what both runs tell their workers."""
    return (
        *at(address, prefix),
        "--model",
        bundle,
        *SENSITIVE,
        *FORGETFUL,
        "--max-record-bytes",
        str(MAX_RECORD_BYTES),
    )


def at(address: str, prefix: str) -> tuple[str, ...]:
    return "--broker", f"kafka://{address}", "--topic-prefix", prefix


def _wait_for_all(group: Sequence[Member]) -> None:
    def ready() -> bool:
        for each in group:
            each.look_after()
        return all(each.ready for each in group)

    wait_for(ready, "workers that are ready", START)


def _drain(address: str, prefix: str, group: Sequence[Member]) -> None:
    """Wait until everything is committed; if that never happens the comparison says what is missing."""
    deadline = time.monotonic() + DRAIN
    left: int | None = None
    while left != 0 and time.monotonic() < deadline:
        for each in group:
            each.look_after()
        left = cluster.lag(address, f"{prefix}{PLAIN.audio_in}", f"{prefix}{GROUP}")
        time.sleep(0.2)  # between two looks, up to the deadline
    if left != 0:
        tell(f"{left} records of {prefix}audio.in are not served after {DRAIN:.0f} s")


def recordings(work: Path, needed: int) -> list[Path]:
    """Return real recordings as WAV, or simulated machines where there are none and that is allowed."""
    esc10 = SHARED_DATA / "esc10" / "audio"
    if esc10.is_dir():
        clips = sorted(esc10.glob("*.ogg"))
        return as_wav(clips[:: max(1, len(clips) // needed)], work / "clips")
    if os.environ.get("CI") == "true":
        raise ChaosFailed(f"CI=true and there are no real recordings at {esc10}")
    tell("there are no real recordings here: machines are simulated")
    simulate(work / "machines", seed=1, clips=180)
    return sorted((work / "machines").rglob("*.wav"))


def model(work: Path) -> Path:
    """Train a small model; how good it is does not matter here."""
    simulate(work / "training", seed=0, clips=72, seconds=2.0)
    fit(load(work / "training"), work / "bundle", name="machines", spec=FeatureSpec(), trees=20)
    return work / "bundle"


def main(argv: Sequence[str] | None = None) -> int:
    """Run it all on a broker of its own and return the exit status."""
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    for name, default in Plan()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help="(%(default)s)")
    plan = Plan(**vars(parser.parse_args(argv)))
    with tempfile.TemporaryDirectory(prefix="earshot-chaos-") as folder:
        work = Path(folder)
        try:
            bundle, clips = model(work), recordings(work, needed=plan.records // 5)
            with ApacheKafka(apache_kafka.fetch(), work) as kafka:
                outcome = chaos(kafka, bundle, clips, plan, work)
        except (ChaosFailed, MemberFailed, apache_kafka.Unavailable) as error:
            tell(f"the chaos test failed: {error}")
            return 1
    report(outcome)
    return 0 if outcome.verdict.flawless else 1


def report(outcome: Outcome) -> None:
    """Print the one line on standard output, and beside it what it does not say."""
    for mismatch in outcome.verdict.mismatches[:MISMATCHES]:
        tell(mismatch)
    tell(f"{outcome.drifts} drift events; {outcome.aborted} predictions were in transactions that were cut off")
    print(outcome, flush=True)


if __name__ == "__main__":
    sys.exit(main())
