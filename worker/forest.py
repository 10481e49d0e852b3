"""A fitted scikit-learn forest, flattened: the same numbers to the last bit, without the overhead.

scikit-learn walks one row down one tree at a time: each step waits for a node to come from memory,
and every second branch is guessed wrong by the processor. Here ten walks of a row, each down
another tree, take one step each in turn, without a branch, and where one has ended the next begins:
the processor waits for many nodes together and guesses nothing. This module knows trees and
matrices; it must not know what a feature is, or where a model came from.

Three things make the result equal to scikit-learn's bit by bit:

- Features are float32 and thresholds float64. A threshold is rounded down to float32, which
  leaves ``x <= threshold`` as it was for every float32 ``x``; rounding to nearest would not.
- The float64 values of the leaves are added in the order of the trees, starting from zero, and
  divided by their number at the end.
- A missing value (NaN) takes the branch that each split has for it. Splits of a forest that saw
  none in training have one as well: that of the larger child. The worker's features are finite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

# The columns of `Forest.nodes`. Its rows are no structures, since a call with an array of those takes a tenth of a
# microsecond longer; indices are unsigned since numba then need not look for negative ones.
THRESHOLD: Final = np.uint32(0)
"""The bits of a float32: x goes left if it is at most this."""

FEATURE: Final = np.uint32(1)
"""Which column of the features is compared."""

RIGHT: Final = np.uint32(2)
LEFT: Final = np.uint32(3)
"""The children: each the index of a node, or a leaf. A step takes RIGHT, or one more."""

TREE: Final = np.uint64(32)
"""From this bit on, a walk is the number of its tree; the bits below are the node where it is."""

HANDS: Final = 10
"""Walks under way at once, each down another tree. Enough to hide the latency of a cache; few enough for the compiler
to write out the step of each, without a loop. Of 8 to 20 the fastest."""

BLOCK: Final = 128
"""Trees that row after row comes down before all rows come down the next ones: few enough for trees of up to 500 splits
to stay in the second cache. Without blocks, rows by the hundred take nearly twice as long down a thousand trees."""


@dataclass(frozen=True, slots=True, eq=False)
class Forest:
    """A forest ready to be asked; made with `Forest.from_sklearn`.

    ``classes`` are the labels in the order of the columns of `predict_proba`, or None for a
    regressor: they tell which of the two methods answers, and the other one raises TypeError.
    ``nodes`` are the splits of all trees, then for each tree that is a single leaf a node that leads
    to it on both sides, and at last the idle node, which leads to itself. ``nan_left`` says which of
    the splits send NaN to the left, and each of ``roots`` is the node where one tree starts.
    ``values`` has a row for each leaf: the probabilities of the classes, or the one predicted value.
    The first rows of a classifier's belong to all leaves that are certain of one class, in the order
    of the classes.
    """

    classes: tuple[str, ...] | None
    n_features: int
    nodes: NDArray[np.uint32]
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
        return self._ask(_probabilities, features, len(self.classes))

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
        answers = self._ask(_values, features, 2)
        return answers[:, 0], answers[:, 1]

    def _ask(self, answer: Callable[..., bool], features: NDArray[np.float32], columns: int) -> Matrix:
        if features.dtype != FLOAT32 or features.ndim != 2 or features.shape[1] != self.n_features:
            raise ValueError(
                f"expected float32 features of shape (n, {self.n_features}), got {features.dtype} of {features.shape}"
            )
        features = np.ascontiguousarray(features)
        answers = np.empty((len(features), columns))  # one made by numba would take twice as long to be returned
        if not answer(self.nodes, self.roots, self.values, features, answers):
            features, nodes = self._with_missing(features)
            answer(nodes, self.roots, self.values, features, answers)
        return answers

    def _with_missing(self, features: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.uint32]]:
        """Return features and nodes for which NaN is as good as any number.

        NaN is not at most a threshold, so it goes right. The splits that send it left look at a
        second copy of the features, where it is less than every threshold.
        """
        infinite = np.isinf(features)
        if infinite.any():
            row, column = np.argwhere(infinite)[0]
            raise ValueError(f"feature {column} of row {row} is {features[row, column]}, expected a finite number")
        nodes = self.nodes.copy()
        splits = nodes[: len(self.nan_left)]
        splits[self.nan_left, FEATURE] += np.uint32(self.n_features)
        return np.hstack([features, np.where(np.isnan(features), np.float32(-np.inf), features)]), nodes


def _shared(leaves: Matrix) -> tuple[NDArray[np.intp], Matrix]:
    """Return which row of fewer values belongs to each leaf of a classifier, and these values."""
    n_classes = leaves.shape[1]
    certain = (leaves.max(axis=1) == 1) & (np.count_nonzero(leaves, axis=1) == 1)
    rows = np.where(certain, leaves.argmax(axis=1), n_classes + np.cumsum(~certain) - 1)
    return rows, np.concatenate([np.eye(n_classes), leaves[~certain]])


def _flatten(trees: Sequence[Any], leaves: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return the nodes and where each tree starts; ``leaves`` are those of the trees one after the other."""
    is_leaf = [tree.children_left == NO_CHILD for tree in trees]
    nodes = np.empty((sum(np.count_nonzero(~each) for each in is_leaf), 4), np.uint32)
    roots = np.empty(len(trees), np.uint32)
    first_node = first_leaf = 0
    for number, (tree, leaf) in enumerate(zip(trees, is_leaf, strict=True)):
        here = np.empty(tree.node_count, np.uint32)  # what a node is called as a child
        last_leaf = first_leaf + int(tree.n_leaves)
        last_node = first_node + int(tree.node_count - tree.n_leaves)
        here[leaf] = leaves[first_leaf:last_leaf]
        here[~leaf] = np.arange(first_node, last_node)
        splits = nodes[first_node:last_node]
        splits[:, THRESHOLD] = _round_down(tree.threshold[~leaf]).view(np.uint32)
        splits[:, FEATURE] = tree.feature[~leaf]
        splits[:, RIGHT] = here[tree.children_right[~leaf]]
        splits[:, LEFT] = here[tree.children_left[~leaf]]
        roots[number] = here[0]
        first_node, first_leaf = last_node, last_leaf
    alone = np.flatnonzero(roots >= LEAF)  # a walk starts at a node, also where its tree has none
    idle = len(nodes) + len(alone)
    others = np.zeros((len(alone) + 1, 4), np.uint32)
    others[:, RIGHT] = others[:, LEFT] = np.append(roots[alone], np.uint32(idle))
    roots[alone] = np.arange(len(nodes), idle)
    return np.concatenate([nodes, others]), roots


