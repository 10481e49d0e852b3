"""The featurizer as a scikit-learn transformer, for a Pipeline and a GridSearchCV.

This module owns what a row is, and nothing else: the numbers are those of the one featurizer, so
what is tried out in a notebook is what the worker serves. It must not know about files or models.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from worker.features import Featurizer, feature_spec
from worker.fourier import Precision
from worker.golden import window_mean


class AudioFeatures(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn is not typed
    """Turns rows of sound into rows of features: the mean over the windows of each row.

    A row is a stretch of mono sound at ``sample_rate``, shape (samples,), float32 with full scale at 1.0, or
    int16, and is cut into windows as the worker cuts a record. Nothing is learnt: ``fit`` makes the tables.

    Args:
        features: the names of feature sets, joined by "+" (`worker.features.feature_spec`).
        sample_rate: in Hz.
        window_seconds: the length of a window; None makes each row a window.
        window_hop_seconds: between the starts of two windows; None for half a window.
        level_dbfs: the RMS level that windows are brought to; None leaves them as they are.
        precision: of Fourier transforms: librosa's "float64", or the faster "float32" (`worker.features.FeatureSpec`).

    Attributes:
        featurizer_: what computes the features.
        n_features_in_: the samples of a row.
    """

    def __init__(
        self,
        features: str = "compact",
        *,
        sample_rate: int = 16000,
        window_seconds: float | None = 1.0,
        window_hop_seconds: float | None = None,
        level_dbfs: float | None = None,
        precision: Precision = "float64",
    ) -> None:
        self.features = features
        self.sample_rate = sample_rate
        self.window_seconds = window_seconds
        self.window_hop_seconds = window_hop_seconds
        self.level_dbfs = level_dbfs
        self.precision = precision

    def fit(self, X: Any, y: object = None) -> AudioFeatures:  # noqa: ARG002, N803  # scikit-learn's names
        """Make the tables for rows as long as those of ``X``, shape (n, samples).

        Raises:
            ValueError: ``X`` is no such array, or the features cannot be computed of it.
        """
        X = self._rows(X, reset=True)  # noqa: N806
        seconds = X.shape[1] / self.sample_rate if self.window_seconds is None else self.window_seconds
        hop = seconds / 2 if self.window_hop_seconds is None else self.window_hop_seconds
        self.featurizer_ = Featurizer(
            feature_spec(
                self.features,
                sample_rate=self.sample_rate,
                window_seconds=seconds,
                window_hop_seconds=hop,
                level_dbfs=self.level_dbfs,
                precision=self.precision,
            )
        )
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:  # noqa: N803  # scikit-learn's name
        """Return the features of each row of ``X``, shape (n, features), for (n, samples).

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: ``X`` is no such array.
        """
        check_is_fitted(self)
        featurizer = self.featurizer_
        return np.array(
            [window_mean(featurizer.transform(featurizer.windows(row))) for row in self._rows(X, reset=False)],
            np.float32,
        )

    def get_feature_names_out(self, input_features: object = None) -> NDArray[np.object_]:  # noqa: ARG002  # as above
        """Return the names of the columns of `transform`."""
        check_is_fitted(self)
        return np.array(self.featurizer_.feature_names, dtype=object)

    def _rows(self, X: Any, *, reset: bool) -> Any:  # noqa: N803
        return validate_data(self, X, dtype=[np.float32, np.int16], reset=reset)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []  # features are float32, whatever the sound is
        return tags
