"""How much each family of features is worth: how much worse scores get when its columns are shuffled.

All columns of a family are shuffled together among held-out windows (permutation importance, Breiman
2001), since shuffling one of many that say nearly the same shows nothing. This module owns the shuffling
and the counting. It must not know what a feature means.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trainer.dataset import Index
from trainer.extract import Windows
from trainer.holdout import Fold, Truth
from trainer.results import FamilyImportance
from worker.profile import Vector

REPEATS: Final = 3

MOST_WINDOWS: Final = 500
"""Of a fold, drawn from all of it: with more of them the answer is the same, and takes longer."""


class Importance:
    """Adds up, fold by fold, what is lost without each family."""

    def __init__(self, families: Sequence[str], windows: Windows, truth: Truth, *, seed: int) -> None:
        self._families = np.array(families)
        self._windows = windows
        self._truth = truth
        self._random = np.random.default_rng(seed)
        self._drops: dict[str, list[Vector]] = defaultdict(list)
        self._sizes: list[int] = []

    def add(self, fold: Fold) -> None:
        """Shuffle each family among the windows of a fold, and ask its forest again."""
        rows = np.flatnonzero(fold.tested)
        if len(rows) > MOST_WINDOWS:
            rows = np.sort(self._random.choice(rows, MOST_WINDOWS, replace=False))
        features = self._windows.features[rows]
        intact = self._error(fold, features, rows)
        self._sizes.append(len(rows))
        for family in dict.fromkeys(self._families):
            columns = np.flatnonzero(self._families == family)
            drops = []
            for _ in range(REPEATS):
                shuffled = features.copy()
                shuffled[:, columns] = features[np.ix_(self._random.permutation(len(rows)), columns)]
                drops.append(self._error(fold, shuffled, rows) - intact)
            self._drops[family].append(np.array(drops))

    def results(self) -> tuple[FamilyImportance, ...]:
        """Return the families, the most important first.

        The drop is in accuracy, or in the unit of the label how much the mean absolute error grows; its
        deviation is that between the repeats.
        """
        found = []
        for family, drops in self._drops.items():
            repeats = np.average(drops, axis=0, weights=self._sizes)
            count = int((self._families == family).sum())
            found.append(FamilyImportance(str(family), count, float(repeats.mean()), float(repeats.std())))
        return tuple(sorted(found, key=lambda each: -each.drop))

    def _error(self, fold: Fold, features: NDArray[np.float32], rows: Index) -> float:
        said, targets = fold.scores(features, self._truth.outputs), self._truth.targets[rows]
        if self._truth.classes:
            return float(np.mean(said.argmax(axis=1) != targets))
        return float(np.mean(np.abs(said[:, 0] - targets)))
