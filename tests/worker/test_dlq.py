"""Dead letters: what is shown of them, and that each goes back once, whatever happens on the way."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker import dlq
from worker.__main__ import main
from worker.broker import Session, Transaction
from worker.broker_sqlite import SqliteBroker
from worker.dlq import Note, Rejection, Selection, Tally
from worker.errors import BadRecord, Fatal, Reason, Retryable
from worker.messages import Headers, Message, Record, Topics, rejection_message

TOPICS = Topics()
PARTITIONS = 3
START = 1_795_334_400_000  # 2026-11-22 08:00:00 UTC
EVERYTHING = Selection()
WAV: Headers = (("content-type", b"audio/wav"), ("ce_time", b"2026-11-22T08:00:00Z"))


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[SqliteBroker]:
    """An embedded broker with the topics."""
    with closing(SqliteBroker(tmp_path / "earshot.db", TOPICS)) as broker:
        broker.create_topics(TOPICS.layout(PARTITIONS))
        yield broker


def heard(offset: int, source: str = "mic-1", partition: int = 0, topic: str = TOPICS.audio_in) -> Record:
    time = START + 1000 * offset
    return Record(topic, partition, offset, time, source.encode(), b"sound %d" % offset, WAV)


def reject(broker: SqliteBroker, *records: Record, reason: Reason = "undecodable", detail: str = "no RIFF") -> None:
    broker.publish(rejection_message(TOPICS, record, BadRecord(reason, detail)) for record in records)


def replay(
    broker: SqliteBroker | Failing, selection: Selection = EVERYTHING, *, again: bool = False, dry_run: bool = False
) -> Tally:
    tally = Tally()
    dlq.replay(broker, TOPICS, selection, tally, again=again, dry_run=dry_run, stop=threading.Event())
    return tally


def records(broker: SqliteBroker, topic: str) -> list[Record]:
    return [record for batch in broker.read([topic]) for record in batch]


def letters(broker: SqliteBroker, selection: Selection = EVERYTHING) -> list[dlq.DeadLetter]:
    return [letter for batch in dlq.letters(broker, TOPICS, selection) for letter in batch]


class TestReplay:
    def test_a_copy_is_as_the_record_was(self, broker: SqliteBroker) -> None:
        """Key, value, headers, partition and timestamp are those of the record; only a marker is added."""
        record = heard(5, partition=2)
        reject(broker, record)

        assert Counter(undecodable=1) == replay(broker).sent

        (copy,) = records(broker, TOPICS.audio_in)
        assert (*WAV, ("earshot_replayed", b"audio.in/2/5")) == copy.headers
        assert (record.key, record.value, record.partition, record.timestamp) == (
            copy.key,
            copy.value,
            copy.partition,
            copy.timestamp,
        )

    def test_a_record_without_a_value(self, broker: SqliteBroker) -> None:
        """What was rejected for want of a key or a value goes back without them."""
        reject(broker, Record(TOPICS.audio_in, 1, 0, START, None, None), reason="empty")

        replay(broker)

        (copy,) = records(broker, TOPICS.audio_in)
        assert (None, None) == (copy.key, copy.value)

    def test_once(self, broker: SqliteBroker) -> None:
        """A second replay sends nothing, and says how many went before; --again sends them once more."""
        reject(broker, *map(heard, range(3)))

        assert 3 == replay(broker).sent.total()
        assert Tally(sent_before=3) == replay(broker)
        assert 3 == len(records(broker, TOPICS.audio_in))

        assert 3 == replay(broker, again=True).sent.total()
        assert 6 == len(records(broker, TOPICS.audio_in))

    @pytest.mark.parametrize("batch", [1, 500])
    def test_rejected_by_two_groups(self, broker: SqliteBroker, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """A record that two groups of workers have rejected is one record, in the same batch or in another."""
        monkeypatch.setattr("worker.broker_sqlite.FOLLOW_RECORDS", batch)
        reject(broker, heard(0), heard(0))
        assert Tally(Counter(undecodable=1), sent_before=1) == replay(broker, again=True)

        reject(broker, heard(0))
        assert Tally(sent_before=3) == replay(broker)

    def test_a_copy_that_is_rejected_again(self, broker: SqliteBroker) -> None:
        """It is a dead letter of its own: it shows of what it is a copy, and can be sent back in turn."""
        reject(broker, heard(9))
        replay(broker)
        reject(broker, *records(broker, TOPICS.audio_in))

        first, second = letters(broker)
        assert (True, None) == (first.sent_back, first.copy_of)
        assert (False, "audio.in/0/9") == (second.sent_back, second.copy_of)
        assert 1 == replay(broker).sent.total()
        # Still one marker, of the last copy: they do not pile up.
        markers = [record.headers[len(WAV) :] for record in records(broker, TOPICS.audio_in)]
        assert [(("earshot_replayed", b"audio.in/0/9"),), (("earshot_replayed", b"audio.in/0/0"),)] == markers

    def test_filters(self, broker: SqliteBroker) -> None:
        """Only what was selected goes back, by reason and by source; the rest can follow later."""
        reject(broker, heard(0, "a"), heard(1, "b"))
        reject(broker, heard(2, "a"), heard(3, "b"), reason="too-large")

        replay(broker, Selection(reason="too-large", source="b"))
        assert [3] == [copy.timestamp // 1000 % 10 for copy in records(broker, TOPICS.audio_in)]
        replay(broker, Selection(source="b"))
        assert {b"sound 1", b"sound 3"} == {copy.value for copy in records(broker, TOPICS.audio_in)}
        assert 2 == replay(broker).sent.total()

    def test_a_dry_run_changes_nothing(self, broker: SqliteBroker) -> None:
        """It counts, writes nothing, and leaves a replay that is under way alone."""
        reject(broker, *map(heard, range(3)))
        with closing(broker.join(TOPICS.audio_dlq, dlq.INSTANCE)) as other:
            assert 3 == replay(broker, dry_run=True).sent.total()
            with other.transaction() as transaction:
                transaction.send([])

        assert [] == records(broker, TOPICS.audio_in)
        assert 3 == len(records(broker, TOPICS.audio_dlq))

    def test_what_is_not_ours_stays(self, broker: SqliteBroker) -> None:
        """Rejections of another system, and records that somebody else wrote, are not sent to audio.in."""
        reject(broker, heard(0, topic="other.audio.in"), heard(1))
        broker.publish(Message(TOPICS.audio_dlq, b"k", b"v", headers) for headers in FOREIGN)

        tally = replay(broker)

        assert (1, 1) == (tally.sent.total(), tally.foreign)
        assert [b"sound 1"] == [copy.value for copy in records(broker, TOPICS.audio_in)]

    def test_a_partition_that_is_gone(self, broker: SqliteBroker) -> None:
        """If audio.in was created anew with fewer partitions it says so, and sends none of that batch."""
        reject(broker, heard(0), heard(1, partition=PARTITIONS))

        with pytest.raises(Fatal, match="no partition 3"):
            replay(broker)

        assert [] == records(broker, TOPICS.audio_in)

    def test_stop(self, broker: SqliteBroker) -> None:
        """Told to stop, it sends nothing more."""
        reject(broker, heard(0))
        stop = threading.Event()
        stop.set()
        tally = Tally()

        dlq.replay(broker, TOPICS, Selection(), tally, again=False, dry_run=False, stop=stop)

        assert Tally() == tally
        assert [] == records(broker, TOPICS.audio_in)

    def test_a_second_replay_fences_the_first(self, broker: SqliteBroker) -> None:
        """If another replay starts while one is under way, the first fails, and nothing is sent twice."""
        reject(broker, *map(heard, range(3)))
        seconds: list[Tally] = []
        failing = Failing(broker, {"send": lambda: seconds.append(replay(broker))})

        with pytest.raises(Retryable, match="'replay' does not hold"):
            replay(failing)

        assert [3] == [tally.sent.total() for tally in seconds]
        assert 3 == len(records(broker, TOPICS.audio_in))

    @pytest.mark.parametrize("point", ["join", "read", "enter", "send", "commit", "committed"])
    def test_once_wherever_it_fails(self, broker: SqliteBroker, point: str) -> None:
        """Wherever a replay fails, and even when nobody knows whether it has committed, the next one sends the rest."""
        reject(broker, *map(heard, range(3)))

        def fail() -> None:
            raise Retryable(f"failed at {point}")

        with pytest.raises(Retryable):
            replay(Failing(broker, {point: fail}))
        replay(broker)

        assert [b"sound 0", b"sound 1", b"sound 2"] == [copy.value for copy in records(broker, TOPICS.audio_in)]

    @pytest.mark.parametrize("seed", range(3))
    def test_once_whatever_fails(self, broker: SqliteBroker, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Failing at random, batch after batch, until one replay gets through: each record once, in order."""
        monkeypatch.setattr("worker.broker_sqlite.FOLLOW_RECORDS", 4)
        reject(broker, *map(heard, range(60)))
        dice = random.Random(seed)
        failures = 0

        def fail() -> None:
            if dice.random() < 0.08:
                raise Retryable("failed")

        failing = Failing(broker, dict.fromkeys(("join", "read", "enter", "send", "commit", "committed"), fail))
        while True:
            try:
                replay(failing)
                break
            except Retryable:
                failures += 1

        assert failures > 3
        assert [b"sound %d" % number for number in range(60)] == [c.value for c in records(broker, TOPICS.audio_in)]


