"""The loop: what is committed, what a failure costs, and when it gives up or stops.

A pipeline that counts stands in for the real one: the state of a source is how many records it
has sent, and each record's output is the count so far. A record processed twice, left out, or
processed with a state that was never committed shows as a wrong number.
"""

from __future__ import annotations

import gc
import random
import weakref
from collections import Counter as Rejections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import msgspec
import pytest
import structlog
from structlog.testing import capture_logs

from worker.broker import Polled, Session, Transaction
from worker.broker_sqlite import SqliteBroker
from worker.errors import Fatal, Retryable
from worker.health import Health, Pulse
from worker.messages import Message, Record, Topics
from worker.pipeline import Batch, Restored
from worker.service import FIRST_PAUSE, LONGEST_PAUSE, PROGRESS, SETTLED, GaveUp, Service

TOPICS = Topics()

POINTS = ("poll", "restore", "enter", "send", "offsets", "commit", "committed")
"""Where a session can fail; ``committed`` is after the fact, when nobody can know any more."""

Counts = dict[int, dict[str, int]]


class Counter:
    """Counts the records of each source; remembers every set of states that it was given."""

    def __init__(self, on_records: Callable[[Sequence[Record]], None] = lambda _: None, **also: Any) -> None:
        self._on_records = on_records
        self.also = also
        self.states: list[Counts] = []

    def run(self, states: Counts, records: Sequence[Record]) -> Batch:
        self._on_records(records)
        self.states.append(states)
        outputs = []
        for record in records:
            counts = states.setdefault(record.partition, {})
            source = (record.key or b"").decode()
            counts[source] = counts.get(source, 0) + 1
            outputs.append(Message(TOPICS.predictions_out, record.key, b"%d" % counts[source]))
        touched = dict.fromkeys((record.partition, record.key) for record in records)
        for partition, key in touched:
            count = states[partition][(key or b"").decode()]
            outputs.append(Message(TOPICS.drift_state, key, b"%d" % count, partition=partition))
        offsets = {record.partition: record.offset + 1 for record in records}
        made: dict[str, Any] = {"outputs": outputs, "offsets": offsets, "predictions": len(records)}
        return Batch(**({"rejections": Rejections()} | made | self.also))

    def restore(self, states: Counts, records: Iterable[Record]) -> Restored:
        sources = foreign = unreadable = 0
        for record in records:
            if record.value == b"foreign":
                foreign += 1
            elif record.value == b"unreadable":
                unreadable += 1
            else:
                sources += 1
                states.setdefault(record.partition, {})[(record.key or b"").decode()] = int(record.value or b"")
        return Restored(sources, foreign, unreadable)


