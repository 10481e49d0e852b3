"""What a forest's scores are worth: probabilities that can be believed, and values with an interval.

A forest votes, and its votes are not probabilities: of the records of which 60 % of its trees say
"dog", far more than 60 % are dogs. What is known about that from held-out clips is a number or two,
and this module owns what is done with them; `trainer.calibration` finds them. It must not know about
forests, sound or messages.

Only additions, products, quotients and square roots are used, which IEEE 754 rounds in one way:
a calibrated score has the same bits on every machine, which exp, log and pow do not promise.
"""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np

from worker.compiled import compiled
from worker.profile import Vector

STEPS: Final = 4
"""Square roots taken: the exponent is counted in sixteenths, closer than it can be known."""


class TemperatureScaling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="temperature-scaling"):
    """Probabilities to the power of ``sixteenths`` / 16, normalised again (Guo et al. 2017).

    The exponent is the inverse of the temperature: above one it makes a forest surer, below less sure.
    ``smoothing`` is added to each probability before, since no number of trees makes anything
    impossible. The order of the classes stays as it is, and so does the answer.
    """

    sixteenths: int
    smoothing: float

    def __post_init__(self) -> None:
        if not (self.sixteenths >= 1 and 0 < self.smoothing < np.inf):
            raise ValueError(f"{self}: expected one sixteenth at least, and a smoothing above 0")

    def apply(self, scores: Vector) -> Vector:
        """Return calibrated probabilities, shape (n, classes), for a forest's, shape (n, classes)."""
        return _tempered(np.ascontiguousarray(scores), self.smoothing, self.sixteenths)


class ConformalInterval(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="conformal-interval"):
    """An interval of ``factor`` * (spread + ``floor``) on both sides of a value, spread being that of the trees.

    Of held-out values the share ``coverage`` lies within it (split conformal prediction with normalised
    residuals, Lei et al. 2018). ``floor`` is in the unit of the value, and keeps an interval from
    closing where all trees agree.
    """

    coverage: float
    factor: float
    floor: float

    def __post_init__(self) -> None:
        if not (0 <= self.factor < np.inf and 0 < self.floor < np.inf):
            raise ValueError(f"{self}: expected a finite factor of 0 or more, and a finite floor above 0")

    def apply(self, scores: Vector) -> Vector:
        """Return value, spread, low and high, shape (n, 4), for a forest's values and spreads, shape (n, 2)."""
        value, spread = scores.T
        reach = self.factor * (spread + self.floor)
        return np.column_stack([value, spread, value - reach, value + reach])


Calibration = TemperatureScaling | ConformalInterval


@compiled
def _tempered(scores: Vector, smoothing: float, sixteenths: int) -> Vector:
    """Return the scores to the power of ``sixteenths`` / 16, shape (n, classes), divided by their sum in each row."""
    digits = 0  # binary ones of the exponent
    while sixteenths >> digits:
        digits += 1
    powers = np.empty_like(scores)
    for row in range(len(scores)):
        total = 0.0
        for column in range(scores.shape[1]):
            root = scores[row, column] + smoothing
            for _ in range(STEPS):
                root = np.sqrt(root)
            power = 1.0
            for digit in range(digits - 1, -1, -1):
                power *= power
                if sixteenths >> digit & 1:
                    power *= root
            powers[row, column] = power
            total += power
        powers[row] /= total
    return powers
