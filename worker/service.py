"""The loop: poll, run the pipeline, commit in one transaction; and what happens when that fails.

Recovery is a restart. Any failed transaction, lost membership or unreachable broker drops the
session and every state with it, and a new session starts from what was committed. There is one
way to recover, so it is the one that is tested.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from threading import Event
from typing import Final

from worker.broker import Broker, Session
from worker.errors import Retryable
from worker.health import Pulse
from worker.messages import Record
from worker.pipeline import Batch, Pipeline, States
from worker.telemetry import Log

FIRST_PAUSE: Final = 0.5
"""Seconds before the first new session: a rebalance or a broker's restart is often over by then."""

LONGEST_PAUSE: Final = 15.0
"""Seconds between sessions at the most, so that the end of an outage is noticed soon."""

SETTLED: Final = 15.0
"""Seconds from which on an idle session is a healthy one. Joining takes a few, and a session that
fails as soon as it has something to commit must not look healthy because it could join."""

PROGRESS: Final = 5.0
"""Seconds between two signs of life while states are restored."""


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
        max_batch_bytes: int,
        poll_seconds: float,
        give_up_seconds: float,
        stop: Event,
        pulse: Pulse,
        log: Log,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._broker = broker
        self._pipeline = pipeline
        self._group = group
        self._instance = instance
        self._max_batch_records = max_batch_records
        self._max_batch_bytes = max_batch_bytes
        self._poll_seconds = poll_seconds
        self._give_up_seconds = give_up_seconds
        self._stop = stop
        self._pulse = pulse
        self._log = log
        self._clock = clock
        self._last_advance = -math.inf
        self._sent: tuple[Batch, float] | None = None  # what is being committed, and when it was begun

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
                    self._pulse.beat("joined")
                    self._serve(session)
            except Retryable as error:
                # They hold all states and records of the session, in a circle where the error came from a thread.
                traceback.clear_frames(error.__traceback__)
                now = self._clock()
                if self._last_advance >= joined:
                    pause, failing_since = FIRST_PAUSE, now
                failing = now - failing_since
                if failing > self._give_up_seconds:
                    raise GaveUp(f"gave up after {failing:.0f} s without the broker: {error}") from error
                self._pulse.unready(f"the session was lost: {error}")
                self._pulse.beat("lost its session")
                self._log.warning("session.lost", why=str(error), next_try_seconds=pause)
                self._stop.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        self._log.info("stopped")

    def _serve(self, session: Session) -> None:
        states: States = {}
        self._sent = None
        settled = self._clock() + SETTLED
        waiting: frozenset[int] = frozenset()
        while not self._stop.is_set():
            records, assigned, revoked, unplaced, more = session.poll(self._poll_seconds, self._max_batch_records)
            self._pulse.beat("polled")
            started = self._clock()
            if assigned or revoked:
                for partition in revoked:
                    states.pop(partition, None)
                self._restore(session, states, assigned)
                sources = sum(len(each) for each in states.values())
                self._log.info("assigned", new=sorted(assigned), gone=sorted(revoked), sources=sources)
            waiting = self._wait_for(unplaced, revoked, waiting)
            if not records and not unplaced and started >= settled:
                self._last_advance = started
            for part in _parts(records, self._max_batch_bytes):
                self._process(session, states, part)
            if not (records and more):
                self._settle(session)
        self._settle(session)

    def _wait_for(self, unplaced: frozenset[int], revoked: frozenset[int], before: frozenset[int]) -> frozenset[int]:
        """Say that partitions are ours and cannot be served yet, and which of those ``before`` can; return them."""
        if unplaced:
            self._pulse.unready(f"the broker does not tell yet where to go on in partitions {sorted(unplaced)}")
        elif before:
            self._pulse.ready()
        if unplaced - before:
            self._log.info("waiting_for_offsets", partitions=sorted(unplaced))
        if known := before - unplaced - revoked:
            self._log.info("offsets_known", partitions=sorted(known))
        return unplaced

    def _process(self, session: Session, states: States, records: Sequence[Record]) -> None:
        """Run the pipeline and begin to commit what it has made, in one transaction.

        On a backlog the commit goes on while the next records are heard. They are heard with states that are
        not committed yet; if that fails, these are lost with the session, and so is what they led to. Where
        nothing waits, `_serve` waits for the commit: a record that came meanwhile would have to wait for two.
        """
        started = self._clock()
        batch = self._pipeline.run(states, records)
        self._pulse.beat("heard a batch")
        self._settle(session)
        with session.transaction(wait=False) as transaction:
            transaction.send(batch.outputs)
            transaction.commit_offsets(batch.offsets)
        self._sent = batch._replace(outputs=[]), started

    def _settle(self, session: Session) -> None:
        """Wait until the batch that was sent last is committed, and tell of it."""
        if self._sent is None:
            return
        (batch, started), self._sent = self._sent, None
        session.settle()
        self._pulse.beat("committed")
        self._last_advance = self._clock()
        self._tell(batch, seconds=round(self._last_advance - started, 4))

    def _tell(self, batch: Batch, *, seconds: float) -> None:
        """Log a batch that was committed: for the operator only what is not everyday."""
        rejections = batch.rejections.total()
        self._log.debug(
            "committed",
            records=batch.predictions + rejections,
            predictions=batch.predictions,
            rejections=rejections,
            drifts=batch.drifts,
            seconds=seconds,
        )
        if batch.drifts:
            self._log.info("drift", events=batch.drifts)
        if rejections:
            self._log.warning("rejected", records=rejections, reasons=dict(sorted(batch.rejections.items())))
        if batch.failure is not None:
            self._log.error("internal_error", records=batch.rejections["internal-error"], first=batch.failure)
        if batch.silent:
            self._log.info("sources.forgotten", sources=batch.silent, why="silent for --forget-after records")
        if batch.crowded_out:
            self._log.warning("sources.forgotten", sources=batch.crowded_out, why="more than --max-sources")

    def _restore(self, session: Session, states: States, partitions: frozenset[int]) -> None:
        if not partitions:
            return
        self._log.info("restoring", partitions=sorted(partitions))
        self._pulse.unready(f"the states of partitions {sorted(partitions)} are being restored")
        restored = self._pipeline.restore(states, self._counted(session.restore(partitions)))
        self._pulse.beat("restored")
        self._pulse.ready()
        if restored.foreign:
            self._log.warning("state.of_another_model", sources=restored.foreign, effect="their detectors start anew")
        if restored.unreadable:
            self._log.warning("state.reset", sources=restored.unreadable, effect="their detectors start anew")

    def _counted(self, records: Iterable[Record]) -> Iterator[Record]:
        """Pass on the states that are restored, and say now and then how far that is."""
        told = self._clock()
        for count, record in enumerate(records):
            if self._clock() - told >= PROGRESS:
                told = self._clock()
                self._pulse.beat("restoring")
                self._log.info("restoring", sources=count)
            yield record


def _parts(records: Sequence[Record], max_bytes: int) -> Iterator[list[Record]]:
    """Cut records into transactions of at most ``max_bytes``, or of one record that is larger.

    All of them are processed before the next poll, so nothing is held across it.
    """
    part: list[Record] = []
    size = 0
    for record in records:
        bytes_ = len(record.value or b"") + len(record.key or b"") + sum(len(n) + len(v) for n, v in record.headers)
        if part and size + bytes_ > max_bytes:
            yield part
            part, size = [], 0
        part.append(record)
        size += bytes_
    if part:
        yield part
