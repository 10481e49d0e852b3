"""Apache Kafka, and what speaks its protocol, behind `worker.broker`: the only file that imports kafka.

It owns every client, its settings and timeouts, and the wording of Kafka's errors. It knows
nothing of audio, models or states.

Exactly once is Kafka's transactions with the group's metadata (KIP-447): a session fences the
producer that its predecessor of the same instance has left behind, and the group's coordinator
refuses offsets from a member whose generation has passed. The client of a session is trusted no
further than its first failure: nothing in it is repaired, and the next session starts afresh.

Many waits of the client have no limit, so every call that talks to the cluster is made through
`_Cluster.attempt`, which gives it a deadline and words its errors. A call that misses its
deadline is left behind, and may end late. That harms nothing: before the next session reads an
offset it has fenced the producer of this one, so what a late commit meets is decided by then. It
has been committed, and the next session starts behind it, or it never will be.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from kafka import (
    ConsumerRebalanceListener,
    KafkaAdminClient,
    KafkaConsumer,
    KafkaProducer,
    OffsetAndMetadata,
    OffsetSpec,
    Serializer,
    TopicPartition,
)
from kafka import errors as kafka_errors
from kafka.admin import MemberToRemove
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.net.compat import KafkaNetClient
from kafka.net.manager import KafkaConnectionManager
from kafka.net.sasl.oauth import AbstractTokenProvider
from kafka.net.selector import NetworkSelector
from kafka.record import memory_records
from kafka.record.default_records import DefaultRecordBatch

from worker.broker import Polled
from worker.errors import EarshotError, Fatal, Retryable
from worker.messages import Message, Record, Topics, TopicSpec
from worker.security import OPEN, Security, read_secret
from worker.watchdog import Watchdog

T = TypeVar("T")

# It narrates its own retries; what matters of them comes back as an error. At the level DEBUG it also tells passwords.
logging.getLogger("kafka").setLevel(logging.CRITICAL)

# Seconds. Each bound says which failure it ends.
CONNECT_TIMEOUT: Final = 10.0  # servers that do not answer when a client is made
REQUEST_TIMEOUT: Final = 10.0  # a broker that takes a request and never answers it
SESSION_TIMEOUT: Final = 10.0  # a member that died: its partitions go to the others after this
HEARTBEAT_INTERVAL: Final = 1.0  # a lost heartbeat or two is no death; and so soon a member hears of a rebalance
MAX_POLL_INTERVAL: Final = 300.0  # a member that lives and hangs; longer than RESTORE_TIMEOUT and the slowest batch
INIT_TIMEOUT: Final = 30.0  # a coordinator that cannot finish what the last session left open
DELIVERY_TIMEOUT: Final = 15.0  # records that a partition's leader does not take
TRANSACTION_TIMEOUT: Final = 30.0  # a session that was killed: what it left open holds up every reader of committed;
# and one that hangs, for what it does in a transaction later than that the cluster has aborted
RESTORE_TIMEOUT: Final = 60.0  # states that stay undecided: TRANSACTION_TIMEOUT, the broker's next look, some reading
SILENCE: Final = 10.0  # an outage, which a poll cannot tell from a quiet topic, so ask after this
CLOSE_TIMEOUT: Final = 2.0  # a farewell that nobody answers
GRACE: Final = 5.0  # a client that does not keep the bounds above, which it should have kept by so long after them
IDLE: Final = 1.0  # how long `follow` waits before it says that nothing came

# Bytes. Bounds on memory; a single larger record still comes through.
FETCH_BYTES: Final = 16 << 20  # from all partitions of one broker: about 500 chunks of a second of 16 kHz PCM
PARTITION_FETCH_BYTES: Final = 4 << 20  # so that one busy partition leaves room for the others
REQUEST_BYTES: Final = 32 << 20  # what is too large is the topic's max.message.bytes to say, not ours
BATCH_BYTES: Final = 256 << 10  # a transaction in few requests; memory is taken only as a batch fills
STATE_SEGMENT_BYTES: Final = 16 << 20  # only closed segments are compacted, and all that is left is read by `restore`

LINGER: Final = 0.1  # seconds; batches fill while the transaction is written, and its flush ends the wait
BACKOFF: Final = 0.02  # seconds; a new transaction waits this long for the last one's markers, not the default 0.1

CONNECT: Final = "connect"  # the one attempt whose failure may have to do with the settings
NOTHING: Final = object()  # stands for a value of None on its way through the client


class TlsError(kafka_errors.KafkaError):  # type: ignore[misc]  # the client ships no types
    """No connection came about, for TLS does not allow it."""


REFUSED: Final = (
    TlsError,
    kafka_errors.AuthorizationError,
    kafka_errors.SaslAuthenticationFailedError,
    kafka_errors.UnsupportedSaslMechanismError,
    kafka_errors.IllegalSaslStateError,
)
BROKEN: Final = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
UNUSABLE: Final = (
    kafka_errors.KafkaConfigurationError,
    kafka_errors.UnsupportedVersionError,
    kafka_errors.InconsistentGroupProtocolError,
    kafka_errors.InvalidSessionTimeoutError,
    kafka_errors.InvalidTopicError,
    kafka_errors.MessageSizeTooLargeError,
    kafka_errors.PolicyViolationError,
    kafka_errors.InvalidReplicationFactorError,
    kafka_errors.UnsupportedCodecError,
    kafka_errors.CorruptRecordError,
)
REPLACED: Final = (
    kafka_errors.ProducerFencedError,
    kafka_errors.InvalidProducerEpochError,
    kafka_errors.FencedInstanceIdError,
)


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
        self._cluster = _Cluster(servers, security)
        self._topics = topics
        self._on_lost_offset = on_lost_offset
        self._publisher: Any = None
        self._followers: set[Any] = set()

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
            self._cluster.ask("create topics", lambda admin: _create(admin, new))
        return list(new)

    def join(self, group: str, instance: str) -> KafkaSession:
        """Fence what an earlier session of ``instance`` left open, and become a member of ``group`` at the first poll.

        Raises:
            Fatal: access is refused, or ``instance`` is no name for Kafka.
            Retryable: the broker cannot be reached.
        """
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,200}", instance):
            raise Fatal(f"--instance is {instance!r}; Kafka wants up to 200 letters, digits, dots, dashes, underscores")
        return KafkaSession(self._cluster, self._topics, group, instance, self._on_lost_offset)

    def publish(self, messages: Iterable[Message]) -> None:
        """Write messages outside any transaction, durably when this returns.

        Raises:
            Retryable: some of the messages may not have been written.
            Fatal: access is refused, or a message is too large.
        """
        wanted = list(messages)
        if self._publisher is None:
            self._publisher = self._cluster.producer()
        producer = self._publisher

        def publish() -> None:
            _delivered(producer, [_send(producer, message) for message in wanted])

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

        def start() -> None:
            consumer.assign(partitions)
            seek = consumer.seek_to_beginning if from_beginning else consumer.seek_to_end
            seek(*partitions)
            for partition in partitions:
                if consumer.position(partition, timeout_ms=_ms(REQUEST_TIMEOUT)) is None:
                    raise kafka_errors.KafkaTimeoutError(f"no offset of {partition} within {REQUEST_TIMEOUT:.0f} s")

        self._cluster.attempt("follow", REQUEST_TIMEOUT + GRACE, start)
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
        consumer.assign(partitions)
        consumer.seek_to_beginning(*partitions)
        return self._read(consumer, ends)

    def close(self) -> None:
        """Free the connections; sessions are closed on their own."""
        self._close_publisher()
        while self._followers:
            self._cluster.farewell(_closing_consumer(self._followers.pop()))

    def _follow(self, consumer: Any) -> Iterator[list[Record]]:
        try:
            while True:
                yield self._cluster.attempt(
                    "follow", IDLE + GRACE, lambda: _records(consumer.poll(timeout_ms=_ms(IDLE)))
                )
        finally:
            self._followers.discard(consumer)
            self._cluster.farewell(_closing_consumer(consumer))

    def _read(self, consumer: Any, ends: Mapping[Any, int]) -> Iterator[list[Record]]:
        def read() -> tuple[list[Record], dict[Any, int]]:
            records = _records(consumer.poll(timeout_ms=_ms(IDLE)))
            return records, {partition: consumer.position(partition, _ms(IDLE)) or 0 for partition in behind}

        try:
            behind = {partition: 0 for partition, end in ends.items() if end > 0}
            deadline = time.monotonic() + RESTORE_TIMEOUT
            while behind:
                records, positions = self._cluster.attempt("read", RESTORE_TIMEOUT + GRACE, read)
                if positions != behind:
                    deadline = time.monotonic() + RESTORE_TIMEOUT
                if time.monotonic() > deadline:
                    raise Retryable(
                        f"cannot read to the end of {', '.join(sorted({each.topic for each in behind}))} at "
                        f"{self._cluster}: nothing comes for {RESTORE_TIMEOUT:.0f} s, or a transaction is still open"
                    )
                yield [each for each in records if each.offset < ends[TopicPartition(each.topic, each.partition)]]
                behind = {partition: at for partition, at in positions.items() if at < ends[partition]}
        finally:
            self._followers.discard(consumer)
            self._cluster.farewell(_closing_consumer(consumer))

    def _close_publisher(self) -> None:
        producer, self._publisher = self._publisher, None
        if producer is not None:
            self._cluster.farewell(_closing_producer(producer))


class KafkaSession:
    """One membership of a group: a consumer, and the producer whose transactions commit its offsets."""

    def __init__(
        self,
        cluster: _Cluster,
        topics: Topics,
        group: str,
        instance: str,
        on_lost_offset: Callable[[LostOffset], None],
    ) -> None:
        self._cluster = cluster
        self._on_lost_offset = on_lost_offset
        self._topics = topics
        self._group = f"{topics.prefix}{group}"  # systems with prefixes of their own share a cluster, not a group
        self._instance = instance
        self._changes = _Changes()
        self._heard = -math.inf
        self._closed = False
        self._consumer: Any = None
        self._producer = cluster.producer(
            transactional_id=f"earshot/{self._group}/{instance}", transaction_timeout_ms=_ms(TRANSACTION_TIMEOUT)
        )
        try:
            # Before any offset is read: this aborts or completes what the last session left open.
            cluster.attempt("join", INIT_TIMEOUT + GRACE, self._producer.init_transactions)
            self._consumer = cluster.consumer(
                group_id=self._group,
                auto_offset_reset="none",  # or the client would go on from elsewhere without a word
                # A restarted worker takes its partitions over at once, and an older self is fenced.
                group_instance_id=instance,
                session_timeout_ms=_ms(SESSION_TIMEOUT),
                heartbeat_interval_ms=_ms(HEARTBEAT_INTERVAL),
                max_poll_interval_ms=_ms(MAX_POLL_INTERVAL),
                partition_assignment_strategy=[CooperativeStickyAssignor],
            )
            cluster.attempt("join", REQUEST_TIMEOUT + GRACE, self._subscribe)
        except BaseException:
            self.close()
            raise

    def poll(self, timeout: float, max_records: int) -> Polled:
        """Return records of ``audio.in`` and what has changed; first of all, and after a silence, look at the cluster.

        The client itself waits in silence for a topic that is missing, for a cluster that is gone
        and, once another session of its instance has taken its place in the group, for good.
        """
        if time.monotonic() - self._heard > SILENCE:
            self._cluster.require(self._topics)
            self._require_membership()
            self._heard = time.monotonic()
        records = self._cluster.attempt("poll", timeout + GRACE, lambda: self._poll(timeout, max_records))
        if records:
            self._heard = time.monotonic()
        return Polled(records, *self._changes.take())

    def restore(self, partitions: Iterable[int]) -> Iterator[Record]:
        """Yield the latest record of each key in these partitions of ``drift.state``.

        The marker that ends a transaction reaches each partition on its own, and so the offsets of
        a former owner may be committed a moment before its states can be read. Its states were in
        the log before its offsets, though: everything up to the end of the log, committed or not,
        has to be decided and read.

        Raises:
            Retryable: that takes longer than `RESTORE_TIMEOUT`.
        """
        wanted = [TopicPartition(self._topics.drift_state, partition) for partition in partitions]
        if not wanted:
            return iter(())
        deadline = time.monotonic() + RESTORE_TIMEOUT
        latest: dict[tuple[int, bytes | None], Record] = {}
        ends = self._cluster.ends(wanted)
        consumer = self._cluster.consumer()

        def read() -> None:
            for record in _records(consumer.poll(timeout_ms=_ms(IDLE))):
                latest[record.partition, record.key] = record
            for partition in list(behind):
                if (consumer.position(partition, _ms(IDLE)) or 0) >= ends[partition]:
                    behind.remove(partition)

        try:
            consumer.assign(wanted)
            consumer.seek_to_beginning(*wanted)
            behind = {partition for partition in wanted if ends[partition] > 0}
            while behind:
                if time.monotonic() > deadline:
                    raise Retryable(
                        f"drift.state cannot be restored within {RESTORE_TIMEOUT:.0f} s from {self._cluster}: "
                        f"a transaction is still open in {sorted(partition.partition for partition in behind)}"
                    )
                self._cluster.attempt("restore", RESTORE_TIMEOUT + GRACE, read)
        finally:
            self._cluster.farewell(_closing_consumer(consumer))
        return (record for record in latest.values() if record.value is not None)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[KafkaTransaction]:
        """Open a transaction that commits when its block ends, in six steps, and aborts when it raises.

        1. Begin. No poll may come between here and the end, for a poll may end our generation.
        2. Send the messages of the block, and note its offsets.
        3. Flush, then take the result of every message: a message that timed out leaves the
           transaction intact, and the commit would go through without it.
        4. Take the group's metadata, and refuse to go on without a generation: without one the
           coordinator does not fence.
        5. Send the offsets, after all messages: whoever is assigned our partitions next knows that
           the states stand in the log if the offsets do.
        6. Commit.

        A block that raises `Retryable` is not aborted here, since that may wait for the broker that
        has just failed: the session is finished, and the next one of this instance aborts it.
        """
        self._cluster.attempt("begin a transaction", TRANSACTION_TIMEOUT, self._producer.begin_transaction)  # 1
        transaction = KafkaTransaction(self._cluster, self._topics, self._producer)
        try:
            yield transaction  # 2
        except (Retryable, GeneratorExit):  # the latter: nobody ends this block, and whoever clears it must not wait
            raise
        except BaseException:
            # An abort that fails leaves a producer that begins no other transaction.
            with contextlib.suppress(EarshotError):
                self._cluster.attempt("abort", TRANSACTION_TIMEOUT, self._producer.abort_transaction)
            raise
        self._cluster.attempt("commit", TRANSACTION_TIMEOUT, lambda: self._commit(transaction))  # 3 to 6

    def close(self) -> None:
        """Leave the group and free the connections."""
        if self._closed:
            return
        self._closed = True
        self._cluster.farewell(_closing_producer(self._producer))
        if self._consumer is not None:
            self._cluster.farewell(self._leave)
            self._cluster.farewell(_closing_consumer(self._consumer))

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
            try:
                return _records(self._consumer.poll(timeout_ms=_ms(left), max_records=max_records))
            except kafka_errors.NoOffsetForPartitionError as error:  # the group is new to these partitions
                (partitions,) = error.args
            except kafka_errors.OffsetOutOfRangeError as error:
                (partitions,) = error.args
                earliest = self._consumer.beginning_offsets(list(partitions))
                ends = self._consumer.end_offsets(list(partitions))
                for each, offset in partitions.items():
                    self._on_lost_offset(LostOffset(each.topic, each.partition, offset, earliest[each], ends[each]))
            self._consumer.seek_to_beginning(*partitions)

    def _require_membership(self) -> None:
        """Raise Retryable if we think that we are a member of the group, and the group does not."""
        member = self._consumer.group_metadata().member_id

        def look(admin: Any) -> set[str]:
            (group,) = admin.describe_groups([self._group]).values()
            if group["error"] is not None:
                raise kafka_errors.KafkaError(group["error"])
            return {each["member_id"] for each in group["members"]}

        # Without an id we are joining. An id that has changed meanwhile is a later one than the group's.
        if (
            member
            and member not in self._cluster.ask("look at the group", look)
            and member == self._consumer.group_metadata().member_id
        ):
            raise Retryable(
                f"group {self._group!r} at {self._cluster} has no such member any more: it was silent for "
                f"{SESSION_TIMEOUT:.0f} s, or another worker runs under the same --instance {self._instance!r}"
            )

    def _leave(self) -> None:
        """Leave the group: a named member does not do so by itself, so that it may come back; we do not mean to.

        With the member's id it cannot be a later session of the instance that is shown out.
        """
        member = self._consumer.group_metadata().member_id
        if member:
            bounds = {"bootstrap_timeout_ms": _ms(CLOSE_TIMEOUT), "request_timeout_ms": _ms(CLOSE_TIMEOUT)}
            with self._cluster.admin(**bounds) as admin:
                leaver = MemberToRemove(member_id=member, group_instance_id=self._instance)
                admin.remove_group_members(self._group, [leaver])

    def _commit(self, transaction: KafkaTransaction) -> None:
        """Take steps 3 to 6; in 5 and 6 the client itself would wait for ever."""
        _delivered(self._producer, transaction.results)  # 3
        if transaction.offsets:
            member = self._consumer.group_metadata()  # 4
            if member.generation_id <= 0:
                raise kafka_errors.CommitFailedError("the group has a newer generation, without this member")
            self._producer.send_offsets_to_transaction(transaction.offsets, member)  # 5
        self._producer.commit_transaction()  # 6


class KafkaTransaction:
    """What one transaction will commit: messages under way, and offsets noted."""

    def __init__(self, cluster: _Cluster, topics: Topics, producer: Any) -> None:
        self._cluster = cluster
        self._topics = topics
        self._producer = producer
        self.results: list[tuple[Message, Any]] = []
        self.offsets: dict[Any, Any] = {}

    def send(self, messages: Iterable[Message]) -> None:
        """Hand messages to the producer, which sends them in the background."""
        wanted = list(messages)
        self._cluster.attempt(
            "send",
            TRANSACTION_TIMEOUT,
            lambda: self.results.extend(_send(self._producer, message) for message in wanted),
        )

    def commit_offsets(self, offsets: Mapping[int, int]) -> None:
        """Note the next offset to read of each partition of ``audio.in``; they are sent after all messages."""
        for partition, offset in offsets.items():
            self.offsets[TopicPartition(self._topics.audio_in, partition)] = OffsetAndMetadata(offset, "", -1)


class _Changes(ConsumerRebalanceListener):  # type: ignore[misc]  # the client ships no types
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


class _Values(Serializer):  # type: ignore[misc]  # the client ships no types
    """Lets a record have neither key nor value: Kafka does, but the client checks before it serializes."""

    def serialize(self, _topic: str, _headers: object, data: object) -> object:
        return None if data is NOTHING else data


class _Lenient(bytearray):
    """Bytes that become text whatever they are: those that are not UTF-8 as escapes."""

    def __getitem__(self, index: Any) -> Any:
        """Return a number, or a part that is as lenient."""
        part = super().__getitem__(index)
        return _Lenient(part) if isinstance(index, slice) else part

    def decode(self, encoding: str = "utf-8", _errors: str = "strict") -> str:
        """Return the text without ever raising."""
        return super().decode(encoding, "backslashreplace")


class _Batch(DefaultRecordBatch):  # type: ignore[misc]  # the client ships no types
    """Records of which one may have a header whose name is not UTF-8: other clients can write that.

    The client's own cannot be got past, by any offset before it or behind.
    """

    def _read_msg(self, *args: Any) -> Any:
        try:
            return super()._read_msg(*args)
        except UnicodeDecodeError:  # nothing of the record has been taken yet
            self._buffer: Any = _Lenient(self._buffer)
            return super()._read_msg(*args)


memory_records.DefaultRecordBatch = _Batch  # the client has no setting for it


class _Producer(KafkaProducer):  # type: ignore[misc]  # the client ships no types
    """A producer that can be closed: the client's own flush raises at its timeout, and close then leaves its thread."""

    def flush(self, timeout: float | None = None) -> None:
        """Wait at most ``timeout`` seconds for each batch; what was not delivered says so in its result."""
        with contextlib.suppress(kafka_errors.KafkaTimeoutError):
            super().flush(timeout)


