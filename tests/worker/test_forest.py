"""The flattened forest against scikit-learn: equal bytes, whatever the forest and the features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from sklearn.ensemble import (
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    GradientBoostingClassifier,
    RandomForestClassifier,
    RandomForestRegressor,
)

from worker.errors import BadModel
from worker.forest import BLOCK, HANDS, Forest

Features = NDArray[np.float32]

CLASSIFIERS = (RandomForestClassifier, ExtraTreesClassifier)
REGRESSORS = (RandomForestRegressor, ExtraTreesRegressor)
KINDS = CLASSIFIERS + REGRESSORS

MAX = float(np.finfo(np.float32).max)
N_FEATURES = 6


def normal(n: int, columns: int = N_FEATURES, seed: int = 0) -> Features:
    return np.random.default_rng(seed).normal(size=(n, columns)).astype(np.float32)


def target(kind: type, features: Features) -> NDArray[Any]:
    """Something to learn that is noisy enough to make deep trees and leaves of mixed classes."""
    noise = np.random.default_rng(7).normal(size=len(features))
    y = np.nan_to_num(features[:, 0]) * 2 + np.nan_to_num(features[:, -1]) + noise
    return y if kind in REGRESSORS else np.digitize(y, np.quantile(y, [0.1, 0.5, 0.8]))


def fitted(kind: type, n_estimators: int = 9, train: Features | None = None, **settings: Any) -> Any:
    train = normal(200) if train is None else train
    bootstrap = settings.pop("bootstrap", True)
    model = kind(n_estimators, bootstrap=bootstrap, random_state=0, **settings)
    return model.fit(train, target(kind, train))


def assert_same(model: Any, *batches: Features) -> None:
    """Compare what scikit-learn says about each batch with what its flattened forest says."""
    forest = Forest.from_sklearn(model)
    for features in batches:
        if forest.classes is not None:
            assert_identical(model.predict_proba(features), forest.predict_proba(features))
            continue
        values, spreads = forest.predict(features)
        assert_identical(model.predict(features), values)
        by_tree = np.array([tree.predict(features) for tree in model.estimators_])
        # Where all trees agree the spread is a rounding error of the values: hence a tolerance in their scale.
        np.testing.assert_allclose(spreads, by_tree.std(axis=0), rtol=1e-12, atol=1e-14 * np.abs(by_tree).max())


def assert_identical(expected: NDArray[Any], actual: NDArray[Any]) -> None:
    assert expected.dtype == actual.dtype
    assert expected.shape == actual.shape
    assert expected.tobytes() == actual.tobytes()


@pytest.mark.parametrize("max_depth", [1, None])
@pytest.mark.parametrize("n_estimators", [1, HANDS - 1, HANDS, HANDS + 1, BLOCK - 1, BLOCK, BLOCK + 1, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_same_numbers_for_any_number_of_trees_and_rows(kind: type, n_estimators: int, max_depth: int | None) -> None:
    """Whole and partial blocks of trees, and batches of any size, give scikit-learn's numbers."""
    model = fitted(kind, n_estimators, max_depth=max_depth)
    assert_same(model, *(normal(n, seed=n) for n in (1, 2, 7, 8, 9, 33, 1000)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [
        {"max_leaf_nodes": 20},  # grown best first, which numbers the nodes in another order
        {"bootstrap": False},
        {"min_samples_split": 10_000},  # trees of a single node
        {"min_samples_leaf": 30, "ccp_alpha": 0.01},
    ],
)
def test_same_numbers_however_the_trees_were_grown(kind: type, settings: dict[str, Any]) -> None:
    """The order and the number of the nodes do not matter."""
    assert_same(fitted(kind, **settings), normal(100, seed=1))


@pytest.mark.parametrize("kind", KINDS)
def test_single_leaves_among_trees(kind: type) -> None:
    """Trees that are a leaf, since they saw one class only, count as the others do, with missing values too."""
    train, features = normal(200), normal(50, seed=1)
    model = kind(BLOCK + 50, bootstrap=True, random_state=0).fit(train, np.arange(200) == 0)
    assert 1 in (counts := {tree.tree_.node_count for tree in model.estimators_})
    assert len(counts) > 1
    features[::2, 0] = np.nan
    assert_same(model, features, train, train[:1])


@pytest.mark.parametrize("kind", KINDS)
def test_more_than_a_thousand_features(kind: type) -> None:
    """Splits on columns far beyond the thousandth read the right column."""
    train = normal(100, columns=1500)
    model = fitted(kind, train=train, max_features=0.2)
    assert max(tree.tree_.feature.max() for tree in model.estimators_) > 1024
    assert_same(model, *(normal(n, columns=1500, seed=1) for n in (33, 400)))


def test_trees_hundreds_of_levels_deep() -> None:
    """A tree that is one long chain is walked to its end."""
    train = np.arange(400, dtype=np.float32)[:, np.newaxis]
    model = RandomForestRegressor(9, random_state=0).fit(train, 2.0 ** np.arange(400))
    assert max(tree.tree_.max_depth for tree in model.estimators_) > 100
    assert_same(model, np.linspace(-1, 401, 1000, dtype=np.float32)[:, np.newaxis])


def nudge(direction: float) -> Callable[[Features], Features]:
    return lambda nearest: np.nextafter(nearest, np.float32(direction))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [lambda nearest: nearest, nudge(-np.inf), nudge(np.inf)], ids=["at", "under", "above"])
