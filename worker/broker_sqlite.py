"""The embedded broker: the contract of `worker.broker` on one SQLite file, for many processes.

Owns the tables, the locking, and the lease that stands in for Kafka's consumer group. It must not
know what a message means.

A transaction gathers its messages and offsets in memory and writes them in one short SQLite
transaction when its block ends, so nobody waits while a batch is computed. ``synchronous=FULL``
has the write-ahead log on the disk before a commit returns: what was committed survives SIGKILL,
and a power cut as far as the disk keeps its word. The log needs shared memory, so the file has to
be on a local disk. Nothing but superseded state is ever deleted: the file grows with the audio.

One member of a group at a time has all partitions of ``audio.in``: the one whose row in
``members`` holds the lease. Whoever takes over deletes that row, every commit first makes sure
inside its own transaction that its row is still there, and ids are never used twice. So it is the
row that fences; the lease, which hangs on clocks, only decides how long others wait.
"""

from __future__ import annotations

import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import msgspec

from worker.broker import Polled
from worker.errors import EarshotError, Fatal, Retryable
from worker.messages import Headers, Message, Record, Topics, TopicSpec

# Seconds. Each says what it is long enough for, or short enough.
LEASE: Final = 30.0  # until a silent member loses its place: longer than any batch; who has its name need not wait
BUSY_TIMEOUT: Final = 10.0  # for other writers, who need milliseconds; below LEASE, so that waiting costs no place
TICK: Final = 0.02  # between two looks for new records: a look costs microseconds, and nobody hears 20 ms
IDLE: Final = 1.0  # until `follow` says that nothing came

FOLLOW_RECORDS: Final = 500  # that `follow` yields at once: 16 MB of one-second chunks at 16 kHz
TAKE_BYTES: Final = (
    16 << 20
)  # read at once, whatever the records; as with Kafka a single larger one still comes through

FORMAT: Final = 0x45615301
"""The ``application_id`` of a file with the tables below; the last byte counts their versions."""

TABLES: Final = (
    "CREATE TABLE topics (name TEXT PRIMARY KEY, partitions INTEGER NOT NULL, compacted INTEGER NOT NULL)",
    """CREATE TABLE records (
        topic TEXT NOT NULL, partition INTEGER NOT NULL, offset INTEGER NOT NULL,
        timestamp INTEGER NOT NULL, key BLOB, value BLOB, headers BLOB NOT NULL,
        PRIMARY KEY (topic, partition, offset))""",
    "CREATE INDEX records_by_key ON records (topic, partition, key)",
    """CREATE TABLE offsets (
        readers TEXT NOT NULL, partition INTEGER NOT NULL, offset INTEGER NOT NULL,
        PRIMARY KEY (readers, partition))""",
    """CREATE TABLE members (
        id INTEGER PRIMARY KEY AUTOINCREMENT, readers TEXT NOT NULL, instance TEXT NOT NULL, lease REAL,
        UNIQUE (readers, instance))""",
    f"PRAGMA application_id = {FORMAT}",
)

_REACTIONS: Final[Mapping[int, tuple[type[EarshotError], str]]] = {
    sqlite3.SQLITE_BUSY: (Retryable, "another process keeps it locked; look for one that is stopped, or for a shell"),
    sqlite3.SQLITE_CANTOPEN: (Fatal, "it cannot be opened; its directory must exist and be writable"),
    sqlite3.SQLITE_READONLY: (Fatal, "it cannot be written; give this user write access to it and to its directory"),
    sqlite3.SQLITE_FULL: (Fatal, "the disk is full; free some space and start again, nothing committed is lost"),
    sqlite3.SQLITE_NOTADB: (Fatal, "it is not an SQLite database; name another file"),
    sqlite3.SQLITE_CORRUPT: (Fatal, "it is damaged; restore a copy, or name another file"),
}

_headers: Final = msgspec.msgpack.Decoder(Headers)
_encoder: Final = msgspec.msgpack.Encoder()

_Log = tuple[str, int]
"""A topic and one of its partitions."""


