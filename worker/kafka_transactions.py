"""The transactions of one instance, one after the other, and how those are ended that were left open.

It owns the producer of a session, in which order a transaction is committed, and what is known of how
the last one of an instance has ended. It knows nothing of groups but their names, or of records.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from worker.errors import EarshotError, Fatal, Retryable
from worker.kafka_clients import TRANSACTION_TIMEOUT, Producer, Written, ms
from worker.kafka_cluster import GRACE, INIT_TIMEOUT, Cluster
from worker.messages import Message, Topics


class Transactions:
    """What a session of ``instance`` sends and commits, once it has ended what the session before left open.

    ``unsettled`` is shared by the sessions of a process. It says how the last transaction of an id
    ended, where the cluster has been made to forget it before anything came of it.

    Raises:
        Fatal: access is refused, or something is open and nobody knows how it should end.
        Retryable: the broker cannot be reached.
    """

    def __init__(self, cluster: Cluster, topics: Topics, group: str, instance: str, unsettled: dict[str, bool]) -> None:
        self._cluster = cluster
        self._topics = topics
        self._group = group
        self._prefix = f"earshot/{group}/"
        self._id = f"{self._prefix}{instance}"
        self._unsettled = unsettled
        self._under_way: Callable[[], None] | None = None  # the end of the last transaction
        self._producer, self._committed = self._succeed(self._id)

    def begin(self) -> KafkaTransaction:
        """Begin the next transaction, when the last one is committed."""
        self.settle()
        self.require_leaders()
        self._cluster.attempt("begin a transaction", TRANSACTION_TIMEOUT, self._producer.begin_transaction)
        self._unsettled.pop(self._id, None)  # the cluster will tell of this one
        return KafkaTransaction(self._cluster, self._producer)

    def abort(self) -> None:
        """Abort the transaction; one that cannot be aborted leaves a producer that begins no other."""
        with contextlib.suppress(EarshotError):
            self._cluster.attempt("abort", TRANSACTION_TIMEOUT, self._producer.abort_transaction)
            self._committed = False

    def commit(self, transaction: KafkaTransaction, member: Any) -> None:
        """Begin to commit a transaction, the offsets as ``member`` of the group; `settle` waits for the end."""
        commit = partial(self._commit, transaction, member)
        self._under_way = self._cluster.start("commit", TRANSACTION_TIMEOUT, commit)

    def settle(self) -> None:
        """Return when the last transaction is committed, or raise why it may not be."""
        if self._under_way is not None:
            self._under_way()
            self._under_way, self._committed = None, True

    def require_leaders(self) -> None:
        """Raise Retryable once partitions have other leaders: markers may be missing, which the next session writes."""
        if self._producer.moved():
            raise Retryable(
                f"partitions at {self._cluster} have other leaders: transactions may have been left open there"
            )

    def end_all(self) -> list[str]:
        """End whatever may be open of this instance and all others of the group, and return the ids of the others.

        What lives among them is fenced by it, and goes on in another session.
        """
        self.settle()
        known = self._cluster.transactional_ids(self._prefix)
        # An instance has no slash in its name: with one it is an instance of another group.
        others = {each for each in known if "/" not in each.removeprefix(self._prefix)} - {self._id}
        if self._committed is not None:
            self._end_open(self._producer, [], commit=self._committed)
        for other in sorted(others):
            self._cluster.farewell(self._succeed(other, suspected=True)[0].end)
        return sorted(others)

    def end(self) -> None:
        """Free the connections; settle before, or what is under way stays open until its time limit."""
        self._producer.end()

    def _succeed(self, transactional_id: str, *, suspected: bool = False) -> tuple[Producer, bool | None]:
        """Return the next producer of a transactional id, and how the last transaction before it has ended.

        What the one before had begun is ended, and so is that one. What the cluster holds for complete
        and is open nevertheless is ended as well (`Producer.settle`), seen or only ``suspected``.

        Raises:
            Fatal: something is open, and nobody knows any more how it should end. It is not guessed:
                the wrong end would lose records or double them.
        """
        producer = self._cluster.producer(
            transactional_id=transactional_id, transaction_timeout_ms=ms(TRANSACTION_TIMEOUT)
        )
        try:
            committed = self._ended(transactional_id)
            self._cluster.attempt("join", INIT_TIMEOUT + GRACE, producer.init_transactions)
            left, unseen = self._cluster.left_open(producer.id, [spec.name for spec in self._topics.layout(1)])
            if committed is not None and (left or suspected):
                self._end_open(producer, [*left, *unseen], commit=committed)
                self._unsettled.pop(transactional_id, None)
            elif left:
                places = ", ".join(f"{each.topic}-{each.partition}" for each in left)
                raise Fatal(
                    f"a transaction of {transactional_id} is open in {places} at {self._cluster}, and nobody knows any "
                    "more whether it was committed: compare what stands there with the offsets of the group, and end "
                    "it with `kafka-transactions.sh abort`"
                )
        except BaseException:
            self._cluster.farewell(producer.end)
            raise
        return producer, committed

    def _ended(self, transactional_id: str) -> bool | None:
        """Return whether the last transaction of an id was committed, or None if there was none or nobody knows.

        The cluster forgets it with `init_transactions`. A session that then fails, or does nothing,
        leaves it to the next one in this process; only a commit that came through late knows better.
        """
        told = self._cluster.was_committed(transactional_id)
        if told is not None and (told or transactional_id not in self._unsettled):
            self._unsettled[transactional_id] = told
        return self._unsettled.get(transactional_id)

    def _end_open(self, producer: Producer, partitions: Sequence[Any], *, commit: bool) -> None:
        self._cluster.attempt(
            "end an open transaction",
            TRANSACTION_TIMEOUT,
            lambda: producer.settle(partitions, self._group, commit=commit),
        )

    def _commit(self, transaction: KafkaTransaction, member: Any) -> None:
        """Take steps 4 to 6 of a session's transaction; in 5 and 6 the client itself would wait for ever."""
        self._producer.deliver(transaction.written)  # 4
        if transaction.offsets:
            self._producer.send_offsets(self._topics.audio_in, transaction.offsets, member)  # 5
        self._producer.commit_transaction()  # 6


class KafkaTransaction:
    """What one transaction will commit: messages under way, and offsets noted."""

    def __init__(self, cluster: Cluster, producer: Producer) -> None:
        self._cluster = cluster
        self._producer = producer
        self.written: list[Written] = []
        self.offsets: dict[int, int] = {}

    def send(self, messages: Iterable[Message]) -> None:
        """Hand messages to the producer, which sends them in the background."""
        wanted = list(messages)
        self.written += self._cluster.attempt("send", TRANSACTION_TIMEOUT, lambda: self._producer.write(wanted))

    def commit_offsets(self, offsets: Mapping[int, int]) -> None:
        """Note the next offset to read of each partition of ``audio.in``; they are sent after all messages."""
        self.offsets |= offsets