@pytest.mark.parametrize("spacing", ["wide", "adjacent"])
def test_features_on_the_thresholds(kind: type, at: Callable[[Features], Features], spacing: str) -> None:
    """A float32 feature next to a float64 threshold falls on the same side as in scikit-learn."""
    train = normal(300)
    if spacing == "adjacent":  # at 2**23 the floats are the whole numbers, and thresholds lie halfway between them
        train = np.float32(2**23) + np.round(3 * np.abs(train))
    model = fitted(kind, n_estimators=20, train=train)
    column, threshold = (
        np.concatenate([getattr(tree.tree_, name)[tree.tree_.feature >= 0] for tree in model.estimators_])
        for name in ("feature", "threshold")
    )
    nearest = threshold.astype(np.float32)
    assert (nearest > threshold).any(), "no threshold rounds up, so nothing is tested"
    features = np.stack([np.resize(at(nearest[column == index]), 500) for index in range(N_FEATURES)], axis=1)
    assert_same(model, features)


@settings(deadline=None)
@given(
    threshold=st.floats(-MAX, MAX),
    x=st.one_of(st.none(), st.floats(-MAX, MAX, width=32)),
    steps=st.integers(-2, 2),
)
@example(threshold=-1e-60, x=-0.0, steps=0)
@example(threshold=1e-60, x=None, steps=1)
@example(threshold=-0.0, x=0.0, steps=0)
@example(threshold=0.0, x=-0.0, steps=0)
@example(threshold=MAX, x=MAX, steps=0)
@example(threshold=-MAX, x=-MAX, steps=0)
def test_any_threshold_and_any_feature(threshold: float, x: float | None, steps: int) -> None:
    """Zeros of both signs, subnormals and the largest floats fall on the same side as in scikit-learn."""
    model = RandomForestRegressor(1, bootstrap=False, random_state=0).fit([[0.0], [1.0]], [0.0, 1.0])
    model.estimators_[0].tree_.threshold[0] = threshold
    feature = np.float32(threshold if x is None else x)
    for _ in range(abs(steps)):
        feature = np.nextafter(feature, np.float32(np.copysign(MAX, steps)))
    assert_same(model, np.array([[feature]]))


@pytest.fixture(scope="module", params=KINDS)
def seasoned(request: pytest.FixtureRequest) -> Any:
    """One forest of each kind that has seen missing values and has splits on them alone."""
    train = normal(300)
    train[np.random.default_rng(1).random(train.shape) < 0.2] = np.nan
    train[::2, 0] = np.nan
    return fitted(request.param, train=train)


@settings(deadline=None, max_examples=30)
@given(
    features=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 20), st.just(N_FEATURES)),
        elements=st.one_of(st.floats(-3, 3, width=32), st.floats(allow_infinity=False, width=32)),
    )
)
def test_any_matrix(seasoned: Any, features: Features) -> None:
    """Any matrix that scikit-learn accepts gives its numbers: missing values, subnormals and huge values too."""
    assert_same(seasoned, features)


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_missing_values(kind: type, seen: bool) -> None:  # noqa: FBT001 - pytest passes parameters by name
    """NaN takes scikit-learn's branch, whether or not the forest saw any in training."""
    train, features = normal(300), normal(200, seed=1)
    features[np.random.default_rng(2).random(features.shape) < 0.5] = np.nan
    features[0] = np.nan
    if seen:
        train[np.random.default_rng(1).random(train.shape) < 0.3] = np.nan
    model = fitted(kind, train=train)
    sends_left = np.concatenate([tree.tree_.missing_go_to_left[tree.tree_.feature >= 0] for tree in model.estimators_])
    assert {0, 1} == set(sends_left), "all splits send NaN the same way, so nothing is tested"
    assert_same(model, features)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_batch(kind: type) -> None:
    """The same row gives the same bytes alone, in a batch, and after other batches."""
    forest = Forest.from_sklearn(fitted(kind))
    features = normal(100, seed=1)

    def ask(rows: Features) -> NDArray[np.float64]:
        return forest.predict_proba(rows) if forest.classes is not None else np.stack(forest.predict(rows), axis=1)

    whole = ask(features)
    assert_identical(whole, np.concatenate([ask(features[row : row + 1]) for row in range(100)]))
    assert_identical(whole, np.concatenate([ask(features[:37]), ask(features[37:])]))
    assert_identical(whole[::-1].copy(), ask(features[::-1]))


def test_any_layout_in_memory() -> None:
    """Features may be in column order, a slice of something larger, or read-only, and are left as they were."""
    model = fitted(RandomForestClassifier)
    features = normal(50, seed=1)
    expected = model.predict_proba(features)
    wide = np.repeat(features, 2, axis=1)
    locked = features.copy()
    locked.setflags(write=False)
    forest = Forest.from_sklearn(model)
    for view in (np.asfortranarray(features), wide[:, ::2], locked):
        assert_identical(expected, forest.predict_proba(view))
    assert_identical(normal(50, seed=1), features)


