"""Measures are scikit-learn's, and their intervals are what drawing groups again and again would give."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
    root_mean_squared_error,
)

from trainer import metrics
from trainer.metrics import classification, per_class, regression, reliability
from trainer.results import Measure
from worker.profile import Vector

Drawn = tuple[Vector, metrics.Codes, metrics.Codes]


def ends(measure: Measure) -> tuple[float, float]:
    """Return the interval of a measure that has one."""
    assert measure.low is not None
    assert measure.high is not None
    return measure.low, measure.high


@pytest.fixture(params=[0, 1])
def drawn(request: pytest.FixtureRequest) -> Drawn:
    """Scores of 60 clips of five classes in 20 groups, as coarse as those of a small forest: many are equal."""
    random = np.random.default_rng(request.param)
    truth = random.integers(0, 5, 60)
    votes = random.multinomial(10, np.full(5, 0.2), 60) + 3 * np.eye(5, dtype=int)[truth]
    return votes / 13, truth, random.integers(0, 20, 60)


class TestClassification:
    def test_the_values_are_scikit_learns(self, drawn: Drawn) -> None:
        """Equal scores are ranked as one, as there."""
        scores, truth, groups = drawn
        found = classification(scores, truth, groups)
        said = scores.argmax(axis=1)
        expected = {
            "accuracy": accuracy_score(truth, said),
            "macro_f1": f1_score(truth, said, average="macro"),
            "auroc": roc_auc_score(truth, scores, multi_class="ovr"),
            "auprc": average_precision_score(np.eye(5)[truth], scores, average="macro"),
        }
        assert expected == pytest.approx({name: found[name].value for name in expected})

    def test_top_three(self) -> None:
        """The truth is among the three most probable; of equal ones the first counts, as in an answer."""
        scores = np.array([[0.4, 0.3, 0.2, 0.1], [0.4, 0.2, 0.2, 0.2], [0.4, 0.2, 0.2, 0.2], [0.1, 0.2, 0.3, 0.4]])
        assert 0.75 == classification(scores, np.array([2, 2, 3, 1]), np.arange(4))["top3"].value
        three = classification(scores[:, :3], np.array([2, 2, 0, 1]), np.arange(4))
        assert "top3" not in three, "of three classes it says nothing"

    def test_calibration_error_by_hand(self) -> None:
        """Two clips in the bin of 0.9 of which one is right, and one in that of 0.6, which is."""
        scores = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
        found = classification(scores, np.array([0, 1, 1]), np.arange(3))
        assert (2 * abs(0.9 - 0.5) + abs(0.6 - 1.0)) / 3 == pytest.approx(found["calibration_error"].value)

    def test_intervals_are_those_of_the_draws(self, drawn: Drawn) -> None:
        """Drawing the groups one by one, and asking scikit-learn each time, gives the same interval."""
        scores, truth, groups = drawn
        found = classification(scores, truth, groups, seed=3)
        names = np.unique(groups)
        random = np.random.default_rng(3)
        counts = random.multinomial(len(names), np.full(len(names), 1 / len(names)), size=metrics.DRAWS)
        rows = [
            np.concatenate(
                [np.flatnonzero(groups == name) for name, n in zip(names, row, strict=True) for _ in range(n)]
            )
            for row in counts
        ]
        right = scores.argmax(axis=1) == truth
        low, high = np.percentile([right[row].mean() for row in rows], [2.5, 97.5])
        assert (low, high) == pytest.approx((found["accuracy"].low, found["accuracy"].high))
        areas = [roc_auc_score(truth[row], scores[row], multi_class="ovr") for row in rows[:30]]
        low, high = ends(found["auroc"])
        assert low < np.mean(areas) < high

    def test_a_group_is_drawn_as_a_whole(self) -> None:
        """If clips of a group are right or wrong together they say less than they seem to: the interval is wider."""
        truth = np.zeros(200, np.intp)
        right = np.repeat(np.arange(20) % 2, 10)
        scores = np.column_stack([right, 1 - right]).astype(float)
        whole = classification(scores, truth, np.repeat(np.arange(20), 10))["accuracy"]
        alone = classification(scores, truth, np.arange(200))["accuracy"]
        assert whole.value == alone.value
        assert 2.5 * np.ptp(ends(alone)) < np.ptp(ends(whole))

    def test_one_group_has_no_interval(self) -> None:
        """Drawn again it is the same: a width of nothing would say that all is known."""
        scores, truth = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]]), np.array([0, 1, 0])
        assert Measure(2 / 3, None, None) == classification(scores, truth, np.zeros(3))["accuracy"]
        values = np.array([[1.0, 0.1], [2.0, 0.1], [3.0, 0.1]])
        assert Measure(0.5, None, None) == regression(values, np.array([1.0, 2.5, 4.0]), np.zeros(3))["mae"]

    def test_what_is_not_defined_is_left_out(self) -> None:
        """Clips of one class only have an accuracy, and no area under a curve."""
        found = classification(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 0]), np.arange(2))
        assert {"accuracy", "macro_f1", "calibration_error"} == set(found)

    def test_the_same_seed_gives_the_same(self, drawn: Drawn) -> None:
        """To the bit, and another one does not."""
        assert classification(*drawn, seed=1) == classification(*drawn, seed=1)
        assert classification(*drawn, seed=1) != classification(*drawn, seed=2)


class TestRegression:
    def test_the_values_are_scikit_learns(self) -> None:
        """Of values, and of the share of intervals that hold the truth."""
        random = np.random.default_rng(0)
        truth, error = random.normal(60, 10, 50), random.normal(0, 3, 50)
        values = truth + error
        found = regression(np.column_stack([values, np.ones(50), values - 2, values + 2]), truth, np.arange(50) // 2)
        expected = {
            "mae": mean_absolute_error(truth, values),
            "rmse": root_mean_squared_error(truth, values),
            "r2": r2_score(truth, values),
            "coverage": np.mean(np.abs(error) <= 2),
        }
        assert expected == pytest.approx({name: each.value for name, each in found.items()})
        for each in found.values():
            low, high = ends(each)
            assert low < each.value < high

    def test_without_intervals_there_is_no_coverage(self) -> None:
        """A forest's own scores have none."""
        found = regression(np.array([[1.0, 0.1], [2.0, 0.1]]), np.array([1.0, 3.0]), np.arange(2))
        assert {"mae", "rmse", "r2"} == set(found)

    def test_a_truth_that_does_not_vary(self) -> None:
        """There is nothing to explain, so R² is left out."""
        found = regression(np.array([[1.0, 0.1], [2.0, 0.1]]), np.array([3.0, 3.0]), np.arange(2))
        assert {"mae", "rmse"} == set(found)


