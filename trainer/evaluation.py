"""What a model is worth on clips it has not seen, and what its world looks like when all is well.

Everything here is computed out of fold: each window is scored by a forest that was fitted without
its clip and without any clip of the same group. A profile made from the training scores would
promise a confidence that no stream can keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, r2_score

from worker.bundle import scores
from worker.forest import Forest
from worker.profile import ReferenceProfile, Signal, Vector, raw_signals, signal_names

Index = NDArray[np.intp]

WATCHED_FEATURES = 8
"""How many of the most important features are watched: enough to say what changed, few enough that
a state stays at a few kilobytes."""

ALWAYS_WATCHED = ("rms.mean", "centroid.mean", "bandwidth.mean", "flatness.mean")
"""Watched whatever their importance: level, colour and noise are what a microphone changes when it goes bad."""


def held_out_scores(
    make: Callable[[], Any],
    features: NDArray[np.float32],
    targets: NDArray[Any],
    owner: Index,
    splits: Iterable[tuple[Index, Index]],
    *,
    outputs: int,
) -> Vector:
    """Score every window by a forest that knows neither its clip nor its group.

    Args:
        make: returns a new, unfitted scikit-learn forest.
        features: shape (windows, features).
        targets: class index or value of each window, shape (windows,).
        owner: the clip of each window, shape (windows,).
        splits: training and held-out clips of each fold.
        outputs: how many scores a window has: the number of classes, or 2 for a regressor.

    Returns:
        Shape (windows, outputs); NaN where a window was held out by no fold.
    """
    result = np.full((len(features), outputs), np.nan)
    for train, test in splits:
        fitted, held = np.isin(owner, train), np.isin(owner, test)
        forest = make().fit(features[fitted], targets[fitted])
        columns = forest.classes_ if hasattr(forest, "classes_") else np.arange(outputs)
        # A class that stands in no clip of this fold's training data has no column, and gets zero.
        result[held] = 0.0
        result[np.ix_(held, columns)] = scores(Forest.from_sklearn(forest), features[held])
    return result


def by_clip(values: Vector, owner: Index, clips: Index) -> Vector:
    """Return the mean of the windows' ``values`` for each of ``clips``, as the worker aggregates a record."""
    return np.array([values[owner == clip].mean(axis=0) for clip in clips])


def classification_metrics(probabilities: Vector, targets: NDArray[np.intp], owner: Index) -> dict[str, float]:
    """Return accuracy and macro-F1 of clips, and the accuracy of single windows."""
    clips, first = np.unique(owner, return_index=True)
    found = by_clip(probabilities, owner, clips).argmax(axis=1)
    truth = targets[first]
    return {
        "accuracy": float(accuracy_score(truth, found)),
        "macro_f1": float(f1_score(truth, found, average="macro")),
        "window_accuracy": float(accuracy_score(targets, probabilities.argmax(axis=1))),
    }


def regression_metrics(values: Vector, targets: Vector, owner: Index) -> dict[str, float]:
    """Return mean absolute error and R² of clips, and the mean absolute error of single windows."""
    clips, first = np.unique(owner, return_index=True)
    found = by_clip(values[:, 0], owner, clips)
    truth = targets[first]
    return {
        "mae": float(mean_absolute_error(truth, found)),
        "r2": float(r2_score(truth, found)),
        "window_mae": float(mean_absolute_error(targets, values[:, 0])),
    }


def watched_features(importances: Vector, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the most important features, and of `ALWAYS_WATCHED` those that there are."""
    ranked = [names[index] for index in np.argsort(-importances, kind="stable")[:WATCHED_FEATURES]]
    return (*ranked, *(name for name in ALWAYS_WATCHED if name in names and name not in ranked))


def reference_profile(
    held_out: Vector,
    features: NDArray[np.float32],
    *,
    classes: tuple[str, ...],
    watched: tuple[str, ...],
    names: tuple[str, ...],
) -> ReferenceProfile:
    """Return mean and spread of every watched signal over the held-out windows.

    A signal that never varies (a class that is never predicted) gets a spread of one in its own
    unit: there is nothing to measure a change by, and any other number would be made up.
    """
    columns = [names.index(name) for name in watched]
    raw = raw_signals(held_out, features, columns, classifier=bool(classes))
    spread = raw.std(axis=0)
    spread[spread < 1e-12] = 1.0
    return ReferenceProfile(
        tuple(
            Signal(name, mean, deviation)
            for name, mean, deviation in zip(
                signal_names(classes, watched), raw.mean(axis=0).tolist(), spread.tolist(), strict=True
            )
        )
    )
