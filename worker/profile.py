"""The reference profile: which numbers are watched for each source, and what they were in training.

A *signal* is one number a record: the confidence of its prediction, one if it was given a class and
zero if not, a predicted value, an important feature. A bundle carries the mean and spread of each
over held-out training windows, and `worker.drift` watches them in those units.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import msgspec
import numpy as np
from numpy.typing import NDArray

from worker.compiled import compiled
from worker.features import LEVEL_GAIN

Vector = NDArray[np.float64]


class Signal(msgspec.Struct, frozen=True):
    """A watched number with its mean and spread (standard deviation, positive) over the training data.

    ``name`` is one of ``confidence``, ``share.<class>``, ``value``, ``spread``, ``feature.<name>``,
    ``level.gain`` (dB).
    """

    name: str
    mean: float
    spread: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.mean) and np.isfinite(self.spread) and self.spread > 0):
            raise ValueError(
                f"signal {self.name!r}: mean {self.mean} and spread {self.spread} must be finite, spread > 0"
            )


class ReferenceProfile(msgspec.Struct, frozen=True, dict=True):  # dict: for what is cached
    """What normal looked like: every watched signal over the held-out training windows."""

    signals: tuple[Signal, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the signals, in the order of every vector."""
        return tuple(signal.name for signal in self.signals)

    def standardise(self, raw: Vector) -> Vector:
        """Return raw signals, shape (n, signals), in training standard deviations from the training mean."""
        mean, spread = self._scale
        standardised: Vector = (raw - mean) / spread
        return standardised

    @cached_property
    def _scale(self) -> tuple[Vector, Vector]:
        return np.array([each.mean for each in self.signals]), np.array([each.spread for each in self.signals])


def signal_names(classes: Sequence[str], watched: Sequence[str], *, levelled: bool = False) -> tuple[str, ...]:
    """Return the names of all signals of a model with these classes (none: a regressor) and watched features.

    A model that levels its windows has their gain as the last signal: what is louder or quieter looks the same
    to its features, and is still a change.
    """
    scores = ("confidence", *(f"share.{label}" for label in classes)) if classes else ("value", "spread")
    return (*scores, *(f"feature.{name}" for name in watched), *([LEVEL_GAIN] if levelled else []))


def raw_signals(
    scores: Vector,
    features: NDArray[np.float32],
    watched: Sequence[int] | NDArray[np.intp],
    gains: NDArray[np.float32] | None = None,
    *,
    classifier: bool,
) -> Vector:
    """Return the signals of a batch of records, in their own units.

    Args:
        scores: for a classifier the probabilities, shape (n, classes); for a regressor the value
            and the spread over the trees, shape (n, 2), with or without columns behind them.
        features: the feature matrix, shape (n, features).
        watched: the columns of ``features`` to watch.
        gains: of a model that levels its windows, by how many dB, shape (n,).
        classifier: which of the two kinds of scores these are.

    Returns:
        Shape (n, signals), in the order of `signal_names`.

    Raises:
        ValueError: there are not as many scores as rows of features.
    """
    if len(features) != len(scores):
        raise ValueError(f"{len(scores)} scores and {len(features)} rows of features; expected as many")
    n_told = 1 + scores.shape[1] if classifier else 2
    raw = np.empty((len(scores), n_told + len(watched) + (gains is not None)))
    fill = _fill_classified if classifier else _fill_measured
    fill(raw, scores, features, np.asarray(watched, np.intp))
    if gains is not None:
        raw[:, -1] = gains
    return raw


@compiled
def _fill_classified(raw: Vector, scores: Vector, features: NDArray[np.float32], watched: NDArray[np.intp]) -> None:
    """Write all signals but the gain: numpy takes ten calls for that, and a record alone waits for each."""
    n_classes = scores.shape[1]
    for row in range(len(raw)):
        best = scores[row].argmax()
        raw[row, 0] = scores[row, best]
        for label in range(n_classes):
            raw[row, 1 + label] = label == best
        for place in range(len(watched)):
            raw[row, 1 + n_classes + place] = features[row, watched[place]]


@compiled
def _fill_measured(raw: Vector, scores: Vector, features: NDArray[np.float32], watched: NDArray[np.intp]) -> None:
    """Do for a regressor what `_fill_classified` does."""
    for row in range(len(raw)):
        raw[row, 0], raw[row, 1] = scores[row, 0], scores[row, 1]
        for place in range(len(watched)):
            raw[row, 2 + place] = features[row, watched[place]]
