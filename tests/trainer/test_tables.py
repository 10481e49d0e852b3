"""Coloured tables: what stands where, and how much of it there is room for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trainer import tables
from trainer.results import Candidate, Evaluation, Search
from trainer.tables import Cell, Confusion


def evaluated(matrix: list[list[int]]) -> Evaluation:
    """An evaluation with this confusion matrix of classes c00, c01 and so on."""
    return Evaluation(
        task="classification",
        label="label",
        classes=tuple(f"c{number:02}" for number in range(len(matrix))),
        how="",
        clip={},
        window={},
        leaky={},
        confusion=tuple(map(tuple, matrix)),
    )


def searched(scores: list[tuple[dict[str, Any], float]], scoring: str = "accuracy") -> Search:
    """A search with these candidates, which stand best first."""
    ordered = sorted(scores, key=lambda each: each[1], reverse=scoring == "accuracy")
    return Search(
        strategy="grid",
        scoring=scoring,
        candidates=tuple(Candidate(parameters, score, 0.0, 1.0) for parameters, score in ordered),
        best={},
        held_out={},
    )


class TestConfusion:
    def test_a_row_is_the_truth(self) -> None:
        """Counts stand in the row of their class, weighed by its clips; right ones are told from wrong ones."""
        table = tables.confusion(evaluated([[3, 1], [0, 0]]))
        assert ("truth", "called", ("c00", "c01")) == (table.down, table.across, table.columns)
        assert ("c00", (Cell("3", 0.75, "good"), Cell("1", 0.25, "bad"))) == table.rows[0]
        assert ("c01", (Cell("", 0.0, "bad"), Cell("", 0.0, "good"))) == table.rows[1]
        assert "" == table.left_out

    def test_of_many_classes_the_mistaken_ones_are_shown(self) -> None:
        """In their order, and what is left out is said."""
        matrix = np.eye(40, dtype=int) * 5
        matrix[35, 36] = 2
        table = tables.confusion(evaluated(matrix.tolist()))
        assert tables.MOST_CLASSES == len(table.rows) == len(table.columns)
        assert {"c35", "c36"} <= set(table.columns)
        assert sorted(table.columns) == list(table.columns)
        assert "10 classes with fewer mistakes are left out" == table.left_out

    def test_most_confused_first(self) -> None:
        """By clips, then by the share of the class; a class that is always right is not listed."""
        found = tables.most_confused(evaluated([[7, 3, 0], [3, 2, 0], [0, 1, 9]]), 2)
        assert [Confusion("c01", "c00", 3, 0.6), Confusion("c00", "c01", 3, 0.3)] == found


class TestHeatMap:
    def test_the_two_parameters_that_matter(self) -> None:
        """The best score of each pair of their values, numbers by size and none last; the third is left out."""
        scores = [
            ({"trees": trees, "depth": depth, "leaf": leaf}, 0.1 * (trees == 100) + 0.2 * (depth is None) - 0.01 * leaf)
            for trees in (100, 20)
            for depth in (None, 5)
            for leaf in (1, 2)
        ]
        table = tables.heat_map(searched(scores))
        assert table is not None
        assert ("depth", "trees") == (table.down, table.across)
        assert ("20", "100") == table.columns
        assert ["5", "none"] == [name for name, _ in table.rows]
        assert [["-0.010", "0.090"], ["0.190", "0.290"]] == [[cell.text for cell in cells] for _, cells in table.rows]
        assert [0.0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0] == [
            cell.weight for _, cells in table.rows for cell in cells
        ]

    def test_of_errors_the_smallest_is_best(self) -> None:
        """A pair of values is worth its smallest error, and the smallest error has the strongest colour."""
        scores = [({"a": a, "b": b, "c": c}, float(a + b + c)) for a in (1, 2) for b in (1, 3) for c in (0, 0.5)]
        table = tables.heat_map(searched(scores, "mae"))
        assert table is not None
        assert ("b", "a") == (table.down, table.across)
        assert [["2.000", "3.000"], ["4.000", "5.000"]] == [[cell.text for cell in cells] for _, cells in table.rows]
        assert [1.0, pytest.approx(2 / 3), pytest.approx(1 / 3), 0.0] == [
            cell.weight for _, cells in table.rows for cell in cells
        ]

    def test_a_pair_that_was_not_tried_is_empty(self) -> None:
        """A random search does not try all of them, and equal scores have no colour."""
        table = tables.heat_map(searched([({"a": 1, "b": 1}, 0.5), ({"a": 2, "b": 2}, 0.5)]))
        assert table is not None
        assert [["0.500", ""], ["", "0.500"]] == [[cell.text for cell in cells] for _, cells in table.rows]
        assert {0.0} == {cell.weight for _, cells in table.rows for cell in cells}

    @pytest.mark.parametrize(
        "parameters",
        [
            [{"a": 1, "b": 1}, {"a": 1, "b": 2}],
            [{"a": number / 7, "b": number % 2} for number in range(50)],
            [{}],
        ],
        ids=["one varies", "too many values", "nothing varies"],
    )
    def test_no_two_parameters_to_show(self, parameters: list[dict[str, Any]]) -> None:
        """There is no map then, and the list of candidates says it all."""
        assert tables.heat_map(searched([(each, 0.5) for each in parameters])) is None
