"""The loop: poll, run the pipeline, commit in one transaction; and what happens when that fails.

Recovery is a restart. Any failed transaction, lost membership or unreachable broker drops the
session and every state with it, and a new session starts from what was committed. There is one
way to recover, so it is the one that is tested.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from threading import Event
from typing import Final

from worker.broker import Broker, Session
from worker.errors import Retryable
from worker.pipeline import Pipeline, States
from worker.telemetry import Log

FIRST_PAUSE: Final = 0.5
"""Seconds before the first new session: a rebalance or a broker's restart is often over by then."""

LONGEST_PAUSE: Final = 15.0
"""Seconds between sessions at the most, so that the end of an outage is noticed soon."""

SETTLED: Final = 15.0
"""Seconds from which on an idle session is a healthy one. Joining takes a few, and a session that
fails as soon as it has something to commit must not look healthy because it could join."""


class GaveUp(Retryable):
    """Session after session has failed for longer than the operator wants to wait."""


class Service:
    """One worker: a pipeline, a broker, and a place in a consumer group."""

    def __init__(
        self,
        broker: Broker,
        pipeline: Pipeline,
        *,
        group: str,
        instance: str,
        max_batch_records: int,
        poll_seconds: float,
        give_up_seconds: float,
        stop: Event,
        log: Log,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._broker = broker
        self._pipeline = pipeline
        self._group = group
        self._instance = instance
        self._max_batch_records = max_batch_records
        self._poll_seconds = poll_seconds
        self._give_up_seconds = give_up_seconds
        self._stop = stop
        self._log = log
        self._clock = clock
        self._last_advance = -math.inf

    def run(self) -> None:
        """Serve until told to stop; then finish the batch in hand, leave the group and return.

        Raises:
            GaveUp: sessions have failed for the stated time, and none has committed or settled.
            Fatal: going on cannot help.
        """
        pause = FIRST_PAUSE
        failing_since = self._clock()
        while not self._stop.is_set():
            joined = self._clock()
            try:
                with closing(self._broker.join(self._group, self._instance)) as session:
                    self._serve(session)
            except Retryable as error:
                now = self._clock()
                if self._last_advance >= joined:
                    pause, failing_since = FIRST_PAUSE, now
                failing = now - failing_since
                if failing > self._give_up_seconds:
                    raise GaveUp(f"gave up after {failing:.0f} s without the broker: {error}") from error
                self._log.warning("session.lost", why=str(error), next_try_seconds=pause)
                self._stop.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        self._log.info("stopped")

    def _serve(self, session: Session) -> None:
        states: States = {}
        settled = self._clock() + SETTLED
        while not self._stop.is_set():
            records, assigned, revoked = session.poll(self._poll_seconds, self._max_batch_records)
            started = self._clock()
            if assigned or revoked:
                for key in [key for key in states if key[0] in revoked]:
                    del states[key]
                self._restore(session, states, assigned)
                self._log.info("assigned", new=sorted(assigned), gone=sorted(revoked), sources=len(states))
            if not records:
                if started >= settled:
                    self._last_advance = started
                continue
            batch = self._pipeline.run(states, records)
            with session.transaction() as transaction:
                transaction.send(batch.outputs)
                transaction.commit_offsets(batch.offsets)
            self._last_advance = self._clock()
            self._log.info(
                "committed",
                records=len(records),
                predictions=batch.predictions,
                rejections=batch.rejections,
                drifts=batch.drifts,
                seconds=round(self._last_advance - started, 4),
            )

    def _restore(self, session: Session, states: States, partitions: frozenset[int]) -> None:
        foreign = sum(not self._pipeline.restore(states, record) for record in session.restore(partitions))
        if foreign:
            self._log.warning("state.of_another_model", sources=foreign, effect="their detectors start anew")
