"""What is particular to the embedded broker: the lease, the file, several processes, and its errors.

What it shares with Kafka is tested in ``tests/contract``.
"""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from worker import broker_sqlite
from worker.broker import Polled, Session
from worker.broker_sqlite import LEASE, SqliteBroker
from worker.errors import Fatal, Retryable
from worker.messages import Message, Record, Topics

TOPICS = Topics()

PATIENCE = 30.0
"""Seconds to wait for other threads and processes on a busy machine."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "earshot.db"


@pytest.fixture
def broker(path: Path) -> SqliteBroker:
    broker = SqliteBroker(path, TOPICS)
    broker.create_topics(TOPICS.layout(2))
    return broker


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests read to the end of a topic, and should not wait a second to know that it is the end."""
    monkeypatch.setattr(broker_sqlite, "IDLE", 0.0)


def sound(value: bytes, partition: int = 0) -> Message:
    return Message(TOPICS.audio_in, b"microphone", value, partition=partition)


def commit(session: Session, outputs: list[bytes], offsets: dict[int, int]) -> None:
    with session.transaction() as transaction:
        transaction.send([Message(TOPICS.predictions_out, None, output) for output in outputs])
        transaction.commit_offsets(offsets)


def committed(broker: SqliteBroker, topic: str) -> list[Record]:
    """Return all that is in ``topic`` now."""
    records: list[Record] = []
    for batch in broker.follow([topic], from_beginning=True):
        if not batch:
            break
        records += batch
    return records


