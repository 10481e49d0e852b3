"""Tuning: what the search found is what is trained, and the same wherever it was searched."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from trainer.cache import Cache
from trainer.dataset import load
from trainer.grid import ARTICLE_GRID, WIDE_GRID, Grid
from trainer.models import ForestSpec
from trainer.search import Strategy
from trainer.tuning import DEFAULT_GRIDS, tune
from worker import bundle
from worker.errors import Fatal

GRID: Grid = {"n_estimators": [3, 6], "max_depth": [2, 8]}


class TestTune:
    def test_the_best_is_trained(self, machines: Path, tmp_path: Path) -> None:
        """The bundle has the best settings, those that were not searched, and the search; it loads."""
        base = ForestSpec(kind="extra-trees", max_depth=1)
        found, fitted = tune(load(machines), tmp_path / "out", GRID, forest=base, name="tuned")
        expected = msgspec.structs.replace(base, **found.best)
        assert found.best in [{"n_estimators": trees, "max_depth": depth} for trees in (3, 6) for depth in (2, 8)]
        manifest = bundle.load(tmp_path / "out").manifest
        assert msgspec.to_builtins(expected) == manifest.forest
        assert manifest.search is not None
        assert found.best == manifest.search["best"]
        assert ("tuned", fitted.manifest) == (manifest.name, manifest)

    def test_of_a_quantity(self, machines: Path, tmp_path: Path) -> None:
        """By its error."""
        found, _ = tune(load(machines, label="rpm"), tmp_path / "out", GRID)
        assert "mae" == found.scoring
        assert "regression" == bundle.load(tmp_path / "out").manifest.task

    def test_nonsense_is_refused_before_anything_is_heard(self, machines: Path, tmp_path: Path) -> None:
        """No clip has been listened to, and nothing is written."""
        told: list[object] = []
        with pytest.raises(Fatal, match="no parameter 'depth'"):
            tune(load(machines), tmp_path / "out", {"depth": [1]}, on_progress=lambda *stage: told.append(stage))
        assert [] == told
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("strategy", "grid"), [("grid", ARTICLE_GRID), ("random", WIDE_GRID), ("halving", WIDE_GRID)]
    )
    def test_what_is_searched_by_default(self, strategy: Strategy, grid: Grid) -> None:
        """The article's grid in full; draws and halving have a wider one."""
        assert grid == DEFAULT_GRIDS[strategy]

    def test_a_regression_is_not_asked_for_class_weights(self, machines: Path, tmp_path: Path) -> None:
        """They are left out of the wide grid."""
        base = ForestSpec(n_estimators=2)
        cache = Cache(tmp_path / "cache")
        found, _ = tune(
            load(machines, label="rpm"), tmp_path / "out", strategy="random", candidates=2, forest=base, cache=cache
        )
        assert {*WIDE_GRID} - {"class_weight"} == {*found.best}
