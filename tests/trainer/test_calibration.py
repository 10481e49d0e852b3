"""Calibration is fitted so that a confidence is a share of right answers, and an interval holds what it says."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.calibration import COVERAGE, SIXTEENTHS, fitted, log_loss
from trainer.metrics import reliability
from worker.calibration import ConformalInterval, TemperatureScaling


def votes(exponent: float, seed: int, count: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Draw truths from probabilities, and return their powers, which are unsure where the truth is not."""
    random = np.random.default_rng(seed)
    honest = random.dirichlet(np.full(4, 0.4), count)
    truth = (honest.cumsum(axis=1) > random.random((count, 1))).argmax(axis=1)
    powers = (honest + 1e-9) ** (1 / exponent)
    return powers / powers.sum(axis=1, keepdims=True), truth


class TestTemperature:
    @pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
    def test_the_exponent_is_found(self, exponent: float) -> None:
        """Probabilities that were made flatter, or sharper, are put right."""
        scores, truth = votes(exponent, seed=0)
        found = fitted(scores, truth, trees=10_000, classifier=True)
        assert isinstance(found, TemperatureScaling)
        assert exponent == pytest.approx(found.sixteenths / 16, abs=0.1)

    def test_it_is_the_best_of_all(self) -> None:
        """The search among exponents finds what trying each one finds."""
        scores, truth = votes(1.7, seed=1, count=200)
        found = fitted(scores, truth, trees=100, classifier=True)
        every = [TemperatureScaling(n, 0.005) for n in (*SIXTEENTHS, SIXTEENTHS.stop)]
        assert min(every, key=lambda each: log_loss(each.apply(scores), truth)) == found

    def test_confidence_becomes_a_share(self) -> None:
        """On other draws the error of calibration is nearly gone."""
        scores, truth = votes(2.0, seed=2)
        found = fitted(scores, truth, trees=100, classifier=True)
        others, known = votes(2.0, seed=3)
        told = reliability(others, found.apply(others), known)
        assert told.error_before > 0.1
        assert told.error_after < 0.03

    def test_without_a_mistake_there_is_an_end(self) -> None:
        """Votes that are always right do not make it infinitely sure."""
        scores = np.array([[0.6, 0.4], [0.4, 0.6]])
        assert TemperatureScaling(SIXTEENTHS.stop, 0.05) == fitted(scores, np.array([0, 1]), trees=10, classifier=True)


class TestInterval:
    def test_it_covers_what_it_says(self) -> None:
        """On other draws, where trees agree and where they do not."""
        random = np.random.default_rng(0)

        def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
            spread = random.gamma(2.0, 1.0, count)
            return np.column_stack([np.zeros(count), spread]), random.normal(0, 3 * spread)

        found = fitted(*draw(4000), trees=10, classifier=False)
        others, truth = draw(4000)
        _, _, low, high = found.apply(others).T
        inside = (low <= truth) & (truth <= high)
        wide = others[:, 1] > np.median(others[:, 1])
        assert pytest.approx(COVERAGE, abs=0.02) == inside.mean()
        assert pytest.approx(COVERAGE, abs=0.05) == inside[wide].mean()
        assert pytest.approx(COVERAGE, abs=0.05) == inside[~wide].mean()

    def test_few_values_are_all_covered(self) -> None:
        """Of nine held-out values none may be outside: the tenth is the one to come."""
        scores = np.column_stack([np.zeros(9), np.ones(9)])
        truth = np.arange(1.0, 10.0)
        found = fitted(scores, truth, trees=10, classifier=False)
        assert isinstance(found, ConformalInterval)
        assert 9.0 == pytest.approx(found.apply(scores)[0, 3])

    def test_trees_that_always_agree(self) -> None:
        """Without any spread the interval is as wide everywhere, and not closed."""
        scores = np.column_stack([np.zeros(100), np.zeros(100)])
        found = fitted(scores, np.linspace(-1, 1, 100), trees=10, classifier=False)
        assert 0.9 == pytest.approx(found.apply(scores)[0, 3], abs=0.02)