class TestDecode:
    def test_rejections_and_notes(self, broker: SqliteBroker) -> None:
        """Both kinds come back as what they were written for."""
        reject(broker, heard(7, partition=1), detail="no RIFF")
        replay(broker)

        assert [
            Rejection("undecodable", "no RIFF", "audio.in", 1, 7, START + 7000),
            Note("audio.in", 1, 7),
        ] == list(map(dlq.decode, records(broker, TOPICS.audio_dlq)))

    def test_headers_of_the_record_cannot_speak_for_the_worker(self) -> None:
        """A producer that sends headers of ours makes neither a note nor another reason."""
        forged: Headers = (("earshot_replayed", b"audio.in/0/1"), ("earshot_reason", b"empty"))
        record = Record(TOPICS.audio_in, 0, 0, START, b"k", b"v", forged)
        message = rejection_message(TOPICS, record, BadRecord("undecodable", "no RIFF"))

        event = dlq.decode(Record(message.topic, 0, 0, START, message.key, message.value, message.headers))

        assert Rejection("undecodable", "no RIFF", "audio.in", 0, 0, START) == event

    @given(
        st.lists(
            st.tuples(
                st.sampled_from([f"earshot_{n}" for n in ("replayed", "reason", "partition", "offset")]) | st.text(),
                st.binary(),
            )
        )
    )
    def test_anything_else(self, headers: list[tuple[str, bytes]]) -> None:
        """Whatever the headers are, it is a ValueError, unless it is a note: a rejection has more headers."""
        with suppress(ValueError):
            assert isinstance(dlq.decode(Record(TOPICS.audio_dlq, 0, 0, START, b"k", b"v", tuple(headers))), Note)


