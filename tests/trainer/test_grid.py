"""Grids: those that come with Earshot, and what is said of somebody's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from sklearn.model_selection import ParameterGrid

from trainer.grid import ARTICLE_GRID, WIDE_GRID, Grid, check, parse, read
from trainer.models import ForestSpec
from worker.errors import Fatal


class TestGridsOfOurOwn:
    @pytest.mark.parametrize(("grid", "size"), [(ARTICLE_GRID, 27), (WIDE_GRID, 144)])
    def test_they_are_grids_of_a_classifier(self, grid: Grid, size: int) -> None:
        """Every value is one that scikit-learn takes, and there are as many candidates as is said."""
        check(grid, "classification", ForestSpec())
        assert size == len(ParameterGrid(grid))

    def test_the_article_has_what_a_regression_can_use(self) -> None:
        """Its grid is the default for both tasks."""
        check(ARTICLE_GRID, "regression", ForestSpec())


class TestParse:
    def test_values_are_what_they_look_like(self) -> None:
        """Numbers are numbers, None is None however it is written, and a word is a word."""
        texts = ["max_depth=None,10, 20", "max_features=sqrt,0.5,none", "kind=extra-trees"]
        expected = {"max_depth": [None, 10, 20], "max_features": ["sqrt", 0.5, None], "kind": ["extra-trees"]}
        assert expected == parse(texts)

    @pytest.mark.parametrize("text", ["max_depth", "=3", ""])
    def test_what_has_no_name_or_values_is_refused(self, text: str) -> None:
        """With an example of what is meant."""
        with pytest.raises(Fatal, match=r"is no parameter; expected .* max_depth=None,10,20"):
            parse([text])

    def test_a_name_that_is_there_twice_is_refused(self) -> None:
        """The second would silently replace the first."""
        with pytest.raises(Fatal, match="max_depth is there twice; give all of its values at once"):
            parse(["max_depth=10", "kind=extra-trees", " max_depth=20"])


class TestRead:
    def test_toml_and_json_say_the_same(self, tmp_path: Path) -> None:
        """TOML has no null, so that a word stands for it."""
        (tmp_path / "a.toml").write_text('max_depth = ["none", 10]\nmax_features = ["sqrt", 0.5]\n')
        (tmp_path / "a.json").write_text('{"max_depth": [null, 10], "max_features": ["sqrt", 0.5]}')
        expected = {"max_depth": [None, 10], "max_features": ["sqrt", 0.5]}
        assert expected == read(tmp_path / "a.toml") == read(tmp_path / "a.json")

    @pytest.mark.parametrize(
        ("name", "content", "complaint"),
        [
            ("a.toml", b"max_depth = 3", "a list of values for each name"),
            ("a.json", b"[1, 2]", "a list of values for each name"),
            ("a.json", b"{", "cannot be read as a grid"),
            ("a.toml", b"max_depth", "cannot be read as a grid"),
            ("a.toml", b"\xff\xfe", "cannot be read as a grid"),
        ],
    )
    def test_what_is_no_grid_is_refused(self, tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
        """With the name of the file, and what was expected."""
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Fatal, match=rf"{name}.*{complaint}"):
            read(tmp_path / name)

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        """Is named."""
        with pytest.raises(Fatal, match=r"none\.toml cannot be read"):
            read(tmp_path / "none.toml")


class TestCheck:
    @pytest.mark.parametrize(
        ("grid", "complaint"),
        [
            ({}, "nothing to search"),
            ({"depth": [3]}, r"no parameter 'depth'; expected one of kind, n_estimators"),
            ({"max_depth": []}, "one or more, each once"),
            ({"max_depth": [3, 3]}, "one or more, each once"),
            ({"max_depth": ["deep"]}, "max_depth cannot be 'deep'"),
            ({"max_depth": [5, 0]}, "max_depth cannot be 0"),
            ({"min_samples_split": [1]}, "min_samples_split cannot be 1"),
            ({"n_estimators": [-5]}, "n_estimators cannot be -5"),
            ({"max_features": [1.5]}, r"max_features cannot be 1\.5"),
            ({"kind": ["forest"]}, "kind cannot be 'forest'"),
        ],
    )
    def test_nonsense_is_found_before_anything_is_fitted(self, grid: Grid, complaint: str) -> None:
        """By its name and value, as scikit-learn would after the features have been extracted."""
        with pytest.raises(Fatal, match=complaint):
            check(grid, "classification", ForestSpec())

    def test_a_regressor_has_no_class_weight(self) -> None:
        """It would be searched in vain: all its values give the same forest."""
        with pytest.raises(Fatal, match="class_weight means nothing to a regression"):
            check({"class_weight": [None, "balanced"]}, "regression", ForestSpec())