def let_the_lease_run_out(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE members SET lease = ? WHERE lease IS NOT NULL", (time.time() - 1,))
        connection.commit()


def seconds_left(path: Path) -> float:
    with closing(sqlite3.connect(path)) as connection:
        ((lease,),) = connection.execute("SELECT lease FROM members WHERE lease IS NOT NULL")
    return float(lease) - time.time()


# -- the lease -----------------------------------------------------------------------------------


def test_a_second_member_waits_until_the_first_leaves(broker: SqliteBroker) -> None:
    """One member of a group has all partitions; another is ready to take over, and gets nothing before."""
    broker.publish([sound(b"a")])
    first, second = broker.join("group", "one"), broker.join("group", "two")

    assert first.poll(0.0, 10).assigned == {0, 1}
    assert second.poll(0.05, 10) == Polled([], frozenset(), frozenset())
    first.close()
    polled = second.poll(0.0, 10)

    assert polled.assigned == {0, 1}
    assert [record.value for record in polled.records] == [b"a"]


def test_a_member_that_fell_silent_loses_its_place_and_can_commit_nothing(broker: SqliteBroker, path: Path) -> None:
    """When the lease has run out and another has taken over, the row that fences is gone."""
    broker.publish([sound(b"a")])
    first, second = broker.join("group", "one"), broker.join("group", "two")
    first.poll(0.0, 10)
    let_the_lease_run_out(path)
    assert second.poll(0.0, 10).assigned == {0, 1}
    second.close()
    third = broker.join("group", "three")

    with pytest.raises(Retryable, match=r"'one' does not hold group 'group of audio\.in'"):
        commit(first, [b"too late"], {0: 1})
    with pytest.raises(Retryable, match="nothing was committed"):
        first.poll(0.0, 10)

    assert committed(broker, TOPICS.predictions_out) == []
    assert [record.offset for record in third.poll(0.0, 10).records] == [0]


def test_of_two_that_find_the_lease_free_one_wins(broker: SqliteBroker) -> None:
    """Between the look and the leap another member may have been quicker."""
    first, second = broker.join("group", "one"), broker.join("group", "two")
    looked = time.time()
    assert first.poll(0.0, 10).assigned == {0, 1}

    assert second._win(looked) == frozenset()
    with pytest.raises(Retryable, match="'two' does not hold"):
        commit(second, [], {0: 1})


def test_a_lease_that_ran_out_unnoticed_is_still_good(broker: SqliteBroker, path: Path) -> None:
    """Clocks decide only how long others wait: nobody took over, so the commit is safe."""
    session = broker.join("group", "one")
    session.poll(0.0, 10)
    let_the_lease_run_out(path)

    commit(session, [b"in time"], {})

    assert [record.value for record in committed(broker, TOPICS.predictions_out)] == [b"in time"]


def test_polls_and_commits_renew_the_lease(broker: SqliteBroker, path: Path) -> None:
    """A member that works, or waits for work, keeps its place."""
    session = broker.join("group", "one")
    session.poll(0.0, 10)

    let_the_lease_run_out(path)
    session.poll(0.0, 10)
    assert LEASE - 10 < seconds_left(path) <= LEASE

    let_the_lease_run_out(path)
    commit(session, [], {})
    assert LEASE - 10 < seconds_left(path) <= LEASE


def test_who_has_won_nothing_commits_no_offsets(broker: SqliteBroker) -> None:
    """A waiting member may not move the group, even if its row is there, nor write what would explain the move."""
    broker.join("group", "one").poll(0.0, 10)
    waiting = broker.join("group", "two")
    waiting.poll(0.0, 10)

    with pytest.raises(Retryable, match="'two' does not hold"):
        commit(waiting, [b"out of turn"], {0: 1})

    assert committed(broker, TOPICS.predictions_out) == []


def test_the_same_name_takes_over_at_once(broker: SqliteBroker) -> None:
    """A restarted replica does not wait for the lease of its dead predecessor."""
    before = broker.join("group", "one")
    before.poll(0.0, 10)

    after = broker.join("group", "one")

    assert after.poll(0.0, 10).assigned == {0, 1}
    with pytest.raises(Retryable, match="under the same name"):
        before.poll(0.0, 10)
    before.close()
    commit(after, [b"unharmed"], {})


# -- records -------------------------------------------------------------------------------------


def test_a_key_has_the_same_partition_in_every_process() -> None:
    """CRC-32 modulo the partitions: pinned, because files outlive versions."""
    topic = TOPICS.layout(8)[0]
    partitions = [broker_sqlite._partition(Message(topic.name, key, b""), topic) for key in (None, b"a", b"b", b"mic")]

    assert partitions == [0, 3, 1, 5]


def test_a_busy_partition_does_not_starve_the_others(broker: SqliteBroker) -> None:
    """Who was served goes to the end of the queue."""
    broker.publish([sound(b"busy", partition=0) for _ in range(50)])
    broker.publish([sound(b"quiet", partition=1)])
    session = broker.join("group", "one")

    partitions = [{record.partition for record in session.poll(0.0, 10).records} for _ in range(3)]

    assert partitions == [{0}, {0, 1}, {0}]


def test_compaction_keeps_one_record_of_each_key(broker: SqliteBroker, path: Path) -> None:
    """A source that is heard for years has one state in the file."""
    for number in range(20):
        states = [Message(TOPICS.drift_state, key, b"%d" % number, partition=1) for key in (b"x", b"y")]
        broker.publish(states)

    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT key, offset, value FROM records ORDER BY offset").fetchall()
    assert rows == [(b"x", 38, b"19"), (b"y", 39, b"19")]


def test_poll_returns_as_soon_as_something_arrives(broker: SqliteBroker, path: Path) -> None:
    """A chunk does not wait for the timeout, whichever connection it came by."""
    session = broker.join("group", "one")
    session.poll(0.0, 10)
    started = time.monotonic()

    with closing(SqliteBroker(path, TOPICS)) as player:
        later = threading.Timer(0.1, player.publish, [[sound(b"a")]])
        later.start()
        records = session.poll(PATIENCE, 10).records
        waited = time.monotonic() - started
        later.join()

    assert [record.value for record in records] == [b"a"]
    assert 0.05 < waited < PATIENCE / 2


def test_the_end_to_follow_from_is_where_follow_was_called(broker: SqliteBroker) -> None:
    """What is published between the call and the first look is not lost."""
    broker.publish([sound(b"past")])
    stream = broker.follow([TOPICS.audio_in], from_beginning=False)
    broker.publish([sound(b"new")])

    assert [record.value for record in next(stream)] == [b"new"]


# -- one file, many users ------------------------------------------------------------------------


def test_nobody_waits_while_a_batch_is_computed(
    broker: SqliteBroker, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is locked only for the commit, however long the block takes."""
    monkeypatch.setattr(broker_sqlite, "BUSY_TIMEOUT", 0.0)
    session = broker.join("group", "one")
    session.poll(0.0, 10)

    with closing(SqliteBroker(path, TOPICS)) as player, session.transaction() as transaction:
        transaction.send([Message(TOPICS.predictions_out, None, b"A")])
        player.publish([sound(b"a")])
        assert [record.value for record in committed(player, TOPICS.audio_in)] == [b"a"]


def test_threads_share_a_broker(broker: SqliteBroker) -> None:
    """A player, a worker and a watcher may live in one process."""

    def play() -> None:
        for _ in range(25):
            broker.publish([sound(b"x")])

    players = [threading.Thread(target=play, daemon=True) for _ in range(4)]
    for player in players:
        player.start()
    session = broker.join("group", "one")
    offsets: list[int] = []
    deadline = time.monotonic() + PATIENCE
    while len(offsets) < 100 and time.monotonic() < deadline:
        records = session.poll(0.1, 10).records
        offsets += [record.offset for record in records]
        commit(session, [b"y"] * len(records), {0: len(offsets)})

    assert offsets == list(range(100))
    assert len(committed(broker, TOPICS.predictions_out)) == 100


PUBLISHER = """
import sys
from pathlib import Path
from worker.broker_sqlite import SqliteBroker
from worker.messages import Message, Topics

topics = Topics()
broker = SqliteBroker(Path(sys.argv[1]), topics)
broker.create_topics(topics.layout(2))
for number in range(40):
    broker.publish([Message(topics.audio_in, b"key", f"{sys.argv[2]} {number}".encode(), partition=0)])
"""


def test_processes_that_start_together_share_the_file(path: Path) -> None:
    """Whoever comes first creates the tables; offsets stay dense, and each writer's records in order."""
    writers = [subprocess.Popen((sys.executable, "-c", PUBLISHER, path, name)) for name in ("a", "b", "c")]
    assert [writer.wait(PATIENCE) for writer in writers] == [0, 0, 0]

    with closing(SqliteBroker(path, TOPICS)) as broker:
        records = committed(broker, TOPICS.audio_in)
    assert [record.offset for record in records] == list(range(120))
    for name in (b"a", b"b", b"c"):
        found = [record.value for record in records if (record.value or b"").startswith(name)]
        assert found == [b"%s %d" % (name, number) for number in range(40)]


WORKER = """
import sys
from pathlib import Path
from worker.broker_sqlite import SqliteBroker
from worker.messages import Message, Topics

topics = Topics()
session = SqliteBroker(Path(sys.argv[1]), topics).join("group", "one")
while True:
    for record in session.poll(1.0, 1).records:
        with session.transaction() as transaction:
            transaction.send([Message(topics.predictions_out, None, record.value, partition=0)])
            transaction.commit_offsets({0: record.offset + 1})
        print(record.offset, flush=True)
"""


def test_a_commit_is_on_the_disk_and_blocks_no_reader(broker: SqliteBroker) -> None:
    """A power cut cannot be tested here: these two settings are what SQLite's promise hangs on."""
    assert broker._database.execute("PRAGMA synchronous") == [(2,)]  # FULL
    assert broker._database.execute("PRAGMA journal_mode") == [("wal",)]


def test_what_was_committed_survives_sigkill(broker: SqliteBroker) -> None:
    """A worker killed at any instant, again and again, leaves each output once and nothing acknowledged is lost."""
    path = broker._database.path
    broker.publish([sound(b"%d" % number) for number in range(500)])
    acknowledged = 0
    for count in (1, 20, 57):
        worker = subprocess.Popen((sys.executable, "-c", WORKER, path), stdout=subprocess.PIPE, text=True)
        assert worker.stdout is not None
        for _ in range(count):
            acknowledged = int(worker.stdout.readline()) + 1
        worker.kill()
        worker.communicate()

        outputs = [record.value for record in committed(broker, TOPICS.predictions_out)]
        with closing(broker.join("group", "one")) as session:
            following = session.poll(0.0, 1).records[0].offset
        assert acknowledged <= following
        assert outputs == [b"%d" % number for number in range(following)]


# -- errors --------------------------------------------------------------------------------------


def test_a_file_that_stays_locked_is_worth_another_try(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody holds the lock for longer than any commit takes: say where to look."""
    monkeypatch.setattr(broker_sqlite, "BUSY_TIMEOUT", 0.05)
    with closing(SqliteBroker(path, TOPICS)) as broker, closing(sqlite3.connect(path)) as shell:
        broker.create_topics(TOPICS.layout(1))
        shell.execute("BEGIN IMMEDIATE")
        with pytest.raises(Retryable, match=r"earshot\.db: another process keeps it locked"):
            broker.publish([sound(b"a")])
        shell.rollback()
        broker.publish([sound(b"a")])
        assert len(committed(broker, TOPICS.audio_in)) == 1


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    """The path in the message is the one to correct."""
    with pytest.raises(Fatal, match=r"nowhere/earshot\.db: it cannot be opened; its directory must exist"):
        SqliteBroker(tmp_path / "nowhere" / "earshot.db", TOPICS)


def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    """It may be somebody's only copy of something: it stays as it was."""
    path.write_bytes(b"RIFF" * 1000)

    with pytest.raises(Fatal, match="not an SQLite database; name another file"):
        SqliteBroker(path, TOPICS)

    assert path.read_bytes() == b"RIFF" * 1000


def test_the_database_of_another_program_is_refused(path: Path) -> None:
    """Nothing is changed in it, not even how it keeps its journal."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE books (title TEXT)")
    before = path.read_bytes()

    with pytest.raises(Fatal, match="the database of another program"):
        SqliteBroker(path, TOPICS)

    assert path.read_bytes() == before


def test_a_full_disk_stops_the_worker_and_spoils_nothing(broker: SqliteBroker) -> None:
    """The transaction that did not fit is gone as a whole, and with more room it can be repeated."""
    ((pages,),) = broker._database.execute("PRAGMA page_count")
    broker._database.execute(f"PRAGMA max_page_count = {pages + 5}")
    with pytest.raises(Fatal, match="the disk is full; free some space"):
        broker.publish([sound(b"small"), sound(bytes(100_000))])

    broker._database.execute("PRAGMA max_page_count = 1000000")
    broker.publish([sound(b"small"), sound(bytes(100_000))])
    assert [record.offset for record in committed(broker, TOPICS.audio_in)] == [0, 1]


def test_a_file_that_cannot_be_written_is_named(broker: SqliteBroker) -> None:
    """A worker without write access cannot commit, so it does not start to read."""
    broker._database.execute("PRAGMA query_only = ON")

    with pytest.raises(Fatal, match=r"earshot\.db: it cannot be written; give this user write access"):
        broker.join("group", "one")


def test_an_unknown_topic_says_how_to_create_it(path: Path) -> None:
    """The first start of a new user ends with the command to run."""
    with closing(SqliteBroker(path, TOPICS)) as broker:
        advice = "there is no topic 'audio.in' in .*; create the topics with `earshot-worker topics`"
        with pytest.raises(Fatal, match=advice):
            broker.publish([sound(b"a")])
        with pytest.raises(Fatal, match=advice):
            broker.follow([TOPICS.audio_in], from_beginning=True)
        with pytest.raises(Fatal, match=advice):
            broker.join("group", "one").poll(0.0, 1)


@pytest.mark.parametrize("partition", [-1, 2])
def test_a_partition_that_does_not_exist_is_refused(broker: SqliteBroker, partition: int) -> None:
    """A record there would never be read."""
    with pytest.raises(Fatal, match=f"'audio.in' has no partition {partition}, only 0 to 1"):
        broker.publish([sound(b"a", partition=partition)])


def test_a_closed_broker_says_so(broker: SqliteBroker) -> None:
    """Closing is for good, for its sessions too, which can still be closed."""
    session = broker.join("group", "one")
    broker.close()

    with pytest.raises(Fatal, match="closed database"):
        session.poll(0.0, 1)
    session.close()
    broker.close()


class TestMemory:
    def test_of_one_poll_is_bounded(self, broker: SqliteBroker, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever the lag, one poll reads so many bytes, or one record that is larger; none is left out."""
        monkeypatch.setattr(broker_sqlite, "TAKE_BYTES", 10)
        sent = [(0, 4), (0, 4), (0, 4), (0, 25), (1, 9), (1, 1), (0, 1)]
        broker.publish(sound(bytes(size), partition) for partition, size in sent)
        polls = []
        with closing(broker.join("group", "instance")) as session:
            while (polled := session.poll(0.0, 100)).records:
                polls.append([(record.partition, len(record.value or b"")) for record in polled.records])

        assert sorted(sent) == sorted(each for poll in polls for each in poll)
        assert all(sum(size for _, size in poll) <= 10 or len(poll) == 1 for poll in polls)
        assert [(0, 4), (0, 4)] == polls[0]