class TestShown:
    def test_table(self, broker: SqliteBroker) -> None:
        """A line for each reason, the most frequent first: counts, first and last time, sources, one example."""
        reject(broker, heard(0, "mic-0"), reason="too-large", detail="9 MB")
        reject(broker, *(heard(n, f"mic-{n}") for n in range(5, 0, -1)))
        replay(broker, Selection(source="mic-3"))
        reject(broker, *records(broker, TOPICS.audio_in))

        header, first, second = dlq.table(letters(broker))

        assert header.startswith("reason       records  sent back  rejected again  first ")
        assert ["undecodable", "6", "1", "1"] == first.split()[:4]
        assert "2026-11-22 08:00:01  2026-11-22 08:00:05  mic-1, mic-2, mic-3, 2 more; audio.in/0/" in first
        assert ["too-large", "1", "0", "0"] == second.split()[:4]
        assert second.endswith("mic-0; audio.in/0/0: 9 MB")

    def test_an_empty_topic(self, broker: SqliteBroker) -> None:
        """That there is nothing is said."""
        assert ["there are no dead letters"] == list(dlq.table(letters(broker)))

    def test_line(self, broker: SqliteBroker) -> None:
        """One record on one line: when, where, whose, why, and what has become of it."""
        reject(broker, heard(9))
        replay(broker)
        reject(broker, *records(broker, TOPICS.audio_in))

        first, second = map(dlq.line, letters(broker))

        source = "           mic-1             undecodable         "
        assert [
            f"2026-11-22 08:00:09  audio.in/0/9 {source}  sent back  no RIFF",
            f"2026-11-22 08:00:09  audio.in/0/0 {source}  waiting    no RIFF (a copy of audio.in/0/9)",
        ] == [first, second]

    def test_json(self, broker: SqliteBroker) -> None:
        """One object a line, in ASCII, with all that is known."""
        reject(broker, heard(3, "mic-ü"), detail="line\nbreak")

        (letter,) = letters(broker)
        text = dlq.json_line(letter)

        assert text.isascii()
        assert {
            "reason": "undecodable",
            "detail": "line\nbreak",
            "source": "mic-ü",
            "topic": "audio.in",
            "partition": 0,
            "offset": 3,
            "timestamp": START + 3000,
            "sent_back": False,
            "copy_of": None,
            "dlq": {"topic": "audio.dlq", "partition": letter.record.partition, "offset": 0},
        } == json.loads(text)

    @given(st.text(), st.binary(), st.integers(-(2**63), 2**63 - 1))
    def test_hostile_text(self, text: str, raw: bytes, time: int) -> None:
        """Nothing from the wire breaks a line or reaches the terminal as more than text, and any time is shown."""
        texts = text.encode(errors="replace")
        headers: Headers = (("earshot_reason", texts), ("earshot_detail", raw), ("earshot_topic", texts))
        numbers: Headers = tuple((f"earshot_{name}", b"1") for name in ("partition", "offset"))
        marks: Headers = (("earshot_timestamp", b"%d" % time), ("earshot_replayed", raw))
        record = Record(TOPICS.audio_dlq, 0, 0, time, raw, None, (*headers, *numbers, *marks))
        letter = dlq.DeadLetter(record, *shown(record), sent_back=False, copy_of=raw.decode(errors="replace"))

        for line in (*dlq.table([letter]), dlq.line(letter), *dlq.report(Tally(), TOPICS, dry_run=True)):
            assert line.isprintable()


