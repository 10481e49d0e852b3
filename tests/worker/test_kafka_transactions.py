"""How transactions are committed while a session goes on, and how those are ended that were left open."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from typing import NoReturn

import pytest
from kafka import KafkaAdminClient, TopicPartition
from kafka import errors as kafka_errors

from tests import apache_kafka
from tests.worker.sessions import PARTITIONS, PATIENCE, committed, poll_for, process, sounds, wait_for
from worker import broker_kafka, kafka_clients, kafka_cluster, kafka_transactions
from worker.broker_kafka import KafkaBroker
from worker.errors import Fatal, Retryable
from worker.kafka_cluster import Cluster
from worker.messages import Topics


def test_whoever_closes_a_session_waits_for_its_commit(broker: KafkaBroker, topics: Topics, group: str) -> None:
    """An open transaction would hold up whoever is assigned its partitions, and all readers, until its time limit."""
    before = set(threading.enumerate())
    broker.publish(sounds(topics, PARTITIONS))
    with closing(broker.join(group, "one")) as session:
        process(session, topics, poll_for(session, PARTITIONS), wait=False)

    assert PARTITIONS == len(committed(broker, topics.predictions_out))
    wait_for(lambda: not any(each.name == "watched" for each in set(threading.enumerate()) - before))


def test_a_rebalance_waits_for_the_commit(
    broker: KafkaBroker, topics: Topics, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group's next generation would refuse it, and the session would be lost at each rebalance."""
    order: list[str] = []
    broker.publish(sounds(topics, PARTITIONS))
    with closing(broker.join(group, "one")) as session:
        records = poll_for(session, PARTITIONS)
        coordinator, producer = session._consumer._coordinator, session._transactions._producer
        commit_transaction, join = producer.commit_transaction, coordinator.ensure_active_group

        def commit() -> None:
            time.sleep(0.5)  # a slow cluster
            commit_transaction()
            order.append("committed")

        def joining(**how: object) -> object:
            order.append("joined")
            return join(**how)

        monkeypatch.setattr(producer, "commit_transaction", commit)
        monkeypatch.setattr(coordinator, "ensure_active_group", joining)
        process(session, topics, records, wait=False)
        coordinator.request_rejoin()
        assert [] == order
        session.poll(PATIENCE, 1)
        session.settle()

    assert ["committed", "joined"] == order[:2]
    assert PARTITIONS == len(committed(broker, topics.predictions_out))


