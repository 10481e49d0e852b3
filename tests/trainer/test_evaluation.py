"""Evaluation: no window is scored by a forest that saw its clip, and every figure is what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, r2_score

from trainer.evaluation import (
    ALWAYS_WATCHED,
    WATCHED_FEATURES,
    Index,
    by_clip,
    classification_metrics,
    held_out_scores,
    reference_profile,
    regression_metrics,
    watched_features,
)
from worker import bundle
from worker.audio import UNLIMITED, waveform
from worker.drift import DriftPolicy
from worker.messages import Classification, Record, Topics
from worker.pipeline import Pipeline
from worker.states import Retention

CLIPS = 12
OWNER = np.repeat(np.arange(CLIPS), 3)
FEATURES = np.random.default_rng(0).normal(size=(len(OWNER), 4)).astype(np.float32)
FEATURES[:, 0] = np.arange(len(OWNER))  # a row's number, so that it is known wherever it turns up


def split(*tests: Sequence[int]) -> list[tuple[Index, Index]]:
    """Return folds in which these clips are held out, one fold after the other."""
    everything = np.arange(CLIPS)
    return [(np.setdiff1d(everything, test), np.array(test, np.intp)) for test in tests]


THIRDS = split(range(4), range(4, 8), range(8, 12))


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
        held_out_scores(make, FEATURES, OWNER % 2, OWNER, THIRDS, outputs=2)
        expected = [set(np.flatnonzero(np.isin(OWNER, train)).tolist()) for train, _ in THIRDS]
        assert expected == make.fitted_on

    def test_scores_are_those_of_the_fold_that_held_the_clip_out(self) -> None:
        """Row by row they are scikit-learn's own probabilities, from the forest of that fold."""
        targets = OWNER % 3
        found = held_out_scores(Recording(RandomForestClassifier), FEATURES, targets, OWNER, THIRDS, outputs=3)
        for train, test in THIRDS:
            known, held = np.isin(OWNER, train), np.isin(OWNER, test)
            forest = RandomForestClassifier(5, random_state=0).fit(FEATURES[known], targets[known])
            np.testing.assert_array_equal(forest.predict_proba(FEATURES[held]), found[held])

    def test_a_regressor_has_a_value_and_its_spread(self) -> None:
        """The two outputs are the mean and the standard deviation over the trees of the fold's forest."""
        targets = FEATURES[:, 1].astype(np.float64)
        found = held_out_scores(Recording(RandomForestRegressor), FEATURES, targets, OWNER, THIRDS, outputs=2)
        train, test = THIRDS[0]
        known, held = np.isin(OWNER, train), np.isin(OWNER, test)
        forest = RandomForestRegressor(5, random_state=0).fit(FEATURES[known], targets[known])
        trees = np.array([tree.predict(FEATURES[held]) for tree in forest.estimators_])
        np.testing.assert_allclose(trees.mean(axis=0), found[held, 0], rtol=1e-12)
        np.testing.assert_allclose(trees.std(axis=0), found[held, 1], rtol=1e-9)

    def test_a_class_that_a_fold_never_saw_gets_zero(self) -> None:
        """Its column stays in place, and the others are the forest's, also if there is only one other."""
        targets = np.where(OWNER < 4, 1, np.where(OWNER < 8, 0, 2))
        found = held_out_scores(Recording(RandomForestClassifier), FEATURES, targets, OWNER, THIRDS, outputs=3)
        for clips, unseen in ((range(4), 1), (range(4, 8), 0), (range(8, 12), 2)):
            rows = np.isin(OWNER, clips)
            assert not found[rows, unseen].any()
            np.testing.assert_allclose(found[rows].sum(axis=1), 1.0)
        halves = split(range(4), range(4, 12))
        found = held_out_scores(Recording(RandomForestClassifier), FEATURES, (OWNER < 4) * 1, OWNER, halves, outputs=2)
        assert [[1.0, 0.0]] == np.unique(found[OWNER < 4], axis=0).tolist()
        assert [[0.0, 1.0]] == np.unique(found[OWNER >= 4], axis=0).tolist()

    def test_a_window_that_no_fold_holds_out_has_no_score(self) -> None:
        """It is NaN, which no figure can hide, and never a zero that looks like an answer."""
        found = held_out_scores(
            Recording(RandomForestClassifier), FEATURES, OWNER % 2, OWNER, split(range(6)), outputs=2
        )
        assert np.isnan(found[OWNER >= 6]).all()
        assert np.isfinite(found[OWNER < 6]).all()


