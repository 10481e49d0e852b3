"""Tuning: what the search found is what is trained, and the same wherever it was searched."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from trainer.__main__ import main
from trainer.arguments import parser
from trainer.cache import Cache
from trainer.dataset import load
from trainer.grid import ARTICLE_GRID, WIDE_GRID, Grid
from trainer.models import ForestSpec
from trainer.results import Search
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
        assert msgspec.to_builtins(expected.settled("classification")) == manifest.forest
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


class TestCommand:
    OPTIONS = ("--no-report", "--no-cache", "--window-hop-seconds", "1")

    def test_the_search_is_told(self, machines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The candidates by rank with their scores, what the best is worth elsewhere, and then what `fit` tells."""
        (tmp_path / "grid.toml").write_text('max_depth = ["none", 2]\nn_estimators = [2, 4, 8]')
        out = tmp_path / "out"
        options = ["--grid", str(tmp_path / "grid.toml"), "--param", "n_estimators=3,6", *self.OPTIONS]
        assert 0 == main(["tune", str(machines), "--out", str(out), *options])
        printed = capsys.readouterr()
        assert "" == printed.err
        lines = printed.out.splitlines()
        first = lines.index("4 candidates (grid search), by accuracy of clips:")
        assert ["parameters", "accuracy", "over", "the", "folds", "seconds"] == lines[first + 1].split()
        ranks, *_, deviation, seconds = zip(*(line.split() for line in lines[first + 2 : first + 6]), strict=True)
        assert ("1", "2", "3", "4") == ranks
        assert all(0 <= float(each) < 1 for each in deviation)
        assert all(float(each) >= 0 for each in seconds)
        assert "the first of them, on clips that were laid aside before:" == lines[first + 6]
        assert f"bundle written to {out}" == lines[-1]
        told = bundle.load(out).manifest.search
        assert told is not None
        assert {"max_depth", "n_estimators"} == set(told["best"])

    def test_as_json(self, machines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Everything that was found out is one document."""
        options = ["--strategy", "halving", "--candidates", "2", "--trees", "6", "--param", "max_depth=1,2,3"]
        assert 0 == main(["tune", str(machines), "--out", str(tmp_path / "out"), *options, *self.OPTIONS, "--json"])
        found = msgspec.json.decode(capsys.readouterr().out)["search"]
        assert "halving" == msgspec.convert(found, Search).strategy
        assert 2 == len(found["candidates"])

    def test_what_is_typed_is_not_searched(self, machines: Path, tmp_path: Path) -> None:
        """An option of the forest holds for every candidate, though the grid of a random search has others."""
        options = ["--strategy", "random", "--candidates", "2", "--trees", "3", "--forest", "extra-trees"]
        assert 0 == main(["tune", str(machines), "--out", str(tmp_path / "out"), *options, *self.OPTIONS])
        manifest = bundle.load(tmp_path / "out").manifest
        assert (3, "extra-trees") == (manifest.forest["n_estimators"], manifest.forest["kind"])
        assert manifest.search is not None
        assert {*WIDE_GRID} - {"n_estimators", "kind"} == {*manifest.search["best"]}

    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            (["--param", "depth=3"], "a forest has no parameter 'depth'"),
            (["--param", "max_depth"], "'max_depth' is no parameter"),
            (["--grid", "nowhere.toml"], "nowhere.toml cannot be read as a grid"),
            (["--max-depth", "3", "--param", "max_depth=3,4"], "--max-depth fixes max_depth, and --param or --grid"),
            (["--backend", "dask"], "--backend dask needs --scheduler ADDRESS"),
            (["--scheduler", "tcp://10.0.0.1:8786"], "is for --backend dask"),
        ],
    )
    def test_what_cannot_be_done(
        self, machines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
    ) -> None:
        """One line, status 1, and no bundle."""
        assert 1 == main(["tune", str(machines), "--out", str(tmp_path / "out"), *options, *self.OPTIONS])
        (line,) = capsys.readouterr().err.splitlines()
        assert complaint in line
        assert not (tmp_path / "out").exists()

    def test_its_help_has_an_example(self, capsys: pytest.CaptureFixture[str]) -> None:
        """A command line to copy, which the parser takes."""
        with pytest.raises(SystemExit):
            main(["tune", "--help"])
        program, *arguments = capsys.readouterr().out.strip().splitlines()[-1].split()
        assert ("earshot-trainer", "tune") == (program, arguments[0])
        parser().parse_args(arguments)
