"""From labelled clips to the bundle of the forest that suits them: extract, search, train.

This module owns the order of these. It must not know how any of them is done, or where: all that is
heavy happens wherever joblib is told to work (see `trainer.backend`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import msgspec

from trainer.cache import Cache
from trainer.dataset import Dataset
from trainer.extract import featurize
from trainer.grid import ARTICLE_GRID, WIDE_GRID, Grid, check
from trainer.listening import Progress, silent
from trainer.models import ForestSpec
from trainer.results import Search
from trainer.search import Strategy, search
from trainer.training import COMPACT_SPEC, HUNDRED_TREES, Fitted, fit
from worker.bundle import check_replaceable
from worker.errors import Fatal
from worker.features import FeatureSpec, Featurizer

DEFAULT_GRIDS: Final[Mapping[Strategy, Grid]] = MappingProxyType(
    {"grid": ARTICLE_GRID, "random": WIDE_GRID, "halving": WIDE_GRID}
)
"""What is searched if nothing is said; draws and halving can afford a wide one."""


class Tuned(NamedTuple):
    """The search, and the training of the best that it has found."""

    search: Search
    fitted: Fitted


def tune(
    dataset: Dataset,
    out: Path | str,
    grid: Grid | None = None,
    *,
    strategy: Strategy = "grid",
    candidates: int | None = None,
    spec: FeatureSpec = COMPACT_SPEC,
    forest: ForestSpec = HUNDRED_TREES,
    fixed: Collection[str] = (),
    folds: int = 5,
    seed: int = 0,
    jobs: int = -1,
    cache: Cache | None = None,
    on_progress: Progress = silent,
    **training: Any,
) -> Tuned:
    """Search for the settings of a forest, and write the bundle of the best one to ``out``.

    Args:
        dataset: the labelled clips.
        out: the folder of the bundle; a bundle that stands there is replaced.
        grid: what is searched; by default `DEFAULT_GRIDS` for the strategy.
        strategy: see `trainer.search.search`.
        candidates: likewise.
        spec: the features, and the windows they are computed from.
        forest: the settings that are not searched.
        fixed: those of them that the default grid would search, and must not.
        folds: see `trainer.search.search`.
        seed: of the search and of the training.
        jobs: processor cores to use; -1 is all of them. The result does not depend on it.
        cache: where features may be kept; without one they are extracted twice.
        on_progress: told how far the work is.
        training: what else `trainer.training.fit` is to be told.

    Raises:
        Fatal: the grid is of no use, or as `fit` does.
    """
    out = Path(out)
    check_replaceable(out)
    grid = grid or _default(strategy, dataset.task, fixed)
    check(grid, dataset.task, forest)
    try:
        featurizer = Featurizer(spec)
    except ValueError as error:
        raise Fatal(str(error)) from error
    windows = featurize(dataset, featurizer, jobs=jobs, cache=cache, on_progress=on_progress)
    found = search(
        windows,
        grid,
        strategy=strategy,
        candidates=candidates,
        base=forest,
        folds=folds,
        seed=seed,
        jobs=jobs,
        on_progress=on_progress,
    )
    best = msgspec.structs.replace(forest, **found.best)
    shared: dict[str, Any] = {"folds": folds, "seed": seed, "jobs": jobs, "cache": cache, "on_progress": on_progress}
    return Tuned(found, fit(dataset, out, spec=spec, forest=best, search=found, **shared, **training))


def _default(strategy: Strategy, task: str, fixed: Collection[str]) -> Grid:
    grid = DEFAULT_GRIDS[strategy]
    left_out = {*fixed} if task == "classification" else {*fixed, "class_weight"}
    return {name: grid[name] for name in grid if name not in left_out}
