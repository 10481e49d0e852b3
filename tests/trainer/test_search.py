"""The search: scikit-learn's own answers, at clip level, honest about what it has not heard, and the same anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier
from sklearn.model_selection import GridSearchCV, ParameterGrid

from trainer.dataset import Clip, Dataset, load
from trainer.extract import Windows, featurize
from trainer.grid import Grid
from trainer.models import ForestSpec
from trainer.results import Search
from trainer.search import HELD_OUT, ClipForest, Strategy, search
from trainer.splits import splits
from worker.errors import Fatal
from worker.features import Featurizer, feature_spec

GRID: Grid = {"n_estimators": [3, 6], "max_depth": [None, 2]}
FEATURES = 4


def windows_of(
    labels: Sequence[str],
    groups: Sequence[str] | None = None,
    *,
    task: Literal["classification", "regression"],
    seed: int = 0,
) -> Windows:
    """Make one to three windows for each clip, the first two features of which depend on its label."""
    random = np.random.default_rng(seed)
    groups = groups or [str(number) for number in range(len(labels))]
    clips = tuple(
        Clip(Path(f"{n}.wav"), f"{n}.wav", label, group, None, f"{n:064}")
        for n, (label, group) in enumerate(zip(labels, groups, strict=True))
    )
    owner = np.repeat(np.arange(len(clips)), random.integers(1, 4, len(clips)))
    values = np.array(labels, float) if task == "regression" else np.unique(labels, return_inverse=True)[1]
    features = random.normal(size=(owner.size, FEATURES))
    features[:, :2] += values[owner, None]
    dataset = Dataset(clips, "label", task)
    nothing = np.zeros(owner.size)
    starts, copies, gains, silent = nothing, nothing.astype(np.intp), nothing.astype(np.float32), nothing.astype(bool)
    return Windows(dataset, features.astype(np.float32), owner, starts, copies, gains, silent, [])


@pytest.fixture
def classes() -> Windows:
    """Three classes of twenty clips that overlap."""
    return windows_of([str(n % 3) for n in range(60)], task="classification")


@pytest.fixture
def quantity() -> Windows:
    return windows_of([f"{n / 10}" for n in range(60)], task="regression")


def timeless(found: Search) -> tuple[Any, ...]:
    """Return everything but how long it took."""
    without = [msgspec.structs.replace(candidate, seconds=0.0) for candidate in found.candidates]
    return without, found.best, found.held_out


def held_out(windows: Windows) -> set[int]:
    return set(splits(windows.dataset, HELD_OUT, 0)[0][1].tolist())


class TestScores:
    def test_are_those_of_a_plain_grid_search(self, esc10: Path) -> None:
        """On real clips of one window each: the scores and the best parameters of GridSearchCV, from arrays."""
        clips = [clip for clip in load(esc10).clips if clip.label in {"dog", "rain", "clock_tick"}]
        dataset = msgspec.structs.replace(load(esc10), clips=tuple(clips[::2]))
        windows = featurize(dataset, Featurizer(feature_spec("article", window_seconds=6.0, window_hop_seconds=6.0)))
        assert len(windows.owner) == len(dataset.clips), "each clip is one window"
        grid: Grid = {"n_estimators": [5, 10], "max_depth": [None, 10, 20], "min_samples_split": [2, 5, 10]}
        found = search(windows, grid)

        train, test = splits(windows.dataset)[0]
        labels = np.array([clip.label for clip in windows.dataset.clips])
        folds = splits(msgspec.structs.replace(dataset, clips=tuple(windows.dataset.clips[clip] for clip in train)))
        assert 4 == len(folds), "of the five official folds one is laid aside"
        plain = GridSearchCV(RandomForestClassifier(random_state=0), grid, cv=folds)
        plain.fit(windows.features[train], labels[train])
        expected = dict(zip(map(str, plain.cv_results_["params"]), plain.cv_results_["mean_test_score"], strict=True))
        assert expected == pytest.approx({str(each.parameters): each.score for each in found.candidates})
        assert plain.best_params_ == found.best == found.candidates[0].parameters
        assert plain.score(windows.features[test], labels[test]) == found.held_out["accuracy"].value

    def test_are_of_clips(self, classes: Windows) -> None:
        """What is compared is the mean over a clip's windows, as a record is answered; nothing else gives these."""
        (found,) = search(classes, {"n_estimators": [7]}).candidates
        train, _ = splits(classes.dataset, HELD_OUT)[0]
        heard = msgspec.structs.replace(classes.dataset, clips=tuple(classes.dataset.clips[clip] for clip in train))
        labels = np.array([clip.label for clip in classes.dataset.clips])
        scores = []
        for fitted, tested in splits(heard):
            rows = np.isin(classes.owner, train[fitted])
            forest = RandomForestClassifier(7, random_state=0).fit(classes.features[rows], labels[classes.owner[rows]])
            said = [
                forest.classes_[forest.predict_proba(classes.features[classes.owner == clip]).mean(axis=0).argmax()]
                for clip in train[tested]
            ]
            scores.append(np.mean(said == labels[train[tested]]))
        assert (np.mean(scores), np.std(scores)) == pytest.approx((found.score, found.deviation))

    def test_of_a_quantity_are_errors(self, quantity: Windows) -> None:
        """The mean absolute error in its unit: positive, and the smallest is the best."""
        found = search(quantity, GRID)
        errors = [candidate.score for candidate in found.candidates]
        assert "mae" == found.scoring
        assert sorted(errors) == errors
        assert 0 < errors[0] < 2.0, "the values lie between 0 and 5.9"
        assert {"mae", "rmse", "r2"} == set(found.held_out)

    def test_a_recording_is_never_on_both_sides(self) -> None:
        """Features that give away the group and nothing else: chance, though each group has several clips."""
        random = np.random.default_rng(0)
        groups = [str(n // 4) for n in range(120)]
        labels = random.permutation(np.repeat(["a", "b"], 15))[np.arange(120) // 4].tolist()
        windows = windows_of(labels, groups, task="classification")
        windows.features[:] = random.normal(size=(30, FEATURES))[windows.owner // 4]
        found = search(windows, {"n_estimators": [20]})
        assert found.candidates[0].score < 0.75
        leaking = windows_of(labels, task="classification")
        leaking.features[:] = windows.features
        assert search(leaking, {"n_estimators": [20]}).candidates[0].score > 0.85


class TestHonesty:
    def test_what_is_laid_aside_is_never_heard(self, classes: Windows) -> None:
        """Other sound in those clips changes what is measured at the end, and nothing before."""
        aside = held_out(classes)
        assert 12 == len(aside)
        found = search(classes, GRID)
        other = classes._replace(features=classes.features.copy())
        other.features[np.isin(classes.owner, list(aside))] = 0.0
        changed = search(other, GRID)
        assert timeless(found)[:2] == timeless(changed)[:2]
        assert found.held_out["accuracy"] != changed.held_out["accuracy"]
        accuracy = found.held_out["accuracy"]
        assert accuracy.low is not None
        assert accuracy.high is not None
        assert accuracy.low <= accuracy.value <= accuracy.high

    def test_copies_are_not_searched_with(self, classes: Windows) -> None:
        """Windows that somebody has made of others are no evidence."""
        copies = classes._replace(
            features=np.concatenate([classes.features, np.zeros_like(classes.features)]),
            owner=np.tile(classes.owner, 2),
            copies=np.repeat([0, 1], len(classes.owner)),
        )
        assert timeless(search(classes, GRID)) == timeless(search(copies, GRID))

    def test_a_class_that_is_only_in_what_is_laid_aside(self) -> None:
        """Nobody has heard it, so all of its clips are wrong, and the others are measured."""
        clips = windows_of([str(n % 2) for n in range(60)], task="classification")
        rare = held_out(clips).pop()
        listed = list(clips.dataset.clips)
        listed[rare] = msgspec.structs.replace(listed[rare], label="rare")
        dataset = msgspec.structs.replace(clips.dataset, clips=tuple(listed))
        found = search(clips._replace(dataset=dataset), {"n_estimators": [5]})
        assert 0.0 < found.held_out["accuracy"].value < 1.0

    def test_too_few_groups(self) -> None:
        """Two are enough to hold one out, and not to search with the other."""
        windows = windows_of([str(n % 2) for n in range(20)], [str(n // 10) for n in range(20)], task="classification")
        with pytest.raises(Fatal, match="a search lays a part of the clips aside, and of the others nothing can be"):
            search(windows, GRID)


class TestStrategies:
    def test_a_grid_is_tried_in_full(self, classes: Windows) -> None:
        """Each combination once, the best first, with how long it took."""
        found = search(classes, GRID)
        tried = [candidate.parameters for candidate in found.candidates]
        assert sorted(map(repr, ParameterGrid(GRID))) == sorted(repr(dict(sorted(each.items()))) for each in tried)
        scores = [candidate.score for candidate in found.candidates]
        assert sorted(scores, reverse=True) == scores
        assert all(candidate.seconds > 0 for candidate in found.candidates)

    def test_the_kind_of_forest_may_be_searched(self, classes: Windows) -> None:
        """Its scores are those of the other class of scikit-learn, and what is not searched is as in the base."""
        base = ForestSpec(max_depth=2, n_estimators=4)
        found = search(classes, {"kind": ["random-forest", "extra-trees"]}, base=base)
        scores = {candidate.parameters["kind"]: candidate.score for candidate in found.candidates}
        alone = search(classes, {"max_depth": [2]}, base=msgspec.structs.replace(base, kind="extra-trees"))
        assert scores["extra-trees"] == alone.candidates[0].score
        assert scores["random-forest"] != scores["extra-trees"]

    def test_random_draws(self, classes: Windows) -> None:
        """As many as asked for, none twice, others with another seed; never more than there are."""
        grid: Grid = {"n_estimators": [2, 3, 4], "max_depth": [1, 2, 3]}

        def drawn(candidates: int, seed: int = 0) -> set[str]:
            found = search(classes, grid, strategy="random", candidates=candidates, seed=seed).candidates
            assert len(found) == len({repr(each.parameters) for each in found})
            return {repr(each.parameters) for each in found}

        assert 4 == len(drawn(4))
        assert drawn(4) == drawn(4)
        assert drawn(4) != drawn(4, seed=1)
        assert 9 == len(drawn(50))

    def test_halving_gives_trees_to_the_best(self, classes: Windows) -> None:
        """Nine candidates have two trees, three of them six, the best eighteen; each is listed as far as it came."""
        grid: Grid = {"n_estimators": [5, 20], "max_depth": [None, 2, 4], "min_samples_leaf": [1, 2, 4]}
        found = search(classes, grid, strategy="halving").candidates
        assert [18, 6, 6, 2, 2, 2, 2, 2, 2] == [each.parameters["n_estimators"] for each in found]
        assert 9 == len({(each.parameters["max_depth"], each.parameters["min_samples_leaf"]) for each in found})
        assert found[1].score >= found[2].score
        assert found[3].score >= found[8].score

    def test_halving_takes_its_trees_from_the_base(self, classes: Windows) -> None:
        """Where they are not in the grid; and so many candidates may be drawn as in a random search."""
        grid: Grid = {"max_depth": [None, 2, 4], "min_samples_leaf": [1, 2, 4]}
        found = search(classes, grid, strategy="halving", candidates=3, base=ForestSpec(n_estimators=12))
        assert [12, 4, 4] == [each.parameters["n_estimators"] for each in found.candidates]
        assert 12 == found.best["n_estimators"]

    @pytest.mark.parametrize(("strategy", "candidates"), [("grid", None), ("random", 3), ("halving", None)])
    @pytest.mark.parametrize("trees", [1, 4, 9])
    def test_progress_is_told(self, classes: Windows, strategy: Strategy, candidates: int | None, trees: int) -> None:
        """Every fit once and in order, up to as many as were announced."""
        told: list[tuple[int, int]] = []
        grid: Grid = {"n_estimators": [trees], "max_depth": [1, 2, 3, 4]}
        search(
            classes,
            grid,
            strategy=strategy,
            candidates=candidates,
            jobs=2,
            on_progress=lambda _stage, done, fits: told.append((done, fits)),
        )
        fits = told[0][1]
        assert [(done, fits) for done in range(fits + 1)] == told


class TestReproducibility:
    @pytest.mark.parametrize("strategy", ["grid", "random", "halving"])
    def test_the_same_on_any_number_of_cores(self, classes: Windows, strategy: Strategy) -> None:
        """Scores, order and best parameters hang on the seed alone."""
        one = search(classes, GRID, strategy=strategy, jobs=1)
        assert timeless(one) == timeless(search(classes, GRID, strategy=strategy, jobs=2))
        assert timeless(one) != timeless(search(classes, GRID, strategy=strategy, jobs=1, seed=1))


class TestClipForest:
    def test_it_is_an_estimator(self) -> None:
        """scikit-learn can read, change and copy its settings, which are those of a forest."""
        model = ClipForest(task="classification", seed=3, kind="extra-trees", n_estimators=5)
        copied = clone(model).set_params(n_estimators=7)
        assert 5 == model.get_params()["n_estimators"]
        assert {**model.get_params(), "n_estimators": 7} == copied.get_params()

    def test_it_is_the_forest_of_its_windows(self, classes: Windows) -> None:
        """What it says of a clip of one window is what the forest of scikit-learn says."""
        labels = np.array([clip.label for clip in classes.dataset.clips])
        clips = np.empty(len(labels), dtype=object)
        clips[:] = [classes.features[classes.owner == clip] for clip in range(len(labels))]
        model = ClipForest(task="classification", seed=3, kind="extra-trees", n_estimators=5).fit(clips, labels)
        forest = ExtraTreesClassifier(5, random_state=3).fit(classes.features, labels[classes.owner])
        single = [clip for clip in clips if len(clip) == 1]
        assert len(single) > 5
        ones = np.empty(len(single), dtype=object)
        for number, clip in enumerate(single):
            ones[number] = clip
        np.testing.assert_array_equal(forest.predict_proba(np.concatenate(single)), model.scores(ones))
        np.testing.assert_array_equal(forest.predict(np.concatenate(single)), model.predict(ones))
