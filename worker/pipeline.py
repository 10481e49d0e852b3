"""The whole flow, pure: records and states in; outputs, offsets and states out.

    Record -> messages.decode -> audio.waveform -> Featurizer (one call a batch)
           -> forest (one call a batch) -> drift (per source) -> Batch

There is no client, clock, environment or file in here: the service around it polls the records,
and commits a `Batch` in one transaction. What comes out depends on the log alone, never on how
the log was cut into batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from worker import audio, messages
from worker.bundle import Bundle
from worker.drift import DriftPolicy, Shift, SourceState
from worker.errors import BadRecord
from worker.messages import Chunk, Classification, DriftDetected, Message, Prediction, Record, Regression, Topics
from worker.profile import Vector, raw_signals

States = dict[tuple[int, str], SourceState]
"""The detectors by partition of ``audio.in`` and source."""


class Batch(NamedTuple):
    """What a run has made of its records; it is committed as a whole or not at all.

    ``outputs`` are predictions, rejections, drift events and the new drift states; ``offsets``
    holds the next offset to read of each partition. The counts are for the log and the metrics.
    """

    outputs: list[Message]
    offsets: dict[int, int]
    predictions: int
    rejections: int
    drifts: int


class _Heard(NamedTuple):
    """A record whose sound is ready: its windows, shape (windows, samples), and how long it was."""

    record: Record
    chunk: Chunk
    windows: NDArray[np.float32]
    seconds: float
    padded: bool


class Pipeline:
    """A model and its settings, ready to turn records into batches."""

    def __init__(self, bundle: Bundle, topics: Topics, limits: audio.Limits, policy: DriftPolicy) -> None:
        self._bundle = bundle
        self._topics = topics
        self._limits = limits
        self._policy = policy

    def run(self, states: States, records: Sequence[Record]) -> Batch:
        """Process ``records``, which are in offset order within each partition.

        ``states`` is brought up to date in place. If the batch is not committed it is worthless,
        and must be read again from ``drift.state``.
        """
        outputs: list[Message] = []
        heard: list[_Heard] = []
        for record in records:
            try:
                heard.append(self._hear(record))
            except BadRecord as why:
                outputs.append(messages.rejection_message(self._topics, record, why))
        rejections = len(outputs)
        drifts = 0
        if heard:
            scores, features = self._score(heard)
            signals = self._signals(scores, features)
            for each, row, observation in zip(heard, scores, signals, strict=True):
                outputs.append(self._predict(each, row))
                shift = self._watch(states, each, observation)
                if shift is not None:
                    drifts += 1
                    outputs += self._announce(each, shift)
        touched = dict.fromkeys((each.record.partition, each.chunk.source) for each in heard)
        outputs += [self._save(partition, source, states[partition, source]) for partition, source in touched]
        offsets = {record.partition: record.offset + 1 for record in records}
        return Batch(outputs, offsets, len(heard), rejections, drifts)

    def restore(self, states: States, record: Record) -> bool:
        """Put one record of ``drift.state`` back into ``states``; False if it is another model's.

        Raises:
            Fatal: the state cannot be read.
        """
        state = SourceState.decode(record.value or b"", self._bundle.profile, self._policy)
        if state is None:
            return False
        states[record.partition, (record.key or b"").decode()] = state
        return True

    def _hear(self, record: Record) -> _Heard:
        chunk = messages.decode(record)
        featurizer = self._bundle.featurizer
        sound = audio.waveform(chunk.data, chunk.content_type, featurizer.spec.sample_rate, self._limits)
        windows = featurizer.windows(sound.samples)
        padded = len(sound.samples) < windows.shape[1]
        return _Heard(record, chunk, windows, sound.duration, padded)

    def _score(self, heard: Sequence[_Heard]) -> tuple[Vector, NDArray[np.float32]]:
        """Return scores and features of each record: the means over its windows."""
        features = self._bundle.featurizer.transform(np.concatenate([each.windows for each in heard]))
        scores = self._bundle.scores(features)
        if len(features) == len(heard):
            return scores, features
        ends = np.cumsum([len(each.windows) for each in heard])
        spans = [slice(end - len(each.windows), end) for end, each in zip(ends, heard, strict=True)]
        return (
            np.array([scores[span].mean(axis=0) for span in spans]),
            np.array([features[span].mean(axis=0, dtype=np.float64) for span in spans], np.float32),
        )

    def _signals(self, scores: Vector, features: NDArray[np.float32]) -> Vector:
        bundle = self._bundle
        raw = raw_signals(scores, features, bundle.watched, classifier=bundle.manifest.task == "classification")
        return bundle.profile.standardise(raw)

    def _predict(self, heard: _Heard, scores: Vector) -> Message:
        return messages.prediction_message(self._topics, heard.record, self._prediction(heard, scores))

    def _prediction(self, heard: _Heard, scores: Vector) -> Prediction:
        manifest = self._bundle.manifest
        place = messages.position(heard.record, heard.chunk.time)
        source, seconds, windows = heard.chunk.source, heard.seconds, len(heard.windows)
        if manifest.task == "regression":
            value, spread = scores.tolist()
            return Regression(
                source, manifest.label, value, spread, seconds, windows, heard.padded, place, self._bundle.id
            )
        best = int(np.argmax(scores))
        probabilities = dict(zip(manifest.classes, scores.tolist(), strict=True))
        label = manifest.classes[best]
        return Classification(
            source,
            label,
            probabilities[label],
            probabilities,
            seconds,
            windows,
            heard.padded,
            place,
            self._bundle.id,
        )

    def _watch(self, states: States, heard: _Heard, observation: Vector) -> Shift | None:
        key = heard.record.partition, heard.chunk.source
        state = states.get(key)
        if state is None:
            state = states[key] = SourceState(self._bundle.profile, self._policy)
        return state.update(observation, seconds=heard.seconds, offset=heard.record.offset, time=heard.chunk.time)

    def _announce(self, heard: _Heard, shift: Shift) -> tuple[Message, Message]:
        record = heard.record
        since = messages.Position(
            record.topic, record.partition, shift.since_offset, messages.instant(shift.since_time)
        )
        detected = messages.position(record, heard.chunk.time)
        event = DriftDetected(heard.chunk.source, shift.signals, since, detected, self._bundle.id)
        return messages.drift_messages(self._topics, record, event)

    def _save(self, partition: int, source: str, state: SourceState) -> Message:
        return Message(self._topics.drift_state, source.encode(), state.encode(), partition=partition)