class Time(Event):
    """A stop signal and a clock in one: who waits for it moves the clock, and nobody sleeps."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.pauses: list[float] = []

    def clock(self) -> float:
        return self.now

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.pauses.append(timeout)
        self.now += timeout
        return self.is_set()


class Scripted:
    """A session that does what it was told, and stops the service when it has nothing left to do."""

    def __init__(
        self,
        *polls: Polled | Exception | Callable[[], Polled],
        fails_at: str = "",
        error: Exception | None = None,
        saved: Iterable[Record] = (),
    ) -> None:
        self._polls = list(polls)
        self._fails_at = fails_at
        self._error = error or Retryable(f"failed at {fails_at}")
        self._saved = iter(saved)
        self.stop: Event | None = None
        self.poll_arguments: list[tuple[float, int]] = []
        self.restored: list[frozenset[int]] = []
        self.committed: list[tuple[list[int], dict[int, int]]] = []
        self._under_way: ScriptedTransaction | None = None
        self.closed = 0

    def poll(self, timeout: float, max_records: int) -> Polled:
        self.poll_arguments.append((timeout, max_records))
        if not self._polls:
            if self._under_way is None:
                self._fail("poll")
                assert self.stop is not None
                self.stop.set()
            return nothing()
        step = self._polls.pop(0)
        if isinstance(step, Exception):
            raise step
        return step if isinstance(step, Polled) else step()

    def restore(self, partitions: Iterable[int]) -> Iterator[Record]:
        self.restored.append(frozenset(partitions))
        self._fail("restore")
        yield from self._saved

    @contextmanager
    def transaction(self, *, wait: bool = True) -> Iterator[Transaction]:
        self.settle()
        self._fail("enter")
        transaction = ScriptedTransaction(self._fail)
        yield transaction
        self._under_way = transaction
        if wait:
            self.settle()

    def settle(self) -> None:
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            self._fail("commit")
            self.committed.append((under_way.counts, under_way.offsets))
            self._fail("committed")

    def close(self) -> None:
        self.closed += 1

    def _fail(self, point: str) -> None:
        if point == self._fails_at:
            raise self._error


class ScriptedTransaction:
    def __init__(self, fail: Callable[[str], None]) -> None:
        self._fail = fail
        self.counts: list[int] = []
        self.offsets: dict[int, int] = {}

    def send(self, messages: Iterable[Message]) -> None:
        self.counts += [int(m.value or b"") for m in messages if m.topic == TOPICS.predictions_out]
        self._fail("send")

    def commit_offsets(self, offsets: Mapping[int, int]) -> None:
        self.offsets.update(offsets)
        self._fail("offsets")


class ScriptedBroker:
    """Hands out its sessions one after the other, and stops the service after the last."""

    def __init__(self, *script: Scripted | Exception) -> None:
        self._script = list(script)
        self.stop = Time()
        self.joined: list[tuple[str, str]] = []

    def join(self, group: str, instance: str) -> Session:
        if not self._script:
            self.stop.set()
            return Scripted()
        self.joined.append((group, instance))
        step = self._script.pop(0)
        if isinstance(step, Exception):
            raise step
        step.stop = self.stop
        return step


def serve(broker: Any, pipeline: Counter, **settings: Any) -> list[Any]:
    """Run the service to its end and return what it has logged."""
    defaults: dict[str, Any] = {
        "max_batch_records": 100,
        "max_batch_bytes": 1 << 20,
        "poll_seconds": 1.0,
        "give_up_seconds": 300.0,
        "pulse": Pulse(),
    }
    with capture_logs() as logs:
        Service(
            broker,
            pipeline,  # type: ignore[arg-type]  # it counts instead
            group="group",
            instance="instance",
            stop=broker.stop,
            log=structlog.get_logger(),
            clock=broker.stop.clock,
            **(defaults | settings),
        ).run()
    return logs


def sound(offset: int, source: str = "mic", partition: int = 0) -> Record:
    return Record(TOPICS.audio_in, partition, offset, 0, source.encode(), b"sound")


def state(value: bytes, source: str = "mic", partition: int = 0) -> Record:
    return Record(TOPICS.drift_state, partition, 0, 0, source.encode(), value)


def polled(*records: Record, assigned: Iterable[int] = (), revoked: Iterable[int] = (), more: bool = False) -> Polled:
    return Polled(list(records), frozenset(assigned), frozenset(revoked), more=more)


def nothing() -> Polled:
    return polled()


def lost() -> Retryable:
    return Retryable("the broker is gone")


class TestLoop:
    def test_commits_what_it_has_read(self) -> None:
        """Each poll with records is one transaction with their outputs and the next offsets; a poll without is none."""
        session = Scripted(
            polled(assigned=[0, 1]),
            polled(sound(7), sound(8), sound(3, "other", 1)),
            nothing(),
            polled(sound(9)),
        )

        serve(ScriptedBroker(session), Counter(), max_batch_records=5, poll_seconds=0.25)

        assert [([1, 2, 1], {0: 9, 1: 4}), ([3], {0: 10})] == session.committed
        assert {(0.25, 5)} == set(session.poll_arguments)
        assert session.closed == 1

    def test_joins_under_its_name(self) -> None:
        """Each session joins the group under the same instance, so that it fences the one before."""
        broker = ScriptedBroker(Scripted(lost()), Scripted())

        serve(broker, Counter())

        assert [("group", "instance")] * 2 == broker.joined

    def test_logs(self) -> None:
        """What was assigned, committed and lost is said, with numbers, and that it has stopped."""
        broker = ScriptedBroker(
            Scripted(
                polled(sound(0), assigned=[1, 0]), nothing(), lost(), saved=[state(b"4"), state(b"foreign", "other")]
            )
        )

        logs = serve(broker, Counter())

        restoring, foreign, assigned, committed, session_lost, stopped = logs
        assert ("restoring", [0, 1]) == (restoring["event"], restoring["partitions"])
        assert ("state.of_another_model", "warning", 1) == (
            foreign["event"],
            foreign["log_level"],
            foreign["sources"],
        )
        assert ("assigned", [0, 1], [], 1) == tuple(assigned[name] for name in ("event", "new", "gone", "sources"))
        assert ("committed", 1, 1, 0, 0) == tuple(
            committed[name] for name in ("event", "records", "predictions", "rejections", "drifts")
        )
        assert ("session.lost", "the broker is gone", FIRST_PAUSE) == tuple(
            session_lost[name] for name in ("event", "why", "next_try_seconds")
        )
        assert "stopped" == stopped["event"]

    def test_says_what_is_not_everyday(self) -> None:
        """Drift, rejections by reason, a bug with its traceback, forgotten sources: once a batch, if there were any."""
        rejections = Rejections({"undecodable": 2, "internal-error": 1})
        pipeline = Counter(rejections=rejections, drifts=2, silent=3, crowded_out=4, failure="Traceback: a bug")

        logs = serve(ScriptedBroker(Scripted(polled(sound(0)))), pipeline)

        found = {(entry["event"], entry["log_level"]): entry for entry in logs}
        assert 3 == found["committed", "debug"]["rejections"]
        assert 2 == found["drift", "info"]["events"]
        assert {"internal-error": 1, "undecodable": 2} == found["rejected", "warning"]["reasons"]
        assert 3 == found["sources.forgotten", "info"]["sources"]
        assert 4 == found["sources.forgotten", "warning"]["sources"]
        bug = found["internal_error", "error"]
        assert 1 == bug["records"]
        assert "Traceback: a bug" == bug["first"]

    def test_says_nothing_of_what_is(self) -> None:
        """A batch in which nothing happened is not worth a line above debug."""
        logs = serve(ScriptedBroker(Scripted(polled(sound(0)), polled(sound(1)))), Counter())

        assert ["committed", "committed"] == [entry["event"] for entry in logs if entry["log_level"] == "debug"]
        assert ["stopped"] == [entry["event"] for entry in logs if entry["log_level"] != "debug"]


class TestMemory:
    def test_of_a_transaction_is_bounded(self) -> None:
        """A poll that brings more bytes becomes several transactions, in order, before the next poll."""
        # A record is a value of 5 bytes and a key of 3.
        records = [sound(offset) for offset in range(5)]
        session = Scripted(polled(*records, assigned=[0]), polled(sound(5)))

        serve(ScriptedBroker(session), Counter(), max_batch_bytes=16)

        assert [([1, 2], {0: 2}), ([3, 4], {0: 4}), ([5], {0: 5}), ([6], {0: 6})] == session.committed

    def test_a_larger_record_goes_alone(self) -> None:
        """A record that is larger than a transaction may be is one by itself, with its headers counted."""
        large = msgspec.structs.replace(sound(1), headers=(("name", b"x" * 100),))
        session = Scripted(polled(sound(0), large, sound(2), sound(3), assigned=[0]))

        serve(ScriptedBroker(session), Counter(), max_batch_bytes=20)

        assert [([1], {0: 1}), ([2], {0: 2}), ([3, 4], {0: 4})] == session.committed


class TestCommitting:
    """On a backlog a batch is committed while the next one is read and heard."""

    def test_while_the_next_batch_is_heard(self) -> None:
        """It is waited for when the next one has been heard, and before that one is sent."""
        session = Scripted(polled(sound(0), assigned=[0], more=True), polled(sound(1), more=True), polled(sound(2)))
        heard: list[int] = []

        serve(ScriptedBroker(session), Counter(lambda _: heard.append(len(session.committed))))

        assert [0, 0, 1] == heard
        assert [([1], {0: 1}), ([2], {0: 2}), ([3], {0: 3})] == session.committed

    def test_parts_of_a_poll(self) -> None:
        """So are those of a poll that brought more than one transaction may have."""
        session = Scripted(polled(sound(0), sound(1), assigned=[0]))
        heard: list[int] = []

        serve(ScriptedBroker(session), Counter(lambda _: heard.append(len(session.committed))), max_batch_bytes=8)

        assert [0, 0] == heard
        assert [([1], {0: 1}), ([2], {0: 2})] == session.committed

    @pytest.mark.parametrize("last", [polled(sound(1)), nothing(), polled(more=True)])
    def test_at_the_end_of_it_nothing_is_left_over(self, last: Polled) -> None:
        """Where nothing waits to be read, a poll begins when all is committed: what comes then waits for nobody.

        What waits may be of an open transaction, for as long as somebody else keeps that open.
        """
        committed: list[int] = []

        def look() -> Polled:
            committed.append(len(session.committed))
            return nothing()

        session = Scripted(polled(sound(0), assigned=[0], more=True), last, look)

        serve(ScriptedBroker(session), Counter())

        assert [1 + len(last.records)] == committed

    def test_what_was_heard_meanwhile_is_lost_with_it(self) -> None:
        """If it fails, the batch that was heard with its states is not sent, and both are heard again."""
        pipeline = Counter()
        failing = Scripted(polled(sound(0), assigned=[0], more=True), polled(sound(1)), fails_at="commit")
        next_one = Scripted(polled(sound(0), sound(1), assigned=[0]))

        serve(ScriptedBroker(failing, next_one), pipeline)

        assert [] == failing.committed
        assert 3 == len(pipeline.states)
        assert [([1, 2], {0: 2})] == next_one.committed


class TestAssignment:
    def test_restores_before_it_processes(self) -> None:
        """States of newly assigned partitions are there when the first records are counted."""
        session = Scripted(polled(sound(7), assigned=[0]), saved=[state(b"7"), state(b"2", "other")])

        serve(ScriptedBroker(session), Counter())

        assert [frozenset({0})] == session.restored
        assert [([8], {0: 8})] == session.committed

    def test_revoked(self) -> None:
        """States of revoked partitions are dropped, of whatever source; the others stay."""
        pipeline = Counter()
        session = Scripted(
            polled(sound(0), sound(0, partition=1), sound(1, "other", 1), assigned=[0, 1]),
            polled(sound(1), revoked=[1]),
        )

        serve(ScriptedBroker(session), pipeline)

        assert [{0: {"mic": 2}}] == pipeline.states[1:]
        assert ([2], {0: 2}) == session.committed[1]

    @pytest.mark.parametrize(("saved", "count"), [([state(b"5")], 6), ([], 1)])
    def test_lost_and_won_back(self, saved: list[Record], count: int) -> None:
        """A partition both revoked and assigned is dropped and then restored: another member has served it."""
        session = Scripted(polled(sound(0)), polled(sound(5), assigned=[0], revoked=[0]), saved=saved)

        serve(ScriptedBroker(session), Counter())

        assert [([1], {0: 1}), ([count], {0: 6})] == session.committed

    def test_state_of_another_model(self) -> None:
        """A state that cannot be used leaves its source without one; that is said once, with a count."""
        session = Scripted(
            polled(sound(7), sound(8, "b"), assigned=[0]),
            saved=[state(b"foreign"), state(b"foreign", "a"), state(b"1", "b")],
        )

        logs = serve(ScriptedBroker(session), Counter())

        assert [([1, 2], {0: 9})] == session.committed
        assert [2] == [entry["sources"] for entry in logs if entry["event"] == "state.of_another_model"]

    def test_a_long_restore_shows_its_progress(self) -> None:
        """While states are restored, it says every few seconds how many there are."""
        broker = ScriptedBroker()

        def slowly() -> Iterator[Record]:
            for number in range(12):
                broker.stop.now += PROGRESS / 4
                yield state(b"1", f"mic-{number}")

        broker._script.append(Scripted(polled(sound(0, "mic-0"), assigned=[0]), saved=slowly()))

        logs = serve(broker, Counter())

        said = [entry.get("sources") for entry in logs if entry["event"] == "restoring"]
        assert [None, 3, 7, 11] == said
        assert [12] == [entry["sources"] for entry in logs if entry["event"] == "assigned"]

    def test_states_that_start_anew_are_counted(self) -> None:
        """With --reset-state, what could not be read is said once, with a count."""
        session = Scripted(polled(sound(0), assigned=[0]), saved=[state(b"unreadable"), state(b"unreadable", "a")])

        logs = serve(ScriptedBroker(session), Counter())

        assert [("warning", 2)] == [(e["log_level"], e["sources"]) for e in logs if e["event"] == "state.reset"]


class TestRecovery:
    @pytest.mark.parametrize("point", POINTS)
    def test_a_new_session_with_fresh_states(self, point: str) -> None:
        """Wherever a session fails, the next one starts from what was committed, not from what was computed."""
        pipeline = Counter()
        failing = Scripted(polled(sound(1), assigned=[0]), fails_at=point, saved=[state(b"1")])
        next_one = Scripted(polled(sound(1), assigned=[0]), saved=[state(b"1")])

        serve(ScriptedBroker(failing, next_one), pipeline)

        assert [([2], {0: 2})] == next_one.committed
        assert (1, 1) == (failing.closed, next_one.closed)
        assert len(pipeline.states) == len({id(states) for states in pipeline.states})

    def test_nothing_restored_is_left(self) -> None:
        """What the last session had restored is gone too: a source without a saved state starts at zero."""
        failing = Scripted(polled(sound(5), assigned=[0]), fails_at="commit", saved=[state(b"5")])
        next_one = Scripted(polled(sound(5), assigned=[0]))

        serve(ScriptedBroker(failing, next_one), Counter())

        assert [([1], {0: 6})] == next_one.committed

    def test_join_fails(self) -> None:
        """A broker that cannot be joined is tried again."""
        session = Scripted(polled(sound(0), assigned=[0]))

        serve(ScriptedBroker(lost(), lost(), session), Counter())

        assert [([1], {0: 1})] == session.committed

    @pytest.mark.parametrize("error", [Fatal("a topic is missing"), ValueError("a bug")])
    @pytest.mark.parametrize("point", ["join", "pipeline", *POINTS])
    def test_what_is_not_retryable(self, point: str, error: Exception) -> None:
        """Anything else ends the service at once; the session is closed and nothing is tried again."""

        def fail(_: object) -> None:
            raise error

        session = Scripted(polled(sound(0), assigned=[0]), fails_at=point, error=error)
        broker = ScriptedBroker(error if point == "join" else session, Scripted())

        with pytest.raises(type(error)) as caught:
            serve(broker, Counter(fail) if point == "pipeline" else Counter())

        assert error is caught.value
        assert 1 == len(broker.joined)
        assert (0 if point == "join" else 1) == session.closed
        assert [] == broker.stop.pauses


class TestWaste:
    def test_of_a_session_that_was_lost_nothing_is_left(self) -> None:
        """Its states go with it, also if its error is in a circle with the frames that it has passed."""

        class Source(dict[str, int]):
            pass

        class Forgetful(Counter):
            def run(self, states: Counts, records: Sequence[Record]) -> Batch:
                states[0] = source = Source()
                alive.append(weakref.ref(source))
                return Batch([], {0: records[-1].offset + 1}, len(records), Rejections())

        def fails() -> Polled:
            error = lost()
            raise error

        alive: list[weakref.ref[Source]] = []
        gc.disable()
        try:
            serve(ScriptedBroker(Scripted(polled(sound(0), assigned=[0]), fails), Scripted()), Forgetful())
            assert [None] == [each() for each in alive]
        finally:
            gc.enable()


class TestWaiting:
    def test_says_what_it_waits_for(self) -> None:
        """Partitions whose offsets are not told yet: it is not ready, says so once, and is ready when they are."""
        pulse = Pulse()
        seen: list[Health] = []

        def look(*unplaced: int, assigned: Iterable[int] = ()) -> Callable[[], Polled]:
            def poll() -> Polled:
                seen.append(pulse.serving())
                return polled(assigned=assigned)._replace(unplaced=frozenset(unplaced))

            return poll

        session = Scripted(look(0, 3, assigned=[0, 3]), look(0, 3), look(3), look(), look())
        logs = serve(ScriptedBroker(session), Counter(), pulse=pulse)

        assert [False, False, False, False, True] == [ready for ready, _ in seen]
        assert all("[0, 3]" in why for _, why in seen[1:3])
        assert "[3]" in seen[3][1]
        said = [(each["event"], each["partitions"]) for each in logs if "offsets" in each["event"]]
        assert [("waiting_for_offsets", [0, 3]), ("offsets_known", [0]), ("offsets_known", [3])] == said

    def test_what_is_given_up_is_not_waited_for(self) -> None:
        """A partition that goes to another member while its offset is not known."""
        waits = polled(assigned=[0, 3])._replace(unplaced=frozenset([0, 3]))
        goes = polled(revoked=[3])._replace(unplaced=frozenset([0]))
        pulse = Pulse()
        ready: list[bool] = []

        def last() -> Polled:
            ready.append(pulse.serving()[0])
            return nothing()

        logs = serve(ScriptedBroker(Scripted(waits, goes, polled(revoked=[0]), last)), Counter(), pulse=pulse)

        said = [(each["event"], each["partitions"]) for each in logs if "offsets" in each["event"]]
        assert [("waiting_for_offsets", [0, 3])] == said
        assert [True] == ready

    def test_is_no_progress(self) -> None:
        """However long it waits, that does not end the outage."""
        broker = ScriptedBroker(lost(), lost())
        waits = [after(broker.stop, SETTLED / 2, polled()._replace(unplaced=frozenset([0]))) for _ in range(4)]
        broker._script += [Scripted(*waits, lost())]

        serve(broker, Counter())

        assert [0.5, 1.0, 2.0] == broker.stop.pauses


class TestBackoff:
    def test_doubles(self) -> None:
        """The pauses between sessions double up to a limit that keeps the end of an outage short."""
        broker = ScriptedBroker(*(lost() for _ in range(8)))

        serve(broker, Counter())

        assert [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0] == broker.stop.pauses
        assert (0.5, 15.0) == (FIRST_PAUSE, LONGEST_PAUSE)

    def test_starts_over_after_a_commit(self) -> None:
        """A session that has committed ends the outage, although it fails later."""
        broker = ScriptedBroker(lost(), lost(), lost())
        broker._script += [Scripted(after(broker.stop, 0.1, polled(sound(0))), lost()), lost(), lost()]

        serve(broker, Counter())

        assert [0.5, 1.0, 2.0, 0.5, 1.0, 2.0] == broker.stop.pauses

    def test_starts_over_after_a_quiet_time(self) -> None:
        """A session that had nothing to do for long enough ends the outage, too."""
        broker = ScriptedBroker(lost(), lost(), lost())
        quiet = [after(broker.stop, SETTLED / 4) for _ in range(4)]
        broker._script += [Scripted(*quiet, lost()), lost(), Scripted(*quiet[:3], lost())]

        serve(broker, Counter())

        assert [0.5, 1.0, 2.0, 0.5, 1.0, 2.0] == broker.stop.pauses

    @pytest.mark.parametrize("point", ["restore", "enter", "send", "offsets", "commit"])
    def test_reading_alone_is_no_progress(self, point: str) -> None:
        """Sessions that can read and fail to commit, again and again, back off like those that cannot read."""
        broker = ScriptedBroker()
        for _ in range(4):
            polls = after(broker.stop, 0.1), after(broker.stop, 0.1, polled(sound(0), assigned=[0]))
            broker._script.append(Scripted(*polls, fails_at=point))

        serve(broker, Counter())

        assert [0.5, 1.0, 2.0, 4.0] == broker.stop.pauses

    def test_stop_ends_the_pause(self) -> None:
        """Told to stop during an outage, it does not try again."""
        broker = ScriptedBroker(lost(), Scripted())

        def wait(_: float | None = None) -> bool:
            broker.stop.set()
            return True

        broker.stop.wait = wait  # type: ignore[assignment, method-assign]  # somebody stops it meanwhile

        serve(broker, Counter())

        assert 1 == len(broker.joined)


class TestGivingUp:
    def test_after_the_stated_time(self) -> None:
        """When the outage has lasted longer than was stated it gives up, and says how long and why."""
        broker = ScriptedBroker(*(lost() for _ in range(100)))
        began = broker.stop.now

        with pytest.raises(GaveUp, match=r"gave up after 60 s .*: the broker is gone") as caught:
            serve(broker, Counter(), give_up_seconds=60.0)

        assert isinstance(caught.value, Retryable)
        assert isinstance(caught.value.__cause__, Retryable)
        assert 60.0 < broker.stop.now - began <= 60.0 + LONGEST_PAUSE

    def test_although_it_can_read(self) -> None:
        """A broker that lets it read and never commit is as good as gone."""
        broker = ScriptedBroker()
        for _ in range(100):
            polls = after(broker.stop, 1.0), after(broker.stop, 1.0, polled(sound(0), assigned=[0]))
            broker._script.append(Scripted(*polls, fails_at="commit"))

        with pytest.raises(GaveUp, match="failed at commit"):
            serve(broker, Counter(), give_up_seconds=60.0)

    def test_the_time_counts_from_the_last_progress(self) -> None:
        """Two outages with a commit, or a long quiet, between them are not added up."""
        broker = ScriptedBroker(*(lost() for _ in range(6)))
        stop = broker.stop
        broker._script += [Scripted(after(stop, 1.0, polled(sound(0))), lost()), *(lost() for _ in range(5))]
        broker._script += [Scripted(after(stop, 1000.0), lost()), *(lost() for _ in range(5))]

        serve(broker, Counter(), give_up_seconds=35.0)

        assert sum(stop.pauses) > 3 * 30.0

    def test_not_while_it_works(self) -> None:
        """A session that works for longer than the stated time may fail: what counts is the failing."""
        broker = ScriptedBroker()
        broker._script.append(Scripted(after(broker.stop, 1000.0, polled(sound(0))), lost()))

        serve(broker, Counter(), give_up_seconds=60.0)

        assert [0.5] == broker.stop.pauses


class TestStopping:
    def test_before_it_began(self) -> None:
        """Told to stop before it has joined, it does not join."""
        broker = ScriptedBroker(Scripted())
        broker.stop.set()

        logs = serve(broker, Counter())

        assert [] == broker.joined
        assert ["stopped"] == [entry["event"] for entry in logs]

    @pytest.mark.parametrize("when", ["poll", "pipeline"])
    def test_the_batch_in_hand_is_committed(self, when: str) -> None:
        """Told to stop while it polls or computes, it commits the batch, leaves the group, and reads no more."""
        broker = ScriptedBroker()

        def stopping() -> Polled:
            broker.stop.set()
            return polled(sound(0), assigned=[0])

        session = Scripted(
            stopping if when == "poll" else polled(sound(0), assigned=[0]),
            AssertionError("polled after the stop"),
        )
        broker._script.append(session)

        logs = serve(broker, Counter(lambda _: broker.stop.set()))

        assert [([1], {0: 1})] == session.committed
        assert 1 == session.closed
        assert "stopped" == logs[-1]["event"]

    def test_although_the_batch_fails(self) -> None:
        """If the last batch cannot be committed it stops all the same: the next start begins with it."""
        broker = ScriptedBroker()
        session = Scripted(polled(sound(0), assigned=[0]), fails_at="commit")
        broker._script += [session, Scripted()]

        logs = serve(broker, Counter(lambda _: broker.stop.set()))

        assert [] == session.committed
        assert (1, 1) == (session.closed, len(broker.joined))
        assert ["session.lost", "stopped"] == [entry["event"] for entry in logs[-2:]]


class TestExactlyOnce:
    """With the embedded broker, on a real file."""

    @pytest.mark.parametrize("batch", [1, 7, 1000])
    def test_undisturbed(self, tmp_path: Path, batch: int) -> None:
        """Each record has one output, with the right count, however the log is cut into batches and runs."""
        with closing(SqliteBroker(tmp_path / "earshot.db", TOPICS)) as broker:
            for _ in range(2):
                publish(broker, 40)
                flaky = Flaky(broker, seed=0, probability=0.0)
                serve(flaky, Counter(), max_batch_records=batch)

            assert expected(80) == predictions(broker)

    @pytest.mark.parametrize("seed", range(5))
    def test_whatever_fails(self, tmp_path: Path, seed: int) -> None:
        """Each record has one output, with the right count, although sessions fail at random everywhere."""
        with closing(SqliteBroker(tmp_path / "earshot.db", TOPICS)) as broker:
            publish(broker, 200)
            flaky = Flaky(broker, seed, probability=0.1)

            serve(flaky, Counter(), max_batch_records=5)

            assert expected(200) == predictions(broker)
            assert {"join", *POINTS} == set(flaky.failed)


SOURCES = ("mic-1", "mic-2", "mic-3", "mic-4", "mic-5")


class Flaky:
    """The embedded broker, which fails anywhere now and then, and stops the service when all is committed."""

    def __init__(self, broker: SqliteBroker, seed: int, probability: float) -> None:
        self._broker = broker
        self._random = random.Random(seed)
        self._probability = probability
        self.stop = Time()
        self.failed: list[str] = []

    def join(self, group: str, instance: str) -> Session:
        self.fail("join")
        return FlakySession(self._broker.join(group, instance), self)

    def fail(self, point: str) -> None:
        if self._random.random() < self._probability:
            self.failed.append(point)
            raise Retryable(f"failed at {point}")


class FlakySession:
    def __init__(self, session: Session, flaky: Flaky) -> None:
        self._session = session
        self._flaky = flaky
        self._under_way: FlakyTransaction | None = None

    def poll(self, _timeout: float, max_records: int) -> Polled:
        self._flaky.fail("poll")
        result = self._session.poll(0.0, max_records)
        if result == nothing() and self._under_way is None:  # what was read before is committed
            self._flaky.stop.set()
        return result._replace(more=bool(result.records))

    def restore(self, partitions: Iterable[int]) -> Iterator[Record]:
        for record in self._session.restore(partitions):
            self._flaky.fail("restore")
            yield record

    @contextmanager
    def transaction(self, *, wait: bool = True) -> Iterator[Transaction]:
        self.settle()
        self._flaky.fail("enter")
        transaction = FlakyTransaction(self._flaky)
        yield transaction
        self._under_way = transaction
        if wait:
            self.settle()

    def settle(self) -> None:
        """Commit as late as is allowed, so that as much as possible has been built on it."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            with self._session.transaction() as transaction:
                transaction.send(under_way.messages)
                transaction.commit_offsets(under_way.offsets)
                self._flaky.fail("commit")
            self._flaky.fail("committed")

    def close(self) -> None:
        self._session.close()


