"""The transformer: a good citizen of scikit-learn, whose numbers are those of the one featurizer."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import joblib
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.utils.estimator_checks import estimator_checks_generator

from trainer.transformer import AudioFeatures
from worker.features import Featurizer, feature_spec

RATE = 16_000


def checks() -> Iterator[Any]:
    """Every check that scikit-learn has for a transformer, but for that of foreign arrays, which skips itself."""
    for estimator, check in estimator_checks_generator(AudioFeatures("article", window_seconds=0.2)):
        name = str(getattr(check, "func", check).__name__)
        if "array_api" not in name:
            yield pytest.param(estimator, check, id=name)


@pytest.mark.parametrize(("estimator", "check"), list(checks()))
def test_the_checks_of_scikit_learn(estimator: Any, check: Any) -> None:
    """It is a transformer like any other."""
    check(estimator)


@pytest.fixture(scope="module")
def tones() -> tuple[np.ndarray, np.ndarray]:
    """Twelve rows of 0.3 s, low and high in turn."""
    time, random = np.arange(4800) / RATE, np.random.default_rng(0)
    classes = np.arange(12) % 2
    rows = [0.3 * np.sin(2 * np.pi * (400 + 2000 * each) * time) + random.normal(0, 0.02, 4800) for each in classes]
    return np.array(rows, np.float32), classes


class TestRows:
    def test_a_row_is_cut_as_the_worker_cuts_a_record(self, tones: tuple[np.ndarray, np.ndarray]) -> None:
        """Its features are the mean over its windows, to the bit, under the featurizer's names."""
        rows, _ = tones
        transformer = AudioFeatures("compact", window_seconds=0.2, window_hop_seconds=0.1)
        found = transformer.fit_transform(rows)
        featurizer = Featurizer(feature_spec("compact", window_seconds=0.2, window_hop_seconds=0.1))
        expected = featurizer.transform(featurizer.windows(rows[3])).mean(axis=0, dtype=np.float64).astype(np.float32)
        np.testing.assert_array_equal(expected, found[3])
        assert list(featurizer.feature_names) == transformer.get_feature_names_out().tolist()
        assert (len(rows), len(featurizer.feature_names)) == found.shape

    def test_a_row_can_be_a_window(self, tones: tuple[np.ndarray, np.ndarray]) -> None:
        """Then nothing is averaged, as in a notebook that has cut its chunks before."""
        rows, _ = tones
        found = AudioFeatures("article", window_seconds=None).fit_transform(rows)
        featurizer = Featurizer(feature_spec("article", window_seconds=0.3, window_hop_seconds=0.3))
        np.testing.assert_array_equal(featurizer.transform(rows), found)

    def test_transforms_in_float32(self, tones: tuple[np.ndarray, np.ndarray]) -> None:
        """They are what the trainer's are; another precision is refused."""
        rows, _ = tones
        found = AudioFeatures("article", window_seconds=None, precision="float32").fit_transform(rows)
        spec = feature_spec("article", window_seconds=0.3, window_hop_seconds=0.3, precision="float32")
        np.testing.assert_array_equal(Featurizer(spec).transform(rows), found)
        with pytest.raises(ValueError, match="precision is 'float16'; expected float64 or float32"):
            AudioFeatures("article", precision="float16").fit(rows)  # type: ignore[arg-type]  # as one may

    def test_a_row_shorter_than_a_window_is_filled_up(self, tones: tuple[np.ndarray, np.ndarray]) -> None:
        """With zeros at its end, as a record is."""
        rows, _ = tones
        filled = np.pad(rows, ((0, 0), (0, RATE - 4800)))
        np.testing.assert_array_equal(AudioFeatures().fit_transform(filled), AudioFeatures().fit_transform(rows))

    def test_integers_are_scaled(self, tones: tuple[np.ndarray, np.ndarray]) -> None:
        """int16 is not taken for a float of 32,768 times the level, and float64 loses nothing that matters."""
        rows, _ = tones
        integers = np.round(rows * 2**15).astype(np.int16)
        expected = AudioFeatures().fit_transform(integers.astype(np.float32) / 2**15)
        np.testing.assert_array_equal(expected, AudioFeatures().fit_transform(integers))
        np.testing.assert_array_equal(expected, AudioFeatures().fit_transform(integers / 2**15))

    def test_what_cannot_be_computed(self, tones: tuple[np.ndarray, np.ndarray]) -> None:
        """The settings are looked at by `fit`, which says what was expected."""
        with pytest.raises(ValueError, match="there is no feature set 'loud'; expected article, compact"):
            AudioFeatures("loud").fit(tones[0])
        with pytest.raises(NotFittedError):
            AudioFeatures().transform(tones[0])


class TestPipeline:
    def test_it_stands_in_a_grid_search(self, tones: tuple[np.ndarray, np.ndarray]) -> None:
        """Features and forest are searched together, as in a notebook, and in other processes too."""
        steps = [("features", AudioFeatures()), ("forest", RandomForestClassifier(10, random_state=0))]
        grid = {"features__features": ["article", "compact"], "forest__max_depth": [1, None]}
        search = GridSearchCV(Pipeline(steps), grid, cv=3, n_jobs=2).fit(*tones)
        assert 1.0 == search.best_score_
        assert set(grid) == set(search.best_params_)
        assert tones[1].tolist() == search.predict(tones[0]).tolist()

    @pytest.mark.parametrize("copy", [clone, lambda each: pickle.loads(pickle.dumps(each))], ids=["clone", "pickle"])
    def test_a_copy_is_the_same(self, copy: Any, tones: tuple[np.ndarray, np.ndarray]) -> None:
        """With its settings, and the same features."""
        original = AudioFeatures("article", window_seconds=0.2, level_dbfs=-23.0).fit(tones[0])
        other = copy(original).fit(tones[0])
        assert original.get_params() == other.get_params()
        np.testing.assert_array_equal(original.transform(tones[0]), other.transform(tones[0]))

    def test_a_fitted_one_is_kept_by_joblib(self, tones: tuple[np.ndarray, np.ndarray], tmp_path: Any) -> None:
        """Loaded, it needs no fit."""
        fitted = AudioFeatures("article").fit(tones[0])
        joblib.dump(fitted, tmp_path / "features.joblib")
        loaded = joblib.load(tmp_path / "features.joblib")
        np.testing.assert_array_equal(fitted.transform(tones[0]), loaded.transform(tones[0]))
