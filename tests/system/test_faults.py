"""Faults at every step of a transaction, on both brokers: nothing is lost, and nothing doubled.

The worker's own command line serves a small stream of real sound, with a fault put into its
broker's client: an error as of a broker that has gone, or SIGKILL. Another worker then takes over,
and what was committed is compared with a run that nothing happened to.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from itertools import chain, product
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Final, NamedTuple

import pytest
from msgspec.structs import replace

from tests.system import chaos, cluster, faulty, oracle
from tests.system.faulty import Job, Mode
from tests.system.mutants import Mutation
from tests.system.oracle import PLAIN
from tests.system.processes import wait_for
from tests.system.stream import MAX_RECORD_BYTES, stream
from worker.broker import Broker
from worker.broker_kafka import KafkaBroker
from worker.broker_sqlite import SqliteBroker
from worker.messages import Message, Topics

pytestmark = pytest.mark.long

RECORDS: Final = 30
PARTITIONS: Final = 2
PATIENCE: Final = 60.0

# What is after one step is before the next. A transaction of two records of one source has three
# messages: what was heard in each of them, and a state. Four would need two sources in one poll.
TRANSACTION: Final = (
    "before begin",
    "after begin",
    *(f"after send {number}" for number in range(1, 4)),
    "after flush",
    "after generation",
    "after offsets",
    "after commit",
)
KAFKA_ONLY: Final = ("flush", "generation")  # steps that the embedded broker does not have

OTHERS: Final = {
    "after poll": ["after poll"],
    # What comes before the first transaction of a session that follows on one that failed.
    **{
        step: ["after offsets", step]
        for step in ("before join", "after join", "before restore", "during restore", "after restore")
    },
    "three in a row": ["after offsets", "during restore", "after commit"],
}

CASES: Final = {step: [step] for step in TRANSACTION} | OTHERS

processes: Final = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.system.faulty"])  # the imports of a worker, once for all of them


class Place(NamedTuple):
    """An empty broker of one of the two kinds; ``left`` counts the records that are still to be served."""

    url: str
    prefix: str
    connect: Callable[[], Broker]
    left: Callable[[], int | None]
    outputs: Callable[[], oracle.Log]


def sqlite(path: Path) -> Place:
    prefix = "here."
    connect = partial(SqliteBroker, path, Topics(prefix))

    def outputs() -> oracle.Log:
        with closing(connect()) as broker:
            return {
                name: [oracle.without(prefix, each) for each in chain(*broker.read([f"{prefix}{name}"]))]
                for name in oracle.WRITTEN
            }

    def left() -> int:
        written = outputs()
        return RECORDS - len(written[PLAIN.predictions_out]) - len(written[PLAIN.audio_dlq])

    return Place(f"sqlite:///{path}", prefix, connect, left, outputs)


def kafka(address: str) -> Place:
    prefix = f"{uuid.uuid4().hex[:12]}."
    return Place(
        f"kafka://{address}",
        prefix,
        partial(KafkaBroker, [address], Topics(prefix)),
        lambda: cluster.lag(address, f"{prefix}{PLAIN.audio_in}", f"{prefix}{chaos.GROUP}"),
        lambda: chaos.outputs(address, prefix),
    )


@pytest.fixture(scope="module")
def sounds(machines: Path) -> list[Message]:
    """A stream with poison in it; its timestamps are set, so that it is the same wherever it is written.

    They are of this hour: a broker deletes what is older than its retention within the minute.
    """
    now = int(time.time() * 1000)
    clips = sorted((machines / "audio").glob("*.wav"))
    messages = stream(clips, RECORDS, PARTITIONS, seed=1)
    return [replace(each, timestamp=now + number) for number, each in enumerate(messages)]


@pytest.fixture(scope="module")
def expected(machine_bundle: Path, sounds: list[Message], tmp_path_factory: pytest.TempPathFactory) -> oracle.Log:
    """What a worker makes of the stream that nothing happens to, in one batch."""
    folder = tmp_path_factory.mktemp("undisturbed")
    place = sqlite(folder / "earshot.db")
    publish(place, sounds)
    with started(place, machine_bundle, folder, [], batch=RECORDS) as worker:
        drain(place, worker)
    written = place.outputs()
    assert RECORDS == len(written[PLAIN.predictions_out]) + len(written[PLAIN.audio_dlq])
    assert written[PLAIN.audio_dlq]
    assert written[PLAIN.drift_state]
    return written


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path, sounds: list[Message]) -> Place:
    """One of the brokers, with the stream on it."""
    if request.param == "sqlite":
        place = sqlite(tmp_path / "earshot.db")
    else:
        place = kafka(request.getfixturevalue("kafka_address"))
    publish(place, sounds)
    return place


def publish(place: Place, sounds: Sequence[Message]) -> None:
    topics = Topics(place.prefix)
    with closing(place.connect()) as broker:
        broker.create_topics(topics.layout(PARTITIONS))
        broker.publish([replace(each, topic=topics.audio_in) for each in sounds])


@contextmanager
def started(
    place: Place,
    bundle: Path,
    folder: Path,
    steps: Sequence[str],
    *,
    mode: Mode = "retryable",
    armed: bool = False,
    mutation: Mutation | None = None,
    batch: int = 2,
) -> Iterator[ForkServerProcess]:
    """Run a worker with faults; what is left of it at the end is killed, and its log shown if the test fails."""
    log = folder / "worker.log"
    arguments = [
        *("run", "--broker", place.url, "--topic-prefix", place.prefix, "--model", str(bundle)),
        *("--instance", "one"),
        *("--max-batch-records", str(batch), "--poll-seconds", "0.1", *chaos.SENSITIVE),
        *("--max-record-bytes", str(MAX_RECORD_BYTES), "--log-format", "json", "--log-level", "debug"),
    ]
    job = Job(arguments, steps, mode, armed, mutation, place.connect, str(log))
    process = processes.Process(target=faulty.run, args=(job,))
    process.start()
    try:
        yield process
    except BaseException:
        print(log.read_text()[-4000:])
        raise
    finally:
        process.kill()
        process.join()


def drain(place: Place, worker: ForkServerProcess) -> None:
    """Wait until everything is served, and insist that the worker has met its faults and drains."""
    wait_for(lambda: not worker.is_alive() or place.left() == 0, "an empty log", PATIENCE)
    worker.terminate()
    worker.join(PATIENCE)
    assert 0 == worker.exitcode


ON_EACH_BROKER: Final = [
    (broker, case)
    for broker, case in product(("sqlite", "kafka"), CASES)
    if broker == "kafka" or not case.endswith(KAFKA_ONLY)
]


@pytest.mark.parametrize("mode", ["retryable", "kill"])
@pytest.mark.parametrize(("place", "case"), ON_EACH_BROKER, indirect=["place"])
def test_nothing_is_lost_or_doubled(
    place: Place, case: str, mode: Mode, machine_bundle: Path, expected: oracle.Log, tmp_path: Path
) -> None:
    """Wherever a worker fails or is killed, it or the next one goes on as if nothing had happened."""
    steps = CASES[case]
    if mode == "kill":
        for number in range(len(steps)):
            with started(place, machine_bundle, tmp_path, steps[number:], mode=mode, armed=number > 0) as worker:
                worker.join(PATIENCE)
                assert -signal.SIGKILL == worker.exitcode
        steps = []
    with started(place, machine_bundle, tmp_path, steps) as worker:
        drain(place, worker)
    assert [] == oracle.compare(expected, place.outputs()).mismatches


# -- that these tests can fail ---------------------------------------------------------------------


@pytest.mark.parametrize("place", ["kafka"], indirect=True)
@pytest.mark.parametrize(("mutation", "lost"), [(None, 0), ("unchecked", 1)])
def test_a_message_that_timed_out(
    place: Place, mutation: Mutation | None, lost: int, machine_bundle: Path, expected: oracle.Log, tmp_path: Path
) -> None:
    """Kafka's client would commit without it; only the check of every result keeps it from being lost."""
    with started(place, machine_bundle, tmp_path, [faulty.LOST], mutation=mutation) as worker:
        drain(place, worker)
    verdict = oracle.compare(expected, place.outputs())
    assert (lost, 0, 0) == verdict[:3]


@pytest.mark.parametrize("place", ["sqlite", "kafka"], indirect=True)
@pytest.mark.parametrize(("mutation", "fault"), [("state first", "before offsets"), ("state last", "after commit")])
def test_states_saved_outside_the_transaction(
    place: Place, mutation: Mutation, fault: str, machine_bundle: Path, expected: oracle.Log, tmp_path: Path
) -> None:
    """A detector that is a batch ahead of the offsets, or behind them, is seen."""
    with started(place, machine_bundle, tmp_path, [fault], mutation=mutation) as worker:
        drain(place, worker)
    verdict = oracle.compare(expected, place.outputs())
    assert (0, 0) == verdict[:2]
    assert verdict.differing > 0