def _round_down(thresholds: Matrix) -> NDArray[np.float32]:
    nearest = thresholds.astype(np.float32)
    return np.nextafter(nearest, np.float32(-np.inf), out=nearest, where=nearest > thresholds)


@compiled
def _probabilities(
    nodes: NDArray[np.uint32],
    roots: NDArray[np.uint32],
    values: Matrix,
    features: NDArray[np.float32],
    means: Matrix,
) -> bool:
    """Write means over the trees, shape (n, n_classes), and return whether all features are finite.

    If they are not, the means are right only for what `Forest._with_missing` returned.
    """
    leaves = _leaves(nodes, roots, features)
    n_rows, n_classes = means.shape
    means[:] = 0.0
    for row in range(n_rows):
        for tree in range(len(roots)):
            leaf = leaves[row, tree]
            if leaf < n_classes:  # certain of one class
                means[row, leaf] += 1.0
            else:
                for column in range(n_classes):
                    means[row, column] += values[leaf, column]
    means /= len(roots)
    return _are_finite(features)


@compiled
def _values(
    nodes: NDArray[np.uint32],
    roots: NDArray[np.uint32],
    values: Matrix,
    features: NDArray[np.float32],
    answers: Matrix,
) -> bool:
    """Write means and population standard deviations over the trees, shape (n, 2); return as `_probabilities` does."""
    leaves = _leaves(nodes, roots, features)
    n_trees = len(roots)
    for row in range(len(features)):
        total = squares = 0.0
        for tree in range(n_trees):
            total += values[leaves[row, tree], 0]
        mean = total / n_trees
        for tree in range(n_trees):
            squares += (values[leaves[row, tree], 0] - mean) ** 2
        answers[row, 0] = mean
        answers[row, 1] = np.sqrt(squares / n_trees)
    return _are_finite(features)


@compiled
def _are_finite(features: NDArray[np.float32]) -> bool:
    numbers = features.reshape(-1)
    finite = True
    for i in range(len(numbers)):  # by index, for an iterator keeps the compiler from looking at several at once
        finite &= np.abs(numbers[i]) < np.float32(np.inf)
    return finite


@compiled
def _leaves(nodes: NDArray[np.uint32], roots: NDArray[np.uint32], features: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Return the leaf that each tree has for each row of ``features``, and a last column that means nothing."""
    n_rows, n_trees = len(features), len(roots)
    thresholds = nodes.view(np.float32)
    leaves = np.empty((n_rows, n_trees + 1), np.uint32)
    walks = np.empty(BLOCK + HANDS + 1, np.uint64)
    hands = np.empty(HANDS, np.uint64)
    idle = np.uint64(n_trees) << TREE | np.uint64(len(nodes) - 1)
    for first in range(0, n_trees, BLOCK):
        n = min(BLOCK, n_trees - first)
        for i in range(n):
            walks[i] = np.uint64(first + i) << TREE | np.uint64(roots[first + i])
        for i in range(n, n + HANDS + 1):
            walks[i] = idle
        for row in range(n_rows):
            _walk(nodes, thresholds, features[row], walks, n, hands, leaves[row])
    for row in range(n_rows):
        for tree in range(n_trees):
            leaves[row, tree] &= ~LEAF
    return leaves


@compiled
def _walk(
    nodes: NDArray[np.uint32],
    thresholds: NDArray[np.float32],
    x: NDArray[np.float32],
    walks: NDArray[np.uint64],
    n: int,
    hands: NDArray[np.uint64],
    leaves: NDArray[np.uint32],
) -> None:
    """Write into ``leaves`` where the first ``n`` of ``walks`` end; those after them idle, and never end."""
    for hand in range(HANDS):
        hands[hand] = walks[hand]
    taken = np.uint64(HANDS)
    while taken < np.uint64(n + HANDS):  # one was taken for each that has ended
        for hand in range(HANDS):
            walk = hands[hand]
            node = np.uint32(walk)
            left = x[nodes[node, FEATURE]] <= thresholds[node, THRESHOLD]
            child = nodes[node, RIGHT + np.uint32(left)]
            leaves[walk >> TREE] = child  # what is written last is the leaf
            further = walk - np.uint64(node) + np.uint64(child)
            # The highest bit of the child, which says that it is a leaf, in all bits. The compiler would make a branch
            # of anything plainer, and one that the processor cannot guess.
            ended = np.uint64(np.int64(np.int32(child)) >> np.int64(63))
            hands[hand] = further ^ ((further ^ walks[taken]) & ended)
            taken -= ended  # all bits together are minus one
