"""Apache Kafka, and what speaks its protocol, behind `worker.broker`.

It owns what a session does and in which order, from fencing its predecessor to the commit. How it commits is for
`worker.kafka_transactions`, how the cluster is reached for `worker.kafka_cluster`, and it knows nothing of audio,
models or states.

Exactly once is Kafka's transactions with the group's metadata (KIP-447): a session fences the
producer that its predecessor of the same instance has left behind, and the group's coordinator
refuses offsets from a member whose generation has passed. The client of a session is trusted no
further than its first failure: nothing in it is repaired, and the next session starts afresh.

A call that misses its deadline is left behind, and may end late. That harms nothing: before the
next session reads an offset it has fenced the producer of this one, so what a late commit meets is
decided by then. It has been committed, and the next session starts behind it, or it never will be.
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from worker.broker import Polled
from worker.errors import EarshotError, Fatal, Retryable
from worker.kafka_clients import (
    DELIVERY_TIMEOUT,
    REQUEST_TIMEOUT,
    Consumer,
    NoOffset,
    OffsetOutOfRange,
    Partition,
    Producer,
    RebalanceListener,
    ms,
)
from worker.kafka_cluster import GRACE, INIT_TIMEOUT, Cluster
from worker.kafka_transactions import KafkaTransaction, Transactions
from worker.messages import Message, Record, Topics, TopicSpec
from worker.security import OPEN, Security

# Seconds. Each bound says which failure it ends.
SESSION_TIMEOUT: Final = 10.0  # a member that died: its partitions go to the others after this
HEARTBEAT_INTERVAL: Final = 1.0  # a lost heartbeat or two is no death; and so soon a member hears of a rebalance
MAX_POLL_INTERVAL: Final = 300.0  # a member that lives and hangs; longer than RESTORE_TIMEOUT and the slowest batch
PLACE_TIMEOUT: Final = 45.0  # offsets that stay undecided: TRANSACTION_TIMEOUT, and the broker's next look within 10 s
RESTORE_TIMEOUT: Final = 60.0  # states that stay undecided: TRANSACTION_TIMEOUT, the broker's next look, some reading
SILENCE: Final = 10.0  # an outage, which a poll cannot tell from a quiet topic, so ask after this
IDLE: Final = 1.0  # how long `follow` waits before it says that nothing came

STATE_SEGMENT_BYTES: Final = 16 << 20  # only closed segments are compacted, and all that is left is read by `restore`


class LostOffset(NamedTuple):
    """A place that a group wants to go on from, and that is in the log no more.

    What lies between ``committed`` and ``earliest`` has been deleted before it was read; if
    ``committed`` is beyond ``end``, the topic has been created anew, or has lost its end.
    """

    topic: str
    partition: int
    committed: int
    earliest: int
    end: int


def stop(lost: LostOffset) -> None:
    """Refuse to go on: records that nobody has heard would be passed over in silence."""
    raise Fatal(
        f"partition {lost.partition} of topic {lost.topic!r} has records from {lost.earliest} to {lost.end}, and the "
        f"group wants to go on from {lost.committed}: they were deleted before they were read, or the topic is "
        "another one now. Give it a longer retention.ms, and go on with --on-lost-offset earliest"
    )


class KafkaBroker:
    """The `worker.broker.Broker` of a Kafka cluster.

    Args:
        servers: ``host:port`` of one or more brokers to start from.
        topics: The names of the topics.
        security: How the cluster is to be trusted, and what it is told.
        on_lost_offset: Called with each offset out of retention; unless it raises, the session
            goes on from the earliest record.
    """

    def __init__(
        self,
        servers: Sequence[str],
        topics: Topics,
        security: Security = OPEN,
        *,
        on_lost_offset: Callable[[LostOffset], None] = stop,
    ) -> None:
        self._cluster = Cluster(servers, security)
        self._topics = topics
        self._on_lost_offset = on_lost_offset
        self._publisher: Producer | None = None
        self._unsettled: dict[str, bool] = {}
        self._followers: set[Consumer] = set()

    def create_topics(self, specs: Sequence[TopicSpec]) -> list[str]:
        """Create the topics that do not exist yet, with the cluster's default replication, and return their names."""
        existing = self._cluster.partitions([spec.name for spec in specs])
        for spec in specs:
            found = existing.get(spec.name, spec.partitions)
            if found != spec.partitions:
                raise Fatal(
                    f"topic {spec.name!r} has {found} partitions, expected {spec.partitions}: "
                    f"ask for {found}, or delete the topic"
                )
        new = {
            spec.name: {"num_partitions": spec.partitions, "configs": _topic_configs(spec)}
            for spec in specs
            if spec.name not in existing
        }
        if new:
            self._cluster.create(new)
        return list(new)

    def join(self, group: str, instance: str) -> KafkaSession:
        """Fence what an earlier session of ``instance`` left open, and become a member of ``group`` at the first poll.

        Raises:
            Fatal: access is refused, or ``instance`` is no name for Kafka.
            Retryable: the broker cannot be reached.
        """
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,200}", instance):
            raise Fatal(f"--instance is {instance!r}; Kafka wants up to 200 letters, digits, dots, dashes, underscores")
        return KafkaSession(self._cluster, self._topics, group, instance, self._on_lost_offset, self._unsettled)

    def publish(self, messages: Iterable[Message]) -> None:
        """Write messages outside any transaction, durably when this returns.

        Raises:
            Retryable: some of the messages may not have been written.
            Fatal: access is refused, a topic is missing, or a message is too large.
        """
        wanted = list(messages)
        if self._publisher is None:
            self._cluster.logs(sorted({each.topic for each in wanted}))  # the client would wait for a missing topic
            self._publisher = self._cluster.producer()
        producer = self._publisher

        def publish() -> None:
            producer.deliver(producer.write(wanted))

        try:
            self._cluster.attempt("publish", INIT_TIMEOUT + DELIVERY_TIMEOUT + GRACE, publish)
        except EarshotError:
            self._close_publisher()
            raise

    def follow(self, topics: Sequence[str], *, from_beginning: bool) -> Iterator[list[Record]]:
        """Yield the committed records of ``topics`` for ever, from the beginning or from the moment of this call."""
        partitions = self._cluster.logs(topics)
        consumer = self._cluster.consumer()
        self._followers.add(consumer)
        consumer.start(partitions, from_beginning=from_beginning)
        self._cluster.attempt("follow", REQUEST_TIMEOUT + GRACE, lambda: consumer.locate(partitions))
        return self._follow(consumer)

    def read(self, topics: Sequence[str]) -> Iterator[list[Record]]:
        """Yield the committed records of ``topics`` up to where they end during this call, and stop.

        Raises:
            Retryable: nothing comes, and no transaction ends, for `RESTORE_TIMEOUT`.
        """
        partitions = self._cluster.logs(topics)
        ends = self._cluster.ends(partitions)
        consumer = self._cluster.consumer()
        self._followers.add(consumer)
        consumer.start(partitions)
        return self._read(consumer, ends)

    def close(self) -> None:
        """Free the connections; sessions are closed on their own."""
        self._close_publisher()
        while self._followers:
            self._cluster.farewell(self._followers.pop().end)

    def _follow(self, consumer: Consumer) -> Iterator[list[Record]]:
        with self._following(consumer):
            while True:
                yield self._cluster.attempt("follow", IDLE + GRACE, lambda: consumer.records(IDLE))

    def _read(self, consumer: Consumer, ends: Mapping[Any, int]) -> Iterator[list[Record]]:
        with self._following(consumer):
            before: dict[Any, int] | None = None
            deadline = time.monotonic() + RESTORE_TIMEOUT
            for records, behind in _catch_up(self._cluster, "read", consumer, ends):
                if behind != before:
                    deadline = time.monotonic() + RESTORE_TIMEOUT
                if time.monotonic() > deadline:
                    raise Retryable(
                        f"cannot read to the end of {', '.join(sorted({each.topic for each in behind}))} at "
                        f"{self._cluster}: nothing comes for {RESTORE_TIMEOUT:.0f} s, or a transaction is still open"
                    )
                yield [each for each in records if each.offset < ends[Partition(each.topic, each.partition)]]
                before = behind

    @contextlib.contextmanager
    def _following(self, consumer: Consumer) -> Iterator[None]:
        try:
            yield
        finally:
            self._followers.discard(consumer)
            self._cluster.farewell(consumer.end)

    def _close_publisher(self) -> None:
        producer, self._publisher = self._publisher, None
        if producer is not None:
            self._cluster.farewell(producer.end)


