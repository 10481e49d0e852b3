"""Several processes under one command: toy members for what can go wrong, and real ones on a real Kafka."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.system.processes import Worker, wait_for, worker
from worker.__main__ import main
from worker.broker_kafka import KafkaBroker
from worker.config import Config
from worker.messages import Classification, Message, Position, Topics
from worker.security import security

LONG = 100_000
"""Bytes of a line that no pipe takes in one piece."""

TOY = """
import json, os, sys, time
from functools import partial
from worker import supervisor, telemetry
from worker.__main__ import _status, _stop_on_signals
from worker.errors import Fatal

supervisor.FIRST_PAUSE = 0.05
supervisor.DRAIN = 0.5

def say(action, **fields):
    print(json.dumps({"action": action, "pid": os.getpid(), **fields}), file=sys.stderr, flush=True)

def serve(kind, name):
    say("serving", of=name, threads=os.environ["OMP_NUM_THREADS"], seconds=time.monotonic())
    if kind == "status":
        return 3
    if kind == "fatal":
        raise Fatal("change something")
    if kind == "bug":
        raise ZeroDivisionError("a bug")
    if kind == "dies":
        os.kill(os.getpid(), 9)
    for _ in range(20 if kind == "talks" else 0):
        say("long", of=name, text=name * int(sys.argv[1]))
    while kind == "deaf":
        time.sleep(60)
    stop.wait()
    say("finished", of=name)
    return 0

stop = _stop_on_signals()
log = telemetry.configure("json", "info")
members = {
    f"toy-{number}": partial(_status, partial(serve, kind, str(number))) for number, kind in enumerate(sys.argv[2:])
}
sys.exit(_status(lambda: supervisor.supervise(members, stop, log)))
"""


NO_ROOM = """
import os
fork, failures = os.fork, iter([True, False, True])

def sometimes():
    if next(failures, False):
        raise BlockingIOError(11, "no room")
    return fork()

