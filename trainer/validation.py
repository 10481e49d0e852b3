"""What a kind of forest is worth on a data set: forests on folds of it, and everything that their scores tell.

This module owns which forests are grown to find that out. It must not know about bundles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import numpy as np
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, r2_score

from trainer import calibration, evaluation
from trainer.dataset import Dataset
from trainer.extract import Windows
from trainer.holdout import Fold, HeldOut, Truth, folds, held_out, leak
from trainer.importance import Importance
from trainer.listening import Progress, silent
from trainer.models import ForestSpec
from trainer.results import Evaluation, FamilyImportance
from trainer.splits import Pairs, random_splits, splits
from worker.calibration import Calibration
from worker.features import Featurizer

STAGE: Final = "testing on held-out clips"


class Validation(NamedTuple):
    """The scores of held-out windows, the calibration fitted to all of them, and what they are worth."""

    held: HeldOut
    calibration: Calibration
    evaluation: Evaluation
    importances: tuple[FamilyImportance, ...]


def cross_validate(
    windows: Windows,
    truth: Truth,
    featurizer: Featurizer,
    forest: ForestSpec,
    *,
    n_splits: int = 5,
    seed: int = 0,
    jobs: int = -1,
    on_progress: Progress = silent,
) -> Validation:
    """Grow a forest for each fold, and one that cheats, and measure them.

    Args:
        windows: of all clips.
        truth: what they are.
        featurizer: where the features came from.
        forest: the settings of every forest.
        n_splits: how many folds, if the data set has none of its own.
        seed: of the forests, the folds and the bootstrap.
        jobs: processor cores to use; -1 is all of them. The result does not depend on it.
        on_progress: told how many forests are done.

    Raises:
        Fatal: nothing can be held out.
    """

    def make() -> Any:
        return forest.make(windows.dataset.task, seed=seed, jobs=jobs)

    pairs = splits(windows.dataset, n_splits, seed)
    importance = Importance([column.family for column in featurizer.columns], windows, truth, seed=seed)

    def grown() -> Iterator[Fold]:
        for done, fold in enumerate(folds(make, windows, truth, pairs)):
            on_progress(STAGE, done, len(pairs) + 1)
            importance.add(fold)
            yield fold

    held = held_out(grown(), windows, truth)
    on_progress(STAGE, len(pairs), len(pairs) + 1)
    leaky = _leaky(make, windows, truth, seed)
    on_progress(STAGE, len(pairs) + 1, len(pairs) + 1)
    tested = held.fold >= 0
    final = calibration.fitted(
        held.scores[tested], truth.targets[tested], trees=forest.n_estimators, classifier=bool(truth.classes)
    )
    cross_fitted = evaluation.cross_fitted(held, truth, forest.n_estimators)
    told = evaluation.of_scores(
        windows, truth, held, cross_fitted, how=_how(windows.dataset, pairs), leaky=leaky, seed=seed
    )
    return Validation(held, final, told, importance.results())


def _leaky(make: Callable[[], Any], windows: Windows, truth: Truth, seed: int) -> dict[str, float]:
    """Return what a fifth of the windows, drawn at random, would claim."""
    original = np.flatnonzero(windows.copies == 0)
    if len(original) < 2:
        return {}
    train, test = random_splits(len(original), seed=seed)[0]
    fold = leak(make, windows, truth, (original[train], original[test]))
    scores, targets = fold.scores(windows.features[fold.tested], truth.outputs), truth.targets[fold.tested]
    if not truth.classes:
        return {"mae": float(mean_absolute_error(targets, scores[:, 0])), "r2": float(r2_score(targets, scores[:, 0]))}
    said = scores.argmax(axis=1)
    return {
        "accuracy": float(accuracy_score(targets, said)),
        "macro_f1": float(f1_score(targets, said, average="macro")),
    }


def _how(dataset: Dataset, pairs: Pairs) -> str:
    groups = len({clip.group for clip in dataset.clips})
    if dataset.clips[0].fold is not None:
        return f"the {len(pairs)} folds of the data set, each tested by a forest that was trained on the others."
    if groups == len(dataset.clips):
        return f"{len(pairs)} folds of clips, each of which is a group of its own."
    if groups == len(pairs):
        return f"each of {groups} groups of clips tested by a forest that was trained on the others."
    return f"{len(pairs)} folds of whole groups ({groups} groups of {len(dataset.clips)} clips)."
