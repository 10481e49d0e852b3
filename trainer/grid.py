"""What a search may choose from: named values of a forest's settings.

This module owns the grids that come with Earshot, and how somebody's own is read and checked. It
must not know how a grid is searched.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from trainer.models import ForestSpec
from worker.errors import Fatal

Grid = Mapping[str, Sequence[Any]]
"""Names of `ForestSpec`, each with the values to be tried."""

ARTICLE_GRID: Final[Grid] = {
    "n_estimators": [50, 100, 200],
    "max_depth": [None, 10, 20],
    "min_samples_split": [2, 5, 10],
}
"""What a notebook's GridSearchCV of a random forest usually goes through: 27 candidates."""

WIDE_GRID: Final[Grid] = {
    "kind": ["random-forest", "extra-trees"],
    "n_estimators": [100, 200, 400],
    "max_features": ["sqrt", "log2", 0.05, 0.2],
    "min_samples_leaf": [1, 2, 4],
    "class_weight": [None, "balanced_subsample"],
}
"""What matters more to a forest of many correlated features, and is too much to be tried in full: 144 candidates."""

NOTHING: Final = frozenset({"", "none", "null"})
"""How None may be written where there is no word for it, which is so on a command line and in TOML."""


def read(path: Path) -> Grid:
    """Read a grid from a TOML file, or from JSON if its name ends so: a list of values for each name.

    Raises:
        Fatal: the file cannot be read, or is not such a grid.
    """
    try:
        data = path.read_bytes()
        table = msgspec.json.decode(data) if path.suffix.lower() == ".json" else tomllib.loads(data.decode())
    except (OSError, ValueError) as error:  # both decoders raise a ValueError
        raise Fatal(f"{path} cannot be read as a grid: {error}") from error
    if not isinstance(table, dict) or not all(isinstance(values, list) for values in table.values()):
        raise Fatal(f"{path} is no grid: it needs a list of values for each name, as in max_depth = ['none', 10, 20]")
    return {name: [_word(value) if isinstance(value, str) else value for value in table[name]] for name in table}


def parse(parameters: Iterable[str]) -> Grid:
    """Read a grid from such texts as ``max_depth=None,10,20``.

    Raises:
        Fatal: one of them is no name with values, or a name is there twice.
    """
    grid: dict[str, list[Any]] = {}
    for text in parameters:
        name, separator, values = text.partition("=")
        if not separator or not name:
            raise Fatal(f"{text!r} is no parameter; expected a name and its values, as in max_depth=None,10,20")
        if name.strip() in grid:
            raise Fatal(f"{name.strip()} is there twice; give all of its values at once, as in max_depth=None,10,20")
        grid[name.strip()] = [_word(value.strip()) for value in values.split(",")]
    return grid


def check(grid: Grid, task: str, base: ForestSpec) -> None:
    """Do nothing if ``base`` with any of these values is a forest for this task.

    Raises:
        Fatal: there is nothing to choose from, a name is not one of `ForestSpec`, a value is not one that
            scikit-learn takes, or is there twice.
    """
    if not grid:
        raise Fatal("there is nothing to search: name a parameter and its values, as in max_depth=None,10,20")
    for name, values in grid.items():
        if name not in ForestSpec.__struct_fields__:
            raise Fatal(
                f"a forest has no parameter {name!r}; expected one of {', '.join(ForestSpec.__struct_fields__)}"
            )
        if not values or len(set(map(repr, values))) < len(values):
            raise Fatal(f"{name} has the values {values}; expected one or more, each once")
        if task == "regression" and name == "class_weight":
            raise Fatal("class_weight means nothing to a regression: leave it out")
        for value in values:
            try:
                forest = msgspec.convert({**msgspec.structs.asdict(base), name: value}, ForestSpec).make(task, seed=0)
                forest._validate_params()  # noqa: SLF001  # what fit() begins with, without waiting an hour for it
            except ValueError as error:
                raise Fatal(f"{name} cannot be {value!r}: {error}") from error


def _word(text: str) -> Any:
    """Return the number that a word is, or None, or the word."""
    if text.lower() in NOTHING:
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
