"""Holding out: no window is scored by a forest that heard its clip, whatever was made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

from trainer.dataset import Clip, Dataset, Index
from trainer.extract import Windows
from trainer.holdout import HeldOut, Truth, folds, held_out, leak, truth_of
from worker.errors import Fatal

CLIPS = 12
OWNER = np.repeat(np.arange(CLIPS), 3)
FEATURES = np.random.default_rng(0).normal(size=(len(OWNER), 4)).astype(np.float32)
FEATURES[:, 0] = np.arange(len(OWNER))  # a row's number, so that it is known wherever it turns up


def split(*tests: Sequence[int]) -> list[tuple[Index, Index]]:
    """Return folds in which these clips are held out, one fold after the other."""
    everything = np.arange(CLIPS)
    return [(np.setdiff1d(everything, test), np.array(test, np.intp)) for test in tests]


THIRDS = split(range(4), range(4, 8), range(8, 12))


def windows_of(owner: Index = OWNER, copies: Index | None = None, labels: Sequence[str] = ("a", "b")) -> Windows:
    """Return windows of clips that lie nowhere, labelled in turn."""
    clips = [Clip(Path(), f"{n}.wav", labels[n % len(labels)], str(n), None, f"{n}") for n in range(CLIPS)]
    return Windows(
        Dataset(tuple(clips), "label", "classification"),
        FEATURES,
        owner,
        np.zeros(len(owner)),
        np.zeros(len(owner), np.intp) if copies is None else copies,
        np.zeros(len(owner), np.float32),
        np.zeros(len(owner), np.bool_),
        [],
    )


def scores_of(make: Callable[[], Any], targets: NDArray[Any], splits: list[tuple[Index, Index]]) -> NDArray[np.float64]:
    """Return held-out scores; whole targets are classes."""
    classes = tuple("abc"[: targets.max() + 1]) if targets.dtype.kind == "i" else ()
    truth = Truth(targets, classes)
    return held_out(folds(make, windows_of(), truth, splits), windows_of(), truth).scores


class Recording:
    """Makes forests that note which rows they were fitted on, and is itself what notes them."""

    def __init__(self, kind: Callable[..., Any]) -> None:
        self.kind = kind
        self.fitted_on: list[set[int]] = []

    def __call__(self) -> Any:
        forest = self.kind(n_estimators=5, random_state=0)
        fit = forest.fit

        def noted(features: NDArray[np.float32], targets: NDArray[Any]) -> Any:
            self.fitted_on.append(set(features[:, 0].astype(int).tolist()))
            return fit(features, targets)

        forest.fit = noted
        return forest


class TestHeldOutScores:
    def test_no_forest_scores_a_clip_that_it_saw(self) -> None:
        """Each fold has a new forest, fitted on all windows of its training clips and on no others."""
        make = Recording(RandomForestClassifier)
        scores_of(make, OWNER % 2, THIRDS)
        expected = [set(np.flatnonzero(np.isin(OWNER, train)).tolist()) for train, _ in THIRDS]
        assert expected == make.fitted_on

    def test_scores_are_those_of_the_fold_that_held_the_clip_out(self) -> None:
        """Row by row they are scikit-learn's own probabilities, from the forest of that fold."""
        targets = OWNER % 3
        found = scores_of(Recording(RandomForestClassifier), targets, THIRDS)
        for train, test in THIRDS:
            known, held = np.isin(OWNER, train), np.isin(OWNER, test)
            forest = RandomForestClassifier(5, random_state=0).fit(FEATURES[known], targets[known])
            np.testing.assert_array_equal(forest.predict_proba(FEATURES[held]), found[held])

    def test_a_regressor_has_a_value_and_its_spread(self) -> None:
        """The two outputs are the mean and the standard deviation over the trees of the fold's forest."""
        targets = FEATURES[:, 1].astype(np.float64)
        found = scores_of(Recording(RandomForestRegressor), targets, THIRDS)
        train, test = THIRDS[0]
        known, held = np.isin(OWNER, train), np.isin(OWNER, test)
        forest = RandomForestRegressor(5, random_state=0).fit(FEATURES[known], targets[known])
        trees = np.array([tree.predict(FEATURES[held]) for tree in forest.estimators_])
        np.testing.assert_allclose(trees.mean(axis=0), found[held, 0], rtol=1e-12)
        np.testing.assert_allclose(trees.std(axis=0), found[held, 1], rtol=1e-9)

    def test_a_class_that_a_fold_never_saw_gets_zero(self) -> None:
        """Its column stays in place, and the others are the forest's, also if there is only one other."""
        targets = np.where(OWNER < 4, 1, np.where(OWNER < 8, 0, 2))
        found = scores_of(Recording(RandomForestClassifier), targets, THIRDS)
        for clips, unseen in ((range(4), 1), (range(4, 8), 0), (range(8, 12), 2)):
            rows = np.isin(OWNER, clips)
            assert not found[rows, unseen].any()
            np.testing.assert_allclose(found[rows].sum(axis=1), 1.0)
        halves = split(range(4), range(4, 12))
        found = scores_of(Recording(RandomForestClassifier), (OWNER < 4) * 1, halves)
        assert [[1.0, 0.0]] == np.unique(found[OWNER < 4], axis=0).tolist()
        assert [[0.0, 1.0]] == np.unique(found[OWNER >= 4], axis=0).tolist()

    def test_a_window_that_no_fold_holds_out_has_no_score(self) -> None:
        """It is NaN, which no figure can hide, and never a zero that looks like an answer."""
        found = scores_of(Recording(RandomForestClassifier), OWNER % 2, split(range(6)))
        assert np.isnan(found[OWNER >= 6]).all()
        assert np.isfinite(found[OWNER < 6]).all()

    def test_the_fold_of_each_window_is_known(self) -> None:
        """Windows that no fold tests have none."""
        truth = Truth(OWNER % 2, ("a", "b"))
        splits = split(range(4), range(4, 8))
        found = held_out(folds(Recording(RandomForestClassifier), windows_of(), truth, splits), windows_of(), truth)
        assert isinstance(found, HeldOut)
        assert np.where(OWNER < 4, 0, np.where(OWNER < 8, 1, -1)).tolist() == found.fold.tolist()

    def test_augmented_copies_are_trained_on_and_never_tested(self) -> None:
        """Copies of a held-out clip are on neither side; those of the others are trained on."""
        copies = np.tile([0, 1, 2], CLIPS)  # of each clip one window is as it was recorded
        windows, truth = windows_of(copies=copies), Truth(OWNER % 2, ("a", "b"))
        make = Recording(RandomForestClassifier)
        found = held_out(folds(make, windows, truth, THIRDS), windows, truth)
        assert [set(np.flatnonzero(np.isin(OWNER, train)).tolist()) for train, _ in THIRDS] == make.fitted_on
        assert (copies == 0).tolist() == (found.fold >= 0).tolist()
        assert np.isnan(found.scores[copies > 0]).all()


