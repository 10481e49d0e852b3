"""How one Kafka cluster is reached: the file that imports kafka, with `worker.kafka_wire` under it.

It owns every client with its settings and timeouts, what the client does not do by itself, and the
wording of Kafka's errors. It knows nothing of sessions, audio, models or states.

Many waits of the client have no limit, so every call that talks to the cluster is made through
`Cluster.attempt`, which gives it a deadline and words its errors. A call that misses its deadline
is left behind, and may end late: `worker.broker_kafka` says why that harms nothing.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any, Final, TypeVar

from kafka import (
    ConsumerRebalanceListener,
    KafkaAdminClient,
    KafkaConsumer,
    KafkaProducer,
    OffsetAndMetadata,
    OffsetSpec,
    TopicPartition,
)
from kafka import errors as kafka_errors
from kafka.admin import ConfigResource, ConfigResourceType, MemberToRemove, TransactionState
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.net.compat import KafkaNetClient
from kafka.net.sasl.oauth import AbstractTokenProvider
from kafka.net.selector import NetworkSelector
from kafka.producer.producer_batch import ProducerBatch
from kafka.record.memory_records import MemoryRecordsBuilder

from worker.errors import EarshotError, Fatal, Retryable
from worker.kafka_wire import REFUSED, Connections
from worker.messages import Message, Record, Topics
from worker.security import Security, read_secret
from worker.watchdog import Watchdog

T = TypeVar("T")

# It narrates its own retries; what matters of them comes back as an error. At the level DEBUG it also tells passwords.
logging.getLogger("kafka").setLevel(logging.CRITICAL)

# Seconds. Each bound says which failure it ends.
CONNECT_TIMEOUT: Final = 10.0  # servers that do not answer when a client is made
REQUEST_TIMEOUT: Final = 10.0  # a broker that takes a request and never answers it
INIT_TIMEOUT: Final = 30.0  # a coordinator that cannot finish what the last session left open
DELIVERY_TIMEOUT: Final = 15.0  # records that a partition's leader does not take
TRANSACTION_TIMEOUT: Final = 30.0  # a session that was killed: what it left open holds up every reader of committed;
# and one that hangs, for what it does in a transaction later than that the cluster has aborted
CLOSE_TIMEOUT: Final = 2.0  # a farewell that nobody answers
GRACE: Final = 5.0  # a client that does not keep the bounds above, which it should have kept by so long after them

# Bytes. Bounds on memory; a single larger record still comes through.
FETCH_BYTES: Final = 8 << 20  # from all partitions of one broker: about 250 chunks of a second of 16 kHz PCM
PARTITION_FETCH_BYTES: Final = 2 << 20  # so that one busy partition leaves room for others; alone it has 60 chunks
REQUEST_BYTES: Final = 32 << 20  # what is too large is the topic's max.message.bytes to say, not ours
BATCH_BYTES: Final = 256 << 10  # a transaction in few requests; memory is taken only as a batch fills

LINGER: Final = 0.1  # seconds; batches fill while the transaction is written, and its flush ends the wait
ASK_AGAIN: Final = 0.2  # seconds; until a coordinator has read its log, after a start or a move
BACKOFF: Final = 0.02  # seconds; a new transaction waits this long for the last one's markers, not the default 0.1

CONNECT: Final = "connect"  # the one attempt whose failure may have to do with the settings

# What a session has to know of the client by name.
Partition: Final = TopicPartition
RebalanceListener: Final = ConsumerRebalanceListener
NoOffset: Final = kafka_errors.NoOffsetForPartitionError
OffsetOutOfRange: Final = kafka_errors.OffsetOutOfRangeError

COMMITTED: Final = (TransactionState.PREPARE_COMMIT, TransactionState.COMPLETE_COMMIT)
NOT_UP_YET: Final = (
    kafka_errors.CoordinatorLoadInProgressError,
    kafka_errors.CoordinatorNotAvailableError,
    kafka_errors.NotCoordinatorError,
    kafka_errors.LeaderNotAvailableError,
    kafka_errors.NotLeaderForPartitionError,
)
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


class Cluster:
    """How one cluster is reached: makes its clients, bounds what they do, and words their errors."""

    def __init__(self, servers: Sequence[str], security: Security) -> None:
        self._watchdog = Watchdog()
        self._servers = ", ".join(servers)
        self._protocol = security.protocol
        self._settings: dict[str, Any] = {
            "bootstrap_servers": list(servers),
            "bootstrap_timeout_ms": ms(CONNECT_TIMEOUT),
            "request_timeout_ms": ms(REQUEST_TIMEOUT),
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
        """Make a client that asks, and changes what is not records."""
        return self._open(KafkaAdminClient, **settings)

    def consumer(self, **settings: Any) -> Consumer:
        """Make a consumer of committed records; also for plain topics: only so does it wait for pending offsets."""
        return self._open(
            Consumer,
            **{
                "isolation_level": "read_committed",
                "enable_auto_commit": False,
                "auto_offset_reset": "earliest",
                "allow_auto_create_topics": False,
                "fetch_max_bytes": FETCH_BYTES,
                "max_partition_fetch_bytes": PARTITION_FETCH_BYTES,
                "partition_assignment_strategy": [CooperativeStickyAssignor],
                "metrics_enabled": False,
                **settings,
            },
        )

    def producer(self, **settings: Any) -> Producer:
        """Make a producer; how large a record may be is for the topics to say."""
        return self._open(
            Producer,
            compression_type="lz4",
            linger_ms=ms(LINGER),
            batch_size=BATCH_BYTES,
            max_request_size=REQUEST_BYTES,
            max_block_ms=ms(INIT_TIMEOUT),
            delivery_timeout_ms=ms(DELIVERY_TIMEOUT),
            retry_backoff_ms=ms(BACKOFF),
            allow_auto_create_topics=False,
            metrics_enabled=False,
            **settings,
        )

    def create(self, topics: Mapping[str, Mapping[str, Any]]) -> None:
        """Create topics, each with its ``num_partitions`` and ``configs``, and wait until they are known."""
        self.ask(
            "create topics",
            lambda admin: admin.create_topics(topics, timeout_ms=ms(REQUEST_TIMEOUT), wait_for_metadata=True),
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
        return [Partition(topic, partition) for topic in topics for partition in range(found[topic])]

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

    def require_settings(self, topics: Topics) -> None:
        """Raise Fatal if a topic that exists cannot hold what is written to it, as far as the cluster tells."""
        wanted = [spec for spec in topics.layout(1) if spec.compacted or spec.max_message_bytes is not None]

        def look(admin: Any) -> dict[str, dict[str, Any]]:
            found = admin.describe_configs(
                [ConfigResource(ConfigResourceType.TOPIC, spec.name, None) for spec in wanted], config_filter="all"
            )
            return dict(found["topic"])

        found = self.ask("look at the settings of topics", look)
        for spec in wanted:
            settings = {name: each["value"] for name, each in found[spec.name].items()}
            policy, size = settings.get("cleanup.policy"), settings.get("max.message.bytes")
            if spec.compacted and policy is not None and "compact" not in policy.split(","):
                raise Fatal(
                    f"topic {spec.name!r} has cleanup.policy={policy}, expected compact: states that have not changed "
                    "for long would be deleted. Set it, or delete the topic and create it with `earshot-worker topics`"
                )
            if spec.max_message_bytes is not None and size is not None and int(size) < spec.max_message_bytes:
                raise Fatal(
                    f"topic {spec.name!r} has max.message.bytes={size}, expected at least {spec.max_message_bytes}: "
                    "a rejected record goes there as it was, with the reason. Raise it"
                )

    def was_committed(self, transactional_id: str) -> bool | None:
        """Return how the last transaction of a producer ends or has ended; None if there was none, or nobody says.

        The cluster says it only until the next producer of that id is initialised, and forgets it then.
        """

        def look(admin: Any) -> bool | None:
            try:
                found = admin.describe_transactions([transactional_id])[transactional_id]
            except (kafka_errors.TransactionalIdNotFoundError, kafka_errors.UnsupportedVersionError):
                return None
            return None if found.state == TransactionState.EMPTY else found.state in COMMITTED

        return self.ask("look at the last transaction", look)

    def left_open(self, producer_id: int, topics: Sequence[str]) -> tuple[list[Any], list[Any]]:
        """Return in which partitions a producer has an open transaction, and where that cannot be seen.

        Only those of ``topics`` count that may be written; where they may not be read, it cannot be seen.
        """

        def look(admin: Any) -> tuple[list[Any], list[Any]]:
            seen: list[Any] = []
            unseen: list[Any] = []
            for topic in admin.describe_topics(list(topics)):
                if topic["error_code"] == 0 and _may(topic, "WRITE"):
                    logs = [Partition(topic["name"], each["partition_index"]) for each in topic["partitions"]]
                    (seen if _may(topic, "READ") else unseen).extend(logs)
            try:
                producers = admin.describe_producers(seen)
            except kafka_errors.UnsupportedVersionError:
                return [], [*seen, *unseen]
            return [log for log in seen if _has_open(producers[log], producer_id)], unseen

        return self.ask("look for open transactions", look)

    def transactional_ids(self, prefix: str) -> list[str]:
        """Return those that begin with ``prefix`` and that the cluster remembers."""

        def look(admin: Any) -> list[str]:
            try:
                found = admin.list_transactions().values()
            except kafka_errors.UnsupportedVersionError:
                return []
            return sorted(
                each.transactional_id for listed in found for each in listed if each.transactional_id.startswith(prefix)
            )

        return self.ask("look for transactions", look)

    def members(self, group: str) -> set[str]:
        """Return the ids of the members of a group, as its coordinator knows them."""

        def look(admin: Any) -> set[str]:
            (found,) = admin.describe_groups([group]).values()
            if found["error"] is not None:
                raise kafka_errors.KafkaError(found["error"])
            return {each["member_id"] for each in found["members"]}

        return self.ask("look at the group", look)

    def show_out(self, group: str, member: str, instance: str) -> None:
        """End a membership, for which a coordinator that does not answer is not waited for long."""
        with self.admin(bootstrap_timeout_ms=ms(CLOSE_TIMEOUT), request_timeout_ms=ms(CLOSE_TIMEOUT)) as admin:
            admin.remove_group_members(group, [MemberToRemove(member_id=member, group_instance_id=instance)])

    def attempt(
        self, what: str, seconds: float, call: Callable[[], T], *, discard: Callable[[T], Any] | None = None
    ) -> T:
        """Let a client do ``what`` within ``seconds``, ``discard`` what comes later, and turn its errors into ours."""
        return self.start(what, seconds, call, discard=discard)()

    def start(
        self, what: str, seconds: float, call: Callable[[], T], *, discard: Callable[[T], Any] | None = None
    ) -> Callable[[], T]:
        """Do as `attempt` does, but return at once; what is returned waits for the end of it."""
        under_way = self._watchdog.start(seconds, call, discard=discard)

        def result() -> T:
            try:
                return under_way()
            except EarshotError:
                raise
            except Exception as error:
                raise self._reaction(error, what) from error

        return result

    def ask(self, what: str, question: Callable[[Any], T]) -> T:
        """Let an admin client of its own answer ``question``, and wait a little for a broker that is not up yet."""

        def ask() -> T:
            deadline = time.monotonic() + REQUEST_TIMEOUT
            with self.admin() as admin:
                while True:
                    try:
                        return question(admin)
                    except NOT_UP_YET:
                        if time.monotonic() > deadline:
                            raise
                    time.sleep(ASK_AGAIN)

        return self.attempt(what, CONNECT_TIMEOUT + 2 * REQUEST_TIMEOUT + GRACE, ask)

    def farewell(self, call: Callable[[], Any]) -> None:
        """Let a client end something, for which nobody waits long and whose failure nobody minds."""
        with contextlib.suppress(EarshotError):
            self.attempt("close", CLOSE_TIMEOUT + GRACE, call)

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

    def _open(self, kind: Callable[..., T], **settings: Any) -> T:
        """Make a client; one that cannot connect leaves its thread and sockets behind unless they are closed here."""
        networks: list[Any] = []

        def network(**configs: Any) -> Any:
            selector = NetworkSelector(**configs)
            networks.append(KafkaNetClient(selector, Connections(selector, **configs)))
            return networks[-1]

        def connect() -> T:
            return kind(kafka_client=network, **(self._settings | settings))

        try:
            client: T = self.attempt(CONNECT, CONNECT_TIMEOUT + GRACE, connect, discard=methodcaller("close"))
        except BaseException:
            for each in networks:
                self.farewell(each.close)
            raise
        return client


class Written:
    """A message that was handed to the client, and the batch it is in: where, and what will be its result.

    It stands for the client's own future of a record.
    """

    __slots__ = ("_future", "_index", "message")

    def __init__(self, message: Message, future: Any, index: int) -> None:
        self.message = message
        self._future = future
        self._index = index

    def rebind(self, future: Any, index: int) -> None:
        """Be in another batch: the client calls it when it divides the one that this is in."""
        former, self._future, self._index = self._future, future, index
        former._latch.set()  # noqa: SLF001 - it is never done; whoever waits for it has to wait for the new one

    def wait(self, deadline: float) -> None:
        """Return when the message is written, or raise why it was not."""
        while not self._future.is_done:
            if not self._future.wait(max(0.0, deadline - time.monotonic())):
                raise kafka_errors.KafkaTimeoutError(
                    f"a record for {self.message.topic!r} was not taken within {DELIVERY_TIMEOUT:.0f} s"
                )
        _, _, why = self._future.value
        if why is not None:
            self._raise(why(self._index))

    def _raise(self, error: Exception) -> None:
        if isinstance(error, (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError)):
            size = len(self.message.value or b"") + len(self.message.key or b"")
            raise Fatal(
                f"a record of {size} bytes is too large for topic {self.message.topic!r}: "
                "raise its max.message.bytes, or send shorter chunks"
            ) from error
        raise error


class Producer(KafkaProducer):  # type: ignore[misc]  # the client ships no types
    """A producer of messages that can be closed.

    The client's own flush raises at its timeout, and close then leaves its thread.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._epochs: dict[Any, int | None] = {}

    def flush(self, timeout: float | None = None) -> None:
        """Wait at most ``timeout`` seconds for each batch; what was not delivered says so in its result.

        The client calls it when it closes, and takes a batch that was divided meanwhile for an unknown error.
        """
        with contextlib.suppress(kafka_errors.KafkaTimeoutError, kafka_errors.UnknownError):
            super().flush(timeout)

    def write(self, messages: Iterable[Message]) -> list[Written]:
        """Take messages, and send them in the background; of each partition in the order in which they come.

        The client takes one message at a time, asks of each all that it has asked of the last one, and has a result
        for each that calls back. Here those of a partition are put into its batches at once: a quarter of the time.
        """
        groups: dict[Any, list[Message]] = {}
        places: dict[tuple[str, int | None, bytes | None], Any] = {}
        for message in messages:
            target = message.topic, message.partition, message.key
            if target not in places:
                places[target] = self._place(*target)
            groups.setdefault(places[target], []).append(message)
        written: list[Written] = []
        for place, group in groups.items():
            if self._transaction_manager.is_transactional():
                self._transaction_manager.maybe_add_partition_to_transaction(place)
            for batch in self._batches(place, group):
                self._enqueue(batch)
                written += batch._record_futures  # noqa: SLF001 - they are ours, see `_batches`
        self._sender.wakeup()
        return written

    def deliver(self, written: Iterable[Written]) -> None:
        """Wait until every message is written, or raise why one was not."""
        deadline = time.monotonic() + DELIVERY_TIMEOUT
        self._accumulator.begin_flush()
        try:
            self._sender.wakeup()
            for each in written:
                each.wait(deadline)
        finally:
            self._accumulator._flushes_in_progress.decrement()  # noqa: SLF001 - so does the client, which waits itself

    def _place(self, topic: str, partition: int | None, key: bytes | None) -> Any:
        """Return the partition that is meant, or the one that the key belongs to."""
        self._wait_on_metadata(topic, self.config["max_block_ms"])
        return Partition(topic, self._partition(topic, partition, key, None, key, None))

    def _batches(self, place: Any, messages: Iterable[Message]) -> Iterator[ProducerBatch]:
        """Put messages for one partition into as many batches as they need."""
        batch = self._batch(place)
        for message in messages:
            content = message.timestamp, message.key, message.value, message.headers
            taken = batch.records.append(*content)
            if taken is None:  # it is full
                yield batch
                batch = self._batch(place)
                taken = batch.records.append(*content)
            self._ensure_valid_record_size(taken.size)
            # What the client moves to another batch, if a topic does not take this one and it has to be divided.
            batch._record_futures.append(Written(message, batch.produce_future, taken.offset))  # noqa: SLF001
        yield batch

    def _batch(self, place: Any) -> ProducerBatch:
        config = self._accumulator.config
        records = MemoryRecordsBuilder(config["message_version"], config["compression_attrs"], config["batch_size"])
        return ProducerBatch(place, records)

    def _enqueue(self, batch: ProducerBatch) -> None:
        """Hand a batch to the thread that sends."""
        accumulator, place = self._accumulator, batch.topic_partition
        with accumulator._tp_lock(place):  # noqa: SLF001 - there is no other way in
            if accumulator._closed:  # noqa: SLF001 - after this it takes no more
                raise kafka_errors.IllegalStateError("the producer is closed")
            accumulator._batches[place].append(batch)  # noqa: SLF001
            accumulator._incomplete.add(batch)  # noqa: SLF001

    def send_offsets(self, topic: str, offsets: Mapping[int, int], member: Any) -> None:
        """Send, for each partition of ``topic``, the next offset that the group of ``member`` has to read."""
        self.send_offsets_to_transaction(
            {Partition(topic, partition): OffsetAndMetadata(offset, "", -1) for partition, offset in offsets.items()},
            member,
        )

    @property
    def id(self) -> int:
        """The number under which the cluster knows this producer and those before it of its transactional id."""
        number: int = self._transaction_manager.producer_id_and_epoch.producer_id
        return number

    def settle(self, partitions: Iterable[Any], group: str, *, commit: bool) -> None:
        """End what the producer before has left open in ``partitions`` and in the offsets of ``group``.

        The cluster holds its last transaction for complete by now. But a broker that sees a partition
        without a leader may pass over the marker that ends the transaction there (KAFKA-20734, Apache
        Kafka 4.1 to 4.3), and then it stays open for ever, for readers of committed records and for the
        offsets. The marker of an empty transaction ends it as well, so this one has to end as that one did.
        """
        self.begin_transaction()
        for partition in partitions:
            self._transaction_manager.maybe_add_partition_to_transaction(partition)
        self.send_offsets_to_transaction({}, group)  # comes back when the partitions are added, too
        if commit:
            self.commit_transaction()
        else:
            self.abort_transaction()

    def moved(self) -> bool:
        """Return whether a partition that is written to has another leader than when this was last asked."""
        known = self._metadata
        epochs = {
            each: known.leader_epoch_for_partition(each)
            for topic in known.topics()
            for each in (Partition(topic, number) for number in known.partitions_for_topic(topic) or ())
        }
        moved = any(self._epochs.get(each, epoch) != epoch for each, epoch in epochs.items())
        self._epochs |= epochs
        return moved

    def end(self) -> None:
        """Close within `CLOSE_TIMEOUT`."""
        self.close(timeout=CLOSE_TIMEOUT)