def test_per_class_by_hand() -> None:
    """Of two dogs one is called a dog, and so is the rain."""
    scores = np.array([[0.8, 0.2, 0.0], [0.3, 0.7, 0.0], [0.6, 0.4, 0.0]])
    dog, noise, never = per_class(scores, np.array([0, 0, 1]), ["dog", "noise", "wind"], ["noise"])
    assert ("dog", 2, 0.5, 0.5, 0.5, 0.5) == (dog.name, dog.clips, dog.precision, dog.recall, dog.f1, dog.auroc)
    assert (1, 0.0, 0.0, True) == (noise.clips, noise.precision, noise.recall, noise.background)
    assert (0, None, None, False) == (never.clips, never.auroc, never.auprc, never.background)


def test_reliability_by_hand() -> None:
    """Bins say how sure and how right; the error is the distance between them, by how many are in a bin."""
    before = np.array([[0.51, 0.49], [0.52, 0.48], [0.99, 0.01]])
    after = np.array([[0.9, 0.1], [0.1, 0.9], [1.0, 0.0]])
    found = reliability(before, after, np.array([0, 1, 0]))
    unsure, sure = found.before
    assert (0.515, 0.5, 2) == pytest.approx((unsure.confidence, unsure.accuracy, unsure.count))
    assert (0.99, 1.0, 1) == pytest.approx((sure.confidence, sure.accuracy, sure.count))
    assert (0.03 + 0.01) / 3 == pytest.approx(found.error_before)
    assert (0.1 + 0.1 + 0) / 3 == pytest.approx(found.error_after)
    assert 3 == sum(each.count for each in found.after)
