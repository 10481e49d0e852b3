"""A fitted scikit-learn forest, flattened: the same numbers to the last bit, without the overhead.

scikit-learn walks one row down one tree at a time: each step waits for a node to come from memory,
and every second branch is guessed wrong by the processor. Here hundreds of walks, of many rows down
several trees, take one step each in turn, without a branch: the processor waits for many nodes
together and guesses nothing. This module knows trees and matrices; it must not know what a
feature is, or where a model came from.

Three things make the result equal to scikit-learn's bit by bit:

- Features are float32 and thresholds float64. A threshold is rounded down to float32, which
  leaves ``x <= threshold`` as it was for every float32 ``x``; rounding to nearest would not.
- The float64 values of the leaves are added in the order of the trees, starting from zero, and
  divided by their number at the end.
- A missing value (NaN) takes the branch that each split has for it. Splits of a forest that saw
  none in training have one as well: that of the larger child. The worker's features are finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor, RandomForestClassifier, RandomForestRegressor
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted

from worker.compiled import compiled
from worker.errors import BadModel

Matrix = NDArray[np.float64]

SUPPORTED: Final = (RandomForestClassifier, ExtraTreesClassifier, RandomForestRegressor, ExtraTreesRegressor)

NO_CHILD: Final = -1
"""What scikit-learn writes for the children of a leaf."""

FLOAT32: Final = np.dtype(np.float32)
LEAF: Final = np.uint32(2**31)
"""Set in a child that is a leaf; the other bits are its row of `Forest.values`."""

NODE: Final = np.dtype(
    [
        ("threshold", np.float32),  # x goes left if it is at most this
        ("feature", np.uint32),  # the column compared
        ("left", np.uint32),  # a child: the index of a node, or a leaf
        ("right", np.uint32),
    ]
)
"""A split; leaves are no nodes. Indices are unsigned since numba then need not look for negative ones."""

WALKS: Final = 512
"""Walks under way at once, and of them rows of one tree at the most. Enough to hide the latency of a
cache; few enough for what is known of them to stay in the first one. Of 256 to 1024, and 16 to 512, the fastest."""
ROWS: Final = 64

CACHE: Final = 1024 * 1024
"""Bytes of features that go through all trees before the next ones do: a second-level cache. With more, wide
features come from farther away for every few trees; with less, all trees come again too often."""


@dataclass(frozen=True, slots=True, eq=False)
class Forest:
    """A forest ready to be asked; made with `Forest.from_sklearn`.

    ``classes`` are the labels in the order of the columns of `predict_proba`, or None for a
    regressor: they tell which of the two methods answers, and the other one raises TypeError.
    ``nodes`` are the splits of all trees, ``nan_left`` says which of them send NaN to the left, and
    each of ``roots`` is where one tree starts, as a child is. ``values`` has a row for each leaf:
    the probabilities of the classes, or the one predicted value. The first rows of a classifier's
    belong to all leaves that are certain of one class, in the order of the classes.
    """

    classes: tuple[str, ...] | None
    n_features: int
    nodes: NDArray[np.void]
    nan_left: NDArray[np.bool_]
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
        classes = tuple(str(label) for label in model.classes_) if hasattr(model, "classes_") else None
        leaves = np.concatenate([tree.value[tree.children_left == NO_CHILD, 0] for tree in trees])
        rows, values = _shared(leaves) if classes is not None else (np.arange(len(leaves)), leaves)
        nodes, roots = _flatten(trees, LEAF | rows.astype(np.uint32))
        return cls(
            classes=classes,
            n_features=int(model.n_features_in_),
            nodes=nodes,
            nan_left=np.concatenate([tree.missing_go_to_left[tree.children_left != NO_CHILD] != 0 for tree in trees]),
            roots=roots,
            values=values,
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
        return self._means(features, n_certain=len(self.classes))[0]

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
        means, leaves = self._means(features, n_certain=0)
        return means[:, 0], _spreads(self.values, leaves, means)

    def _means(self, features: NDArray[np.float32], n_certain: int) -> tuple[Matrix, NDArray[np.uint32]]:
        if features.dtype != FLOAT32 or features.ndim != 2 or features.shape[1] != self.n_features:
            raise ValueError(
                f"expected float32 features of shape (n, {self.n_features}), got {features.dtype} of {features.shape}"
            )
        features, nodes = np.ascontiguousarray(features), self.nodes
        if not _are_finite(features):
            features, nodes = self._with_missing(features)
        return _predict(nodes, self.roots, self.values, n_certain, features)

    def _with_missing(self, features: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.void]]:
        """Return features and nodes for which NaN is as good as any number.

        NaN is not at most a threshold, so it goes right. The splits that send it left look at a
        second copy of the features, where it is less than every threshold.
        """
        infinite = np.isinf(features)
        if infinite.any():
            row, column = np.argwhere(infinite)[0]
            raise ValueError(f"feature {column} of row {row} is {features[row, column]}, expected a finite number")
        nodes = self.nodes.copy()
        nodes["feature"][self.nan_left] += np.uint32(self.n_features)
        return np.hstack([features, np.where(np.isnan(features), np.float32(-np.inf), features)]), nodes


def _shared(leaves: Matrix) -> tuple[NDArray[np.intp], Matrix]:
    """Return which row of fewer values belongs to each leaf of a classifier, and these values."""
    n_classes = leaves.shape[1]
    certain = (leaves.max(axis=1) == 1) & (np.count_nonzero(leaves, axis=1) == 1)
    rows = np.where(certain, leaves.argmax(axis=1), n_classes + np.cumsum(~certain) - 1)
    return rows, np.concatenate([np.eye(n_classes), leaves[~certain]])


def _flatten(trees: Sequence[Any], leaves: NDArray[np.uint32]) -> tuple[NDArray[np.void], NDArray[np.uint32]]:
    """Return the splits of all trees and where each tree starts; ``leaves`` are its leaves one after the other."""
    is_leaf = [tree.children_left == NO_CHILD for tree in trees]
    nodes = np.empty(sum(np.count_nonzero(~each) for each in is_leaf), NODE)
    roots = np.empty(len(trees), np.uint32)
    first_node = first_leaf = 0
    for number, (tree, leaf) in enumerate(zip(trees, is_leaf, strict=True)):
        here = np.empty(tree.node_count, np.uint32)  # what a node is called as a child
        last_leaf = first_leaf + int(tree.n_leaves)
        last_node = first_node + int(tree.node_count - tree.n_leaves)
        here[leaf] = leaves[first_leaf:last_leaf]
        here[~leaf] = np.arange(first_node, last_node)
        splits = nodes[first_node:last_node]
        splits["threshold"] = _round_down(tree.threshold[~leaf])
        splits["feature"] = tree.feature[~leaf]
        splits["left"] = here[tree.children_left[~leaf]]
        splits["right"] = here[tree.children_right[~leaf]]
        roots[number] = here[0]
        first_node, first_leaf = last_node, last_leaf
    return nodes, roots


def _round_down(thresholds: Matrix) -> NDArray[np.float32]:
    nearest = thresholds.astype(np.float32)
    return np.nextafter(nearest, np.float32(-np.inf), out=nearest, where=nearest > thresholds)


@compiled
def _are_finite(features: NDArray[np.float32]) -> bool:
    finite = True
    for x in features.reshape(-1):
        finite &= np.abs(x) < np.float32(np.inf)
    return finite


@compiled
def _predict(
    nodes: NDArray[np.void], roots: NDArray[np.uint32], values: Matrix, n_certain: int, features: NDArray[np.float32]
) -> tuple[Matrix, NDArray[np.uint32]]:
    """Return the mean over the trees, of shape (n, n_values), and the leaf of each, of shape (n, n_trees).

    Of the first ``n_certain`` rows of the values, each is one in its own column and zero elsewhere.
    """
    n_rows, n_features = features.shape
    leaves = np.empty((n_rows, len(roots)), np.uint32)
    block = max(ROWS, CACHE // (features.itemsize * n_features))
    for first in range(0, n_rows, block):
        _walk(nodes, roots, features[first : first + block], leaves[first : first + block])
    sums = np.zeros((n_rows, values.shape[1]))
    for row in range(n_rows):
        for tree in range(len(roots)):
            leaf = leaves[row, tree]
            if leaf < n_certain:
                sums[row, leaf] += 1.0
            else:
                for column in range(values.shape[1]):
                    sums[row, column] += values[leaf, column]
    sums /= len(roots)
    return sums, leaves


@compiled
def _walk(
    nodes: NDArray[np.void], roots: NDArray[np.uint32], features: NDArray[np.float32], leaves: NDArray[np.uint32]
) -> None:
    """Write into ``leaves``, shape (n, n_trees), the leaf that each tree has for each row of ``features``."""
    n_rows, n_trees = leaves.shape
    rows_at_once = min(n_rows, ROWS)
    trees_at_once = min(n_trees, WALKS // rows_at_once)
    walks = rows_at_once * trees_at_once
    at = np.empty(walks, np.uint32)  # where each walk is: at a node, or at its end in a leaf
    starts = np.empty(walks, np.uint32)  # where its row starts in the features
    under_way = np.empty(walks, np.uint32)  # which walks have not ended: the first n of these
    for first_tree in range(0, n_trees, trees_at_once):
        trees = range(first_tree, min(first_tree + trees_at_once, n_trees))
        for first_row in range(0, n_rows, rows_at_once):
            rows = range(first_row, min(first_row + rows_at_once, n_rows))
            walk, n = 0, 0
            for tree in trees:
                for row in rows:
                    at[walk] = roots[tree]
                    starts[walk] = (row - first_row) * features.shape[1]
                    under_way[n] = walk
                    walk += 1
                    n += roots[tree] < LEAF
            block = features[first_row:].reshape(-1)
            while n:
                n = _step(nodes, block, at, starts, under_way, n)
            walk = 0
            for tree in trees:
                for row in rows:
                    leaves[row, tree] = at[walk] & ~LEAF
                    walk += 1


@compiled
def _step(
    nodes: NDArray[np.void],
    features: NDArray[np.float32],
    at: NDArray[np.uint32],
    starts: NDArray[np.uint32],
    under_way: NDArray[np.uint32],
    n: int,
) -> int:
    """Take the first ``n`` walks of ``under_way`` one node further; leave those that go on first, and count them."""
    kept = 0
    for i in range(n):
        walk = under_way[i]
        node = nodes[at[walk]]
        child = node.left if features[starts[walk] + node.feature] <= node.threshold else node.right
        at[walk] = child
        under_way[kept] = walk  # stays if the walk goes on, and is overwritten if not: no branch to guess
        kept += int(child < LEAF)
    return kept


@compiled
def _spreads(values: Matrix, leaves: NDArray[np.uint32], means: Matrix) -> Matrix:
    """Return the population standard deviation over the trees of the first value, of shape (n,)."""
    n_rows, n_trees = leaves.shape
    spreads = np.zeros(n_rows)
    for row in range(n_rows):
        for leaf in leaves[row]:
            spreads[row] += (values[leaf, 0] - means[row, 0]) ** 2
        spreads[row] = np.sqrt(spreads[row] / n_trees)
    return spreads