class KafkaSession:
    """One membership of a group: a consumer, and the producer whose transactions commit its offsets."""

    def __init__(
        self,
        cluster: Cluster,
        topics: Topics,
        group: str,
        instance: str,
        on_lost_offset: Callable[[LostOffset], None],
        unsettled: dict[str, bool],
    ) -> None:
        self._cluster = cluster
        self._on_lost_offset = on_lost_offset
        self._topics = topics
        self._group = f"{topics.prefix}{group}"  # systems with prefixes of their own share a cluster, not a group
        self._instance = instance
        self._changes = _Changes()
        self._heard = -math.inf
        self._placed = math.inf
        self._complete = False
        self._farewells: list[Callable[[], None]] = []
        try:
            # Before any offset is read: this aborts or completes what the last session left open.
            self._transactions = Transactions(cluster, topics, self._group, instance, unsettled)
            self._farewells += [self._transactions.settle, self._transactions.end]
            self._consumer = cluster.consumer(
                group_id=self._group,
                auto_offset_reset="none",  # or the client would go on from elsewhere without a word
                # A restarted worker takes its partitions over at once, and an older self is fenced.
                group_instance_id=instance,
                session_timeout_ms=ms(SESSION_TIMEOUT),
                heartbeat_interval_ms=ms(HEARTBEAT_INTERVAL),
                max_poll_interval_ms=ms(MAX_POLL_INTERVAL),
            )
            self._farewells += [self._leave, self._consumer.end]
            cluster.attempt("join", REQUEST_TIMEOUT + GRACE, self._subscribe)
        except BaseException:
            self.close()
            raise

    def poll(self, timeout: float, max_records: int) -> Polled:
        """Return records of ``audio.in`` and what has changed; first of all, and after a silence, look at the cluster.

        The client itself waits in silence for a topic that is missing, for a cluster that is gone
        and, once another session of its instance has taken its place in the group, for good.
        """
        with self._coming_back():
            self._transactions.require_leaders()
            if self._consumer.rebalances():
                self._transactions.settle()
            if time.monotonic() - self._heard > SILENCE:
                self._cluster.require(self._topics)
                if self._heard == -math.inf:
                    self._cluster.require_settings(self._topics)
                self._require_membership()
                self._heard = time.monotonic()
            records = self._cluster.attempt("poll", timeout + GRACE, lambda: self._poll(timeout, max_records))
            if records:
                self._heard = time.monotonic()
            if not self._complete and self._consumer.has_joined():
                self._complete = True
                self._complete_rebalance()
            unplaced = self._consumer.unplaced()
            self._require_places(unplaced)
            return Polled(
                records, *self._changes.take(), unplaced, self._consumer.is_behind(self._consumer.assignment())
            )

    def restore(self, partitions: Iterable[int]) -> Iterator[Record]:
        """Yield the latest record of each key in these partitions of ``drift.state``.

        The marker that ends a transaction reaches each partition on its own, and so the offsets of
        a former owner may be committed a moment before its states can be read. Its states were in
        the log before its offsets, though: everything up to the end of the log, committed or not,
        has to be decided and read.

        Raises:
            Retryable: that takes longer than `RESTORE_TIMEOUT`.
        """
        wanted = [Partition(self._topics.drift_state, partition) for partition in partitions]
        if not wanted:
            return iter(())
        deadline = time.monotonic() + RESTORE_TIMEOUT
        latest: dict[tuple[int, bytes | None], Record] = {}
        ends = self._cluster.ends(wanted)
        consumer = self._cluster.consumer()
        try:
            consumer.start(wanted)
            for records, behind in _catch_up(self._cluster, "restore", consumer, ends):
                latest |= {(each.partition, each.key): each for each in records}
                if behind and time.monotonic() > deadline:
                    raise Retryable(
                        f"drift.state cannot be restored within {RESTORE_TIMEOUT:.0f} s from {self._cluster}: "
                        f"a transaction is still open in {sorted(partition.partition for partition in behind)}"
                    )
        finally:
            self._cluster.farewell(consumer.end)
        return (record for record in latest.values() if record.value is not None)

    @contextlib.contextmanager
    def transaction(self, *, wait: bool = True) -> Iterator[KafkaTransaction]:
        """Open a transaction that commits when its block ends, in six steps, and aborts when it raises.

        1. Begin.
        2. Send the messages of the block, and note its offsets.
        3. Take the group's metadata, and refuse to go on without a generation: without one the
           coordinator does not fence. No poll may come between the one that brought the records and
           this, for a poll may end our generation, and it has to be the one that they were read in.
        4. Flush, and take the result of every message: a message that timed out leaves the
           transaction intact, and the commit would go through without it.
        5. Send the offsets, after all messages: whoever is assigned our partitions next knows that
           the states stand in the log if the offsets do.
        6. Commit.

        Steps 4 to 6 mostly wait for the cluster. Without ``wait`` they go on while the session is used;
        a poll waits for them only if the group rebalances: they would be refused by its next generation.

        A block that raises `Retryable` is not aborted here, since that may wait for the broker that
        has just failed: the session is finished, and the next one of this instance aborts it.
        """
        with self._coming_back():
            transaction = self._transactions.begin()  # 1
            try:
                yield transaction  # 2
                member = self._membership() if transaction.offsets else None  # 3
            except (Retryable, GeneratorExit):  # the latter: nobody ends this block, and who clears it must not wait
                raise
            except BaseException:
                self._transactions.abort()
                raise
            self._transactions.commit(transaction, member)  # 4 to 6
            if wait:
                self._transactions.settle()

    def settle(self) -> None:
        """Return when the last transaction is committed, or raise as its block would have done."""
        with self._coming_back():
            self._transactions.settle()

    def close(self) -> None:
        """Leave the group, unless the session has failed and the next one comes back for it; free the connections."""
        while self._farewells:
            self._cluster.farewell(self._farewells.pop(0))

    def _complete_rebalance(self) -> None:
        """Join the group once more if it has left partitions to nobody.

        Partitions change hands in two steps: who has too many gives them up and joins once more, and by that they are
        given away. If its session ends in between, the next one finds its place again, and nobody would join.
        """
        given = set().union(*self._cluster.members(self._group).values())
        if given < set(self._consumer.partitions_for_topic(self._topics.audio_in) or ()):
            self._consumer.rejoin()

    def _require_places(self, unplaced: frozenset[int]) -> None:
        """Raise Retryable if partitions are ours and wait too long for their offsets, which the client does in silence.

        Kafka tells no offset while a transaction that commits one is open. Its time limit ends each,
        unless the marker was lost: then only the next producer of its instance can do it, and that
        instance may never come back. So all of the group are succeeded, once; what lives is fenced by
        it, and goes on in another session.
        """
        now = time.monotonic()
        self._placed = min(self._placed, now) if unplaced else now
        if now - self._placed <= PLACE_TIMEOUT:
            return
        ended = self._transactions.end_all()
        raise Retryable(
            f"group {self._group!r} at {self._cluster} was told no offset of the partitions {sorted(unplaced)} of "
            f"{self._topics.audio_in!r} for {PLACE_TIMEOUT:.0f} s: a transaction that commits them is still open. "
            f"Ended what may have been left by {', '.join(ended) or 'this instance'}; if this comes again, "
            "look with `kafka-transactions.sh find-hanging`"
        )

    def _subscribe(self) -> None:
        """Subscribe, and wait until the client knows the partitions.

        If they become known only after it has joined, it joins once more; and if the poll ends while
        it does, the client forgets about it, sends no heartbeat any more and waits to be shown out.
        """
        self._consumer.subscribe([self._topics.audio_in], listener=self._changes)
        self._consumer.partitions_for_topic(self._topics.audio_in)

    def _poll(self, timeout: float, max_records: int) -> list[Record]:
        """Poll the client, and tell it where to start in partitions where it does not know."""
        deadline = time.monotonic() + timeout
        while True:
            left = max(0.0, deadline - time.monotonic())
            self._consumer.resume_joining()
            try:
                return self._consumer.records(left, max_records)
            except NoOffset as error:  # the group is new to these partitions
                (partitions,) = error.args
            except OffsetOutOfRange as error:
                (partitions,) = error.args
                earliest = self._consumer.beginning_offsets(list(partitions))
                ends = self._consumer.end_offsets(list(partitions))
                for each, offset in partitions.items():
                    self._on_lost_offset(LostOffset(each.topic, each.partition, offset, earliest[each], ends[each]))
            self._consumer.seek_to_beginning(*partitions)

    def _require_membership(self) -> None:
        """Raise Retryable if we think that we are a member of the group, and the group does not."""
        member = self._consumer.group_metadata().member_id
        # Without an id we are joining. An id that has changed meanwhile is a later one than the group's.
        if (
            member
            and member not in self._cluster.members(self._group)
            and member == self._consumer.group_metadata().member_id
        ):
            raise Retryable(
                f"group {self._group!r} at {self._cluster} has no such member any more: it was silent for "
                f"{SESSION_TIMEOUT:.0f} s, or another worker runs under the same --instance {self._instance!r}"
            )

    @contextlib.contextmanager
    def _coming_back(self) -> Iterator[None]:
        """Keep the place in the group if this fails: a named member returns to it with no rebalance for anybody.

        Whoever does not return is missed after `SESSION_TIMEOUT`, as one that died.
        """
        try:
            yield
        except Retryable:
            with contextlib.suppress(ValueError):
                self._farewells.remove(self._leave)
            raise

    def _leave(self) -> None:
        """Leave the group: a named member does not do so by itself, so that it may come back.

        With the member's id it cannot be a later session of the instance that is shown out.
        """
        member = self._consumer.group_metadata().member_id
        if member:
            self._cluster.show_out(self._group, member, self._instance)

    def _membership(self) -> Any:
        """Return who we are in the group, for the coordinator to refuse us if that has passed."""
        member = self._consumer.group_metadata()
        if member.generation_id <= 0:
            raise Retryable(f"group {self._group!r} at {self._cluster} has a newer generation, without this member")
        return member