class TestByClip:
    def test_windows_are_averaged(self) -> None:
        """A clip's scores are the mean over its windows, in the order that is asked for."""
        values = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.2, 0.8]])
        owner = np.array([7, 7, 7, 3])
        np.testing.assert_allclose([[0.2, 0.8], [0.5, 0.5]], by_clip(values, owner, np.array([3, 7])))

    def test_it_is_what_the_worker_says_of_a_record(self, machine_bundle: Path, machines: Path) -> None:
        """The same bytes as one record give the same probabilities, to the last bit."""
        clips = sorted((machines / "audio").glob("*.wav"))[:3]
        model = bundle.load(machine_bundle)
        records = [Record("audio.in", 0, offset, 0, b"mic", clip.read_bytes()) for offset, clip in enumerate(clips)]
        outputs = Pipeline(model, Topics(), UNLIMITED, DriftPolicy(), Retention()).run({}, records).outputs
        said = [
            msgspec.json.decode(each.value or b"", type=Classification)
            for each in outputs
            if each.topic == "predictions.out"
        ]
        cut = [
            model.featurizer.windows(
                waveform(clip.read_bytes(), None, model.featurizer.spec.sample_rate, UNLIMITED).samples
            )
            for clip in clips
        ]
        owner = np.repeat(np.arange(len(cut)), [len(windows) for windows in cut])
        scores = model.scores(model.featurizer.transform(np.concatenate(cut)))
        expected = by_clip(scores, owner, np.arange(len(cut)))
        assert [len(windows) for windows in cut] == [each.windows for each in said]
        assert min(each.windows for each in said) > 1, "one window is its own mean, and shows nothing"
        assert expected.tolist() == [list(each.probabilities.values()) for each in said]


class TestMetrics:
    def test_a_classification_by_hand(self) -> None:
        """Two of three clips are right although three of six windows are: windows vote with their probabilities."""
        owner = np.array([0, 0, 1, 1, 2, 2])
        targets = np.array([0, 0, 1, 1, 1, 1])
        first = np.array([0.9, 0.4, 0.6, 0.1, 0.7, 0.8])  # the probability of class 0
        found = classification_metrics(np.column_stack([first, 1 - first]), targets, owner)
        # Clips: 0.65 -> 0 (right), 0.35 -> 1 (right), 0.75 -> 0 (wrong): both F1 are 2/3.
        assert found == pytest.approx({"accuracy": 2 / 3, "macro_f1": 2 / 3, "window_accuracy": 2 / 6})

    def test_a_regression_by_hand(self) -> None:
        """A clip's value is the mean of its windows' values; their spread over the trees plays no part."""
        owner = np.array([0, 0, 1, 2])
        targets = np.array([1.0, 1.0, 2.0, 6.0])
        values = np.column_stack([[0.0, 3.0, 2.0, 5.0], [9.0, 9.0, 9.0, 9.0]])
        found = regression_metrics(values, targets, owner)
        # Clips: 1.5, 2, 5 against 1, 2, 6; the mean of the truth is 3.
        assert found == pytest.approx({"mae": 0.5, "r2": 1 - (0.25 + 0 + 1) / (4 + 1 + 9), "window_mae": 1.0})

    def test_they_are_scikit_learns(self) -> None:
        """On random scores of clips of unequal length, in no order, the figures are those of scikit-learn."""
        random = np.random.default_rng(1)
        owner = random.permutation(np.repeat(np.arange(30), random.integers(1, 6, 30)))
        truth, values = random.integers(0, 4, 30), random.dirichlet(np.ones(4), len(owner))
        clips = np.array([values[owner == clip].mean(axis=0) for clip in range(30)])
        named = classification_metrics(values, truth[owner], owner)
        assert accuracy_score(truth, clips.argmax(axis=1)) == named["accuracy"]
        assert f1_score(truth, clips.argmax(axis=1), average="macro") == named["macro_f1"]
        assert accuracy_score(truth[owner], values.argmax(axis=1)) == named["window_accuracy"]
        measured = regression_metrics(values, truth[owner].astype(float), owner)
        assert mean_absolute_error(truth, clips[:, 0]) == measured["mae"]
        assert r2_score(truth, clips[:, 0]) == measured["r2"]
        assert mean_absolute_error(truth[owner], values[:, 0]) == measured["window_mae"]