class _Token(AbstractTokenProvider):  # type: ignore[misc]  # the client ships no types
    """The token of OAUTHBEARER, read at each connection, since somebody else renews it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def token(self) -> str:
        try:
            return read_secret("--kafka-sasl-token-file", self._path)
        except Fatal as error:
            raise kafka_errors.SaslAuthenticationFailedError(str(error)) from error


class _Connections(KafkaConnectionManager):  # type: ignore[misc]  # the client ships no types
    """Connections that fail at once where they are refused, and not only when the time to connect is over.

    The client means to do so by itself, but looks for the failure before it comes; and the server
    closes the connection with its answer, so that often the end is all that the client sees.
    """

    async def _connect(self, node: Any, connection: Any, *args: Any, **settings: Any) -> None:
        answers: list[Exception] = []
        authenticate = connection._sasl_authenticate  # noqa: SLF001 - nothing else tells

        async def listen(*args: Any) -> None:
            try:
                await authenticate(*args)
            except REFUSED as error:
                answers.append(error)
                raise

        def note(error: Exception) -> None:
            refused = _refused_by_tls(error)
            if refused is not None:
                error = TlsError(f"TLS with {node.host}:{node.port} failed: {refused}")
            if isinstance(error, REFUSED):
                self._auth_failures[node.node_id] = error

        connection._sasl_authenticate = listen  # noqa: SLF001 - nor any other ear
        await super()._connect(node, connection, *args, **settings)
        for answer in answers:
            note(answer)
        connection.init_future.add_errback(note)


def _refused_by_tls(error: Exception) -> str | None:
    """Return why TLS has refused a connection, us or them; None if the connection broke in any other way."""
    for cause in (error.__context__, *error.args):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return cause.verify_message
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, BROKEN):
            return cause.reason or str(cause)
    return None


class _Cluster:
    """How one cluster is reached: makes its clients, bounds what they do, and words their errors."""

    def __init__(self, servers: Sequence[str], security: Security) -> None:
        self._watchdog = Watchdog()
        self._servers = ", ".join(servers)
        self._protocol = security.protocol
        self._settings: dict[str, Any] = {
            "bootstrap_servers": list(servers),
            "bootstrap_timeout_ms": _ms(CONNECT_TIMEOUT),
            "request_timeout_ms": _ms(REQUEST_TIMEOUT),
            "security_protocol": security.protocol,
            "ssl_context": security.tls,
        }
        if security.mechanism is not None:
            self._settings |= {
                "sasl_mechanism": security.mechanism,
                "sasl_plain_username": security.username,
                "sasl_plain_password": security.password,
            }
        if security.token_file is not None:
            self._settings["sasl_oauth_token_provider"] = _Token(security.token_file)

    def __str__(self) -> str:
        return self._servers

    def admin(self, **settings: Any) -> Any:
        return self._open(KafkaAdminClient, **settings)

    def consumer(self, **settings: Any) -> Any:
        """Make a consumer of committed records; also for plain topics: only so does it wait for pending offsets."""
        return self._open(
            KafkaConsumer,
            **{
                "isolation_level": "read_committed",
                "enable_auto_commit": False,
                "auto_offset_reset": "earliest",
                "allow_auto_create_topics": False,
                "fetch_max_bytes": FETCH_BYTES,
                "max_partition_fetch_bytes": PARTITION_FETCH_BYTES,
                "metrics_enabled": False,
                **settings,
            },
        )

    def producer(self, **settings: Any) -> Any:
        return self._open(
            _Producer,
            compression_type="lz4",
            linger_ms=_ms(LINGER),
            batch_size=BATCH_BYTES,
            max_request_size=REQUEST_BYTES,
            max_block_ms=_ms(INIT_TIMEOUT),
            delivery_timeout_ms=_ms(DELIVERY_TIMEOUT),
            retry_backoff_ms=_ms(BACKOFF),
            allow_auto_create_topics=False,
            value_serializer=_Values(),
            metrics_enabled=False,
            **settings,
        )

    def partitions(self, topics: Sequence[str]) -> dict[str, int]:
        """Return the number of partitions of those of ``topics`` that exist."""

        def look(admin: Any) -> dict[str, int]:
            found = {}
            for topic in admin.describe_topics(list(topics)):
                error = kafka_errors.for_code(topic["error_code"])
                if error is kafka_errors.UnknownTopicOrPartitionError:
                    continue
                if error is not kafka_errors.NoError:
                    raise error(topic["name"])
                found[topic["name"]] = len(topic["partitions"])
            return found

        return self.ask("look at the topics", look)

    def ends(self, partitions: Iterable[Any]) -> dict[Any, int]:
        """Return where logs end, decided or not: the marker that ends a transaction may still be on its way."""

        def look(admin: Any) -> dict[Any, int]:
            found = admin.list_partition_offsets(dict.fromkeys(partitions, OffsetSpec.LATEST))
            return {partition: each.offset for partition, each in found.items()}

        return self.ask("look for the ends of logs", look)

    def logs(self, topics: Sequence[str]) -> list[Any]:
        """Return every partition of ``topics``, which have to exist."""
        found = self.partitions(topics)
        _require_all(found, topics)
        return [TopicPartition(topic, partition) for topic in topics for partition in range(found[topic])]

    def require(self, topics: Topics) -> None:
        """Raise Fatal unless the topics exist and ``drift.state`` has the partitions of ``audio.in``."""
        names = [spec.name for spec in topics.layout(1)]
        found = self.partitions(names)
        _require_all(found, names)
        audio, state = found[topics.audio_in], found[topics.drift_state]
        if audio != state:
            raise Fatal(
                f"topic {topics.drift_state!r} has {state} partitions and {topics.audio_in!r} has {audio}; "
                f"they must be equal: delete {topics.drift_state!r} and create it with `earshot-worker topics`"
            )

    def attempt(self, what: str, seconds: float, call: Callable[[], T]) -> T:
        """Let a client do ``what`` within ``seconds``, and turn its errors into ours."""
        return self._attempt(what, seconds, call, discard=None)

    def ask(self, what: str, question: Callable[[Any], T]) -> T:
        """Let an admin client of its own answer ``question``."""

        def ask() -> T:
            with self.admin() as admin:
                return question(admin)

        return self.attempt(what, CONNECT_TIMEOUT + 2 * REQUEST_TIMEOUT + GRACE, ask)

    def farewell(self, call: Callable[[], Any]) -> None:
        """Let a client end something, for which nobody waits long and whose failure nobody minds."""
        with contextlib.suppress(EarshotError):
            self.attempt("close", CLOSE_TIMEOUT + GRACE, call)

    def _attempt(self, what: str, seconds: float, call: Callable[[], T], *, discard: Callable[[T], Any] | None) -> T:
        try:
            return self._watchdog.call(seconds, call, discard=discard)
        except EarshotError:
            raise
        except Exception as error:
            raise self._reaction(error, what) from error

    def _reaction(self, error: Exception, attempt: str) -> EarshotError:
        # The client wraps some errors in a plain KafkaError.
        causes = (error, *(each for each in error.args if isinstance(each, kafka_errors.KafkaError)))
        told = f"cannot {attempt} at {self._servers}: {error}"
        if any(isinstance(cause, REFUSED) for cause in causes):
            return Fatal(f"{told}; access is refused: check the settings --kafka-…, and what this user may do")
        if any(isinstance(cause, REPLACED) for cause in causes):
            return Retryable(
                f"{told}; another worker may run under the same --instance, "
                f"or the transaction took longer than {TRANSACTION_TIMEOUT:.0f} s"
            )
        if isinstance(error, ValueError) or any(isinstance(cause, UNUSABLE) for cause in causes):
            return Fatal(f"{told}; trying again cannot help")
        if attempt == CONNECT:
            told += f"; nobody answers there, or expects another --kafka-security-protocol than {self._protocol}"
        return Retryable(told)

    def _open(self, kind: Any, **settings: Any) -> Any:
        """Make a client; one that cannot connect leaves its thread and sockets behind unless they are closed here."""
        networks: list[Any] = []

        def network(**configs: Any) -> Any:
            selector = NetworkSelector(**configs)
            networks.append(KafkaNetClient(selector, _Connections(selector, **configs)))
            return networks[-1]

        def connect() -> Any:
            return kind(kafka_client=network, **(self._settings | settings))

        try:
            return self._attempt(CONNECT, CONNECT_TIMEOUT + GRACE, connect, discard=lambda client: client.close())
        except BaseException:
            for each in networks:
                self.farewell(each.close)
            raise


def _create(admin: Any, topics: Mapping[str, Mapping[str, Any]]) -> None:
    admin.create_topics(topics, timeout_ms=_ms(REQUEST_TIMEOUT), wait_for_metadata=True)


def _topic_configs(spec: TopicSpec) -> dict[str, str]:
    configs: dict[str, str] = {}
    if spec.compacted:
        configs |= {"cleanup.policy": "compact", "segment.bytes": str(STATE_SEGMENT_BYTES)}
    if spec.max_message_bytes is not None:
        configs["max.message.bytes"] = str(spec.max_message_bytes)
    return configs


def _send(producer: Any, message: Message) -> tuple[Message, Any]:
    """Hand a message to the client and return it with what will be its result."""
    return message, producer.send(
        message.topic,
        value=NOTHING if message.value is None else message.value,
        key=message.key,
        headers=list(message.headers),
        partition=message.partition,
        timestamp_ms=message.timestamp,
    )


def _delivered(producer: Any, results: Iterable[tuple[Message, Any]]) -> None:
    """Wait until every message is written, or raise why one was not."""
    producer.flush(DELIVERY_TIMEOUT)
    for message, result in results:
        if not result.is_done:
            raise kafka_errors.KafkaTimeoutError(
                f"a record for {message.topic!r} was not taken within {DELIVERY_TIMEOUT:.0f} s"
            )
        try:
            result.get()
        except (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError) as error:
            size = len(message.value or b"") + len(message.key or b"")
            raise Fatal(
                f"a record of {size} bytes is too large for topic {message.topic!r}: "
                "raise its max.message.bytes, or send shorter chunks"
            ) from error


def _records(polled: Mapping[Any, Sequence[Any]]) -> list[Record]:
    return [
        Record(
            each.topic,
            each.partition,
            each.offset,
            each.timestamp,
            each.key,
            each.value,
            tuple((name, value or b"") for name, value in each.headers),
        )
        for records in polled.values()
        for each in records
    ]


def _require_all(found: Mapping[str, int], topics: Sequence[str]) -> None:
    missing = [topic for topic in topics if topic not in found]
    if missing:
        raise Fatal(f"there is no topic {', '.join(map(repr, missing))}: create it with `earshot-worker topics`")


def _closing_producer(producer: Any) -> Callable[[], None]:
    return lambda: producer.close(timeout=CLOSE_TIMEOUT)


def _closing_consumer(consumer: Any) -> Callable[[], None]:
    return lambda: consumer.close(autocommit=False, timeout_ms=_ms(CLOSE_TIMEOUT))


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