def test_the_next_generation_refuses_a_commit_that_comes_late(
    broker: KafkaBroker, topics: Topics, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has the partitions then begins where the last commit ended, so this one must not come through."""
    broker.publish(sounds(topics, PARTITIONS))
    with closing(broker.join(group, "one")) as one:
        records = poll_for(one, PARTITIONS)
        others_have_joined = threading.Event()
        deliver = one._transactions._producer.deliver

        def late(written: Sequence[kafka_clients.Written]) -> None:
            assert others_have_joined.wait(PATIENCE)
            deliver(written)

        monkeypatch.setattr(one._transactions._producer, "deliver", late)
        monkeypatch.setattr(one._consumer, "rebalances", lambda: False)  # it is told too late
        process(one, topics, records, wait=False)
        with closing(broker.join(group, "two")) as two:
            assigned: set[int] = set()

            def joined() -> bool:
                one.poll(0.1, 1)
                assigned.update(two.poll(0.1, 1).assigned)
                return len(assigned) == PARTITIONS // 2

            wait_for(joined)
            others_have_joined.set()
            with pytest.raises(Retryable, match="commit"):
                one.settle()

    with closing(broker.join(group, "one")) as successor:
        records = poll_for(successor, PARTITIONS)
        process(successor, topics, records)
    assert PARTITIONS == len(records) == len(committed(broker, topics.predictions_out))


def lose_markers(kafka: apache_kafka.ApacheKafka) -> None:
    """Cut the last marker off each log of a broker that was killed.

    A broker leaves them out by itself if it holds a partition for deleted that has no leader for the
    moment, and holds the transaction for complete all the same: Apache Kafka 4.1 to 4.3 (KAFKA-20734).
    """
    for log in kafka.data.glob("*/00000000000000000000.log"):
        if log.parent.name.startswith(("__transaction_state", "__cluster_metadata")):
            continue
        content = log.read_bytes()
        at = last = 0
        while at + 12 <= len(content) and (length := int.from_bytes(content[at + 8 : at + 12])):
            last, at = at, at + 12 + length
        attributes = int.from_bytes(content[last + 21 : last + 23])
        if attributes & 0x20:  # a control batch
            os.truncate(log, last)


def is_complete(address: str, transactional_id: str) -> bool:
    """Whether the cluster holds the last transaction for complete, all of its markers written."""
    with KafkaAdminClient(bootstrap_servers=address) as admin:
        state: str = admin.describe_transactions([transactional_id])[transactional_id].state
        return state.startswith("Complete")


def open_transactions(address: str, topics: Sequence[str]) -> set[str]:
    """Which of these topics hold a transaction without an end."""
    with KafkaAdminClient(bootstrap_servers=address) as admin:
        logs = [
            TopicPartition(topic["name"], partition["partition_index"])
            for topic in admin.describe_topics(topics)
            for partition in topic["partitions"]
        ]
        return {
            log.topic
            for log, state in admin.describe_producers(logs).items()
            if any(each.current_transaction_start_offset >= 0 for each in state.active_producers)
        }


@pytest.mark.parametrize(("end", "heir"), [("commit_transaction", "one"), ("abort_transaction", "two")])
def test_what_the_broker_left_open_is_ended_as_it_was_meant(
    mortal: apache_kafka.ApacheKafka, topics: Topics, group: str, monkeypatch: pytest.MonkeyPatch, end: str, heir: str
) -> None:
    """A marker that was never written blocks neither the offsets nor readers, whichever way the transaction went.

    The next session of the instance writes it. If it never comes, another one does, and says so.
    """
    monkeypatch.setattr(broker_kafka, "PLACE_TIMEOUT", 2.0)
    with closing(KafkaBroker([mortal.address], topics)) as broker:
        broker.create_topics(topics.layout(PARTITIONS))
        broker.publish(sounds(topics, PARTITIONS))
        with closing(broker.join(group, "one")) as session:
            records = poll_for(session, PARTITIONS)
            monkeypatch.setattr(
                session._transactions._producer, "commit_transaction", getattr(session._transactions._producer, end)
            )
            process(session, topics, records)
            wait_for(lambda: is_complete(mortal.address, f"earshot/{topics.prefix}{group}/one"))
            mortal.kill()
            lose_markers(mortal)
            mortal.start()
        written = [topics.predictions_out, "__consumer_offsets"]
        assert set(written) == open_transactions(mortal.address, written)

        if heir != "one":
            told = rf"no offset of the partitions \[0, 1, 2, 3\] .* left by earshot/{topics.prefix}{group}/one;"
            with closing(broker.join(group, heir)) as session, pytest.raises(Retryable, match=told):
                poll_for(session, 1)
        with closing(broker.join(group, heir)) as session:
            if end == "abort_transaction":
                process(session, topics, poll_for(session, PARTITIONS))
            assert [] == session.poll(3.0, 100).records
            assert frozenset() == session.poll(0.1, 100).unplaced
        assert PARTITIONS == len(committed(broker, topics.predictions_out))
        assert set() == open_transactions(mortal.address, written)


def leave_open(broker: KafkaBroker, mortal: apache_kafka.ApacheKafka, topics: Topics, group: str) -> None:
    """Answer a record of each partition, and lose what says that this is committed."""
    broker.create_topics(topics.layout(PARTITIONS))
    broker.publish(sounds(topics, PARTITIONS))
    with closing(broker.join(group, "one")) as session:
        process(session, topics, poll_for(session, PARTITIONS))
        wait_for(lambda: is_complete(mortal.address, f"earshot/{topics.prefix}{group}/one"))
        mortal.kill()
        lose_markers(mortal)
        mortal.start()


@pytest.mark.parametrize("before", ["a join that fails", "a session that does nothing"])
def test_what_was_committed_is_not_forgotten_with_the_producer(
    mortal: apache_kafka.ApacheKafka, topics: Topics, group: str, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """The cluster forgets how a transaction ended when the next producer comes; who comes after that still knows."""

    def fails(*_: object) -> NoReturn:
        raise Retryable("no leader yet")

    with closing(KafkaBroker([mortal.address], topics)) as broker:
        leave_open(broker, mortal, topics, group)
        if before == "a join that fails":
            monkeypatch.setattr(Cluster, "left_open", fails)
            with pytest.raises(Retryable, match="no leader yet"):
                broker.join(group, "one")
            monkeypatch.undo()
        else:
            broker.join(group, "one").close()
        with closing(broker.join(group, "one")) as session:
            assert [] == session.poll(3.0, 100).records
            assert frozenset() == session.poll(0.1, 100).unplaced
        assert PARTITIONS == len(committed(broker, topics.predictions_out))


def test_how_a_transaction_ends_is_never_guessed(
    mortal: apache_kafka.ApacheKafka, topics: Topics, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ended between fencing and settling takes the knowledge with it: a person has to look."""

    def fails(*_: object) -> NoReturn:
        raise Retryable("no leader yet")

    with closing(KafkaBroker([mortal.address], topics)) as broker:
        leave_open(broker, mortal, topics, group)
        monkeypatch.setattr(Cluster, "left_open", fails)
        with pytest.raises(Retryable, match="no leader yet"):
            broker.join(group, "one")
        monkeypatch.undo()
    told = rf"is open in .*{topics.predictions_out}-\d.* nobody knows any more"
    with closing(KafkaBroker([mortal.address], topics)) as another, pytest.raises(Fatal, match=told):
        another.join(group, "one")
    assert topics.predictions_out in open_transactions(mortal.address, [topics.predictions_out])


def test_another_leader_ends_the_session(broker: KafkaBroker, topics: Topics, group: str) -> None:
    """The old one may have taken markers of this session with it, and only the next session can tell."""
    broker.publish(sounds(topics, PARTITIONS))
    with closing(broker.join(group, "one")) as session:
        process(session, topics, poll_for(session, PARTITIONS))
        assert [] == session.poll(0.1, 1).records
        log = TopicPartition(topics.predictions_out, 0)
        known = session._transactions._producer._metadata
        epoch = known.leader_epoch_for_partition(log)
        known.update_partition_leader(log, known.leader_for_partition(log), epoch + 1)
        with pytest.raises(Retryable, match="have other leaders"):
            session.poll(0.1, 1)


def test_a_client_that_hangs_ends_the_session_in_time(
    broker: KafkaBroker, topics: Topics, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it waits for: the call is left behind, and a new session finds the work undone."""
    broker.publish(sounds(topics, PARTITIONS))
    never = threading.Event()
    with closing(broker.join(group, "one")) as session:
        records = poll_for(session, PARTITIONS)
        monkeypatch.setattr(kafka_transactions, "TRANSACTION_TIMEOUT", 1.0)
        monkeypatch.setattr(session._transactions._producer, "commit_transaction", never.wait)
        started = time.monotonic()
        with pytest.raises(Retryable, match=r"cannot commit at .*: it has not come back for 1 s"):
            process(session, topics, records)
        assert time.monotonic() - started < 1.0 + kafka_cluster.GRACE

    with closing(broker.join(group, "one")) as session:
        process(session, topics, poll_for(session, PARTITIONS))
    never.set()
    assert PARTITIONS == len(committed(broker, topics.predictions_out))


def test_a_commit_that_comes_through_late_is_respected(
    broker: KafkaBroker, topics: Topics, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session has been given up and its transaction has not: the next one starts behind it."""
    broker.publish(sounds(topics, PARTITIONS))
    with closing(broker.join(group, "one")) as session:
        records = poll_for(session, PARTITIONS)
        commit = session._transactions._producer.commit_transaction
        committed_late = threading.Event()
        given_up = threading.Event()

        def late() -> None:
            given_up.wait(PATIENCE)
            commit()
            committed_late.set()

        monkeypatch.setattr(kafka_transactions, "TRANSACTION_TIMEOUT", 1.0)
        monkeypatch.setattr(session._transactions._producer, "commit_transaction", late)
        with pytest.raises(Retryable):
            process(session, topics, records)
        given_up.set()
        assert committed_late.wait(PATIENCE)

    with closing(broker.join(group, "one")) as session:
        assert [] == session.poll(3.0, 100).records
    assert PARTITIONS == len(committed(broker, topics.predictions_out))


def test_a_commit_that_comes_too_late_is_refused(
    broker: KafkaBroker, topics: Topics, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next session has fenced it, and does the work again."""
    broker.publish(sounds(topics, PARTITIONS))
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(closing(broker.join(group, "one")))
        records = poll_for(session, PARTITIONS)
        commit = session._transactions._producer.commit_transaction
        refused: list[Exception] = []
        given_up, over = threading.Event(), threading.Event()

        def late() -> None:
            given_up.wait(PATIENCE)
            try:
                commit()
            except kafka_errors.KafkaError as error:
                refused.append(error)
            over.set()

        monkeypatch.setattr(kafka_transactions, "TRANSACTION_TIMEOUT", 1.0)
        monkeypatch.setattr(session._transactions._producer, "commit_transaction", late)
        with pytest.raises(Retryable):
            process(session, topics, records)
        monkeypatch.undo()

        new = stack.enter_context(closing(broker.join(group, "one")))
        given_up.set()
        process(new, topics, poll_for(new, PARTITIONS))
        assert over.wait(PATIENCE)
    assert 1 == len(refused)
    assert PARTITIONS == len(committed(broker, topics.predictions_out))