class TestLeak:
    def test_it_trains_on_neighbours_of_what_it_tests(self) -> None:
        """Its split is of windows, and copies play no part."""
        make = Recording(RandomForestClassifier)
        windows = windows_of(copies=np.tile([0, 0, 1], CLIPS))
        everything = np.flatnonzero(windows.copies == 0)
        fold = leak(make, windows, Truth(OWNER % 2, ("a", "b")), (everything[::2], everything[1::2]))
        assert [set(everything[::2].tolist())] == make.fitted_on
        assert everything[1::2].tolist() == np.flatnonzero(fold.tested).tolist()


class TestTruth:
    def test_classes_are_in_the_order_of_the_alphabet(self) -> None:
        """A window has the class of its clip."""
        truth = truth_of(windows_of(labels=("rain", "dog")))
        assert (("dog", "rain"), 2) == (truth.classes, truth.outputs)
        assert (1 - OWNER % 2).tolist() == truth.targets.tolist()

    def test_values_are_numbers(self) -> None:
        """However they are written; a value and its spread are two outputs."""
        windows = windows_of(labels=("1e1", "-3"))
        truth = truth_of(windows._replace(dataset=Dataset(windows.dataset.clips, "label", "regression")))
        assert ((), 2) == (truth.classes, truth.outputs)
        assert np.where(OWNER % 2, -3.0, 10.0).tolist() == truth.targets.tolist()

    def test_one_class_is_refused(self) -> None:
        """There is nothing to tell apart."""
        with pytest.raises(Fatal, match="have the label 'a': a classifier needs at least two classes"):
            truth_of(windows_of(labels=("a",)))
