"""What scores of clips that a forest had not heard say about it.

This module owns how scores of windows become the verdict on clips: the mean over a clip's windows is
calibrated, as the worker does with a record, and measured. It must not know how the scores were made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix

from trainer import metrics
from trainer.calibration import fitted
from trainer.dataset import Clip, Index
from trainer.extract import Windows
from trainer.holdout import HeldOut, Truth
from trainer.results import Answer, Evaluation, Measures
from worker.calibration import Calibration
from worker.golden import window_mean
from worker.profile import Vector

NOT_ASKED: Final[Mapping[str, float]] = {}


def of_scores(
    windows: Windows,
    truth: Truth,
    held: HeldOut,
    calibrations: Sequence[Calibration],
    *,
    how: str,
    leaky: Mapping[str, float] = NOT_ASKED,
    seed: int = 0,
) -> Evaluation:
    """Measure the scores of held-out windows.

    Args:
        windows: of all clips.
        truth: what they are.
        held: their scores; clips that were not tested are left out.
        calibrations: one for each fold, as by `cross_fitted`.
        how: one sentence about how clips were held out.
        leaky: what a random split of the windows claims.
        seed: of the bootstrap.
    """
    tested = np.flatnonzero(held.fold >= 0)
    scores, fold = held.scores[tested], held.fold[tested]
    owner, targets = windows.owner[tested], truth.targets[tested]
    numbers, first = np.unique(owner, return_index=True)
    clips = [windows.dataset.clips[number] for number in numbers]
    groups = np.array([clip.group for clip in clips])
    silent = windows.silent[tested]
    told = _apply(calibrations, by_clip(scores, owner, numbers), fold[first])
    said = _apply(calibrations, scores, fold)
    known, whose = targets[first], groups[np.searchsorted(numbers, owner)]
    named = bool(truth.classes)
    return Evaluation(
        task=windows.dataset.task,
        label=windows.dataset.label,
        classes=truth.classes,
        how=how,
        clip=measures(told, known, groups, seed=seed),
        window=measures(said, targets, whose, seed=seed),
        leaky=dict(leaky),
        silent=float(silent.mean()),
        sounding=measures(said[~silent], targets[~silent], whose[~silent], seed=seed) if silent.any() else {},
        per_class=metrics.per_class(told, known, truth.classes, windows.dataset.background) if named else (),
        confusion=_confusion(told, known, len(truth.classes)) if named else (),
        reliability=metrics.reliability(scores, said, targets) if named else None,
        answers=tuple(_answer(clip, row, truth.classes) for clip, row in zip(clips, told.tolist(), strict=True)),
    )


def measures(scores: Vector, targets: NDArray[Any], groups: NDArray[Any], *, seed: int = 0) -> Measures:
    """Return the measures of `trainer.metrics` for the scores of a classifier (whole targets) or a regressor."""
    measure = metrics.classification if targets.dtype.kind == "i" else metrics.regression
    return measure(scores, targets, groups, seed=seed)


def by_clip(values: Vector, owner: Index, clips: Index) -> Vector:
    """Return the mean of the windows' ``values`` for each of ``clips``, as the worker aggregates a record."""
    return np.array([window_mean(values[owner == clip]) for clip in clips])


def cross_fitted(held: HeldOut, truth: Truth, trees: int) -> list[Calibration]:
    """Return a calibration for each fold that is fitted to all others, so that none is judged by what it knows."""
    found = []
    for fold in range(held.fold.max() + 1):
        others = (held.fold >= 0) & (held.fold != fold)
        rows = others if others.any() else held.fold >= 0
        found.append(fitted(held.scores[rows], truth.targets[rows], trees=trees, classifier=bool(truth.classes)))
    return found


def _apply(calibrations: Sequence[Calibration], scores: Vector, fold: Index) -> Vector:
    """Return ``scores``, each row calibrated for its fold."""
    result = [calibrations[each].apply(scores[fold == each]) for each in np.unique(fold)]
    order = np.argsort(fold, kind="stable")
    calibrated = np.empty((len(scores), result[0].shape[1]))
    calibrated[order] = np.concatenate(result)
    return calibrated


def _confusion(told: Vector, targets: NDArray[np.intp], classes: int) -> tuple[tuple[int, ...], ...]:
    counts = confusion_matrix(targets, told.argmax(axis=1), labels=range(classes))
    return tuple(tuple(row) for row in counts.tolist())


def _answer(clip: Clip, told: Sequence[float], classes: Sequence[str]) -> Answer:
    if not classes:
        value, _, low, high = told
        return Answer(clip.name, clip.label, f"{value:.6g}", low=low, high=high)
    confidence = max(told)
    return Answer(clip.name, clip.label, classes[told.index(confidence)], confidence)
