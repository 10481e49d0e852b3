"""Hearing: records in; what was heard in each of them out, or why it could not be used.

    Record -> messages.decode -> audio.waveform -> Featurizer (record by record)
           -> forest (one call a batch) -> Heard or BadRecord

This module owns that a record which cannot be used costs nothing but itself. Most of them are
malformed and say so with a `BadRecord`. The rest meet a bug of ours, and for those there are three
rules, none of which looks at more than one record, so that what comes out still depends on the log
alone:

1. Whatever fails for a batch is tried again with each record alone.
2. A record that fails alone, unexpectedly, is held against the model's golden clips: if those still
   give what they gave the trainer then it is this record, and it is rejected as "internal-error".
   If they do not, then no record can be blamed: that is `Fatal`, and nothing goes to audio.dlq.
3. Running out of memory says something about the machine and nothing about the record: `Fatal`.

It must not know about states, topics or brokers.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from worker import audio, messages
from worker.bundle import Bundle
from worker.errors import BadRecord, EarshotError, Fatal
from worker.golden import window_mean
from worker.messages import Chunk, Classification, Prediction, Record, Regression
from worker.profile import Vector, raw_signals

ADDRESS: Final = re.compile(r"\b0x[0-9a-fA-F]+")
"""Where an object lies in memory differs between two runs; a rejection must not."""

Given = TypeVar("Given")
Made = TypeVar("Made")


class Heard(NamedTuple):
    """What was heard in one record, and its standardised signals, shape (signals,)."""

    chunk: Chunk
    prediction: Prediction
    signals: Vector


class _Features(NamedTuple):
    """A record whose sound is done with: the features of its windows, shape (windows, features).

    ``gain`` is the mean of the windows' in dB, if the model levels them.
    """

    record: Record
    chunk: Chunk
    features: NDArray[np.float32]
    gain: float | None
    seconds: float
    padded: bool


class Hearing:
    """A model and its limits, ready to hear records."""

    def __init__(self, bundle: Bundle, limits: audio.Limits) -> None:
        self._bundle = bundle
        self._limits = limits

    def hear(self, records: Sequence[Record]) -> Iterator[tuple[Record, Heard | BadRecord]]:
        """Yield each record, in order, with what was heard in it or why it is rejected.

        Raises:
            Fatal: it is not about a record.
        """
        prepared = [self._alone(self._prepare, record, record) for record in records]
        usable = [each for each in prepared if isinstance(each, _Features)]
        heard: Sequence[Heard | BadRecord] | None
        try:
            heard = self._predict(usable)
        except Exception:  # noqa: BLE001  # whatever it is, rule 1 finds out whose it is
            heard = None
        if heard is None:
            heard = [self._alone(self._predict_one, each, each.record) for each in usable]
        rest = iter(heard)
        for record, each in zip(records, prepared, strict=True):
            yield record, each if isinstance(each, BadRecord) else next(rest)

    def _alone(self, step: Callable[[Given], Made], given: Given, record: Record) -> Made | BadRecord:
        """Take a step with one record, and reject the record if that is what fails.

        What is returned has never been raised: an exception that was holds the frames that it has passed, and
        these all that is in a batch, in a circle that is taken apart only when the garbage collector comes by.
        """
        try:
            return step(given)
        except BadRecord as why:
            return BadRecord(why.reason, why.detail)
        except EarshotError:
            raise
        except MemoryError as error:
            raise Fatal(
                f"out of memory with {_place(record)}: give the worker more, "
                "or lower --max-record-bytes, --max-record-seconds or --max-batch-bytes"
            ) from error
        except Exception as error:  # noqa: BLE001  # rules 2 and 3
            text = ADDRESS.sub("0x…", f"{type(error).__name__}: {error}")
            try:
                self._bundle.replay()
            except Exception as unsound:  # noqa: BLE001  # a golden clip fails in whatever way the record did
                raise Fatal(
                    f"{_place(record)} failed ({text}), and so do the model's golden clips, so it is not the record: "
                    f"{unsound}; nothing was rejected; check the installation, or go back to the last one that worked"
                ) from error
            trace = "".join(traceback.format_exception(error))
            return BadRecord("internal-error", text.encode(errors="backslashreplace").decode(), trace)

    def _prepare(self, record: Record) -> _Features:
        """Decode and featurize one record; its sound is in memory no longer than this."""
        chunk = messages.decode(record)
        featurizer = self._bundle.featurizer
        sound = audio.waveform(chunk.data, chunk.content_type, featurizer.spec.sample_rate, self._limits)
        windows = featurizer.windows(sound.samples)
        features = featurizer.transform(windows)
        gain = None if featurizer.spec.level_dbfs is None else float(featurizer.gains(windows).mean())
        padded = len(sound.samples) < featurizer.spec.window_samples
        return _Features(record, chunk, features, gain, sound.duration, padded)

    def _predict_one(self, prepared: _Features) -> Heard:
        return self._predict([prepared])[0]

    def _predict(self, prepared: Sequence[_Features]) -> list[Heard]:
        """Predict a batch in one call; answers and features of a record are means over its windows."""
        if not prepared:
            return []
        bundle = self._bundle
        answers = bundle.answers([each.features for each in prepared])
        features = np.array([window_mean(each.features) for each in prepared], np.float32)
        levelled = bundle.manifest.spec.level_dbfs is not None
        gains = np.array([each.gain for each in prepared], np.float32) if levelled else None
        classifier = bundle.manifest.task == "classification"
        raw = raw_signals(answers, features, bundle.watched, gains, classifier=classifier)
        return [
            Heard(each.chunk, self._prediction(each, row), observation)
            for each, row, observation in zip(prepared, answers, bundle.profile.standardise(raw), strict=True)
        ]

    def _prediction(self, heard: _Features, answer: Vector) -> Prediction:
        manifest = self._bundle.manifest
        place = messages.position(heard.record, heard.chunk.time)
        source, seconds, windows = heard.chunk.source, heard.seconds, len(heard.features)
        if manifest.task == "regression":
            value, spread, low, high = answer.tolist()
            return Regression(
                source,
                manifest.label,
                value,
                low,
                high,
                spread,
                seconds,
                windows,
                heard.padded,
                place,
                self._bundle.id,
            )
        best = int(answer.argmax())
        probabilities = dict(zip(manifest.classes, answer.tolist(), strict=True))
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


def _place(record: Record) -> str:
    return f"record {record.offset} of partition {record.partition} of {record.topic}"
