"""Workers without one of the things on which exactly once rests: the tests of the faults have to see each of them.

``unchecked`` does not take the results of its messages before it commits. ``state first`` and ``state
last`` save the detectors beside the transaction, before it ends or after. This module changes the
process that it runs in for good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any, Literal

from worker import broker_kafka, broker_sqlite, kafka_transactions
from worker.broker import Broker
from worker.kafka_clients import Producer
from worker.messages import Message, Topics

Mutation = Literal["unchecked", "state first", "state last"]


def mutate(mutation: Mutation, connect: Callable[[], Broker]) -> None:
    """Change the worker of this process; ``connect`` reaches its broker beside the worker."""
    if mutation == "unchecked":
        Producer.deliver = lambda *_: None  # type: ignore[method-assign]
        return
    saved: list[Message] = []

    def save() -> None:
        with closing(connect()) as broker:
            broker.publish(saved)
        saved.clear()

    for transaction in (kafka_transactions.KafkaTransaction, broker_sqlite._Transaction):
        _divert_states(transaction, saved)
    for session in (broker_kafka.KafkaSession, broker_sqlite._Session):
        _save_outside(session, mutation, save)


def _divert_states(transaction: Any, saved: list[Message]) -> None:
    send = transaction.send

    def diverting(one: Any, messages: Iterable[Message]) -> None:
        parts: tuple[list[Message], list[Message]] = [], []
        for message in messages:
            parts[message.topic.endswith(Topics().drift_state)].append(message)
        saved.extend(parts[True])
        send(one, parts[False])

    transaction.send = diverting


def _save_outside(session: Any, mutation: Mutation, save: Callable[[], None]) -> None:
    original = session.transaction

    @contextmanager
    def transaction(one: Any, **how: Any) -> Iterator[Any]:
        with original(one, **how) as inside:
            yield inside
            if mutation == "state first":
                save()
        one.settle()
        save()

    session.transaction = transaction
