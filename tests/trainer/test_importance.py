"""Importance by family: what a forest hangs on is lost when it is shuffled, and what it does not is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

from trainer import importance
from trainer.dataset import Clip, Dataset
from trainer.extract import Windows
from trainer.holdout import Truth, folds
from trainer.importance import Importance

CLIPS = 60
FAMILIES = ("noise", "signal", "signal", "noise")
"""Both columns of "signal" say the same: shuffling only one of them would show little."""


def windows_of(features: np.ndarray) -> Windows:
    clips = tuple(Clip(Path(), str(n), "a", str(n), None, str(n)) for n in range(CLIPS))
    zeros = np.zeros(CLIPS)
    dataset = Dataset(clips, "label", "classification")
    copies, gains, silent = zeros.astype(np.intp), zeros.astype(np.float32), zeros.astype(np.bool_)
    return Windows(dataset, features, np.arange(CLIPS), zeros, copies, gains, silent, [])


def results(targets: np.ndarray, classes: tuple[str, ...]) -> list[tuple[str, int, float, float]]:
    random = np.random.default_rng(0)
    features = random.normal(size=(CLIPS, 4)).astype(np.float32)
    features[:, 1] = features[:, 2] = targets + random.normal(0, 0.01, CLIPS)
    windows, truth = windows_of(features), Truth(targets, classes)
    kind = RandomForestClassifier if classes else RandomForestRegressor
    half = np.arange(CLIPS) < CLIPS // 2
    splits = [(np.flatnonzero(half == side), np.flatnonzero(half != side)) for side in (True, False)]
    found = Importance(FAMILIES, windows, truth, seed=0)
    for fold in folds(lambda: kind(20, random_state=0), windows, truth, splits):
        found.add(fold)
    return [(each.family, each.features, each.drop, each.deviation) for each in found.results()]


def test_of_a_classifier() -> None:
    """Without the family that says it all, one of three classes is guessed; without the others nothing is lost."""
    (first, columns, drop, deviation), (second, _, none, _) = results(np.arange(CLIPS) % 3, ("a", "b", "c"))
    assert ("signal", 2, "noise") == (first, columns, second)
    assert 2 / 3 == pytest.approx(drop, abs=0.15)
    assert 0 < deviation < 0.1
    assert abs(none) < 0.05


def test_of_a_regressor() -> None:
    """The drop is how much the mean error grows, in the unit of the label."""
    (first, _, drop, _), (_, _, none, _) = results(np.linspace(0, 30, CLIPS)[np.arange(CLIPS) * 7 % CLIPS], ())
    assert "signal" == first
    assert 10 == pytest.approx(drop, abs=3)  # two of 0 to 30, drawn at random, are 10 apart on average
    assert abs(none) < 1


def test_many_windows_are_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long fold some windows speak for all, and say nearly the same."""
    monkeypatch.setattr(importance, "MOST_WINDOWS", 10)
    (first, _, drop, _), _ = results(np.arange(CLIPS) % 3, ("a", "b", "c"))
    assert "signal" == first
    assert drop > 0.3
