"""`dlq replay` on both brokers: each dead letter goes back once."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest

from tests.contract.conftest import Connect
from worker import dlq
from worker.broker import Broker
from worker.errors import BadRecord, Retryable
from worker.messages import Record, Topics, rejection_message

RECORDS = 50


def reject(broker: Broker, topics: Topics) -> list[bytes]:
    """Fill audio.dlq, and return the values in order."""
    values = [b"sound %d" % number for number in range(RECORDS)]
    records = (Record(topics.audio_in, 1, 1000 + n, 1_795_334_400_000 + n, b"mic", v) for n, v in enumerate(values))
    broker.publish(rejection_message(topics, record, BadRecord("undecodable", "no RIFF")) for record in records)
    return values


def replay(broker: Broker, topics: Topics) -> dlq.Tally:
    tally = dlq.Tally()
    selection = dlq.Selection()
    dlq.replay(broker, topics, selection, tally, again=False, dry_run=False, stop=threading.Event())
    return tally


def copies(broker: Broker, topics: Topics) -> list[bytes | None]:
    return [record.value for batch in broker.read([topics.audio_in]) for record in batch if record.partition == 1]


def test_each_dead_letter_goes_back_once(broker: Broker, connect: Connect, topics: Topics) -> None:
    """In order, to their partition; a second replay, of another process, sends nothing."""
    values = reject(broker, topics)

    assert RECORDS == replay(broker, topics).sent.total()
    assert dlq.Tally(sent_before=RECORDS) == replay(connect(topics), topics)

    assert values == copies(broker, topics)


def test_a_replay_that_was_killed_is_finished_by_the_next(broker: Broker, connect: Connect, topics: Topics) -> None:
    """What it had sent and not committed goes away, and its successor fences it before it looks at the notes."""
    values = reject(broker, topics)
    with closing(connect(topics).join(dlq.GROUP, dlq.INSTANCE)) as killed:
        letters = [letter for batch in dlq.letters(broker, topics, dlq.Selection()) for letter in batch]
        transaction = killed.transaction()
        transaction.__enter__().send(message for letter in letters for message in dlq.messages(topics, letter))

        assert RECORDS == replay(broker, topics).sent.total()
        with pytest.raises(Retryable):
            transaction.__exit__(None, None, None)

    assert values == copies(broker, topics)