class SqliteBroker:
    """A broker in the file ``path``, which is created if it does not exist.

    May be used from several threads, and the file by several processes on one machine.

    Raises:
        Fatal: the file cannot be opened or written, or is something else.
        Retryable: another process keeps it locked.
    """

    def __init__(self, path: Path, topics: Topics) -> None:
        self._database = _Database(path)
        self._topics = topics

    def create_topics(self, specs: Sequence[TopicSpec]) -> list[str]:
        """Create the topics that do not exist yet and return their names."""
        created = []
        with self._database.transaction() as execute:
            existing = dict(execute("SELECT name, partitions FROM topics"))
            for spec in specs:
                if spec.name not in existing:
                    execute("INSERT INTO topics VALUES (?, ?, ?)", spec.name, spec.partitions, spec.compacted)
                    created.append(spec.name)
                elif spec.partitions != existing[spec.name]:
                    raise Fatal(
                        f"topic {spec.name!r} in {self._database.path} has {existing[spec.name]} partitions, which "
                        f"cannot be changed to {spec.partitions}; ask for as many as it has, or name another file"
                    )
        return created

    def join(self, group: str, instance: str) -> _Session:
        """Become a member of ``group``, and fence whoever joined it as ``instance`` before."""
        return _Session(self._database, self._topics, group, instance)

    def publish(self, messages: Iterable[Message]) -> None:
        """Write messages, all or none of them; they are on the disk when this returns."""
        # Making them may take its time: gather them before anybody is locked out.
        gathered = list(messages)
        with self._database.transaction():
            _append(self._database, gathered)

    def follow(self, topics: Sequence[str], *, from_beginning: bool) -> Iterator[list[Record]]:
        """Yield the committed records of ``topics`` for ever, an empty list after each idle second.

        The end, for who does not want the beginning, is where the topics end during this call.
        """
        logs = [(topic, number) for topic in topics for number in range(_topic(self._database, topic).partitions)]
        return self._follow({log: 0 if from_beginning else _end(self._database, log) for log in logs})

    def read(self, topics: Sequence[str]) -> Iterator[list[Record]]:
        """Yield the records of ``topics`` up to where they end during this call, and stop."""
        logs = [(topic, number) for topic in topics for number in range(_topic(self._database, topic).partitions)]
        return self._read({log: end for log in logs if (end := _end(self._database, log))})

    def close(self) -> None:
        """Close the file, for the sessions and followers of this broker too."""
        self._database.close()

    def _follow(self, positions: dict[_Log, int]) -> Iterator[list[Record]]:
        while True:
            records: list[Record] = []
            for _ in _ticks(IDLE):
                if records := _take(self._database, positions, FOLLOW_RECORDS):
                    break
            yield records

    def _read(self, ends: dict[_Log, int]) -> Iterator[list[Record]]:
        positions = dict.fromkeys(ends, 0)
        while records := _take(self._database, positions, FOLLOW_RECORDS):
            yield [record for record in records if record.offset < ends[record.topic, record.partition]]
            # A log that grows faster than it is read must not keep this going.
            positions = {log: position for log, position in positions.items() if position < ends[log]}


