"""The contract of `worker.broker`, behaviour by behaviour, on the embedded broker and on a real Kafka."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.contract.conftest import PARTITIONS, Connect
from worker.broker import Broker, Session, Transaction
from worker.broker_sqlite import SqliteBroker
from worker.errors import Fatal, Retryable
from worker.messages import Message, Record, Topics

PATIENCE = 30.0
"""Seconds to wait for what must come: a group of Kafka needs a few to settle on a busy machine."""

ALL = frozenset(range(PARTITIONS))

NOW = int(time.time() * 1000)


class Interrupted(Exception):
    """What goes wrong inside a transaction of these tests."""


def commit(session: Session, messages: list[Message], offsets: dict[int, int]) -> None:
    with session.transaction() as transaction:
        transaction.send(messages)
        transaction.commit_offsets(offsets)


def interrupt(session: Session, messages: list[Message], offsets: dict[int, int]) -> None:
    """Do all that `commit` does, and fail before the block ends."""
    with session.transaction() as transaction:
        transaction.send(messages)
        transaction.commit_offsets(offsets)
        raise Interrupted


def poll_until(session: Session, count: int) -> list[Record]:
    """Poll until ``count`` records have come, and fail if they do not, or if more do."""
    deadline = time.monotonic() + PATIENCE
    records: list[Record] = []
    while len(records) < count and time.monotonic() < deadline:
        records += session.poll(0.5, 100).records
    assert count == len(records)
    return records


def poll_until_assigned(session: Session) -> frozenset[int]:
    """Poll until every partition is assigned, taking no record, and return what was assigned."""
    deadline = time.monotonic() + PATIENCE
    assigned: frozenset[int] = frozenset()
    while assigned != ALL and time.monotonic() < deadline:
        assigned |= session.poll(0.5, 1).assigned
    return assigned


def follow_until(stream: Iterator[list[Record]], count: int) -> list[Record]:
    """Follow until ``count`` records have come, and fail if they do not, or if more do."""
    deadline = time.monotonic() + PATIENCE
    records: list[Record] = []
    while len(records) < count and time.monotonic() < deadline:
        records += next(stream)
    assert count == len(records)
    return records


def follow_until_idle(stream: Iterator[list[Record]]) -> list[Record]:
    """Follow until nothing has arrived for about a second."""
    deadline = time.monotonic() + PATIENCE
    records: list[Record] = []
    while (batch := next(stream)) and time.monotonic() < deadline:
        records += batch
    return records


def values(records: list[Record]) -> list[bytes | None]:
    return [record.value for record in records]


def sounds(topics: Topics, *values: bytes, partition: int | None = 0) -> list[Message]:
    return [Message(topics.audio_in, b"microphone", value, partition=partition) for value in values]


def predictions(topics: Topics, *values: bytes) -> list[Message]:
    return [Message(topics.predictions_out, b"microphone", value, partition=0) for value in values]


def as_message(record: Record) -> Message:
    return Message(record.topic, record.key, record.value, record.headers, record.partition, record.timestamp)


# -- topics --------------------------------------------------------------------------------------


def test_create_topics_returns_only_the_names_it_created(connect: Connect, topics: Topics) -> None:
    """Creating topics twice is as good as once, and those that exist do not keep others from being created."""
    broker = connect(topics)
    layout = topics.layout(PARTITIONS)
    names = [spec.name for spec in layout]

    assert names[:3] == sorted(broker.create_topics(layout[:3]), key=names.index)
    assert names[3:] == sorted(broker.create_topics(layout), key=names.index)
    assert broker.create_topics(layout) == []


def test_create_topics_refuses_another_number_of_partitions(broker: Broker, topics: Topics) -> None:
    """The partitions of a topic cannot be changed, since state and keys are bound to them."""
    with pytest.raises(Fatal, match=topics.audio_in):
        broker.create_topics(topics.layout(PARTITIONS + 1))


def test_poll_without_topics_is_fatal(connect: Connect, topics: Topics, group: str) -> None:
    """A worker whose topics were not created stops and says which, instead of waiting for ever."""
    with (
        pytest.raises(Fatal, match=f"{topics.audio_in}.*earshot-worker topics"),
        closing(connect(topics).join(group, "one")) as session,
    ):
        poll_until(session, 1)


# -- records -------------------------------------------------------------------------------------


def test_a_record_arrives_as_it_was_published(broker: Broker, topics: Topics, group: str) -> None:
    """Keys, values, headers and timestamps survive, absent ones and empty ones too, in offset order."""
    headers = (("twice", b"first"), ("a", b""), ("twice", b"second"), ("ünïcode", b"\x00\xff"))
    published = [
        Message(topics.audio_in, b"key", b"value", headers, partition=1, timestamp=NOW),
        Message(topics.audio_in, None, None, (), partition=1, timestamp=NOW - 1000),
        Message(topics.audio_in, b"", b"", (), partition=1, timestamp=NOW),
        Message(topics.audio_in, b"\x00\xff", random.Random(7).randbytes(900_000), (), partition=1, timestamp=NOW),
    ]
    broker.publish(published)

    with closing(broker.join(group, "one")) as session:
        records = poll_until(session, len(published))

    assert published == [as_message(record) for record in records]
    assert [record.offset for record in records] == [0, 1, 2, 3]


def test_any_record_survives_the_round_trip(broker: Broker, topics: Topics) -> None:
    """What `publish` takes, `follow` gives back, whatever the bytes are."""
    messages = st.builds(
        Message,
        topic=st.sampled_from([topics.audio_in, topics.predictions_out]),
        key=st.none() | st.binary(max_size=20),
        value=st.none() | st.binary(max_size=200),
        headers=st.lists(st.tuples(st.text(max_size=8), st.binary(max_size=8)), max_size=3).map(tuple),
        partition=st.integers(0, PARTITIONS - 1),
        timestamp=st.integers(NOW - 86_400_000, NOW),
    )
    stream = broker.follow([topics.audio_in, topics.predictions_out], from_beginning=True)

    @settings(max_examples=100 if isinstance(broker, SqliteBroker) else 10, deadline=None)
    @given(st.lists(messages, min_size=1, max_size=10))
    def survives(batch: list[Message]) -> None:
        broker.publish(batch)
        found = follow_until(stream, len(batch))
        for log in {(message.topic, message.partition) for message in batch}:
            expected = [message for message in batch if (message.topic, message.partition) == log]
            assert expected == [as_message(record) for record in found if (record.topic, record.partition) == log]

    survives()


def test_a_message_without_a_timestamp_gets_the_present_one(broker: Broker, topics: Topics) -> None:
    """``timestamp`` None means now."""
    before = int(time.time() * 1000)
    broker.publish(sounds(topics, b"now"))
    after = int(time.time() * 1000)

    (record,) = follow_until(broker.follow([topics.audio_in], from_beginning=True), 1)

    assert before <= record.timestamp <= after


def test_a_key_always_goes_to_the_same_partition(broker: Broker, topics: Topics) -> None:
    """The records of one source stay in order, and many sources spread over the partitions."""
    keys = [f"source-{number}".encode() for number in range(30)]
    for _ in range(2):
        broker.publish(Message(topics.audio_in, key, b"sound") for key in keys)

    records = follow_until(broker.follow([topics.audio_in], from_beginning=True), 60)

    assert len({(record.key, record.partition) for record in records}) == 30
    assert {record.partition for record in records} == ALL


def test_an_explicit_partition_is_honoured(broker: Broker, topics: Topics) -> None:
    """State is written to the partition whose records it explains, whatever its key says."""
    broker.publish(Message(topics.drift_state, b"same key", b"state", partition=number) for number in range(PARTITIONS))

    records = follow_until(broker.follow([topics.drift_state], from_beginning=True), PARTITIONS)

    assert {record.partition for record in records} == ALL


# -- polling -------------------------------------------------------------------------------------


def test_a_new_member_is_assigned_every_partition_and_reads_from_the_earliest_record(
    broker: Broker, topics: Topics, group: str
) -> None:
    """A group without committed offsets starts at the beginning, and an only member reads everything."""
    broker.publish(sounds(topics, b"a", partition=0) + sounds(topics, b"b", partition=2))

    with closing(broker.join(group, "one")) as session:
        deadline = time.monotonic() + PATIENCE
        assigned: frozenset[int] = frozenset()
        records: list[Record] = []
        while len(records) < 2 and time.monotonic() < deadline:
            polled = session.poll(0.5, 100)
            assigned |= polled.assigned
            records += polled.records
            assert frozenset() == polled.revoked
            # A record never comes before its partition: its state could not have been restored.
            assert {record.partition for record in polled.records} <= assigned

    assert assigned == ALL
    assert sorted(record.value or b"" for record in records) == [b"a", b"b"]


def test_poll_brings_no_more_than_asked_and_returns_in_time(broker: Broker, topics: Topics, group: str) -> None:
    """``max_records`` bounds a batch, ``timeout`` bounds the wait for it."""
    for partition in (0, 1):
        broker.publish(sounds(topics, *[b"%d" % number for number in range(5)], partition=partition))

    with closing(broker.join(group, "one")) as session:
        polled: list[Record] = []
        deadline = time.monotonic() + PATIENCE
        while len(polled) < 10 and time.monotonic() < deadline:
            records = session.poll(0.5, 4).records
            assert len(records) <= 4
            polled += records
        started = time.monotonic()
        assert session.poll(0.3, 4).records == []
        waited = time.monotonic() - started

    for partition in (0, 1):
        records = [record for record in polled if record.partition == partition]
        assert values(records) == [b"%d" % number for number in range(5)]
    assert 0.2 < waited < 1.0


# -- transactions --------------------------------------------------------------------------------


def test_a_transaction_commits_messages_and_offsets_together(broker: Broker, topics: Topics, group: str) -> None:
    """Nothing shows before the block ends; then the messages are there, and the next session goes on behind them."""
    broker.publish(sounds(topics, b"a", b"b", b"c"))
    stream = broker.follow([topics.predictions_out, topics.drift_events], from_beginning=True)

    with closing(broker.join(group, "one")) as session:
        poll_until(session, 3)
        with session.transaction() as transaction:
            transaction.send(predictions(topics, b"A"))
            transaction.send([*predictions(topics, b"B"), Message(topics.drift_events, b"microphone", b"drift")])
            transaction.commit_offsets({0: 2})
            assert follow_until_idle(stream) == []
        assert sorted(record.value or b"" for record in follow_until(stream, 3)) == [b"A", b"B", b"drift"]

    with closing(broker.join(group, "one")) as session:
        assert [(record.offset, record.value) for record in poll_until(session, 1)] == [(2, b"c")]


def test_a_session_commits_batch_after_batch(broker: Broker, topics: Topics, group: str) -> None:
    """The normal life of a worker: many transactions in one session, for several partitions."""
    stream = broker.follow([topics.predictions_out], from_beginning=True)
    with closing(broker.join(group, "one")) as session:
        for number in range(5):
            broker.publish(sounds(topics, b"%d" % number, partition=number % 2))
            (record,) = poll_until(session, 1)
            commit(session, predictions(topics, record.value or b""), {record.partition: record.offset + 1})

    assert values(follow_until(stream, 5)) == [b"0", b"1", b"2", b"3", b"4"]
    broker.publish(sounds(topics, b"next 0", partition=0) + sounds(topics, b"next 1", partition=1))
    with closing(broker.join(group, "one")) as session:
        assert {(0, 3), (1, 2)} == {(record.partition, record.offset) for record in poll_until(session, 2)}


def test_a_commit_goes_on_while_the_session_is_polled(broker: Broker, topics: Topics, group: str) -> None:
    """A transaction that is not waited for is committed all the same, and a poll goes on behind what was read."""
    broker.publish(sounds(topics, b"a"))
    stream = broker.follow([topics.predictions_out], from_beginning=True)

    with closing(broker.join(group, "one")) as session:
        for heard, published, offset in ((b"a", b"b", 1), (b"b", b"c", 2)):
            assert [heard] == values(poll_until(session, 1))
            with session.transaction(wait=False) as transaction:
                transaction.send(predictions(topics, heard.upper()))
                transaction.commit_offsets({0: offset})
            broker.publish(sounds(topics, published))
        assert [b"c"] == values(poll_until(session, 1))
        session.settle()
        assert [b"A", b"B"] == values(follow_until(stream, 2))
        session.settle()  # there is nothing more to wait for

    with closing(broker.join(group, "one")) as session:
        assert [b"c"] == values(poll_until(session, 1))


def test_an_exception_inside_the_block_leaves_nothing_behind(broker: Broker, topics: Topics, group: str) -> None:
    """The exception passes through, no message becomes visible, and a new session gets the same records."""
    broker.publish(sounds(topics, b"a", b"b"))

    with closing(broker.join(group, "one")) as session:
        poll_until(session, 2)
        outputs = [*predictions(topics, b"A"), Message(topics.drift_state, b"microphone", b"state")]
        with pytest.raises(Interrupted):
            interrupt(session, outputs, {0: 2})

    broker.publish(predictions(topics, b"afterwards"))
    stream = broker.follow([topics.predictions_out], from_beginning=True)
    assert values(follow_until(stream, 1)) == [b"afterwards"]
    with closing(broker.join(group, "one")) as session:
        assert values(poll_until(session, 2)) == [b"a", b"b"]
        assert list(session.restore(ALL)) == []


def test_what_was_not_committed_is_delivered_again(broker: Broker, topics: Topics, group: str) -> None:
    """A closed session leaves its records to the next one, and each group has its own offsets."""
    broker.publish(sounds(topics, b"a", b"b"))

    with closing(broker.join(group, "one")) as session:
        poll_until(session, 2)
    with closing(broker.join(group, "two")) as session:
        assert values(poll_until(session, 2)) == [b"a", b"b"]
        commit(session, [], {0: 2})
    with closing(broker.join(f"{group}-other", "one")) as session:
        assert values(poll_until(session, 2)) == [b"a", b"b"]


def test_a_second_session_of_the_same_instance_fences_the_first(
    broker: Broker, connect: Connect, topics: Topics, group: str
) -> None:
    """A replica that was believed dead can commit nothing once its successor has joined."""
    broker.publish(sounds(topics, b"a"))
    with closing(broker.join(group, "one")) as first:
        poll_until(first, 1)
        with closing(connect(topics).join(group, "one")) as second:
            with pytest.raises(Retryable):
                commit(first, predictions(topics, b"from the first"), {0: 1})
            assert values(poll_until(second, 1)) == [b"a"]
            commit(second, predictions(topics, b"from the second"), {0: 1})

    stream = broker.follow([topics.predictions_out], from_beginning=True)
    assert values(follow_until(stream, 1)) == [b"from the second"]


def test_a_session_without_partitions_commits_messages_and_is_fenced(
    broker: Broker, connect: Connect, topics: Topics, group: str
) -> None:
    """Without offsets nothing needs to be polled first; a successor fences all the same."""
    with closing(broker.join(group, "one")) as first:
        commit(first, predictions(topics, b"first"), {})
        with closing(connect(topics).join(group, "one")) as second:
            with pytest.raises(Retryable):
                commit(first, predictions(topics, b"fenced"), {})
            commit(second, predictions(topics, b"second"), {})

    assert [b"first", b"second"] == [r.value for batch in broker.read([topics.predictions_out]) for r in batch]


def test_a_partition_that_does_not_exist_is_fatal(broker: Broker, topics: Topics, group: str) -> None:
    """Another attempt would not make one."""
    nowhere = sounds(topics, b"a", partition=PARTITIONS)
    with pytest.raises(Fatal, match=str(PARTITIONS)):
        broker.publish(nowhere)
    with closing(broker.join(group, "one")) as session, pytest.raises(Fatal, match=str(PARTITIONS)):
        commit(session, nowhere, {})


def test_a_session_that_was_fenced_while_idle_learns_of_it(
    broker: Broker, connect: Connect, topics: Topics, group: str
) -> None:
    """It hears so from its poll before long, though there is nothing to poll and nothing to commit."""
    with closing(broker.join(group, "one")) as first:
        assert poll_until_assigned(first) == ALL
        with closing(connect(topics).join(group, "one")) as second:
            assert poll_until_assigned(second) == ALL
            with pytest.raises(Retryable):
                poll_until(first, 1)
            broker.publish(sounds(topics, b"a"))
            assert values(poll_until(second, 1)) == [b"a"]


def test_two_members_of_a_group_do_the_work_once(broker: Broker, connect: Connect, topics: Topics, group: str) -> None:
    """Another instance may share the work or wait for it; it never repeats it, and takes all of it over at the end."""
    work = [b"%d" % number for number in range(30)]
    broker.publish(sounds(topics, value, partition=number % PARTITIONS)[0] for number, value in enumerate(work))
    outputs = broker.follow([topics.predictions_out], from_beginning=True)
    done: list[bytes | None] = []

    with ExitStack() as stack:
        sessions = {name: stack.enter_context(closing(connect(topics).join(group, name))) for name in ("one", "two")}

        def work_until(count: int) -> None:
            deadline = time.monotonic() + PATIENCE
            while len(done) < count and time.monotonic() < deadline:
                for name, session in sessions.items():
                    try:
                        records = session.poll(0.1, 4).records
                        if records:
                            offsets = {record.partition: record.offset + 1 for record in records}
                            commit(session, [m for r in records for m in predictions(topics, r.value or b"")], offsets)
                            done.extend(values(records))
                    except Retryable:
                        session.close()
                        sessions[name] = stack.enter_context(closing(broker.join(group, name)))

        work_until(30)
        sessions.pop("one").close()
        broker.publish(sounds(topics, b"last 0", partition=0) + sounds(topics, b"last 2", partition=2))
        work_until(32)

    expected = sorted([*work, b"last 0", b"last 2"])
    assert expected == sorted(record.value or b"" for record in follow_until(outputs, 32))


def test_closing_twice_is_allowed(broker: Broker, group: str) -> None:
    """Whoever cleans up need not know what has been cleaned up already."""
    session = broker.join(group, "one")
    session.poll(0.1, 1)

    session.close()
    session.close()
    broker.close()
    broker.close()


# -- state ---------------------------------------------------------------------------------------


def test_restore_yields_the_latest_state_of_each_key(broker: Broker, topics: Topics, group: str) -> None:
    """Older states and deleted keys are left out, and so are other partitions than those asked for."""

    def state(key: bytes, value: bytes | None, partition: int) -> Message:
        return Message(topics.drift_state, key, value, (("h", b"1"),), partition=partition, timestamp=NOW)

    broker.publish([state(b"x", b"x1", 0), state(b"y", b"y1", 0), state(b"z", b"z1", 2)])
    broker.publish(sounds(topics, b"a"))
    with closing(broker.join(group, "one")) as session:
        poll_until(session, 1)
        latest = [state(b"x", b"x2", 0), state(b"y", None, 0), state(b"w", b"w1", 1), state(b"x", b"x3", 0)]
        commit(session, latest, {0: 1})
        with pytest.raises(Interrupted):
            interrupt(session, [state(b"x", b"aborted", 0)], {})

    with closing(broker.join(group, "one")) as session:
        assert poll_until_assigned(session) == ALL
        restored = sorted(session.restore(ALL), key=lambda record: record.partition)
        assert [as_message(record) for record in restored] == [
            state(b"x", b"x3", 0),
            state(b"w", b"w1", 1),
            state(b"z", b"z1", 2),
        ]
        assert values(list(session.restore([1]))) == [b"w1"]
        assert list(session.restore([])) == []


def test_offsets_go_on_when_a_topic_is_compacted(broker: Broker, topics: Topics) -> None:
    """Compaction never makes an offset mean another record."""
    stream = broker.follow([topics.drift_state], from_beginning=True)
    offsets = []
    for number in range(3):
        broker.publish([Message(topics.drift_state, b"key", b"%d" % number, partition=0)])
        offsets += [record.offset for record in follow_until(stream, 1)]

    assert offsets == [0, 1, 2]


# -- following -----------------------------------------------------------------------------------


def test_follow_from_the_end_sees_only_what_comes(broker: Broker, topics: Topics) -> None:
    """A watcher starts with the present, hears about idleness, and needs no group."""
    broker.publish(predictions(topics, b"past"))
    stream = broker.follow([topics.predictions_out, topics.drift_events], from_beginning=False)

    started = time.monotonic()
    assert next(stream) == []
    assert time.monotonic() - started < 5.0
    broker.publish([*predictions(topics, b"new"), Message(topics.drift_events, None, b"event")])

    assert sorted(record.value or b"" for record in follow_until(stream, 2)) == [b"event", b"new"]
    assert follow_until_idle(stream) == []


def test_read_ends_where_the_log_ended(broker: Broker, topics: Topics) -> None:
    """What is there when it is called comes, in order by partition, and then it stops; what comes later does not."""
    names = [topics.audio_in, topics.predictions_out, topics.drift_events]
    broker.publish(sounds(topics, b"a", b"b") + sounds(topics, b"c", partition=2) + predictions(topics, b"d"))
    stream = broker.read(names)
    broker.publish(sounds(topics, b"later") + sounds(topics, b"later", partition=1))

    records = [record for batch in stream for record in batch]

    assert sorted(record.value or b"" for record in records) == [b"a", b"b", b"c", b"d"]
    assert values([r for r in records if (r.topic, r.partition) == (topics.audio_in, 0)]) == [b"a", b"b"]
    assert [record for batch in broker.read([topics.audio_dlq]) for record in batch] == []


def test_read_sees_what_was_just_committed(broker: Broker, topics: Topics, group: str) -> None:
    """Nothing that was committed before the call is missing, and nothing that was aborted or is open comes."""
    with closing(broker.join(group, "one")) as session:
        committed: list[bytes] = []
        for number in range(10):
            committed.append(b"%d" % number)
            commit(session, predictions(topics, committed[-1]), {})
            assert committed == [r.value for batch in broker.read([topics.predictions_out]) for r in batch]
        with pytest.raises(Interrupted):
            interrupt(session, predictions(topics, b"aborted"), {})
        assert committed == [r.value for batch in broker.read([topics.predictions_out]) for r in batch]


def test_read_of_a_missing_topic_is_fatal(connect: Connect, topics: Topics) -> None:
    """As everywhere: it says which topic is missing."""
    with pytest.raises(Fatal, match=topics.audio_dlq):
        list(connect(topics).read([topics.audio_dlq]))


# -- all of it, in random order ------------------------------------------------------------------


def test_systems_with_prefixes_of_their_own_share_a_broker_and_nothing_else(
    broker: Broker, topics: Topics, group: str, connect: Connect
) -> None:
    """The same group and instance on other topics are another group, and another instance: nobody fences anybody."""
    other = Topics(prefix=f"other-{topics.prefix}")
    neighbour = connect(other)
    neighbour.create_topics(other.layout(PARTITIONS))
    for each, names in ((broker, topics), (neighbour, other)):
        each.publish([Message(names.audio_in, b"k", names.prefix.encode(), partition=0)])
    with closing(broker.join(group, "one")) as mine, closing(neighbour.join(group, "one")) as theirs:
        for session, names in ((mine, topics), (theirs, other)):
            (record,) = poll_until(session, 1)
            assert names.prefix.encode() == record.value
        commit(mine, [Message(topics.predictions_out, None, b"mine")], {0: 1})
        commit(theirs, [Message(other.predictions_out, None, b"theirs")], {0: 1})


class Story:
    """A worker that is interrupted at random, and what a correct broker would have done so far."""

    def __init__(self, broker: Broker, topics: Topics, group: str, seed: int) -> None:
        self.broker = broker
        self.topics = topics
        self.group = group
        self.random = random.Random(seed)
        self.published = [0] * PARTITIONS
        self.committed = [0] * PARTITIONS
        self.dead: list[tuple[Session, AbstractContextManager[Transaction]]] = []
        self.join()

    def publish(self) -> None:
        for _ in range(self.random.randint(1, 5)):
            partition = self.random.randrange(PARTITIONS)
            value = b"%d/%d" % (partition, self.published[partition])
            self.broker.publish([Message(self.topics.audio_in, b"key", value, partition=partition)])
            self.published[partition] += 1

    def poll(self) -> list[Record]:
        records = self.session.poll(0.1, self.random.randint(1, 8)).records
        for record in records:
            assert self.positions[record.partition] == record.offset
            assert b"%d/%d" % (record.partition, record.offset) == record.value
            self.positions[record.partition] += 1
        return records

    def commit(self) -> None:
        # Without records it may be that no partition is assigned yet, and then there is nothing to commit.
        if not (records := self.poll()):
            return
        commit(self.session, self.outputs(records), dict(enumerate(self.positions)))
        self.committed = list(self.positions)

    def commit_two(self) -> None:
        """Commit once without waiting for it, and read and commit again."""
        if records := self.poll():
            with self.session.transaction(wait=False) as transaction:
                transaction.send(self.outputs(records))
                transaction.commit_offsets(dict(enumerate(self.positions)))
            self.committed = list(self.positions)
            self.commit()
            self.session.settle()

    def abort(self) -> None:
        if not (records := self.poll()):
            return
        with pytest.raises(Interrupted):
            interrupt(self.session, self.outputs(records), dict(enumerate(self.positions)))
        self.rejoin()

    def die(self) -> None:
        """Send a batch, and do nothing more: neither commit nor abort nor close."""
        records = self.poll()
        transaction = self.session.transaction()
        transaction.__enter__().send(self.outputs(records))
        self.dead.append((self.session, transaction))
        self.join()

    def rejoin(self) -> None:
        self.session.close()
        self.join()

    def join(self) -> None:
        self.session = self.broker.join(self.group, "one")
        self.positions = list(self.committed)

    def outputs(self, records: list[Record]) -> list[Message]:
        return [Message(self.topics.predictions_out, None, r.value, partition=r.partition) for r in records]


@pytest.mark.parametrize("seed", [1, 2])
def test_every_record_has_one_output_whatever_happens(broker: Broker, topics: Topics, group: str, seed: int) -> None:
    """Publishing, committing, aborting, leaving and dying in any order yields each output once, in order."""
    story = Story(broker, topics, group, seed)
    actions = [story.publish, story.commit, story.commit_two, story.abort, story.rejoin, story.die]
    for action in story.random.choices(actions, weights=[6, 3, 3, 1, 1, 1], k=100):
        action()
    deadline = time.monotonic() + PATIENCE
    while story.committed != story.published and time.monotonic() < deadline:
        story.commit()
    story.session.close()

    outputs = follow_until(broker.follow([topics.predictions_out], from_beginning=True), sum(story.published))
    for partition, count in enumerate(story.published):
        expected = [b"%d/%d" % (partition, offset) for offset in range(count)]
        assert expected == [record.value for record in outputs if record.partition == partition]
