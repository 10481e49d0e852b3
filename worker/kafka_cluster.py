"""How one Kafka cluster is reached, by the clients of `worker.kafka_clients` and over `worker.kafka_wire`.

It owns the settings and the deadlines of all clients, what is asked of the cluster itself, and the
wording of Kafka's errors. It knows nothing of sessions, audio, models or states.

Many waits of the client have no limit, so every call that talks to the cluster is made through
`Cluster.attempt`, which gives it a deadline and words its errors. A call that misses its deadline
is left behind, and may end late: `worker.broker_kafka` says why that harms nothing.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any, Final, TypeVar

from kafka import KafkaAdminClient, OffsetSpec
from kafka import errors as kafka_errors
from kafka.admin import ConfigResource, ConfigResourceType, MemberToRemove, TransactionState
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.net.compat import KafkaNetClient
from kafka.net.sasl.oauth import AbstractTokenProvider

from worker.errors import EarshotError, Fatal, Retryable
from worker.kafka_clients import (
    CLOSE_TIMEOUT,
    DELIVERY_TIMEOUT,
    REQUEST_TIMEOUT,
    TRANSACTION_TIMEOUT,
    Consumer,
    Partition,
    Producer,
    ms,
)
from worker.kafka_wire import REFUSED, Connections, Selector
from worker.messages import Topics
from worker.security import Security, read_secret
from worker.watchdog import Watchdog

T = TypeVar("T")

# It narrates its own retries; what matters of them comes back as an error. At the level DEBUG it also tells passwords.
logging.getLogger("kafka").setLevel(logging.CRITICAL)

# Seconds. Each bound says which failure it ends.
CONNECT_TIMEOUT: Final = 10.0  # servers that do not answer when a client is made
INIT_TIMEOUT: Final = 30.0  # a coordinator that cannot finish what the last session left open
GRACE: Final = 5.0  # a client that does not keep the bounds above, which it should have kept by so long after them

# Bytes. Bounds on memory; a single larger record still comes through.
FETCH_BYTES: Final = 8 << 20  # from all partitions of one broker: about 250 chunks of a second of 16 kHz PCM
PARTITION_FETCH_BYTES: Final = 2 << 20  # so that one busy partition leaves room for others; alone it has 60 chunks
REQUEST_BYTES: Final = 32 << 20  # what is too large is the topic's max.message.bytes to say, not ours
BATCH_BYTES: Final = 256 << 10  # a transaction in few requests; memory is taken only as a batch fills

LINGER: Final = (
    0.1  # seconds; until all of a transaction is written, so that it goes in few requests; `deliver` ends it
)
ASK_AGAIN: Final = 0.2  # seconds; until a coordinator has read its log, after a start or a move
BACKOFF: Final = 0.02  # seconds; a new transaction waits this long for the last one's markers, not the default 0.1

CONNECT: Final = "connect"  # the one attempt whose failure may have to do with the settings

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

    def members(self, group: str) -> dict[str, set[int]]:
        """Return the ids of the members of a group, as its coordinator knows them, and the partitions that each has."""

        def look(admin: Any) -> dict[str, set[int]]:
            (found,) = admin.describe_groups([group]).values()
            if found["error"] is not None:
                raise kafka_errors.KafkaError(found["error"])
            return {each["member_id"]: _partitions(each["member_assignment"]) for each in found["members"]}

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
            selector = Selector(**configs)
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


def _partitions(assignment: Any) -> set[int]:
    """Return the partitions of an assignment, of a single topic; one that is still to come is empty, or of bytes."""
    topics = assignment["assigned_partitions"] if isinstance(assignment, Mapping) else []
    return {partition for each in topics for partition in each["partitions"]}


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
        named = " and no topic ".join(map(repr, missing))
        raise Fatal(f"there is no topic {named}; create the topics with `earshot-worker topics`")
