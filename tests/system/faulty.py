"""A worker that fails at one step, once: the worker's own command line, with a fault put into the broker's client.

The steps are those of a transaction and what comes before it, on either broker, each ``before`` and
``after``. A fault is what the client would raise if the broker had gone, or SIGKILL. One is neither: a
message whose delivery times out. This module runs in a process of its own, which it changes for good.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, Literal, NamedTuple

from kafka import KafkaConsumer
from kafka.errors import KafkaTimeoutError

import worker.__main__
from tests.system.mutants import Mutation, mutate
from worker import broker_kafka, broker_sqlite, pipeline
from worker.broker import Broker
from worker.errors import Retryable
from worker.kafka_clients import Producer
from worker.messages import Message, Record

Mode = Literal["retryable", "kill"]

KAFKA: Final = {
    "join": (Producer, "init_transactions"),
    "poll": (broker_kafka.KafkaSession, "poll"),
    "begin": (Producer, "begin_transaction"),
    "send": (Producer, "_enqueue"),
    "flush": (Producer, "deliver"),
    "generation": (KafkaConsumer, "group_metadata"),
    "offsets": (Producer, "send_offsets_to_transaction"),
    "commit": (Producer, "commit_transaction"),
}
SQLITE: Final = {
    "join": (broker_sqlite.SqliteBroker, "join"),
    "poll": (broker_sqlite._Session, "poll"),
}
STATEMENTS: Final = {
    "BEGIN": "begin",
    "INSERT INTO records": "send",
    "INSERT OR REPLACE INTO offsets": "offsets",
    "COMMIT": "commit",
}
"""What the embedded broker tells SQLite in a transaction, and the steps that these are."""

ARMED: Final = 3
"""Batches after which the first fault may strike: there is something to lose and something to double by then."""

LOST: Final = "lost message"
"""A fault of Kafka's: the delivery of a message times out, and the transaction knows nothing of it."""

LEFT_OVER: Final = 99
"""The exit status if a fault has not struck."""


class Faults:
    """Faults that are still to strike, in their order."""

    def __init__(self, steps: Sequence[str], mode: Mode, *, armed: bool) -> None:
        self.steps = list(steps)
        self._mode = mode
        self._batches = ARMED if armed else 0
        self._sends = 0

    def due(self, name: str) -> bool:
        """Return whether this is the moment of the next fault, which is then over."""
        now = self._batches >= ARMED and name in self.steps[:1]
        if now:
            del self.steps[0]
        return now

    def strike(self, when: str, step: str) -> None:
        """Strike if this is the moment; what a transaction hands over is told apart by number."""
        if step == "begin":
            self._sends = 0
        self._sends += (when, step) == ("before", "send")
        name = f"{when} {step} {self._sends}" if step == "send" else f"{when} {step}"
        if not self.due(name):
            return
        if self._mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise Retryable(f"a fault {name}")

    def count_batches(self) -> None:
        run = pipeline.Pipeline.run

        def counted(*arguments: Any) -> Any:
            self._batches += 1
            return run(*arguments)

        pipeline.Pipeline.run = counted  # type: ignore[method-assign, assignment]  # it is the one, counted

    def surround(self, owner: Any, name: str, step: str) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def surrounded(*arguments: Any, **more: Any) -> Any:
            self.strike("before", step)
            result = original(*arguments, **more)
            self.strike("after", step)
            return result

        setattr(owner, name, surrounded)

    def surround_statements(self) -> None:
        execute = broker_sqlite._Database.execute

        def surrounded(database: Any, statement: str, *parameters: object) -> list[Any]:
            steps = [step for start, step in STATEMENTS.items() if statement.startswith(start)]
            for step in steps:
                self.strike("before", step)
            rows = execute(database, statement, *parameters)
            for step in steps:
                self.strike("after", step)
            return rows

        broker_sqlite._Database.execute = surrounded  # type: ignore[method-assign, assignment]  # as above

    def surround_restore(self, session: Any) -> None:
        original = session.restore

        def restore(one: Any, partitions: Iterable[int]) -> Iterator[Record]:
            self.strike("before", "restore")
            for record in original(one, partitions):
                yield record
                self.strike("during", "restore")
            self.strike("after", "restore")

        session.restore = restore


class Undelivered:
    """A record whose delivery has timed out."""

    def wait(self, _deadline: float) -> None:
        raise KafkaTimeoutError("a fault: the record was not taken in time")


def lose_a_message(faults: Faults) -> None:
    """Let the delivery of one message time out, which leaves the transaction of Kafka's client intact."""
    write = Producer.write

    def losing(producer: Producer, messages: Iterable[Message]) -> list[Any]:
        wanted = list(messages)
        if not faults.due(LOST):
            return list(write(producer, wanted))
        return [Undelivered(), *write(producer, wanted[1:])]

    Producer.write = losing  # type: ignore[method-assign, assignment]  # it is the one, and loses one


class Job(NamedTuple):
    """What a process has to do.

    ``arguments`` are those of ``earshot-worker``. ``steps`` are the faults, such as ``before commit``
    or ``after send 2``, in their order; ``armed`` says that the first may strike at once, and not only
    after `ARMED` batches. ``log`` takes what the worker says.
    """

    arguments: Sequence[str]
    steps: Sequence[str]
    mode: Mode
    armed: bool
    mutation: Mutation | None
    connect: Callable[[], Broker]
    log: str


def run(job: Job) -> None:
    """Run a worker, and end the process with its exit status."""
    sys.stderr = open(job.log, "a", buffering=1)  # noqa: PTH123, SIM115  # for as long as the process lives
    if job.mutation is not None:
        mutate(job.mutation, job.connect)
    faults = Faults(job.steps, job.mode, armed=job.armed)
    faults.count_batches()
    lose_a_message(faults)
    for session in (broker_kafka.KafkaSession, broker_sqlite._Session):
        faults.surround_restore(session)
    for step, (owner, name) in (*KAFKA.items(), *SQLITE.items()):
        faults.surround(owner, name, step)
    faults.surround_statements()
    status = worker.__main__.main(job.arguments)
    os._exit(LEFT_OVER if status == 0 and faults.steps else status)
