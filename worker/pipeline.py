"""The whole flow, pure: records and states in; outputs, offsets and states out.

    Record -> hearing (decode, featurize, predict) -> drift (per source) -> Batch

There is no client, clock, environment or file in here: the service around it polls the records,
and commits a `Batch` in one transaction. What comes out depends on the log alone, never on how
the log was cut into batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from worker import audio, messages
from worker.bundle import Bundle
from worker.drift import DriftPolicy, Shift
from worker.errors import BadRecord, Fatal, Reason
from worker.hearing import Heard, Hearing
from worker.messages import DriftDetected, Message, Record, Topics
from worker.states import Retention, Sources

States = dict[int, Sources]
"""The detectors by partition of ``audio.in``."""


class Batch(NamedTuple):
    """What a run has made of its records; it is committed as a whole or not at all.

    ``outputs`` are predictions, rejections, drift events and what has changed of the drift states;
    ``offsets`` holds the next offset to read of each partition. The rest is for the log and the
    metrics: ``silent`` and ``crowded_out`` count the sources that were forgotten (see
    `worker.states`), and ``failure`` is the traceback of the first unexpected exception that cost a record.
    """

    outputs: list[Message]
    offsets: dict[int, int]
    predictions: int
    rejections: Counter[Reason]
    drifts: int = 0
    silent: int = 0
    crowded_out: int = 0
    failure: str | None = None


class Restored(NamedTuple):
    """How many sources came back, were another model's, and could not be read and start anew."""

    sources: int
    foreign: int
    unreadable: int


class Pipeline:
    """A model and its settings, ready to turn records into batches.

    With ``reset_state`` a state that cannot be read is given up, and its source starts anew.
    """

    def __init__(
        self,
        bundle: Bundle,
        topics: Topics,
        limits: audio.Limits,
        policy: DriftPolicy,
        retention: Retention,
        *,
        reset_state: bool = False,
    ) -> None:
        self._bundle = bundle
        self._topics = topics
        self._hearing = Hearing(bundle, limits)
        self._policy = policy
        self._retention = retention
        self._reset_state = reset_state

    def run(self, states: States, records: Sequence[Record]) -> Batch:
        """Process ``records``, which are in offset order within each partition.

        ``states`` is brought up to date in place. If the batch is not committed it is worthless,
        and must be read again from ``drift.state``.

        Raises:
            Fatal: something is wrong that is not about a record.
        """
        outputs: list[Message] = []
        rejections: Counter[Reason] = Counter()
        drifts = silent = crowded_out = 0
        failure: str | None = None
        for record, heard in self._hearing.hear(records):
            if isinstance(heard, BadRecord):
                outputs.append(messages.rejection_message(self._topics, record, heard))
                rejections[heard.reason] += 1
                failure = failure or heard.trace
                continue
            outputs.append(messages.prediction_message(self._topics, record, heard.prediction))
            shift = self._watch(states, record, heard)
            if shift is not None:
                drifts += 1
                outputs += self._announce(record, heard, shift)
        offsets = {record.partition: record.offset + 1 for record in records}
        for partition in offsets:
            changes = self._sources(states, partition).changes()
            outputs += [
                Message(self._topics.drift_state, key, value, partition=partition)
                for key, value in changes.values.items()
            ]
            silent += changes.silent
            crowded_out += changes.crowded_out
        predictions = len(records) - rejections.total()
        return Batch(outputs, offsets, predictions, rejections, drifts, silent, crowded_out, failure)

    def restore(self, states: States, records: Iterable[Record]) -> Restored:
        """Put records of ``drift.state`` back into ``states``.

        Raises:
            Fatal: a state cannot be read, and that was not to be put up with.
        """
        restored = foreign = unreadable = 0
        for record in records:
            sources, key = self._sources(states, record.partition), record.key or b""
            try:
                known = sources.restore(key, record.value or b"")
            except Fatal as error:
                if not self._reset_state:
                    raise Fatal(
                        f"the state of source {key!r} in partition {record.partition} of {record.topic}: {error}; "
                        "`earshot-worker run --reset-state` starts the detectors of such sources anew"
                    ) from error
                sources.give_up(key)
                unreadable += 1
            else:
                restored += known
                foreign += not known
        return Restored(restored, foreign, unreadable)

    def _sources(self, states: States, partition: int) -> Sources:
        if partition not in states:
            states[partition] = Sources(self._bundle.profile, self._policy, self._retention)
        return states[partition]

    def _watch(self, states: States, record: Record, heard: Heard) -> Shift | None:
        return self._sources(states, record.partition).update(
            heard.chunk.source,
            heard.signals,
            seconds=heard.prediction.duration,
            offset=record.offset,
            time=heard.chunk.time,
        )

    def _announce(self, record: Record, heard: Heard, shift: Shift) -> tuple[Message, Message]:
        since = messages.Position(
            record.topic, record.partition, shift.since_offset, messages.instant(shift.since_time)
        )
        detected = messages.position(record, heard.chunk.time)
        event = DriftDetected(heard.chunk.source, shift.signals, since, detected, self._bundle.id)
        return messages.drift_messages(self._topics, record, event)
