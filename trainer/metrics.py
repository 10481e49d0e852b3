"""How good scores are, and how sure that is: measures, their bootstrap intervals, and reliability.

This module owns the numbers, from scores and truth alone. It must not know about forests, folds or clips.

An interval is of 1,000 draws of whole groups with replacement (the cluster bootstrap; Efron 1979), since
clips of one recording are right or wrong together. A draw is a weight for each group, so that all draws
of a measure are one product of matrices and not a thousand calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_fscore_support, roc_auc_score

from trainer.results import ClassResult, Measure, Measures, Reliability, ReliabilityBin
from worker.profile import Vector

DRAWS: Final = 1000
CHUNK: Final = 2_000_000
"""Numbers at a time while draws are ranked: 16 MB an array."""

BINS: Final = 15
"""Of confidence; as many as Guo et al. (2017) have."""

TOP: Final = 3

Codes = NDArray[np.intp]


def classification(probabilities: Vector, truth: Codes, groups: NDArray[Any], *, seed: int = 0) -> Measures:
    """Measure a classifier.

    Args:
        probabilities: shape (n, classes).
        truth: the index of the true class, shape (n,).
        groups: what each row belongs to, shape (n,); groups are drawn as a whole.
        seed: of the draws.

    Returns:
        accuracy, macro_f1, auroc and auprc (means over the classes), top3 if there are more than three
        classes, and calibration_error (of the chosen class; Guo et al. 2017). What is not defined, as
        AUROC is for a single class, is left out.
    """
    weights, rows = _draws(groups, seed)
    hits = np.eye(probabilities.shape[1], dtype=bool)
    said = probabilities.argmax(axis=1)
    right = said == truth
    confidence = probabilities.max(axis=1)
    correct, called, true = (
        _sums(weights, rows, each) for each in (hits[truth] & right[:, None], hits[said], hits[truth])
    )
    total = true.sum(axis=1)
    with np.errstate(invalid="ignore"):  # a class that a draw does not have is 0 / 0, and not counted
        found = {"accuracy": correct.sum(axis=1) / total, "macro_f1": _known_mean(2 * correct / (called + true))}
    found["auroc"], found["auprc"] = _ranked(probabilities, truth, weights, rows)
    if probabilities.shape[1] > TOP:
        first = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP]
        found[f"top{TOP}"] = _sums(weights, rows, (first == truth[:, None]).any(axis=1)[:, None])[:, 0] / total
    gaps = (right - confidence)[:, None] * (_bin(confidence)[:, None] == np.arange(BINS))
    found["calibration_error"] = np.abs(_sums(weights, rows, gaps)).sum(axis=1) / total
    return _measures(found, groups=weights.shape[1])


def regression(scores: Vector, truth: Vector, groups: NDArray[Any], *, seed: int = 0) -> Measures:
    """Measure a regressor.

    Args:
        scores: values and spreads, shape (n, 2), or with the ends of their intervals, shape (n, 4).
        truth: shape (n,); for the others see `classification`.
        groups: as there.
        seed: as there.

    Returns:
        mae and rmse in the unit of the truth, r2 (left out where the truth does not vary), and where there are
        intervals coverage, the share of the truth that lies within its own.
    """
    weights, rows = _draws(groups, seed)
    error, centred = scores[:, 0] - truth, truth - truth.mean()
    columns = [np.ones_like(error), np.abs(error), error**2, centred, centred**2]
    total, absolute, squared, first, second = _sums(weights, rows, np.column_stack(columns)).T
    varied = second - first**2 / total
    varied[varied <= 1e-12 * second[0]] = np.nan  # a draw of one value only
    found = {"mae": absolute / total, "rmse": np.sqrt(squared / total), "r2": 1 - squared / varied}
    if scores.shape[1] > 2:
        within = (scores[:, 2] <= truth) & (truth <= scores[:, 3])
        found["coverage"] = _sums(weights, rows, within[:, None])[:, 0] / total
    return _measures(found, groups=weights.shape[1])


def per_class(
    probabilities: Vector, truth: Codes, classes: Sequence[str], background: Sequence[str] = ()
) -> tuple[ClassResult, ...]:
    """Return how well each class is told from all others; see `classification` for the arrays."""
    said = probabilities.argmax(axis=1)
    codes = range(len(classes))
    precision, recall, f1, support = precision_recall_fscore_support(truth, said, labels=codes, zero_division=0.0)

    def result(code: int) -> ClassResult:
        is_it = truth == code
        mixed = 0 < is_it.sum() < len(truth)
        scores = probabilities[:, code]
        return ClassResult(
            classes[code],
            int(support[code]),
            float(precision[code]),
            float(recall[code]),
            float(f1[code]),
            float(roc_auc_score(is_it, scores)) if mixed else None,
            float(average_precision_score(is_it, scores)) if mixed else None,
            background=classes[code] in background,
        )

    return tuple(result(code) for code in codes)


def reliability(before: Vector, after: Vector, truth: Codes) -> Reliability:
    """Compare confidence with accuracy for probabilities before and after calibration, shape (n, classes)."""
    bins_before, error_before = _reliability(before, truth)
    bins_after, error_after = _reliability(after, truth)
    return Reliability(bins_before, bins_after, error_before, error_after)


def _reliability(probabilities: Vector, truth: Codes) -> tuple[tuple[ReliabilityBin, ...], float]:
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    place = _bin(confidence)
    count, sure, true = (np.bincount(place, each, BINS) for each in (None, confidence, right))
    bins = tuple(
        ReliabilityBin(float(sure[each] / count[each]), float(true[each] / count[each]), int(count[each]))
        for each in np.flatnonzero(count)
    )
    return bins, float(np.abs(true - sure).sum() / len(truth))


def _bin(confidence: Vector) -> Codes:
    return np.minimum((confidence * BINS).astype(np.intp), BINS - 1)


def _draws(groups: NDArray[Any], seed: int) -> tuple[Vector, Codes]:
    """Return how often each group is drawn, shape (1 + DRAWS, groups), and the group of each row.

    In the first draw each group is drawn once: it is the data as they are.
    """
    names, rows = np.unique(groups, return_inverse=True)
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=DRAWS)
    return np.vstack([np.ones(len(names)), drawn]), rows


def _sums(weights: Vector, rows: Codes, columns: NDArray[Any]) -> Vector:
    """Return the sum of each column in each draw, shape (1 + DRAWS, columns)."""
    by_group = np.zeros((weights.shape[1], columns.shape[1]))
    np.add.at(by_group, rows, columns)
    sums: Vector = weights @ by_group
    return sums


def _ranked(probabilities: Vector, truth: Codes, weights: Vector, rows: Codes) -> tuple[Vector, Vector]:
    """Return AUROC and average precision in each draw, their means over the classes that it has."""
    areas = [_areas(scores, truth == code, weights, rows) for code, scores in enumerate(probabilities.T)]
    auroc, auprc = np.array(areas).transpose(1, 2, 0)
    known = ~np.isnan(auroc[0])  # classes without a row, or with all of them
    if not known.any():
        return np.full(len(weights), np.nan), np.full(len(weights), np.nan)
    return _known_mean(auroc[:, known]), _known_mean(auprc[:, known])


def _areas(scores: Vector, is_it: NDArray[np.bool_], weights: Vector, rows: Codes) -> tuple[Vector, Vector]:
    """Return both areas of one class in each draw; rows with equal scores are ranked as one."""
    order = np.argsort(-scores, kind="stable")
    first = np.flatnonzero(np.diff(scores[order], prepend=np.inf))
    auroc, auprc = np.full(len(weights), np.nan), np.full(len(weights), np.nan)
    step = max(CHUNK // len(scores), 1)
    for start in range(0, len(weights), step):
        drawn = weights[start : start + step, rows[order]]
        true = np.add.reduceat(drawn * is_it[order], first, axis=1)
        every = np.add.reduceat(drawn, first, axis=1)
        recalled, called = np.cumsum(true, axis=1), np.cumsum(every, axis=1)
        all_true, all_false = recalled[:, -1], (called - recalled)[:, -1]
        with np.errstate(invalid="ignore", divide="ignore"):
            pairs = ((every - true) * (recalled - true / 2)).sum(axis=1)
            auroc[start : start + step] = pairs / (all_true * all_false)
            precision = np.where(called > 0, recalled / called, 0.0)
            auprc[start : start + step] = (true * precision).sum(axis=1) / all_true
    auprc[np.isnan(auroc)] = np.nan
    return auroc, auprc


def _known_mean(draws: Vector) -> Vector:
    """Return the mean of each row without its NaNs; NaN if it has nothing else."""
    with np.errstate(invalid="ignore"):
        mean: Vector = np.nansum(draws, axis=1) / np.sum(~np.isnan(draws), axis=1)
    return mean


def _measures(found: dict[str, Vector], *, groups: int) -> Measures:
    """Return the first of all draws as the value, and where the middle 95 % of the others lie, unless all are one.

    The interval is widened to the value where it would not hold it: drawn data calibrate worse than any.
    """
    measures = {}
    for name, draws in found.items():
        value = float(draws[0])
        if np.isfinite(value) and groups == 1:
            measures[name] = Measure(value, None, None)
        elif np.isfinite(value):
            low, high = np.nanpercentile(draws[1:], [2.5, 97.5]).tolist()
            measures[name] = Measure(value, min(low, value), max(high, value))
    return measures
