"""A fitted scikit-learn forest, flattened: the same numbers to the last bit, without the overhead.

scikit-learn walks one tree at a time and pays 100 µs of Python for each, whatever the batch.
Here all trees lie in one array of nodes and compiled code walks eight of them at once, so that
the processor waits for eight nodes from memory together and not one after the other. This module
knows trees and matrices; it must not know what a feature is, or where a model came from.

Three things make the result equal to scikit-learn's bit by bit:

- Features are float32 and thresholds float64. A threshold is rounded down to float32, which
  leaves ``x <= threshold`` as it was for every float32 ``x``; rounding to nearest would not.
- The float64 values of the leaves are added in the order of the trees, starting from zero, and
  divided by their number at the end.
- A missing value (NaN) takes the branch that each split has for it. Splits of a forest that saw
  none in training have one as well: that of the larger child. The worker's features are finite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray
from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor, RandomForestClassifier, RandomForestRegressor
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted

from worker.errors import BadModel

Matrix = NDArray[np.float64]
Function = TypeVar("Function", bound=Callable[..., Any])

SUPPORTED: Final = (RandomForestClassifier, ExtraTreesClassifier, RandomForestRegressor, ExtraTreesRegressor)

LANES: Final = 8
"""Trees walked at once; of 4, 8 and 16, eight was the fastest, for one row and for a thousand."""

NO_CHILD: Final = -1
"""What scikit-learn writes for the children of a leaf."""

NODE: Final = np.dtype(
    [
        ("threshold", np.float32),  # x goes right if it is above; +inf in a leaf
        ("feature", np.uint32),  # the column compared; 0 in a leaf
        ("left", np.uint32),  # the left child, whose right sibling follows it; a leaf is its own left child
        ("nan_right", np.uint32),  # 1 if NaN goes right; 0 in a leaf
        ("leaf", np.uint32),  # the row of a leaf in `Forest.values`
    ]
)
"""A node of a tree. Indices are unsigned since numba then need not look for negative ones."""


@dataclass(frozen=True, slots=True, eq=False)
class Forest:
    """A forest ready to be asked; made with `Forest.from_sklearn`.

    ``classes`` are the labels in the order of the columns of `predict_proba`, or None for a
    regressor: they tell which of the two methods answers, and the other one raises TypeError.
    ``nodes`` are those of all trees, and each of ``roots`` is where one tree starts. ``values``
    has a row for each leaf: the probabilities of the classes, or the one predicted value.
    """

    classes: tuple[str, ...] | None
    n_features: int
    nodes: NDArray[np.void]
    roots: NDArray[np.uint32]
    values: Matrix

    @classmethod
    def from_sklearn(cls, model: Any) -> Forest:
        """Flatten a fitted random forest or extra-trees model that has one output.

        Raises:
            BadModel: ``model`` is of another type (a subclass may predict in its own way and is
                refused too), is not fitted, or has several outputs.
        """
        name = type(model).__name__
        if type(model) not in SUPPORTED:
            raise BadModel(f"the model is a {name}; expected one of {', '.join(kind.__name__ for kind in SUPPORTED)}")
        try:
            check_is_fitted(model)
        except NotFittedError:
            raise BadModel(f"the {name} is not fitted; fit it before it is saved") from None
        if model.n_outputs_ != 1:
            raise BadModel(f"the {name} has {model.n_outputs_} outputs, expected one: train one model for each")
        trees = [estimator.tree_ for estimator in model.estimators_]
        roots = np.cumsum([0, *(tree.node_count for tree in trees[:-1])])
        first_leaves = np.cumsum([0, *(tree.n_leaves for tree in trees[:-1])])
        return cls(
            classes=tuple(str(label) for label in model.classes_) if hasattr(model, "classes_") else None,
            n_features=int(model.n_features_in_),
            nodes=np.concatenate([_flatten(*part) for part in zip(trees, roots, first_leaves, strict=True)]),
            roots=roots.astype(np.uint32),
            values=np.concatenate([tree.value[tree.children_left == NO_CHILD, 0] for tree in trees]),
        )

    @property
    def n_trees(self) -> int:
        """The number of trees."""
        return len(self.roots)

    def predict_proba(self, features: NDArray[np.float32]) -> Matrix:
        """Return the probability of each of ``classes`` for each row of ``features``.

        Args:
            features: float32 of shape (n, n_features), n from 0.

        Returns:
            float64 of shape (n, n_classes), equal to scikit-learn's ``predict_proba``.

        Raises:
            TypeError: the forest is a regressor.
            ValueError: ``features`` have another dtype or shape, or hold an infinity.
        """
        if self.classes is None:
            raise TypeError("this forest is a regressor and has no probabilities; call predict")
        return _means(self.values, self._leaves(features))

    def predict(self, features: NDArray[np.float32]) -> tuple[Matrix, Matrix]:
        """Return the value predicted for each row of ``features``, and how far the trees disagree.

        Args:
            features: float32 of shape (n, n_features), n from 0.

        Returns:
            Two float64 arrays of shape (n,): the values, equal to scikit-learn's ``predict``, and
            the population standard deviation of the predictions of the single trees.

        Raises:
            TypeError: the forest is a classifier.
            ValueError: ``features`` have another dtype or shape, or hold an infinity.
        """
        if self.classes is not None:
            raise TypeError("this forest is a classifier and has no values; call predict_proba")
        leaves = self._leaves(features)
        means = _means(self.values, leaves)
        return means[:, 0], _spreads(self.values, leaves, means)

    def _leaves(self, features: NDArray[np.float32]) -> NDArray[np.uint32]:
        if features.dtype != np.float32 or features.ndim != 2 or features.shape[1] != self.n_features:
            raise ValueError(
                f"expected float32 features of shape (n, {self.n_features}), got {features.dtype} of {features.shape}"
            )
        infinite = np.isinf(features)
        if infinite.any():
            row, column = np.argwhere(infinite)[0]
            raise ValueError(f"feature {column} of row {row} is {features[row, column]}, expected a finite number")
        return _walk(self.nodes, self.roots, np.ascontiguousarray(features))


def _compiled(function: Function) -> Function:
    """Compile at the first call, and keep the machine code for the next process where there is a place for it."""
    try:
        return cast("Function", njit(cache=True, nogil=True)(function))
    except RuntimeError:
        # Neither the package's folder nor the user's cache can be written to: compile in every process.
        return cast("Function", njit(nogil=True)(function))


def _flatten(tree: Any, root: int, first_leaf: int) -> NDArray[np.void]:
    """Return the nodes of one tree, the first of which will stand at index ``root`` of all nodes."""
    is_leaf = tree.children_left == NO_CHILD
    splits = np.flatnonzero(~is_leaf)
    place = np.zeros(tree.node_count, np.int64)  # where each node goes, so that siblings are neighbours
    place[tree.children_left[splits]] = 1 + 2 * np.arange(len(splits))
    place[tree.children_right[splits]] = 2 + 2 * np.arange(len(splits))
    nodes = np.zeros(tree.node_count, NODE)
    nodes["threshold"][place] = np.where(is_leaf, np.inf, _round_down(tree.threshold))
    nodes["feature"][place] = np.where(is_leaf, 0, tree.feature)
    nodes["left"][place] = root + np.where(is_leaf, place, place[tree.children_left])
    nodes["nan_right"][place] = ~is_leaf & (tree.missing_go_to_left == 0)
    nodes["leaf"][place] = np.where(is_leaf, first_leaf + np.cumsum(is_leaf) - 1, 0)
    return nodes


def _round_down(thresholds: Matrix) -> NDArray[np.float32]:
    nearest = thresholds.astype(np.float32)
    return np.nextafter(nearest, np.float32(-np.inf), out=nearest, where=nearest > thresholds)


@_compiled
def _walk(nodes: NDArray[np.void], roots: NDArray[np.uint32], features: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Return the leaf that each tree finds for each row, of shape (n_trees, n)."""
    n_trees, n_rows = len(roots), len(features)
    leaves = np.empty((n_trees, n_rows), np.uint32)
    at = np.empty(LANES, np.uint32)
    for first in range(0, n_trees, LANES):
        for row in range(n_rows):
            for lane in range(LANES):  # always eight, so that the compiler unrolls: the last tree fills up
                at[lane] = roots[min(first + lane, n_trees - 1)]
            walking = True
            while walking:  # until all have arrived; a leaf leads to itself
                walking = False
                for lane in range(LANES):
                    node = nodes[at[lane]]
                    x = features[row, node.feature]
                    right = np.uint32(x > node.threshold) | (np.uint32(np.isnan(x)) & node.nan_right)
                    child = np.uint32(node.left + right)
                    walking |= child != at[lane]
                    at[lane] = child
            for lane in range(min(LANES, n_trees - first)):
                leaves[first + lane, row] = nodes[at[lane]].leaf
    return leaves


@_compiled
def _means(values: Matrix, leaves: NDArray[np.uint32]) -> Matrix:
    """Return the mean over the trees, of shape (n, n_values), added up in the order of the trees."""
    n_trees, n_rows = leaves.shape
    sums = np.zeros((n_rows, values.shape[1]))
    for tree in range(n_trees):
        for row in range(n_rows):
            leaf = leaves[tree, row]
            for column in range(values.shape[1]):
                sums[row, column] += values[leaf, column]
    sums /= n_trees
    return sums


@_compiled
def _spreads(values: Matrix, leaves: NDArray[np.uint32], means: Matrix) -> Matrix:
    """Return the population standard deviation over the trees of the first value, of shape (n,)."""
    n_trees, n_rows = leaves.shape
    spreads = np.zeros(n_rows)
    for tree in range(n_trees):
        for row in range(n_rows):
            spreads[row] += (values[leaves[tree, row], 0] - means[row, 0]) ** 2
    for row in range(n_rows):
        spreads[row] = np.sqrt(spreads[row] / n_trees)
    return spreads