class _Transaction:
    """What a block wants to write, in memory until the block ends."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.offsets: dict[int, int] = {}

    def send(self, messages: Iterable[Message]) -> None:
        self.messages.extend(messages)

    def commit_offsets(self, offsets: Mapping[int, int]) -> None:
        self.offsets.update(offsets)


class _Session:
    """One row of ``members``: waiting while its lease is NULL, the reader of the group afterwards."""

    def __init__(self, database: _Database, topics: Topics, group: str, instance: str) -> None:
        self._database = database
        self._topics = topics
        self._instance = instance
        self._positions: dict[_Log, int] = {}
        # Groups are per topic, so that systems with different prefixes can share a file.
        self._readers = f"{group} of {topics.audio_in}"
        statement = "INSERT OR REPLACE INTO members (readers, instance) VALUES (?, ?) RETURNING id"
        ((self._member,),) = database.execute(statement, self._readers, instance)

    def poll(self, timeout: float, max_records: int) -> Polled:
        for _ in _ticks(timeout):
            assigned = self._hold()
            records = _take(self._database, self._positions, max_records)
            if records or assigned:
                return Polled(records, assigned, revoked=frozenset())
        return Polled([], assigned=frozenset(), revoked=frozenset())

    def restore(self, partitions: Iterable[int]) -> Iterator[Record]:
        topic = _topic(self._database, self._topics.drift_state)
        statement = "SELECT * FROM records WHERE (topic, partition) = (?, ?) AND value IS NOT NULL ORDER BY offset"
        for partition in partitions:
            yield from map(_record, self._database.execute(statement, topic.name, partition))

    @contextmanager
    def transaction(self, *, wait: bool = True) -> Iterator[_Transaction]:  # noqa: ARG002  # a file has nobody to wait for
        transaction = _Transaction()
        yield transaction
        if transaction.offsets and not self._positions:
            raise self._fenced()
        with self._database.transaction() as execute:
            if self._positions:
                self._renew()
            elif not execute("SELECT id FROM members WHERE id = ?", self._member):
                raise self._fenced()
            _append(self._database, transaction.messages)
            for partition, offset in transaction.offsets.items():
                execute("INSERT OR REPLACE INTO offsets VALUES (?, ?, ?)", self._readers, partition, offset)

    def settle(self) -> None:
        """Return: what has ended is committed."""

    def close(self) -> None:
        with suppress(EarshotError):
            self._database.execute("DELETE FROM members WHERE id = ?", self._member)

    def _hold(self) -> frozenset[int]:
        """Keep the lease, or try to win it; return the partitions that were won."""
        now = time.time()
        leases = dict(self._database.execute("SELECT id, lease FROM members WHERE readers = ?", self._readers))
        if self._member not in leases:
            raise self._fenced()
        lease = leases[self._member]
        if lease is None and all(other is None or other <= now for other in leases.values()):
            return self._win(now)
        # Renewed at half time, so that an idle member does not write to the disk at every poll.
        if lease is not None and lease < now + LEASE / 2:
            self._renew()
        return frozenset()

    def _win(self, now: float) -> frozenset[int]:
        """Take the free lease, unless another was quicker, and start at the committed offsets."""
        with self._database.transaction() as execute:
            execute("DELETE FROM members WHERE readers = ? AND lease <= ?", self._readers, now)
            if execute("SELECT id FROM members WHERE readers = ? AND lease IS NOT NULL", self._readers):
                return frozenset()
            self._renew()
            topic = _topic(self._database, self._topics.audio_in)
            committed = dict(execute("SELECT partition, offset FROM offsets WHERE readers = ?", self._readers))
        self._positions = {(topic.name, number): committed.get(number, 0) for number in range(topic.partitions)}
        return frozenset(range(topic.partitions))

    def _renew(self) -> None:
        statement = "UPDATE members SET lease = ? WHERE id = ? RETURNING id"
        if not self._database.execute(statement, time.time() + LEASE, self._member):
            raise self._fenced()

    def _fenced(self) -> Retryable:
        return Retryable(
            f"{self._instance!r} does not hold group {self._readers!r} in {self._database.path}: another session took "
            f"it, under the same name or after {LEASE:.0f} s of silence; nothing was committed. If another worker runs "
            "under this name, stop it or give it another --instance"
        )


class _Database:
    """One connection, used by one thread at a time, whose errors say what to do."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        try:
            self._connection = sqlite3.connect(path, BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise self._explained(error) from error
        try:
            self._prepare()
        except EarshotError:
            self.close()
            raise

    def execute(self, statement: str, *parameters: object) -> list[Any]:
        """Return the rows of one statement, which outside a transaction is one of its own."""
        with self._lock:
            try:
                return self._connection.execute(statement, parameters).fetchall()
            except sqlite3.Error as error:
                raise self._explained(error) from error

    @contextmanager
    def transaction(self) -> Iterator[Callable[..., list[Any]]]:
        """Lend `execute` for a block of statements that are written together or not at all."""
        with self._lock:
            try:
                self.execute("BEGIN IMMEDIATE")
                yield self.execute
                self.execute("COMMIT")
            finally:
                # SQLite itself has rolled back after some errors, such as a full disk.
                if self._connection.in_transaction:
                    self.execute("ROLLBACK")

    def close(self) -> None:
        with self._lock, suppress(sqlite3.Error):
            self._connection.close()

    def _prepare(self) -> None:
        with self.transaction() as execute:
            if not execute("SELECT * FROM sqlite_master"):
                for statement in TABLES:
                    execute(statement)
            ((found,),) = execute("PRAGMA application_id")
            if found != FORMAT:
                raise Fatal(
                    f"{self.path} is the database of another program, or of another version of Earshot "
                    f"(its application_id is {found:#x}, expected {FORMAT:#x}); name another file"
                )
        self.execute("PRAGMA journal_mode = WAL")
        self.execute("PRAGMA synchronous = FULL")

    def _explained(self, error: sqlite3.Error) -> EarshotError:
        # The low byte is the kind of error, the rest its variety; Python's own errors have neither.
        kind = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        reaction, advice = _REACTIONS.get(kind, (Fatal, "this should not happen; see whether its disk is sound"))
        return reaction(f"{self.path}: {advice} (SQLite says: {error})")


def _topic(database: _Database, name: str) -> TopicSpec:
    for row in database.execute("SELECT name, partitions, compacted FROM topics WHERE name = ?", name):
        return TopicSpec(*row)
    raise Fatal(f"there is no topic {name!r} in {database.path}; create the topics with `earshot-worker topics`")


def _end(database: _Database, log: _Log) -> int:
    """Return the next offset; compaction never takes the last record, so none is used twice."""
    ((end,),) = database.execute("SELECT max(offset) + 1 FROM records WHERE (topic, partition) = (?, ?)", *log)
    return end or 0


def _append(database: _Database, messages: Iterable[Message]) -> None:
    now = time.time_ns() // 1_000_000
    for message in messages:
        topic = _topic(database, message.topic)
        log = (topic.name, _partition(message, topic))
        end = _end(database, log)
        if topic.compacted:
            database.execute("DELETE FROM records WHERE (topic, partition, key) = (?, ?, ?)", *log, message.key)
        timestamp = now if message.timestamp is None else message.timestamp
        row = (*log, end, timestamp, message.key, message.value, _encoder.encode(message.headers))
        database.execute("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?)", *row)


def _partition(message: Message, topic: TopicSpec) -> int:
    if message.partition is None:
        # CRC-32 is the same in every process and version of Python, which hash() is not.
        return zlib.crc32(message.key or b"") % topic.partitions
    if not 0 <= message.partition < topic.partitions:
        raise Fatal(
            f"topic {topic.name!r} has no partition {message.partition}, only 0 to {topic.partitions - 1}; "
            "use one of them, or leave the choice to the key"
        )
    return message.partition


def _take(database: _Database, positions: dict[_Log, int], limit: int) -> list[Record]:
    """Read at most ``limit`` records and `TAKE_BYTES`, and move the positions past them."""
    log_from = "FROM records WHERE (topic, partition) = (?, ?) AND offset >= ?"
    sizes = f"SELECT offset, ifnull(length(value), 0) {log_from} ORDER BY offset LIMIT ?"
    statement = f"SELECT * {log_from} AND offset < ? ORDER BY offset"
    records: list[Record] = []
    taken = 0
    for log, position in list(positions.items()):
        end = position
        for offset, size in database.execute(sizes, *log, position, limit - len(records)):
            if taken and taken + size > TAKE_BYTES:
                break
            taken, end = taken + size, offset + 1
        if end > position:
            records += map(_record, database.execute(statement, *log, position, end))
            # Who was served goes to the end of the queue: a busy partition cannot starve the others.
            del positions[log]
            positions[log] = end
    return records


def _record(row: tuple[Any, ...]) -> Record:
    topic, partition, offset, timestamp, key, value, headers = row
    return Record(topic, partition, offset, timestamp, key, value, _headers.decode(headers))


def _ticks(timeout: float) -> Iterator[None]:
    """Yield at once, then every `TICK`, and a last time when ``timeout`` seconds have passed."""
    deadline = time.monotonic() + timeout
    yield
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(TICK, left))
        yield
