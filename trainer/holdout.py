"""Scores by forests that have not heard what they score.

Each window is scored by a forest that was fitted without its clip and without any clip of its group.
Everything that is said about a model comes from such scores: a figure or a profile made from the
training scores would promise a confidence that no stream can keep. This module owns how they are
made; it must not know what is done with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.dataset import Index
from trainer.extract import Windows
from trainer.models import grown
from worker.errors import Fatal
from worker.forest import Forest
from worker.golden import scores
from worker.profile import Vector

Rows = NDArray[np.bool_]


class Truth(NamedTuple):
    """What each window should be predicted as: class indices, shape (windows,), and the classes; or values and none."""

    targets: NDArray[Any]
    classes: tuple[str, ...]

    @property
    def outputs(self) -> int:
        """How many scores a window has: one for each class, or a regressor's value and spread."""
        return len(self.classes) or 2


class Fold(NamedTuple):
    """A forest, what it scores (windows, shape (n,)), and the class of each of its outputs."""

    forest: Forest
    tested: Rows
    columns: Index

    def scores(self, features: NDArray[np.float32], outputs: int) -> Vector:
        """Return its scores of rows of features; a class that it has never heard gets zero."""
        result = np.zeros((len(features), outputs))
        result[:, self.columns] = scores(self.forest, features)
        return result


class HeldOut(NamedTuple):
    """The scores of held-out windows, shape (windows, outputs), and the fold that tested each, shape (windows,).

    A window that no fold has tested, such as an augmented one, has NaN and -1.
    """

    scores: Vector
    fold: Index


def truth_of(windows: Windows) -> Truth:
    """Return what the windows should be predicted as.

    Raises:
        Fatal: there is one class only.
    """
    labels = [clip.label for clip in windows.dataset.clips]
    if windows.dataset.task == "regression":
        return Truth(np.array([float(label) for label in labels])[windows.owner], ())
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise Fatal(f"all usable clips have the label {labels[0]!r}: a classifier needs at least two classes")
    return Truth(codes[windows.owner], tuple(classes.tolist()))


def folds(
    make: Callable[[], Any], windows: Windows, truth: Truth, splits: Iterable[tuple[Index, Index]]
) -> Iterator[Fold]:
    """Yield a forest for each split: fitted to all that is made of its training clips, to score the others as they are.

    Args:
        make: returns a new, unfitted scikit-learn forest.
        windows: of all clips.
        truth: what they are.
        splits: training and held-out clips.
    """
    for train, test in splits:
        yield _fold(
            make, windows, truth, np.isin(windows.owner, train), np.isin(windows.owner, test) & (windows.copies == 0)
        )


def leak(make: Callable[[], Any], windows: Windows, truth: Truth, split: tuple[Index, Index]) -> Fold:
    """Return a forest that cheats: ``split`` is of windows, so neighbours of those that it tests were trained on."""
    everything = np.arange(len(windows.owner))
    train, test = (np.isin(everything, rows) for rows in split)
    return _fold(make, windows, truth, train & (windows.copies == 0), test & (windows.copies == 0))


def held_out(tested: Iterable[Fold], windows: Windows, truth: Truth) -> HeldOut:
    """Collect the scores of all folds."""
    result = HeldOut(np.full((len(windows.owner), truth.outputs), np.nan), np.full(len(windows.owner), -1))
    for number, fold in enumerate(tested):
        result.scores[fold.tested] = fold.scores(windows.features[fold.tested], truth.outputs)
        result.fold[fold.tested] = number
    return result


def _fold(make: Callable[[], Any], windows: Windows, truth: Truth, fitted: Rows, tested: Rows) -> Fold:
    forest = grown(make(), windows.features[fitted], truth.targets[fitted])
    columns = forest.classes_ if truth.classes else np.arange(truth.outputs)
    return Fold(Forest.from_sklearn(forest), tested, columns)