def test_no_rows() -> None:
    """A batch in which nothing was usable gives empty arrays of the right width."""
    nothing = np.empty((0, N_FEATURES), np.float32)
    assert Forest.from_sklearn(fitted(RandomForestClassifier)).predict_proba(nothing).shape == (0, 4)
    values, spreads = Forest.from_sklearn(fitted(RandomForestRegressor)).predict(nothing)
    assert (values.shape, spreads.shape) == ((0,), (0,))


@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["siren", "dog", "rain", "dog"], ("dog", "rain", "siren")),
        ([10, 2, -1, 2], ("-1", "2", "10")),
        ([True, False, True, False], ("False", "True")),
        (["hum", "hum", "hum", "hum"], ("hum",)),
    ],
)
def test_classes_are_the_labels_as_strings(kind: type, labels: list[Any], classes: tuple[str, ...]) -> None:
    """Labels of any type become strings in the order of the columns; a single class is always certain."""
    train = normal(4)
    model = kind(9, random_state=0).fit(train, labels)
    forest = Forest.from_sklearn(model)
    assert classes == forest.classes
    assert_identical(model.predict_proba(train), forest.predict_proba(train))


@pytest.mark.parametrize("kind", KINDS)
def test_the_forest_knows_its_size(kind: type) -> None:
    """The numbers of trees and features are those of the model, and only a classifier has classes."""
    forest = Forest.from_sklearn(fitted(kind, 7))
    assert (forest.n_trees, forest.n_features) == (7, N_FEATURES)
    assert (kind in CLASSIFIERS) == (forest.classes is not None)


def test_the_spread_is_that_of_the_trees() -> None:
    """Two trees that say 1 and 4 have a mean of 2.5 and a population standard deviation of 1.5."""
    model = RandomForestRegressor(2, bootstrap=False, min_samples_split=10).fit(normal(2), [0.0, 0.0])
    for tree, value in zip(model.estimators_, (1.0, 4.0), strict=True):
        tree.tree_.value[:] = value
    values, spreads = Forest.from_sklearn(model).predict(normal(1))
    assert (values.tolist(), spreads.tolist()) == ([2.5], [1.5])


def test_the_wrong_question_is_refused() -> None:
    """A regressor has no probabilities and a classifier no values; the error names the right method."""
    with pytest.raises(TypeError, match=r"regressor and has no probabilities; call predict$"):
        Forest.from_sklearn(fitted(RandomForestRegressor)).predict_proba(normal(1))
    with pytest.raises(TypeError, match=r"classifier and has no values; call predict_proba$"):
        Forest.from_sklearn(fitted(RandomForestClassifier)).predict(normal(1))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (normal(3, columns=5), r"expected float32 features of shape \(n, 6\), got float32 of \(3, 5\)"),
        (normal(3).astype(np.float64), r"expected float32 features of shape \(n, 6\), got float64 of \(3, 6\)"),
        (normal(3)[0], r"expected float32 features of shape \(n, 6\), got float32 of \(6,\)"),
        (normal(3)[0, 0], r"expected float32 features of shape \(n, 6\), got float32 of \(\)"),
        (np.full((3, 6), 1e39), "got float64"),
        (
            np.where(np.eye(3, 6, 2) == 1, np.float32(-np.inf), normal(3)),
            "feature 2 of row 0 is -inf, expected a finite",
        ),
    ],
)
@pytest.mark.parametrize("kind", [RandomForestClassifier, RandomForestRegressor])
def test_wrong_features_are_refused(kind: type, features: NDArray[Any], message: str) -> None:
    """Another shape or dtype, or an infinity, is an error that says what came and what was expected."""
    forest = Forest.from_sklearn(fitted(kind))
    ask: Callable[[Any], Any] = forest.predict if forest.classes is None else forest.predict_proba
    with pytest.raises(ValueError, match=message):
        ask(features)


class OwnForest(RandomForestClassifier):  # type: ignore[misc] # scikit-learn ships no types
    """A subclass, which may predict in its own way."""


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (GradientBoostingClassifier(), "GradientBoostingClassifier; expected one of RandomForestClassifier, Extra"),
        (OwnForest(3).fit([[0.0], [1.0]], [0, 1]), "OwnForest; expected one of"),
        (None, "NoneType; expected one of"),
        (RandomForestClassifier(3), "RandomForestClassifier is not fitted"),
        (RandomForestClassifier(3).fit([[0.0], [1.0]], [[0, 1], [1, 0]]), "has 2 outputs, expected one"),
        (ExtraTreesRegressor(3).fit([[0.0], [1.0]], [[0, 1], [1, 0]]), "has 2 outputs, expected one"),
    ],
)
def test_other_models_are_refused(model: object, message: str) -> None:
    """Only the four forests, fitted and with one output, can be flattened; the error says what came."""
    with pytest.raises(BadModel, match=message):
        Forest.from_sklearn(model)
