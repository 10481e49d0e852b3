"""The coloured tables of the report: numbers in rows and columns, and how strongly each cell stands out.

This module owns which numbers stand where. It must not know how a page looks: it says of a cell how much it weighs
and whether that is good news, and the page finds the colour.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from trainer.results import Candidate, Evaluation, Search
from trainer.wording import count, value_of

MOST_CLASSES: Final = 30
"""Classes that a confusion matrix is readable with."""

MOST_VALUES: Final = 12
"""Values of a hyper-parameter that a heat map has room for; a random search draws more, and has a list."""


class Cell(NamedTuple):
    """A text, its weight between 0 and 1, and what that means."""

    text: str
    weight: float = 0.0
    tone: Literal["good", "bad"] = "good"


class Table(NamedTuple):
    """Rows by name, each with a cell for every column; ``left_out`` says what there was no room for."""

    across: str
    down: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    left_out: str = ""


class Confusion(NamedTuple):
    """So many ``clips`` of a class, ``share`` of all its clips, were called another."""

    truth: str
    said: str
    clips: int
    share: float


def confusion(evaluation: Evaluation) -> Table:
    """Return what clips of each class were called; with very many classes, of those that are mistaken most often."""
    matrix = _matrix(evaluation)
    wrong = matrix.sum(axis=0) + matrix.sum(axis=1) - 2 * np.diag(matrix)
    shown = np.sort(np.argsort(-wrong, kind="stable")[:MOST_CLASSES])
    left_out = len(matrix) - len(shown)

    def cell(truth: int, said: int) -> Cell:
        clips = int(matrix[truth, said])
        weight = clips / max(1, int(matrix[truth].sum()))
        return Cell(str(clips) if clips else "", weight, "good" if truth == said else "bad")

    return Table(
        "called",
        "truth",
        tuple(evaluation.classes[said] for said in shown),
        tuple((evaluation.classes[truth], tuple(cell(truth, said) for said in shown)) for truth in shown),
        f"{count(left_out, 'class', 'classes')} with fewer mistakes are left out" if left_out else "",
    )


def most_confused(evaluation: Evaluation, most: int) -> list[Confusion]:
    """Return the pairs of classes that are mistaken most often, at most so many."""
    matrix = _matrix(evaluation)
    found = [
        Confusion(evaluation.classes[truth], evaluation.classes[said], int(clips), clips / matrix[truth].sum())
        for (truth, said), clips in np.ndenumerate(matrix)
        if truth != said and clips
    ]
    return sorted(found, key=lambda each: (-each.clips, -each.share))[:most]


def heat_map(search: Search) -> Table | None:
    """Return the best score for each pair of values of the two parameters that matter most.

    A parameter matters as much as the best scores of its values differ. There is None to show where fewer
    than two parameters have several values, but few enough for a table.
    """
    names = dict.fromkeys(name for each in search.candidates for name in each.parameters)
    values = {name: _values(search.candidates, name) for name in names}
    suitable = [name for name in names if 2 <= len(values[name]) <= MOST_VALUES]
    spread = {name: np.ptp([_best(search.candidates, {name: value}) for value in values[name]]) for name in suitable}
    chosen = sorted(suitable, key=lambda name: -spread[name])[:2]
    if len(chosen) < 2:
        return None
    down, across = chosen
    scores = [
        [_best(search.candidates, {down: row, across: column}) for column in values[across]] for row in values[down]
    ]
    low, high = np.nanmin(scores), np.nanmax(scores)
    worst = high if search.scoring == "mae" else low

    def cell(score: float) -> Cell:
        return Cell("", 0.0) if np.isnan(score) else Cell(f"{score:.3f}", abs(score - worst) / max(high - low, 1e-9))

    return Table(
        across,
        down,
        tuple(value_of(value) for value in values[across]),
        tuple(
            (value_of(value), tuple(cell(score) for score in row))
            for value, row in zip(values[down], scores, strict=True)
        ),
    )


def _matrix(evaluation: Evaluation) -> Any:
    size = len(evaluation.classes)
    return np.array(evaluation.confusion, dtype=int).reshape(size, size)


def _values(candidates: Iterable[Candidate], name: str) -> list[Any]:
    """Return the values of a parameter: numbers by size, then words, then none."""
    values = {value_of(each.parameters[name]): each.parameters[name] for each in candidates if name in each.parameters}

    def order(value: Any) -> tuple[int, float, str]:
        number = isinstance(value, int | float)
        return (0 if number else 2 if value is None else 1, float(value) if number else 0.0, str(value))

    return sorted(values.values(), key=order)


def _best(candidates: Sequence[Candidate], wanted: dict[str, Any]) -> float:
    """Return the score of the first that fits: candidates stand best first, whether more is better or less."""
    scores = (
        each.score
        for each in candidates
        if all(name in each.parameters and each.parameters[name] == value for name, value in wanted.items())
    )
    return next(scores, float("nan"))