class TestCommands:
    @pytest.fixture
    def url(self, broker: SqliteBroker, tmp_path: Path) -> str:
        """Two rejections of two sources for two reasons, and where they are."""
        reject(broker, heard(0, "a"))
        reject(broker, heard(1, "b"), reason="too-large")
        return f"sqlite:///{tmp_path / 'earshot.db'}"

    def test_list(self, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        """A table without a filter, single records with one or as JSON."""
        assert 0 == main(["dlq", "list", "--broker", url])
        assert 3 == capsys.readouterr().out.count("\n")
        assert 0 == main(["dlq", "list", "--broker", url, "--reason", "too-large"])
        assert "audio.in/0/1" in capsys.readouterr().out
        assert 0 == main(["dlq", "list", "--broker", url, "--json", "--source", "a"])
        assert [0] == [json.loads(line)["offset"] for line in capsys.readouterr().out.splitlines()]

    def test_replay(self, url: str, broker: SqliteBroker, capsys: pytest.CaptureFixture[str]) -> None:
        """It prints what it did, or would do."""
        assert 0 == main(["dlq", "replay", "--broker", url, "--dry-run", "--source", "a"])
        assert "      1  undecodable\n1 dead letters would go back to audio.in\n" == capsys.readouterr().out
        assert 0 == main(["dlq", "replay", "--broker", url, "--source", "a"])
        assert "      1  undecodable\n1 dead letters sent back to audio.in\n" == capsys.readouterr().out
        assert 0 == main(["dlq", "replay", "--broker", url])
        printed = capsys.readouterr().out
        assert printed.startswith(
            "      1  too-large\n1 dead letters sent back to audio.in; 1 went back before (--again "
        )
        assert 2 == len(records(broker, TOPICS.audio_in))

    def test_a_failure_hides_nothing(self, url: str, broker: SqliteBroker, capsys: pytest.CaptureFixture[str]) -> None:
        """What was sent before something went wrong is printed all the same."""
        reject(broker, heard(0, partition=PARTITIONS))

        assert 1 == main(["dlq", "replay", "--broker", url])

        out, err = capsys.readouterr()
        assert "0 dead letters sent back" in out
        assert "no partition 3" in err

    def test_without_topics(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Which topic is missing, and how to create it."""
        assert 1 == main(["dlq", "list", "--broker", f"sqlite:///{tmp_path / 'new.db'}"])
        assert "there is no topic 'audio.dlq'" in capsys.readouterr().err


FOREIGN: tuple[Headers, ...] = (
    (),
    (("earshot_reason", b"undecodable"),),
    (("earshot_replayed", b"nonsense"),),
    (("earshot_replayed", b"audio.in/one/two"),),
)


def shown(record: Record) -> tuple[Rejection, str]:
    why = dlq.decode(record)
    assert isinstance(why, Rejection)
    return why, (record.key or b"").decode(errors="replace")


class Failing:
    """The embedded broker, with something that happens at some points of a replay."""

    def __init__(self, broker: SqliteBroker, at: Mapping[str, object]) -> None:
        self._broker = broker
        self._at = at
        self.create_topics = broker.create_topics
        self.publish = broker.publish
        self.follow = broker.follow

    def happen(self, point: str) -> None:
        action = self._at.get(point)
        if callable(action):
            action()

    def join(self, group: str, instance: str) -> Session:
        self.happen("join")
        return FailingSession(self._broker.join(group, instance), self)

    def read(self, topics: Sequence[str]) -> Iterator[list[Record]]:
        for batch in self._broker.read(topics):
            self.happen("read")
            yield batch

    def close(self) -> None:
        raise NotImplementedError


class FailingSession:
    def __init__(self, session: Session, failing: Failing) -> None:
        self._session = session
        self._failing = failing
        self.poll = session.poll
        self.restore = session.restore
        self.settle = session.settle
        self.close = session.close

    @contextmanager
    def transaction(self, *, wait: bool = True) -> Iterator[Transaction]:
        self._failing.happen("enter")
        with self._session.transaction(wait=wait) as transaction:
            yield FailingTransaction(transaction, self._failing)
            self._failing.happen("commit")
        self._failing.happen("committed")


class FailingTransaction:
    def __init__(self, transaction: Transaction, failing: Failing) -> None:
        self._transaction = transaction
        self._failing = failing
        self.commit_offsets = transaction.commit_offsets

    def send(self, messages: Iterable[Message]) -> None:
        self._transaction.send(messages)
        self._failing.happen("send")