class TestWatchedFeatures:
    NAMES = tuple(f"f{number}" for number in range(12))

    def test_the_most_important_come_first(self) -> None:
        """They are ranked, there are no more than a state can hold, and equals stay in the featurizer's order."""
        importances = np.array([0.0, 0.3, 0.1, 0.0, 0.2, 0.1, 0.0, 0.05, 0.06, 0.07, 0.08, 0.04])
        expected = ("f1", "f4", "f2", "f5", "f10", "f9", "f8", "f7")
        assert WATCHED_FEATURES == len(expected)
        assert expected == watched_features(importances, self.NAMES)

    def test_the_level_is_watched_whatever_its_importance(self) -> None:
        """It comes last if it is not among the most important, where it stands if it is, and never twice."""
        names = (*self.NAMES, ALWAYS_WATCHED[0])
        unimportant = np.append(np.ones(12), 0.0)
        assert (*self.NAMES[:WATCHED_FEATURES], ALWAYS_WATCHED[0]) == watched_features(unimportant, names)
        important = np.append(np.ones(12), 2.0)
        assert (ALWAYS_WATCHED[0], *self.NAMES[: WATCHED_FEATURES - 1]) == watched_features(important, names)

    def test_fewer_features_than_places(self) -> None:
        """All of them are watched."""
        assert ("b", "a") == watched_features(np.array([0.1, 0.9]), ("a", "b"))


class TestReferenceProfile:
    def test_a_classifier_by_hand(self) -> None:
        """The confidence, the share of each class and the watched features, in the profile's order."""
        scores = np.array([[0.6, 0.4], [0.1, 0.9], [0.2, 0.8], [0.7, 0.3]])
        features = np.array([[0, 1], [0, 2], [0, 3], [0, 6]], np.float32)
        profile = reference_profile(scores, features, classes=("a", "b"), watched=("y",), names=("x", "y"))
        assert ("confidence", "share.a", "share.b", "feature.y") == profile.names
        assert [0.75, 0.5, 0.5, 3.0] == pytest.approx([signal.mean for signal in profile.signals])
        spreads = [np.sqrt(0.0125), 0.5, 0.5, np.sqrt(14 / 4)]  # of the population, as for every signal in a stream
        assert spreads == pytest.approx([signal.spread for signal in profile.signals])

    def test_a_regressor_by_hand(self) -> None:
        """The value, its spread over the trees and the watched features."""
        scores = np.array([[10.0, 1.0], [14.0, 3.0]])
        features = np.array([[5.0], [9.0]], np.float32)
        profile = reference_profile(scores, features, classes=(), watched=("x",), names=("x",))
        assert ("value", "spread", "feature.x") == profile.names
        assert [12.0, 2.0, 7.0] == [signal.mean for signal in profile.signals]
        assert [2.0, 1.0, 2.0] == [signal.spread for signal in profile.signals]

    def test_a_constant_signal_keeps_its_own_unit(self) -> None:
        """A class that is never named, and a feature that never moves, get a spread of one and stay finite."""
        scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.9, 0.1]])
        features = np.full((3, 1), 0.1, np.float32)
        profile = reference_profile(scores, features, classes=("a", "b"), watched=("x",), names=("x",))
        spreads = {signal.name: signal.spread for signal in profile.signals}
        assert {"share.a": 1.0, "share.b": 1.0, "feature.x": 1.0} == {
            name: spreads[name] for name in ("share.a", "share.b", "feature.x")
        }
        assert 0 < spreads["confidence"] < 1
        standard = profile.standardise(np.array([[0.9, 0.0, 1.0, 0.1]]))
        assert [-1.0, 1.0] == standard[0, 1:3].tolist()