os.fork = sometimes
"""


@contextmanager
def toys(log: Path, *kinds: str, before: str = "") -> Iterator[Worker]:
    """Run one member of each kind under a supervisor, and leave none behind; ``before`` is run first."""
    with (
        log.open("wb") as errors,
        subprocess.Popen([sys.executable, "-c", before + TOY, str(LONG), *kinds], stderr=errors) as process,
    ):
        toy = Worker(process, log)
        try:
            yield toy
        finally:
            process.kill()
            process.wait()
            wait_for(lambda: not any(map(alive, pids(toy))), "the end of all members")


def pids(of: Worker) -> list[int]:
    return [entry["pid"] for entry in of.events("member.started")]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def serving(toy: Worker, count: int) -> list[dict[str, Any]]:
    """Wait until so many members have started, ever."""
    found: list[dict[str, Any]] = wait_for(lambda: (s := toy.events("serving"))[count - 1 :] and s, f"{count} members")
    return found


class TestToys:
    def test_drained(self, tmp_path: Path) -> None:
        """SIGTERM reaches every member once, and all that they say is in one log; a thread each is all they have."""
        with toys(tmp_path / "log", "good", "good", "good") as toy:
            started = serving(toy, 3)
            assert 0 == toy.stop()
        assert ["0", "1", "2"] == sorted(entry["of"] for entry in started)
        assert {"1"} == {entry["threads"] for entry in started}
        assert ["0", "1", "2"] == sorted(entry["of"] for entry in toy.events("finished"))
        assert {"toy-0", "toy-1", "toy-2"} == {entry["member"] for entry in toy.events("member.ended")}
        assert [0] == [entry["status"] for entry in toy.events("drained")]

    def test_told_by_everybody(self, tmp_path: Path) -> None:
        """An init system that signals each process as well does not take the members' time to drain."""
        with toys(tmp_path / "log", "good", "good") as toy:
            serving(toy, 2)
            for pid in pids(toy):
                os.kill(pid, signal.SIGTERM)
            assert 0 == toy.stop()
        assert 2 <= len(toy.events("finished"))

    def test_killed(self, tmp_path: Path) -> None:
        """A member that was killed is started again, and the others are not disturbed."""
        with toys(tmp_path / "log", "good", "good") as toy:
            first = serving(toy, 2)
            os.kill(first[0]["pid"], signal.SIGKILL)
            again = serving(toy, 3)[2]
            assert again["of"] == first[0]["of"]
            assert 0 == toy.stop()
        assert "Killed" == toy.events("member.ended")[0]["signal"]
        assert [1] == [entry["failures"] for entry in toy.events("member.starts_again")]
        assert ["0", "1"] == sorted(entry["of"] for entry in toy.events("finished"))

    def test_killed_again_and_again(self, tmp_path: Path) -> None:
        """After five quick failures, with growing pauses, all members drain, and one line says why."""
        with toys(tmp_path / "log", "dies", "good") as toy:
            assert 1 == toy.process.wait(timeout=30)
        assert [0.05, 0.1, 0.2, 0.4] == [entry["pause_seconds"] for entry in toy.events("member.starts_again")]
        last = (tmp_path / "log").read_text().splitlines()[-1]
        assert last.startswith(
            "earshot-worker: toy-0 has ended 5 times in a row within 60 s of its start, the last time"
        )
        assert "with signal Killed" in last
        assert ["1"] == [entry["of"] for entry in toy.events("finished")]
        times = [entry["seconds"] for entry in toy.events("serving") if entry["of"] == "0"]
        assert all(later - earlier >= 0.04 for earlier, later in pairwise(times))

    def test_killed_after_a_long_life(self, tmp_path: Path) -> None:
        """That is no quick failure, and none is counted."""
        with toys(tmp_path / "log", "good", before="from worker import supervisor\nsupervisor.SETTLED = 0.0\n") as toy:
            os.kill(serving(toy, 1)[0]["pid"], signal.SIGKILL)
            serving(toy, 2)
            assert 0 == toy.stop()
        again = toy.events("member.starts_again")
        assert [(0, 0.05)] == [(entry["failures"], entry["pause_seconds"]) for entry in again]

    def test_no_room_for_a_process(self, tmp_path: Path) -> None:
        """It is tried again after a pause, while the others serve."""
        with toys(tmp_path / "log", "good", "good", "good", before=NO_ROOM) as toy:
            serving(toy, 3)
            assert 0 == toy.stop()
        again = toy.events("member.starts_again")
        assert [("toy-0", 1), ("toy-2", 1)] == [(entry["member"], entry["failures"]) for entry in again]
        assert {"[Errno 11] no room"} == {entry["error"] for entry in again}
        assert ["0", "1", "2"] == sorted(entry["of"] for entry in toy.events("finished"))

    def test_nobody_reads_the_log(self) -> None:
        """The supervisor stays until its members have ended, and kills those that do not drain in time."""
        command = [sys.executable, "-c", TOY, str(LONG), "good", "deaf"]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            assert process.stderr is not None
            members: dict[str, int] = {}
            while len(members) < 2:
                entry = json.loads(process.stderr.readline())
                if entry["action"] == "serving":
                    members[entry["of"]] = entry["pid"]
            process.stderr.close()
            os.kill(members["0"], signal.SIGKILL)
            process.wait(timeout=30)
            assert not alive(members["1"])

    @pytest.mark.parametrize(
        ("kind", "status", "said"),
        [
            ("status", 3, ""),
            ("fatal", 1, "earshot-worker: change something\n"),
            ("bug", 1, "ZeroDivisionError: a bug\n"),
        ],
    )
    def test_a_status_of_its_own(self, kind: str, status: int, said: str, tmp_path: Path) -> None:
        """A member that says why it ends is not started again: the others drain, and its status is the command's."""
        with toys(tmp_path / "log", "good", kind, "good") as toy:
            assert status == toy.process.wait(timeout=30)
        assert [] == toy.events("member.starts_again")
        assert 3 == len(toy.events("member.ended"))
        assert said in (tmp_path / "log").read_text()

    def test_lines_stay_whole(self, tmp_path: Path) -> None:
        """However long their lines are, and however fast they come, no member talks into another's."""
        with toys(tmp_path / "log", "talks", "talks", "talks") as toy:
            # They are left to finish: a signal may cut a line where Python itself writes it in pieces.
            wait_for(lambda: len(toy.events("long")) == 60, "all lines")
            assert 0 == toy.stop()
        lines = (tmp_path / "log").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        assert all(entry["text"] == entry["of"] * LONG for entry in entries if entry["action"] == "long")

    def test_one_that_does_not_drain(self, tmp_path: Path) -> None:
        """It is killed after a while, and the status says that not all is well."""
        with toys(tmp_path / "log", "deaf", "good") as toy:
            serving(toy, 2)
            assert 130 == toy.stop()
        assert ["1"] == [entry["of"] for entry in toy.events("finished")]

    def test_a_second_signal(self, tmp_path: Path) -> None:
        """It ends everything at once: the supervisor, and its members with it."""
        with toys(tmp_path / "log", "deaf", "deaf") as toy:
            serving(toy, 2)

            def ended() -> bool:
                toy.process.send_signal(signal.SIGINT)
                return toy.process.poll() is not None

            wait_for(ended, "the end", 10)
            assert 130 == toy.process.returncode
            wait_for(lambda: not any(map(alive, pids(toy))), "the end of the members", 10)

    def test_a_supervisor_that_is_killed(self, tmp_path: Path) -> None:
        """Its members notice, and leave the group rather than stay on unwatched."""
        with toys(tmp_path / "log", "good", "good") as toy:
            members = [entry["pid"] for entry in serving(toy, 2)]
            toy.process.kill()
            toy.process.wait()
            wait_for(lambda: not any(map(alive, members)), "the end of the members", 10)


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ((), "--processes is 2, but the embedded broker serves one member of a group at a time"),
            (("--broker", "kafka://localhost:1", "--health-port", "65535"), "no port for each of 2 processes"),
        ],
    )
    def test_what_cannot_be(self, settings: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
        """Processes that could only wait for each other are refused, before anything starts."""
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            assert 1 == main(["run", "--model", "bundle", "--processes", "2", *settings])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        assert said in capsys.readouterr().err

    def test_a_model_that_is_none(self, tmp_path: Path) -> None:
        """Each member finds that out, and the command ends with the status of the first that does."""
        with worker(
            tmp_path / "log", "--model", tmp_path, "--processes", "2", "--broker", "kafka://localhost:1"
        ) as group:
            assert 3 == group.process.wait(timeout=60)
        assert "is no model bundle" in (tmp_path / "log").read_text()


class TestKafka:
    def test_two_members_one_of_which_is_killed(
        self, kafka_address: str, machine_bundle: Path, machines: Path, tmp_path: Path
    ) -> None:
        """Each has a share; the one that is killed comes back under its name; each chunk has one prediction."""
        topics = Topics(f"{uuid.uuid4()}.")
        cluster = ("--broker", f"kafka://{kafka_address}", "--topic-prefix", topics.audio_in.removesuffix("audio.in"))
        options = ("--processes", "2", "--instance", "hall", "--health-port", "0", "--log-level", "debug")
        sounds = [clip.read_bytes() for clip in sorted((machines / "audio").iterdir())[:8]]
        with ExitStack() as stack:
            broker = stack.enter_context(closing(KafkaBroker([kafka_address], topics, security(Config()))))
            broker.create_topics(topics.layout(4))
            group = stack.enter_context(worker(tmp_path / "log", "--model", machine_bundle, *options, *cluster))

            def publish() -> None:
                broker.publish(
                    Message(topics.audio_in, b"mic", sound, partition=partition)
                    for partition in range(4)
                    for sound in sounds
                )

            def members(action: str) -> set[str]:
                return {entry["member"] for entry in group.events(action)}

            def answered() -> list[Position]:
                records = [record for batch in broker.read([topics.predictions_out]) for record in batch]
                return [msgspec.json.decode(record.value or b"", type=Classification).record for record in records]

            wait_for(lambda: len(members("assigned")) == 2, "a share for both members", 120)
            publish()
            wait_for(lambda: len(members("committed")) == 2, "work of both", 120)
            victim = group.events("member.started")[0]
            os.kill(victim["pid"], signal.SIGKILL)
            publish()
            wait_for(lambda: len(group.events("member.started")) == 3, "its return")
            wait_for(lambda: len(answered()) >= 2 * 4 * len(sounds), "an answer to all", 120)
            assert 0 == group.stop()
            places = Counter((position.partition, position.offset) for position in answered())
        assert dict.fromkeys([(part, offset) for part in range(4) for offset in range(2 * len(sounds))], 1) == places
        assert victim["member"] == group.events("member.started")[2]["member"]
        assert {"hall-0", "hall-1"} == members("stopped") == members("health")
        assert [0] == [entry["status"] for entry in group.events("drained")]

    def test_topics_that_are_not_there(self, kafka_address: str, machine_bundle: Path, tmp_path: Path) -> None:
        """What one member cannot go on with ends the command, with the status that a single worker has."""
        cluster = ("--broker", f"kafka://{kafka_address}", "--topic-prefix", f"{uuid.uuid4()}.")
        with worker(tmp_path / "log", "--model", machine_bundle, "--processes", "2", *cluster) as group:
            assert 1 == group.process.wait(timeout=90)
        assert [] == group.events("member.starts_again")
        assert "earshot-worker topics" in (tmp_path / "log").read_text()