class _Changes(RebalanceListener):  # type: ignore[misc]  # the client ships no types
    """Notes what the group has given and taken; the client calls it on its I/O thread, which must not wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._assigned: set[int] = set()
        self._revoked: set[int] = set()

    def on_partitions_assigned(self, assigned: Iterable[Any]) -> None:
        with self._lock:
            self._assigned |= {each.partition for each in assigned}

    def on_partitions_revoked(self, revoked: Iterable[Any]) -> None:
        """Also called for partitions that were lost: either way their states are no longer ours."""
        partitions = {each.partition for each in revoked}
        with self._lock:
            self._revoked |= partitions
            self._assigned -= partitions

    def take(self) -> tuple[frozenset[int], frozenset[int]]:
        """Return (assigned, revoked) since the last call."""
        with self._lock:
            changes = frozenset(self._assigned), frozenset(self._revoked)
            self._assigned, self._revoked = set(), set()
            return changes


def _catch_up(
    cluster: Cluster, what: str, consumer: Consumer, ends: Mapping[Any, int]
) -> Iterator[tuple[list[Record], dict[Any, int]]]:
    """Yield what each poll brings, and where the partitions stand that are still behind, until none is.

    A consumer of committed records passes an offset only once its transaction is decided.
    """
    behind = {partition: 0 for partition, end in ends.items() if end > 0}

    def read() -> tuple[list[Record], dict[Any, int]]:
        records = consumer.records(IDLE)
        return records, {partition: consumer.position(partition, ms(IDLE)) or 0 for partition in behind}

    while behind:
        records, positions = cluster.attempt(what, RESTORE_TIMEOUT + GRACE, read)
        behind = {partition: at for partition, at in positions.items() if at < ends[partition]}
        yield records, behind


def _topic_configs(spec: TopicSpec) -> dict[str, str]:
    configs: dict[str, str] = {}
    if spec.compacted:
        configs |= {"cleanup.policy": "compact", "segment.bytes": str(STATE_SEGMENT_BYTES)}
    if spec.max_message_bytes is not None:
        configs["max.message.bytes"] = str(spec.max_message_bytes)
    return configs