class Consumer(KafkaConsumer):  # type: ignore[misc]  # the client ships no types
    """A consumer of records."""

    def start(self, partitions: Sequence[Any], *, from_beginning: bool = True) -> None:
        """Read these partitions from one end of their logs, or the other."""
        self.assign(partitions)
        seek = self.seek_to_beginning if from_beginning else self.seek_to_end
        seek(*partitions)

    def locate(self, partitions: Iterable[Any]) -> None:
        """Wait until the client knows the offset of each partition, which it looks for only when it needs it."""
        for partition in partitions:
            if self.position(partition, timeout_ms=ms(REQUEST_TIMEOUT)) is None:
                raise kafka_errors.KafkaTimeoutError(f"no offset of {partition} within {REQUEST_TIMEOUT:.0f} s")

    def records(self, timeout: float, max_records: int | None = None) -> list[Record]:
        """Poll for at most ``timeout`` seconds."""
        polled = self.poll(timeout_ms=ms(timeout), max_records=max_records)
        self._fetch_ahead(polled)
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

    def _fetch_ahead(self, topic_partitions: Iterable[Any]) -> None:
        """Ask for what comes next, if there is more than was polled: it comes while this is worked on.

        The client asks by the same rule, that no partition of the last fetch is left untouched, but only when it is
        polled, and then waits. Of records that trickle in nothing is asked ahead: the first of them would be brought
        alone, the rest only after it, and what else that broker is asked would wait behind the question.
        """
        fetcher, places = self._fetcher, self._subscription.assignment
        # The position, and not the last record: it has passed the marker that ends a transaction.
        more = any(places[each].position.offset < (self.highwater(each) or 0) for each in topic_partitions)
        if more and not fetcher._completed_fetches:  # noqa: SLF001 - there is no other way in
            fetcher.send_fetches()

    def resume_joining(self) -> None:
        """See a rebalance through that was under way when the last poll ended.

        The client forgets about it if its reason has gone by then, as when topics have changed and are
        known now: it would send no heartbeat any more and wait to be shown out. And it takes no notice
        of a join that came to its end between two polls, but begins another, which costs all others
        one too: members that are busy between their polls would keep each other from ever serving.
        """
        coordinator = self._coordinator
        if coordinator.rejoining:
            coordinator.request_rejoin()
            if coordinator._join_task is not None:  # noqa: SLF001 - nothing else keeps it
                coordinator._join_task = _Kept(coordinator._join_task)  # noqa: SLF001

    def rebalances(self) -> bool:
        """Return whether the next poll will join the group anew, as far as is known."""
        return bool(self._coordinator.rejoining or self._coordinator.need_rejoin())

    def unplaced(self) -> frozenset[int]:
        """Return the partitions that are ours, and of which it is not known yet where to go on from."""
        placed = self._subscription.has_valid_position
        return frozenset(each.partition for each in self.assignment() if not placed(each))

    def end(self) -> None:
        """Close within `CLOSE_TIMEOUT`, and commit nothing."""
        self.close(autocommit=False, timeout_ms=ms(CLOSE_TIMEOUT))


class _Kept:
    """A join under way that is waited for even if it has ended: the client looks at ``is_done`` before it does so."""

    is_done: Final = False

    def __init__(self, join: Any) -> None:
        self.add_callback = join.add_callback
        self.add_errback = join.add_errback


def ms(seconds: float) -> int:
    """Return seconds as the client wants them."""
    return round(seconds * 1000)


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


def _may(topic: Mapping[str, Any], operation: str) -> bool:
    """Return whether a topic's description allows it; a broker that does not say will refuse in time."""
    return operation in topic.get("authorized_operations", (operation,))


def _has_open(state: Any, producer_id: int) -> bool:
    return any(
        each.producer_id == producer_id and each.current_transaction_start_offset >= 0
        for each in state.active_producers
    )


def _require_all(found: Mapping[str, int], topics: Sequence[str]) -> None:
    missing = [topic for topic in topics if topic not in found]
    if missing:
        raise Fatal(f"there is no topic {', '.join(map(repr, missing))}: create it with `earshot-worker topics`")
