"""How `worker.calibration` is fitted: by the scores of clips that the forest had not seen.

This module owns what is minimised or counted, and nothing else; which clips were held out is not its
business. It must not know about forests or sound.
"""

from __future__ import annotations

import bisect
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from worker.calibration import Calibration, ConformalInterval, TemperatureScaling
from worker.profile import Vector

SIXTEENTHS: Final = range(4, 128)
"""From a quarter to eight: votes without a mistake would ask for more without end."""

COVERAGE: Final = 0.9

FLOOR: Final = 0.1
"""The floor of an interval in medians of the spread: from none to one, intervals were equally wide and right."""

TINY: Final = 1e-9
"""The floor if no tree ever disagrees: residuals must be divided by something."""


def fitted(scores: Vector, targets: NDArray[Any], *, trees: int, classifier: bool) -> Calibration:
    """Fit a calibration to the scores of held-out windows.

    Args:
        scores: what the forest says, shape (n, classes), or values and spreads, shape (n, 2).
        targets: the class indices or values that are true, shape (n,).
        trees: how many gave the scores; half the vote of one is what smooths the probabilities.
        classifier: which of the two kinds of scores these are.
    """
    if classifier:
        return _temperature(scores, targets, smoothing=0.5 / trees)
    return _interval(scores, targets)


def log_loss(probabilities: Vector, targets: NDArray[np.intp]) -> float:
    """Return the mean negative logarithm of the probability of what is true."""
    return float(-np.log(probabilities[np.arange(len(targets)), targets]).mean())


def _temperature(probabilities: Vector, targets: NDArray[np.intp], *, smoothing: float) -> TemperatureScaling:
    def rises(sixteenths: int) -> bool:
        here, next_ = (TemperatureScaling(each, smoothing) for each in (sixteenths, sixteenths + 1))
        return log_loss(next_.apply(probabilities), targets) >= log_loss(here.apply(probabilities), targets)

    # The log-loss is convex in the exponent: it falls up to the best one, and rises from there on.
    best = SIXTEENTHS.start + bisect.bisect_left(SIXTEENTHS, x=True, key=rises)
    return TemperatureScaling(best, smoothing)


def _interval(scores: Vector, targets: Vector) -> ConformalInterval:
    values, spreads = scores.T
    floor = max(FLOOR * float(np.median(spreads)), TINY)
    residuals = np.abs(values - targets) / (spreads + floor)
    level = min(COVERAGE * (1 + 1 / len(targets)), 1.0)
    return ConformalInterval(COVERAGE, float(np.quantile(residuals, level, method="higher")), floor)
