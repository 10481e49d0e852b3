"""Which forest suits these clips: scikit-learn's searches, with clips as their samples.

This module owns how candidates are compared and what becomes of the best one. It must not know what
may be chosen from (`trainer.grid`), or on how many machines it runs (`trainer.backend`).

1. Whole groups of clips, about a fifth, are laid aside: the search never hears them.
2. Each candidate is fitted and scored on folds of the others. A sample is a clip with all of its
   windows, so no fold can cut one; folds do not part groups either. What is scored is what the
   worker says of a clip, the mean over its windows: accuracy, or the mean absolute error.
3. The best one is fitted again on all but the clips laid aside, and measured on those.
4. `trainer.training.fit` trains it on everything.

The best of many scores flatters: it is chosen for being high (Cawley and Talbot 2010). So the score
to be believed is that of the clips laid aside. The same clips, grid and seed give the same scores on
any number of cores or machines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil, floor, log
from typing import Any, Final, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.experimental import enable_halving_search_cv  # noqa: F401  # without it the next line fails
from sklearn.model_selection import (
    GridSearchCV,
    HalvingRandomSearchCV,
    ParameterGrid,
    RandomizedSearchCV,
)

from trainer import metrics
from trainer.backend import counted, on_cluster
from trainer.extract import Windows
from trainer.grid import Grid
from trainer.listening import Progress, silent
from trainer.models import ForestSpec, grown
from trainer.results import Candidate, Measures, Search
from trainer.splits import splits
from worker.errors import Fatal
from worker.forest import Forest
from worker.golden import scores, window_mean

Strategy = Literal["grid", "random", "halving"]

HELD_OUT: Final = 5
"""One clip in so many is laid aside; of official folds it is the first."""

FACTOR: Final = 3
"""Of the candidates of one round of halving, one in so many comes into the next, with so many times the trees."""

DRAWN: Final = 20
"""Candidates that a random search draws: one of them is among the best 14 % of all with a probability of 95 %."""

SCORING: Final = {"classification": "accuracy", "regression": "mae"}

DEFAULT: Final = ForestSpec()

Clips = NDArray[np.object_]
"""A clip an element: the features of its windows, float32 of shape (windows, features)."""


class ClipForest(BaseEstimator):  # type: ignore[misc]  # scikit-learn is not typed
    """A forest of windows that is fitted to clips and asked about clips; its settings are those of `ForestSpec`.

    It grows on ``jobs`` cores of the machine it is on, also within a task of a cluster.
    """

    def __init__(self, *, task: str, seed: int, jobs: int = 1, **settings: Any) -> None:
        self.task = task
        self.seed = seed
        self.jobs = jobs
        self.settings = settings

    def get_params(self, deep: bool = True) -> dict[str, Any]:  # noqa: ARG002, FBT001, FBT002  # scikit-learn's signature
        """Return what the constructor takes."""
        return {"task": self.task, "seed": self.seed, "jobs": self.jobs, **self.settings}

    def set_params(self, **params: Any) -> ClipForest:
        """Change settings of the forest."""
        self.settings = {**self.settings, **params}
        return self

    def fit(self, clips: Clips, labels: NDArray[Any]) -> ClipForest:
        """Grow the forest; each window has the label of its clip."""
        forest = ForestSpec(**self.settings).make(self.task, seed=self.seed, jobs=self.jobs)
        targets = np.repeat(labels, [len(clip) for clip in clips])
        self.forest_ = Forest.from_sklearn(grown(forest, np.concatenate(list(clips)), targets))
        return self

    def scores(self, clips: Clips) -> NDArray[np.float64]:
        """Return the mean over its windows of what `worker.golden.scores` says, for each clip."""
        return np.array([window_mean(scores(self.forest_, clip)) for clip in clips])

    def predict(self, clips: Clips) -> NDArray[Any]:
        """Return the class or the value of each clip."""
        said = self.scores(clips)
        return said[:, 0] if self.forest_.classes is None else np.array(self.forest_.classes)[said.argmax(axis=1)]


def search(
    windows: Windows,
    grid: Grid,
    *,
    strategy: Strategy = "grid",
    candidates: int | None = None,
    base: ForestSpec = DEFAULT,
    folds: int = 5,
    seed: int = 0,
    jobs: int = -1,
    on_progress: Progress = silent,
) -> Search:
    """Find the best of ``grid`` for ``windows``, and measure it on clips that were not searched with.

    Args:
        windows: of all clips.
        grid: what may be chosen; everything else is as in ``base``.
        strategy: "grid" tries everything; "random" draws ``candidates``; "halving" lets all, or so many, compete
            with few trees, and the best third with three times as many, until those left have ``n_estimators``,
            or the largest of it in the grid (Jamieson and Talwalkar 2016).
        candidates: how many are drawn; the default is 20 for "random", and all for "halving".
        base: the settings that are not searched.
        folds: of the clips that are searched with, unless the data set has its own.
        seed: of the forests, the folds and the draw.
        jobs: processor cores, without a cluster (see `trainer.backend`). The result does not depend on it.
        on_progress: told how many fits are done.

    Raises:
        Fatal: the clips cannot be held out twice.
    """
    dataset = windows.dataset
    train, test = splits(dataset, HELD_OUT, seed)[0]
    heard = msgspec.structs.replace(dataset, clips=tuple(dataset.clips[clip] for clip in train))
    try:
        pairs = splits(heard, folds, seed)
    except Fatal as error:
        raise Fatal(f"a search lays a part of the clips aside, and of the others {error}") from error
    clips, labels = _samples(windows)
    groups = np.array([clip.group for clip in dataset.clips])
    plan = _plan(strategy, grid, candidates, base, seed)
    fits = len(pairs) * sum(plan.rounds)
    on_progress("searching", 0, fits)
    # Here one forest after the other grows on all cores: in threads of one process, scikit-learn's searches
    # undo each other's warning filters. On a cluster, each task grows a forest on one core.
    spread = on_cluster()
    settings = msgspec.structs.asdict(base) | {"task": dataset.task, "seed": seed}
    with counted(fits, lambda done: on_progress("searching", done, fits)) as tell:
        found = plan.make(
            ClipForest(**settings, jobs=1 if spread else jobs),
            scoring=_Scorer(dataset.task, tell),
            cv=pairs,
            refit=False,
            n_jobs=-1 if spread else 1,
            error_score="raise",
        ).fit(clips[train], labels[train])
    ranked = _ranked(found.cv_results_, len(pairs), dataset.task)
    best = ranked[0].parameters
    model = ClipForest(**settings | best, jobs=jobs).fit(clips[train], labels[train])
    return Search(
        strategy=strategy,
        scoring=SCORING[dataset.task],
        candidates=ranked,
        best=best,
        held_out=_measured(model, clips[test], labels[test], groups[test], np.unique(labels)),
    )


class _Plan(NamedTuple):
    """A search of scikit-learn that lacks its estimator, and how many candidates each of its rounds has."""

    make: Callable[..., Any]
    rounds: list[int]


def _plan(strategy: Strategy, grid: Grid, candidates: int | None, base: ForestSpec, seed: int) -> _Plan:
    if strategy == "grid":
        return _Plan(partial(GridSearchCV, param_grid=grid), [len(ParameterGrid(grid))])
    if strategy == "random":
        drawn = min(candidates or DRAWN, len(ParameterGrid(grid)))
        settings = {"param_distributions": grid, "n_iter": drawn, "random_state": seed}
        return _Plan(partial(RandomizedSearchCV, **settings), [drawn])
    space = {name: values for name, values in grid.items() if name != "n_estimators"}
    size, trees = len(ParameterGrid(space)), max(grid.get("n_estimators", [base.n_estimators]))
    drawn = min(candidates or size, size)
    settings = {"param_distributions": space, "n_candidates": drawn, "random_state": seed, "factor": FACTOR}
    settings |= {"resource": "n_estimators", "min_resources": "exhaust", "max_resources": trees}
    settings |= {"return_train_score": False}
    # How many rounds these make is scikit-learn's rule: as many as it takes to be left with fewer than
    # FACTOR candidates, and as can begin with one tree.
    wanted = 1 + floor(log(drawn, FACTOR))
    first = max(1, trees // FACTOR ** (wanted - 1))
    rounds = min(wanted, 1 + floor(log(trees // first, FACTOR)))
    return _Plan(
        partial(HalvingRandomSearchCV, **settings),
        [drawn := ceil(drawn / FACTOR) if each else drawn for each in range(rounds)],
    )


@dataclass(frozen=True)
class _Scorer:
    """Scores a forest on clips, the higher the better, and says that it has."""

    task: str
    tell: Callable[[], None]

    def __call__(self, model: ClipForest, clips: Clips, labels: NDArray[Any]) -> float:
        said = model.predict(clips)
        score = -np.abs(said - labels).mean() if self.task == "regression" else (said == labels).mean()
        self.tell()
        return float(score)


def _samples(windows: Windows) -> tuple[Clips, NDArray[Any]]:
    """Return the features and the label of each clip; copies that somebody has made of it are left out."""
    clips = np.empty(len(windows.dataset.clips), dtype=object)
    for clip in range(len(clips)):
        clips[clip] = windows.features[(windows.owner == clip) & (windows.copies == 0)]
    labels = [clip.label for clip in windows.dataset.clips]
    return clips, np.array(labels, dtype=float if windows.dataset.task == "regression" else None)


def _measured(
    model: ClipForest, clips: Clips, labels: NDArray[Any], groups: NDArray[Any], classes: NDArray[Any]
) -> Measures:
    """Return the measures of a fitted forest on clips; it may not know all of the classes."""
    said = model.scores(clips)
    if model.forest_.classes is None:
        return metrics.regression(said, labels, groups, seed=model.seed)
    probabilities = np.zeros((len(clips), len(classes)))
    probabilities[:, np.searchsorted(classes, model.forest_.classes)] = said
    measures = metrics.classification(probabilities, np.searchsorted(classes, labels), groups, seed=model.seed)
    del measures["calibration_error"]  # it would be of a forest that nobody has calibrated
    return measures


def _ranked(results: dict[str, Any], folds: int, task: str) -> tuple[Candidate, ...]:
    """Return each candidate once, the best first; of those that halving has dropped, the last to go comes first."""
    rounds = results.get("iter", [0] * len(results["params"]))
    last: dict[str, tuple[int, float, Candidate]] = {}
    for number, parameters in enumerate(results["params"]):
        score = float(results["mean_test_score"][number])
        candidate = Candidate(
            parameters,
            -score if task == "regression" else score,
            float(results["std_test_score"][number]),
            folds * float(results["mean_fit_time"][number] + results["mean_score_time"][number]),
        )
        searched = {
            name: value for name, value in parameters.items() if name != "n_estimators" or "iter" not in results
        }
        last[repr(searched)] = (-rounds[number], -score, candidate)
    return tuple(candidate for *_, candidate in sorted(last.values(), key=lambda entry: entry[:2]))