class FlakyTransaction:
    def __init__(self, flaky: Flaky) -> None:
        self.messages: list[Message] = []
        self.offsets: dict[int, int] = {}
        self._flaky = flaky

    def send(self, messages: Iterable[Message]) -> None:
        self.messages += messages
        self._flaky.fail("send")

    def commit_offsets(self, offsets: Mapping[int, int]) -> None:
        self.offsets |= offsets
        self._flaky.fail("offsets")


def publish(broker: SqliteBroker, records: int) -> None:
    broker.create_topics(TOPICS.layout(3))
    keys = (SOURCES[index % len(SOURCES)].encode() for index in range(records))
    broker.publish(Message(TOPICS.audio_in, key, b"sound") for key in keys)


def predictions(broker: SqliteBroker) -> dict[str, list[int]]:
    """The counts that were published for each source, in order."""
    found: dict[str, list[int]] = {source: [] for source in SOURCES}
    stream = broker.follow([TOPICS.predictions_out], from_beginning=True)
    while batch := next(stream):
        for record in batch:
            found[(record.key or b"").decode()].append(int(record.value or b""))
    return found


def expected(records: int) -> dict[str, list[int]]:
    return {source: list(range(1, records // len(SOURCES) + 1)) for source in SOURCES}


def after(stop: Time, seconds: float, result: Polled | None = None) -> Callable[[], Polled]:
    """A poll that takes its time on the scripted clock."""

    def poll() -> Polled:
        stop.now += seconds
        return result or nothing()

    return poll
