"""What Earshot needs from a message broker, and nothing else.

Two implementations stand behind these protocols, `worker.broker_kafka` and
`worker.broker_sqlite`, and one contract suite holds both to what is written here.

Delivery, in one sentence: what a `Transaction` sends and the offsets it commits become visible
together when its ``with`` block ends, or never. Every reader in this file sees committed records
only. Any `Retryable` that leaves a session means that the session is finished: close it, drop
every state derived from it, and join again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from worker.messages import Message, Record, TopicSpec


class Polled(NamedTuple):
    """What one poll brought.

    ``assigned`` are partitions of ``audio.in`` that are newly ours: their states must be restored
    before ``records`` are processed. ``revoked`` are partitions that are ours no longer: their
    states must be dropped. A partition in both was lost and won back: drop, then restore.
    ``unplaced`` are partitions that are ours and bring no records yet, for the broker has not told
    where to go on from; a session ends if that takes too long. ``more`` says that records are
    waiting behind these, as far as is known; they may be of a transaction that is still open.
    """

    records: list[Record]
    assigned: frozenset[int]
    revoked: frozenset[int]
    unplaced: frozenset[int] = frozenset()
    more: bool = False


class Transaction(Protocol):
    """The inside of a ``with session.transaction()`` block."""

    def send(self, messages: Iterable[Message]) -> None:
        """Write messages; they stay invisible until the block ends."""

    def commit_offsets(self, offsets: Mapping[int, int]) -> None:
        """Commit, for each partition of ``audio.in``, the offset of the next record to read.

        It is behind a record that the last poll has brought: one that an earlier poll has brought may
        be another member's by now.
        """


class Session(Protocol):
    """One membership of a consumer group on ``audio.in``, from joining to the first failure."""

    def poll(self, timeout: float, max_records: int) -> Polled:
        """Return within ``timeout`` seconds with at most ``max_records`` committed records, fewer if they are large.

        Records come in offset order within a partition, and start at the group's committed
        offset, or else at the earliest record.

        Raises:
            Retryable: the broker cannot be reached, or the membership was lost.
            Fatal: access is refused, or a topic is missing.
        """

    def restore(self, partitions: Iterable[int]) -> Iterator[Record]:
        """Yield what ``drift.state`` holds for these partitions, the latest record of each key.

        Keys whose latest record has no value (a tombstone) are left out. Everything that was
        committed before the partition was assigned is seen.
        """

    def transaction(self, *, wait: bool = True) -> AbstractContextManager[Transaction]:
        """Open a transaction that commits when its block ends, and aborts when it raises.

        One that commits no offsets needs no partition, and so no poll before it. Without ``wait`` the
        end of the block begins the commit, and need not wait for it: `settle` does, and so does the
        next transaction. Meanwhile the session may be polled, and it closes without it.

        Raises:
            Retryable: nothing was committed, or it is not known whether it was; the session is
                finished either way, and the committed offset tells the next one.
        """

    def settle(self) -> None:
        """Return when the last transaction is committed, or raise as its block would have done."""

    def close(self) -> None:
        """Leave the group and free the connections; safe to call twice, never raises."""


class Broker(Protocol):
    """A cluster, or a file that behaves like one."""

    def create_topics(self, specs: Sequence[TopicSpec]) -> list[str]:
        """Create the topics that do not exist yet and return their names.

        Raises:
            Fatal: a topic exists with another number of partitions.
            Retryable: the broker cannot be reached.
        """

    def join(self, group: str, instance: str) -> Session:
        """Become a member of ``group``.

        ``instance`` is this replica's stable name: a new session under the same name fences
        what an old one may have left open.
        """

    def publish(self, messages: Iterable[Message]) -> None:
        """Write messages outside any transaction, durably when this returns."""

    def follow(self, topics: Sequence[str], *, from_beginning: bool) -> Iterator[list[Record]]:
        """Yield the committed records of ``topics`` for ever, in offset order by partition.

        An empty list is yielded about once a second while nothing arrives, so that the caller
        can look at the clock and stop. Belongs to no consumer group.
        """

    def read(self, topics: Sequence[str]) -> Iterator[list[Record]]:
        """Yield the committed records of ``topics`` up to where they end during this call, and stop.

        They come in offset order by partition. What was committed before the call is seen, and a
        transaction that is still open is waited for; an empty list is yielded about once a second
        meanwhile. Belongs to no consumer group.

        Raises:
            Retryable: the broker cannot be reached, or a transaction stays open.
            Fatal: access is refused, or a topic is missing.
        """

    def close(self) -> None:
        """Free the connections; safe to call twice, never raises."""
