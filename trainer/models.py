"""The forests that can be trained, and their settings."""

from __future__ import annotations

from typing import Any, Final, Literal

import joblib
import msgspec
import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import (
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)

Kind = Literal["random-forest", "extra-trees"]

FORESTS: Final = {
    ("random-forest", "classification"): RandomForestClassifier,
    ("random-forest", "regression"): RandomForestRegressor,
    ("extra-trees", "classification"): ExtraTreesClassifier,
    ("extra-trees", "regression"): ExtraTreesRegressor,
}


class ForestSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides how a forest grows, beside its data and its seed; names are scikit-learn's.

    ``max_features`` None is scikit-learn's own choice for the task: the square root of their number for
    classification, all of them for regression. ``class_weight`` means nothing to a regressor.
    """

    kind: Kind = "random-forest"
    n_estimators: int = 100
    max_depth: int | None = None
    max_features: Literal["sqrt", "log2"] | float | None = None
    min_samples_leaf: int = 1
    min_samples_split: int = 2
    class_weight: Literal["balanced", "balanced_subsample"] | None = None

    def settled(self, task: str) -> ForestSpec:
        """Return the settings with what they leave to the task, as they are told with a model."""
        usual: Literal["sqrt"] | float = "sqrt" if task == "classification" else 1.0
        return self if self.max_features is not None else msgspec.structs.replace(self, max_features=usual)

    def make(self, task: str, *, seed: int, jobs: int | None = None) -> Any:
        """Return a new, unfitted scikit-learn forest."""
        settings = msgspec.structs.asdict(self.settled(task))
        kind = settings.pop("kind")
        if task == "regression":
            settings.pop("class_weight")
        return FORESTS[kind, task](**settings, random_state=seed, n_jobs=jobs)


def grown(forest: Any, features: NDArray[np.float32], targets: NDArray[Any]) -> Any:
    """Fit a forest, always on the cores of this machine: one that comes back from a cluster has other bytes."""
    with joblib.parallel_config(backend="threading"):
        return forest.fit(features, targets)
