"""How clips are held out: whole groups, so that no recording is on both sides of a split.

This module owns the splits and nothing else. It must not know about features or models.
"""

from __future__ import annotations

import warnings
from collections import Counter

import numpy as np
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold

from trainer.dataset import Dataset, Index
from worker.errors import Fatal

Pairs = list[tuple[Index, Index]]
"""What is trained on, and what is tested, in each fold."""


def splits(dataset: Dataset, n_splits: int = 5, seed: int = 0) -> Pairs:
    """Return pairs of clip indices (train, test); every clip is tested once, and no group is on both sides.

    The folds of the data set are used if it has any; where the same sound is in two of them, it is
    left out of the training whose test it is in. Otherwise whole groups are held out, with the
    classes spread evenly as far as groups allow; there are fewer splits if groups are few.

    Raises:
        Fatal: nothing can be held out.
    """
    groups = np.array([clip.group for clip in dataset.clips])
    if dataset.clips[0].fold is not None:
        return _official_splits(np.array([clip.fold for clip in dataset.clips]), groups)
    labels = np.array([clip.label for clip in dataset.clips])
    most = min(n_splits, len(set(groups)))
    if dataset.task == "classification":
        most = min(most, max(Counter(labels).values()))
    if most < 2:
        raise Fatal(
            f"nothing can be held out of {len(groups)} clips: they need two groups at least, and a class two clips; "
            "the column 'group' says which clips are from one recording or machine"
        )
    folds = StratifiedGroupKFold if dataset.task == "classification" else GroupKFold
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # it cannot be in every test, and need not
        pairs = list(folds(most, shuffle=True, random_state=seed).split(groups, labels, groups))
    return [(train, test) for train, test in pairs if train.size and test.size]


def random_splits(count: int, n_splits: int = 5, seed: int = 0) -> Pairs:
    """Return pairs of window indices (train, test), drawn as if windows had nothing to do with each other.

    Windows of one clip are on both sides, so a score over these splits says how well recordings are
    recognised again. It belongs beside the honest one as a warning, and nowhere else.

    Raises:
        Fatal: there are fewer than two windows.
    """
    if count < 2:
        raise Fatal(f"nothing can be held out of {count} window; at least two are needed")
    return list(KFold(min(n_splits, count), shuffle=True, random_state=seed).split(np.arange(count)))


def _official_splits(folds: Index, groups: Index) -> Pairs:
    values = np.unique(folds)
    if len(values) < 2:
        raise Fatal(f"all clips are in fold {values[0]}: nothing can be held out; number the folds, or drop the column")
    tests = [folds == value for value in values]
    pairs = [(np.flatnonzero(~test & ~np.isin(groups, groups[test])), np.flatnonzero(test)) for test in tests]
    for value, (train, _) in zip(values, pairs, strict=True):
        if not train.size:
            raise Fatal(f"every clip is in fold {value} or has the same sound as one that is: nothing is left to train")
    return pairs
