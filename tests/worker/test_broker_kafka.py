"""What is particular to Kafka; that it keeps the contract of `worker.broker` is for tests/contract to show."""

from __future__ import annotations

import contextlib
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from confluent_kafka import Consumer, Producer
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType

from tests import apache_kafka
from tests.worker.sessions import PARTITIONS, PATIENCE, committed, hurry, poll_for, process, sounds, wait_for
from worker import broker_kafka, kafka_cluster
from worker.broker_kafka import KafkaBroker, KafkaSession, LostOffset
from worker.errors import BadRecord, Fatal, Retryable
from worker.messages import Message, Record, Topics, TopicSpec, rejection_message


def share(*sessions: KafkaSession) -> dict[KafkaSession, frozenset[int]]:
    """Poll until each has its share of the partitions, and return what each has."""
    owned: dict[KafkaSession, frozenset[int]] = dict.fromkeys(sessions, frozenset())

    def shared() -> bool:
        for session in sessions:
            polled = session.poll(0.1, 10)
            owned[session] = owned[session] - polled.revoked | polled.assigned
        return all(len(each) == PARTITIONS // len(sessions) for each in owned.values())

    wait_for(shared)
    return owned


def lead(one: KafkaSession, two: KafkaSession) -> tuple[KafkaSession, KafkaSession]:
    """Let two sessions share the partitions, and return the leader of the group first."""
    share(one, two)
    return (two, one) if one._consumer._coordinator._assignment_snapshot is None else (one, two)


def transactional(address: str) -> Producer:
    producer = Producer({"bootstrap.servers": address, "transactional.id": uuid.uuid4().hex})
    producer.init_transactions(PATIENCE)
    return producer


# -- members of a group ---------------------------------------------------------------------------


def test_members_share_the_partitions_and_process_nothing_twice(
    broker: KafkaBroker, topics: Topics, group: str
) -> None:
    """A second member takes half of the partitions while both work, and gives them back when it leaves."""
    members: dict[KafkaSession, set[int]] = {}
    rounds = 0

    def each_owns(count: int) -> bool:
        """Let every member work on a record of each partition, and look at what it owns afterwards."""
        nonlocal rounds
        rounds += 1
        broker.publish(sounds(topics, PARTITIONS))
        for session, owned in members.items():
            polled = session.poll(0.1, 10)
            owned.difference_update(polled.revoked)
            owned.update(polled.assigned)
            assert {record.partition for record in polled.records} <= owned
            if polled.records:
                process(session, topics, polled.records)
        return all(len(owned) == count for owned in members.values())

    with closing(broker.join(group, "one")) as one:
        members[one] = set()
        wait_for(lambda: each_owns(PARTITIONS))
        with closing(broker.join(group, "two")) as two:
            members[two] = set()
            wait_for(lambda: each_owns(PARTITIONS // 2))
            assert set(range(PARTITIONS)) == members[one] | members[two]
            for _ in range(5):
                each_owns(PARTITIONS // 2)
            del members[two]
        left = time.monotonic()
        wait_for(lambda: each_owns(PARTITIONS))
        # It was shown out of the group, not waited for until it was thought dead.
        assert time.monotonic() - left < broker_kafka.SESSION_TIMEOUT / 2
        expected = Counter(b"%d/%d" % (partition, n) for partition in range(PARTITIONS) for n in range(rounds))
        while records := one.poll(2.0, 100).records:
            process(one, topics, records)

    assert expected == Counter(record.value for record in committed(broker, topics.predictions_out))


def test_a_successor_of_the_same_instance_takes_over_at_once(broker: KafkaBroker, topics: Topics, group: str) -> None:
    """The partitions of a worker that was killed wait for no timeout; its remains neither commit nor disturb."""
    broker.publish(sounds(topics, PARTITIONS))
    old = broker.join(group, "one")
    poll_for(old, PARTITIONS)

    started = time.monotonic()
    with closing(broker.join(group, "one")) as new:
        records = poll_for(new, PARTITIONS)
        assert time.monotonic() - started < broker_kafka.SESSION_TIMEOUT
        with pytest.raises(Retryable, match="--instance"):
            process(old, topics, records)
        old.close()
        process(new, topics, records)
        broker.publish(sounds(topics, PARTITIONS))
        deadline = time.monotonic() + 2 * broker_kafka.HEARTBEAT_INTERVAL
        while time.monotonic() < deadline:
            assert frozenset() == new.poll(0.2, 100).revoked

    assert PARTITIONS == len(committed(broker, topics.predictions_out))


def test_a_rebalance_that_outlasts_a_poll_is_seen_through(broker: KafkaBroker, group: str) -> None:
    """Its reason has gone when the next poll comes, and the member serves all the same, long before it is missed."""
    with closing(broker.join(group, "one")) as one, closing(broker.join(group, "two")) as two:
        leader, follower = lead(one, two)
        coordinator = leader._consumer._coordinator
        coordinator._assignment_snapshot = {}  # as if the topics had changed
        # The follower does not poll meanwhile, and so cannot answer.
        wait_for(lambda: leader.poll(0.1, 1) is None or coordinator.rejoining)
        coordinator._assignment_snapshot = coordinator._metadata_snapshot
        with ThreadPoolExecutor(1) as threads:
            following = threads.submit(follower.poll, broker_kafka.SILENCE / 2, 1)
            leader.poll(broker_kafka.SILENCE / 2, 1)
            following.result()
        assert not coordinator.rejoining


def test_a_rebalance_that_ends_between_two_polls_is_over(broker: KafkaBroker, group: str) -> None:
    """The member takes up what it was given then: joining once more would make all others join once more too."""
    with closing(broker.join(group, "one")) as one, closing(broker.join(group, "two")) as two:
        leader, follower = lead(one, two)
        coordinator = leader._consumer._coordinator
        coordinator._assignment_snapshot = {}  # as if the topics had changed
        # The follower does not poll meanwhile, and so cannot answer.
        wait_for(lambda: leader.poll(0.1, 1) is None or coordinator._join_task is not None)
        coordinator._assignment_snapshot = coordinator._metadata_snapshot
        under_way = coordinator._join_task
        wait_for(lambda: follower.poll(0.1, 1) is None or under_way.is_done)
        generation = coordinator._generation.generation_id
        leader.poll(0.1, 1)
        assert not coordinator.rejoining
        assert generation == coordinator._generation.generation_id


def test_a_session_that_failed_is_followed_without_a_rebalance(broker: KafkaBroker, group: str) -> None:
    """The next one of the instance has its partitions at once, and nobody else loses or gets any."""
    with closing(broker.join(group, "other")) as other:
        with closing(broker.join(group, "one")) as session:
            owned = share(session, other)
            with pytest.raises(Retryable, match="as it must"), session.transaction():
                raise Retryable("as it must")
        before = other._consumer.group_metadata()
        with closing(broker.join(group, "one")) as successor:
            polled = successor.poll(5.0, 10)
            while not polled.assigned:
                polled = successor.poll(5.0, 10)
            assert owned[session] == polled.assigned
            assert (frozenset(), frozenset()) == other.poll(2 * broker_kafka.HEARTBEAT_INTERVAL, 10)[1:3]
            assert before == other._consumer.group_metadata()


def test_a_rebalance_that_a_session_leaves_half_done_is_completed(broker: KafkaBroker, group: str) -> None:
    """It has given partitions up and has not joined again, which would give them to the other member.

    Now and then it is quicker than this test and has joined again, and then there is nothing to complete.
    """
    with closing(broker.join(group, "one")) as session:
        share(session)
        with closing(broker.join(group, "two")) as other:
            with ThreadPoolExecutor(1) as threads:
                joining = threads.submit(wait_for, lambda: other.poll(0.1, 10) is None or other._consumer.has_joined())
                wait_for(lambda: bool(session.poll(0.1, 10).revoked))
                joining.result()
            session._farewells.remove(session._leave)  # as one that was killed, or whose commit was refused
            session.close()

            def owned() -> set[int]:
                for each in (successor, other):
                    each.poll(0.1, 10)
                return {at.partition for each in (successor, other) for at in each._consumer.assignment()}

            with closing(broker.join(group, "one")) as successor:
                wait_for(lambda: owned() == set(range(PARTITIONS)))


@pytest.mark.parametrize("aware", [False, True], ids=["unaware", "aware"])
def test_a_member_that_was_shown_out_cannot_commit(
    broker: KafkaBroker, topics: Topics, group: str, *, aware: bool
) -> None:
    """Neither before its heartbeat tells it, nor after, when it has no generation that the group could refuse."""
    broker.publish(sounds(topics, PARTITIONS))
    with closing(broker.join(group, "one")) as session:
        records = poll_for(session, PARTITIONS)
        session._leave()
        if aware:
            wait_for(lambda: session._consumer.group_metadata().generation_id <= 0)
        with pytest.raises(Retryable, match=r"generation|group metadata"):
            process(session, topics, records)

    with closing(broker.join(group, "one")) as session:
        assert PARTITIONS == len(poll_for(session, PARTITIONS))
    assert [] == committed(broker, topics.predictions_out)


def test_a_poll_says_whether_more_is_waiting(broker: KafkaBroker, topics: Topics, group: str) -> None:
    """More than it may bring is; when all has been brought, nothing is."""
    broker.publish(sounds(topics, 3 * PARTITIONS))
    with closing(broker.join(group, "one")) as session:
        told: list[tuple[int, bool]] = []

        def all_polled() -> bool:
            polled = session.poll(0.2, PARTITIONS)
            told.extend([(len(polled.records), polled.more)] if polled.records else [])
            return sum(count for count, _ in told) == 3 * PARTITIONS

        wait_for(all_polled)

    assert told[0][1]
    assert not told[-1][1]


def test_lost_partitions_are_reported_and_won_back(broker: KafkaBroker, group: str) -> None:
    """A member that was shown out while idle reports its partitions as revoked and as assigned again."""
    with closing(broker.join(group, "one")) as session:
        wait_for(lambda: bool(session.poll(0.2, 1).assigned))
        session._leave()
        assigned: set[int] = set()
        revoked: set[int] = set()

        def won_back() -> bool:
            polled = session.poll(0.2, 1)
            revoked.update(polled.revoked)
            assigned.update(polled.assigned)
            return len(assigned) == PARTITIONS

        wait_for(won_back)
        assert set(range(PARTITIONS)) == revoked


# -- committed, aborted, undecided ----------------------------------------------------------------


def test_follow_never_sees_what_was_aborted(broker: KafkaBroker, topics: Topics, kafka_address: str) -> None:
    """Whoever aborts: nothing of it shows, nor does what is undecided, and what comes after is not held up."""
    producer = transactional(kafka_address)
    for value in (b"aborted", b"committed"):
        producer.begin_transaction()
        for partition in range(PARTITIONS):
            producer.produce(topics.predictions_out, value=value, partition=partition)
        producer.flush()
        assert [] == committed(broker, topics.predictions_out)
        if value == b"aborted":
            producer.abort_transaction()
        else:
            producer.commit_transaction()

    assert [b"committed"] * PARTITIONS == [record.value for record in committed(broker, topics.predictions_out)]


def test_restore_passes_over_what_is_not_a_record(
    broker: KafkaBroker, topics: Topics, group: str, kafka_address: str
) -> None:
    """Markers and aborted states at the end of the log are read over: they neither show nor hold `restore` up."""
    broker.publish([Message(topics.drift_state, b"source", b"good", partition=1)])
    producer = transactional(kafka_address)
    for _ in range(2):
        producer.begin_transaction()
        for partition in range(PARTITIONS):
            producer.produce(topics.drift_state, key=b"source", value=b"aborted", partition=partition)
        producer.flush()
        producer.abort_transaction()

    with closing(broker.join(group, "one")) as session:
        started = time.monotonic()
        assert [b"good"] == [record.value for record in session.restore(range(PARTITIONS))]
        assert time.monotonic() - started < 5.0
        assert [] == list(session.restore([]))


def test_restore_waits_for_what_is_undecided(
    broker: KafkaBroker, topics: Topics, group: str, kafka_address: str
) -> None:
    """A former owner's offsets may be committed before its states can be read: `restore` waits for them."""
    producer = transactional(kafka_address)
    producer.begin_transaction()
    producer.produce(topics.drift_state, key=b"source", value=b"state", partition=0)
    producer.flush()

    with closing(broker.join(group, "one")) as session, ThreadPoolExecutor(1) as pool:
        restored = pool.submit(lambda: [record.value for record in session.restore([0])])
        with pytest.raises(TimeoutError):
            restored.result(timeout=2.0)
        producer.commit_transaction()
        assert [b"state"] == restored.result(timeout=PATIENCE)


def test_restore_does_not_wait_for_ever(
    broker: KafkaBroker, topics: Topics, group: str, kafka_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transaction that nobody ends makes the session fail, so that the service says so and tries again."""
    monkeypatch.setattr(broker_kafka, "RESTORE_TIMEOUT", 0.5)
    producer = transactional(kafka_address)
    producer.begin_transaction()
    producer.produce(topics.drift_state, key=b"source", value=b"state", partition=2)
    producer.flush()

    with closing(broker.join(group, "one")) as session, pytest.raises(Retryable, match=r"still open in \[2\]"):
        list(session.restore(range(PARTITIONS)))
    producer.abort_transaction()


# -- other clients --------------------------------------------------------------------------------


def test_what_another_client_writes_is_read(
    broker: KafkaBroker, topics: Topics, group: str, kafka_address: str
) -> None:
    """Keys, headers, timestamps and compression of librdkafka arrive; a header without a value is an empty one."""
    producer = Producer({"bootstrap.servers": kafka_address, "compression.type": "zstd"})
    headers: list[tuple[str, str | bytes | None]] = [("ce_source", "mic/1"), ("ce_source", b"\xff"), ("empty", None)]
    producer.produce(topics.audio_in, key=b"k\x00", value=b"v" * 5000, headers=headers, partition=2, timestamp=1234567)
    producer.produce(topics.audio_in, partition=2, timestamp=1234568)
    producer.flush()

    with closing(broker.join(group, "one")) as session:
        records = poll_for(session, 2)

    read = (("ce_source", b"mic/1"), ("ce_source", b"\xff"), ("empty", b""))
    assert [
        Record(topics.audio_in, 2, 0, 1234567, b"k\x00", b"v" * 5000, read),
        Record(topics.audio_in, 2, 1, 1234568, None, None),
    ] == records


class BadName(str):
    """A header's name as it must not be, which this client writes only if it is fooled."""

    __slots__ = ()

    def encode(self, _encoding: str = "utf-8", _errors: str = "strict") -> bytes:
        return b"bad \xff\xc3"


@pytest.mark.parametrize("compression", [None, "lz4"])
def test_a_header_name_that_is_not_utf_8_blocks_nothing(
    broker: KafkaBroker, topics: Topics, group: str, kafka_address: str, compression: str | None
) -> None:
    """The record comes with its bytes and all its headers, that one's name escaped, and so do those around it."""
    producer = KafkaProducer(bootstrap_servers=kafka_address, compression_type=compression, linger_ms=200)
    bad = [("ce_source", b"mic"), (BadName("bad"), b"\xff\x00"), ("löud", b""), (BadName("bad"), b"2")]
    for value, headers in ((b"before", []), (b"poison", bad), (b"after", [("ce_source", b"mic")])):
        producer.send(topics.audio_in, value=value, key=b"k\xff", headers=headers, partition=1, timestamp_ms=1234567)
    producer.close()

    with closing(broker.join(group, "one")) as session:
        records = poll_for(session, 3)
        process(session, topics, records)

    name = "bad \\xff\\xc3"
    read = (("ce_source", b"mic"), (name, b"\xff\x00"), ("löud", b""), (name, b"2"))
    assert [
        Record(topics.audio_in, 1, 0, 1234567, b"k\xff", b"before"),
        Record(topics.audio_in, 1, 1, 1234567, b"k\xff", b"poison", read),
        Record(topics.audio_in, 1, 2, 1234567, b"k\xff", b"after", (("ce_source", b"mic"),)),
    ] == records
    assert 3 == len(committed(broker, topics.predictions_out))


def test_another_client_reads_what_is_committed(
    broker: KafkaBroker, topics: Topics, group: str, kafka_address: str
) -> None:
    """A consumer of librdkafka with ``read_committed`` sees each output once, with its key, headers and timestamp."""
    message = Message(topics.predictions_out, b"source", b"{}", (("ce_id", b"1"), ("ce_id", b"2")), timestamp=1234567)
    with closing(broker.join(group, "one")) as session:
        with contextlib.suppress(ZeroDivisionError), session.transaction() as transaction:
            transaction.send([Message(topics.predictions_out, b"source", b"aborted")])
            raise ZeroDivisionError
        with session.transaction() as transaction:
            transaction.send([message])

    consumer = Consumer(
        {
            "bootstrap.servers": kafka_address,
            "group.id": group,
            "isolation.level": "read_committed",
            "auto.offset.reset": "earliest",
        }
    )
    consumer.subscribe([topics.predictions_out])
    (seen,) = consumer.consume(1, timeout=PATIENCE)
    more = consumer.poll(1.0)
    consumer.close()

    assert more is None
    assert (message.key, message.value) == (seen.key(), seen.value())
    assert list(message.headers) == seen.headers()
    assert message.timestamp == seen.timestamp()[1]


def test_keys_choose_the_partition_that_they_choose_in_java(
    broker: KafkaBroker, topics: Topics, kafka_address: str
) -> None:
    """Sources that a Java client or a Kafka Connect job writes stay on one partition with those that we write."""
    keys = [b"source-%d" % number for number in range(40)]
    producer = Producer({"bootstrap.servers": kafka_address, "partitioner": "murmur2_random"})
    for key in keys:
        producer.produce(topics.audio_in, key=key, value=b"theirs")
    producer.flush()
    broker.publish(Message(topics.audio_in, key, b"ours") for key in keys)

    records = committed(broker, topics.audio_in)

    assert 80 == len(records)
    assert 40 == len({(record.key, record.partition) for record in records})


# -- what goes wrong ------------------------------------------------------------------------------


def test_states_that_do_not_match_the_audio_are_fatal(kafka_address: str, topics: Topics, group: str) -> None:
    """A state could not stand beside the records that it explains; the message says what to delete."""
    with closing(KafkaBroker([kafka_address], topics)) as broker:
        broker.create_topics(
            [
                spec if spec.name != topics.drift_state else TopicSpec(spec.name, 2, compacted=True)
                for spec in topics.layout(3)
            ]
        )
        with closing(broker.join(group, "one")) as session, pytest.raises(Fatal, match=r"has 2 partitions .* has 3"):
            session.poll(0.1, 1)


@pytest.mark.parametrize(
    ("name", "setting", "value", "told"),
    [
        ("audio_dlq", "max.message.bytes", "1048588", "at least 16777216"),
        ("drift_state", "cleanup.policy", "delete", "compact"),
    ],
)
def test_settings_that_would_fail_later_are_fatal_at_once(
    broker: KafkaBroker, kafka_address: str, topics: Topics, group: str, name: str, setting: str, value: str, told: str
) -> None:
    """A topic that somebody else has created is looked at before there is anything to lose."""
    topic = getattr(topics, name)
    with KafkaAdminClient(bootstrap_servers=kafka_address) as admin:
        admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, {setting: value})])
    with (
        closing(broker.join(group, "one")) as session,
        pytest.raises(Fatal, match=rf"'{topic}' has {setting}={value}, expected {told}"),
    ):
        session.poll(0.1, 1)


def test_missing_topics_are_named_with_the_command_that_creates_them(
    kafka_address: str, topics: Topics, group: str
) -> None:
    """The operator sees which topics there are not, and what to type."""
    with closing(KafkaBroker([kafka_address], topics)) as broker:
        session = broker.join(group, "one")
        with closing(session), pytest.raises(Fatal, match=rf"{topics.drift_state}.*`earshot-worker topics`"):
            session.poll(0.1, 1)
        with pytest.raises(Fatal, match=r"`earshot-worker topics`"):
            broker.follow([topics.drift_events], from_beginning=True)
        with pytest.raises(Fatal, match=rf"{topics.audio_in}.*`earshot-worker topics`"):
            broker.publish(sounds(topics, 1))


def test_a_name_that_kafka_does_not_take_is_fatal(broker: KafkaBroker, group: str) -> None:
    """An instance named after a host and a port would be refused by the cluster, in words of its own."""
    with pytest.raises(Fatal, match="--instance is 'host:1'"):
        broker.join(group, "host:1")


def lose(address: str, topics: Topics, before: int) -> None:
    """Delete the records before an offset of partition 1 of ``audio.in``, as its retention would."""
    with KafkaAdminClient(bootstrap_servers=address) as admin:
        admin.delete_records({TopicPartition(topics.audio_in, 1): before})


def work_on_partition_1(broker: KafkaBroker, topics: Topics, group: str) -> None:
    """Publish six records, and commit the place behind the second."""
    broker.publish(Message(topics.audio_in, b"source", b"%d" % n, partition=1) for n in range(6))
    with closing(broker.join(group, "one")) as session:
        poll_for(session, 6)
        with session.transaction() as transaction:
            transaction.commit_offsets({1: 2})


def test_an_offset_out_of_retention_stops_the_worker(
    broker: KafkaBroker, topics: Topics, group: str, kafka_address: str
) -> None:
    """It says what was lost and how to go on, and loses nothing in silence."""
    work_on_partition_1(broker, topics, group)
    lose(kafka_address, topics, before=4)

    told = rf"partition 1 of topic '{topics.audio_in}' has records from 4 to 6, .* from 2: .*--on-lost-offset earliest"
    with closing(broker.join(group, "one")) as session, pytest.raises(Fatal, match=told):
        poll_for(session, 1)


def test_an_offset_out_of_retention_can_be_passed_over(
    broker: KafkaBroker, topics: Topics, group: str, kafka_address: str
) -> None:
    """The session goes on from the earliest record, and tells once what was lost; other partitions do not notice."""
    work_on_partition_1(broker, topics, group)
    lose(kafka_address, topics, before=4)
    broker.publish([Message(topics.audio_in, b"source", b"elsewhere", partition=0)])
    lost: list[LostOffset] = []

    with (
        closing(KafkaBroker([kafka_address], topics, on_lost_offset=lost.append)) as lenient,
        closing(lenient.join(group, "one")) as session,
    ):
        records = poll_for(session, 3)
        process(session, topics, records)

    assert [LostOffset(topics.audio_in, 1, committed=2, earliest=4, end=6)] == lost
    assert {(0, 0), (1, 4), (1, 5)} == {(record.partition, record.offset) for record in records}


def test_an_offset_beyond_the_end_stops_the_worker(broker: KafkaBroker, topics: Topics, group: str) -> None:
    """A log that has lost its end will have other records under the same offsets."""
    broker.publish([Message(topics.audio_in, b"source", b"0", partition=1)])
    with closing(broker.join(group, "one")) as session:
        poll_for(session, 1)
        with session.transaction() as transaction:
            transaction.commit_offsets({1: 5})

    with closing(broker.join(group, "one")) as session, pytest.raises(Fatal, match=r"from 0 to 1, .* go on from 5"):
        poll_for(session, 1)


def test_a_message_that_is_too_large_is_fatal(broker: KafkaBroker, topics: Topics) -> None:
    """It would be too large again in the next session."""
    noise = random.Random(0).randbytes(2_000_000)
    told = rf"2000006 bytes is too large for topic '{topics.predictions_out}': raise its max\.message\.bytes"
    with pytest.raises(Fatal, match=told):
        broker.publish([Message(topics.predictions_out, b"source", noise)])
    broker.publish([Message(topics.predictions_out, b"source", b"small")])
    assert [b"small"] == [record.value for record in committed(broker, topics.predictions_out)]


def test_an_outage_is_noticed_and_survived(
    mortal: apache_kafka.ApacheKafka, topics: Topics, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that is killed fails whatever needs it, with its address; its restart serves the next session."""
    with closing(KafkaBroker([mortal.address], topics)) as patient:
        patient.create_topics(topics.layout(PARTITIONS))
        patient.publish(sounds(topics, PARTITIONS))
        hurry(monkeypatch)
        with closing(KafkaBroker([mortal.address], topics)) as hasty:
            with closing(hasty.join(group, "one")) as session:
                records = poll_for(session, PARTITIONS)
                mortal.kill()
                with pytest.raises(Retryable, match=mortal.address):
                    wait_for(lambda: bool(session.poll(0.2, 1).revoked))
                with pytest.raises(Retryable, match=mortal.address):
                    process(session, topics, records)
            with pytest.raises(Retryable, match=mortal.address):
                hasty.join(group, "one")
            with pytest.raises(Retryable, match=mortal.address):
                hasty.publish(sounds(topics, 1))
        monkeypatch.undo()
        mortal.start()
        with closing(patient.join(group, "one")) as session:
            process(session, topics, poll_for(session, PARTITIONS))
        assert PARTITIONS == len(committed(patient, topics.predictions_out))


@pytest.mark.parametrize("stage", ["join", "poll", "send", "commit"])
def test_a_broker_that_freezes_ends_the_session_in_time(
    mortal: apache_kafka.ApacheKafka, topics: Topics, group: str, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """It takes connections and answers nothing: no call waits for ever, and afterwards nothing is lost or doubled."""
    hurry(monkeypatch)
    longest = 0.0

    def bounded(act: Callable[[], object]) -> None:
        nonlocal longest
        started = time.monotonic()
        with pytest.raises(Retryable, match=mortal.address):
            act()
        longest = max(longest, time.monotonic() - started)

    with closing(KafkaBroker([mortal.address], topics)) as broker:
        broker.create_topics(topics.layout(PARTITIONS))
        broker.publish(sounds(topics, PARTITIONS))
        with closing(broker.join(group, "one")) as session, contextlib.ExitStack() as thawed:
            records = poll_for(session, PARTITIONS)
            messages = [Message(topics.predictions_out, b"source", each.value) for each in records]
            offsets = {each.partition: each.offset + 1 for each in records}
            thawed.callback(mortal.thaw)
            if stage == "join":
                mortal.freeze()
                bounded(lambda: broker.join(group, "one"))
            elif stage == "poll":
                mortal.freeze()
                bounded(lambda: wait_for(lambda: bool(session.poll(0.2, 1).revoked)))
            else:

                def transact() -> None:
                    with session.transaction() as transaction:
                        if stage == "send":
                            mortal.freeze()
                        transaction.send(messages)
                        transaction.commit_offsets(offsets)
                        if stage == "commit":
                            session._transactions._producer.flush()
                            mortal.freeze()

                bounded(transact)
            started = time.monotonic()
            session.close()
            closed = time.monotonic() - started
        monkeypatch.undo()
        with closing(broker.join(group, "one")) as session:
            while records := session.poll(4.0, 100).records:
                process(session, topics, records)
        assert PARTITIONS == len(committed(broker, topics.predictions_out))

    grace = kafka_cluster.GRACE
    assert longest < 4.0 + grace + 3.0  # the bound of a transaction is the longest
    assert closed < 3 * (1.0 + grace)


def test_the_largest_record_still_fits_the_dead_letters(broker: KafkaBroker, topics: Topics, group: str) -> None:
    """A record that audio.in has only just taken can be rejected: its copy is larger, and audio.dlq has room for it."""
    largest = 1024**2 - 200  # the broker's default is 1 MiB and 12 bytes for a batch with its headers
    noise = random.Random(0).randbytes(largest)
    with pytest.raises(Fatal, match="too large"):
        broker.publish([Message(topics.audio_in, b"source", noise + bytes(2_000))])
    broker.publish([Message(topics.audio_in, b"source", noise)])
    with closing(broker.join(group, "one")) as session:
        (record,) = poll_for(session, 1)
        with session.transaction() as transaction:
            transaction.send([rejection_message(topics, record, BadRecord("undecodable", "x" * 280))])
            transaction.commit_offsets({record.partition: record.offset + 1})

    (rejected,) = committed(broker, topics.audio_dlq)
    assert noise == rejected.value
