"""The reference profile: which numbers are watched, under which names and in which units."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from worker.profile import ReferenceProfile, Signal, raw_signals, signal_names

FEATURES = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)


class TestNames:
    def test_classifier(self) -> None:
        """A classifier is watched by its confidence, the share of each class, and features."""
        expected = ("confidence", "share.dog", "share.rain", "feature.rms", "feature.mfcc0")

        assert expected == signal_names(["dog", "rain"], ["rms", "mfcc0"])

    def test_regressor(self) -> None:
        """A regressor, which has no classes, is watched by its value, the spread over the trees, and features."""
        assert ("value", "spread", "feature.rms") == signal_names([], ["rms"])


class TestRawSignals:
    def test_classifier(self) -> None:
        """The confidence is the best probability, and the share is one for its class and zero for the others."""
        probabilities = np.array([[0.2, 0.5, 0.3], [0.6, 0.4, 0.0]])

        signals = raw_signals(probabilities, FEATURES, [2, 0], classifier=True)

        assert [[0.5, 0, 1, 0, 3.0, 1.0], [0.6, 1, 0, 0, 6.0, 4.0]] == signals.tolist()
        assert np.float64 == signals.dtype

    def test_tie(self) -> None:
        """Of equal probabilities the first is chosen, as everywhere else, and only that one."""
        signals = raw_signals(np.array([[0.25, 0.375, 0.375]]), FEATURES[:1], [], classifier=True)

        assert [[0.375, 0, 1, 0]] == signals.tolist()

    def test_regressor(self) -> None:
        """Value and spread pass as they are; two of them are not mistaken for the probabilities of two classes."""
        signals = raw_signals(np.array([[20.0, 0.5], [-3.0, 7.0]]), FEATURES, [1], classifier=False)

        assert [[20.0, 0.5, 2.0], [-3.0, 7.0, 5.0]] == signals.tolist()
        assert np.float64 == signals.dtype

    def test_no_record(self) -> None:
        """No record gives no row, of the right width."""
        signals = raw_signals(np.empty((0, 2)), FEATURES[:0], [0, 1, 2], classifier=False)

        assert (0, 5) == signals.shape

    @pytest.mark.parametrize("classes", [["a"], ["a", "b", "c"], []])
    @pytest.mark.parametrize("watched", [[], [1], [2, 0]])
    def test_as_many_as_names(self, classes: list[str], watched: list[int]) -> None:
        """There is one column for each name."""
        scores = np.full((2, len(classes) or 2), 0.5)

        signals = raw_signals(scores, FEATURES, watched, classifier=bool(classes))

        assert (2, len(signal_names(classes, ["x"] * len(watched)))) == signals.shape


class TestProfile:
    def test_scores_of_other_records(self) -> None:
        """They are refused: compiled code would read what stands behind the features."""
        with pytest.raises(ValueError, match="2 scores and 1 rows of features"):
            raw_signals(np.array([[0.5, 0.5], [0.5, 0.5]]), FEATURES[:1], [0], classifier=True)

    def test_standardise(self) -> None:
        """Each column is counted in its own spreads from its own mean."""
        profile = ReferenceProfile((Signal("value", 10.0, 2.0), Signal("spread", -1.0, 0.5)))

        standardised = profile.standardise(np.array([[10.0, -1.0], [14.0, -2.0], [np.nan, np.inf]]))

        assert ("value", "spread") == profile.names
        np.testing.assert_array_equal([[0.0, 0.0], [2.0, -2.0], [np.nan, np.inf]], standardised)

    def test_training_data_is_standard(self) -> None:
        """A profile of some data turns that data into mean 0 and standard deviation 1."""
        data = np.random.default_rng(0).gamma(2.0, 3.0, size=(1000, 4))
        signals = zip(data.mean(axis=0).tolist(), data.std(axis=0).tolist(), strict=True)
        profile = ReferenceProfile(tuple(Signal(f"feature.f{i}", *each) for i, each in enumerate(signals)))

        standardised = profile.standardise(data)

        np.testing.assert_allclose(standardised.mean(axis=0), 0.0, atol=1e-12)
        np.testing.assert_allclose(standardised.std(axis=0), 1.0)

    def test_travels(self) -> None:
        """A profile written as JSON, as in a bundle, is read back to the last bit."""
        profile = ReferenceProfile((Signal("confidence", 1 / 3, 1e-17), Signal("share.dög", -0.1, 2.5)))

        assert profile == msgspec.json.decode(msgspec.json.encode(profile), type=ReferenceProfile)


class TestSignal:
    @pytest.mark.parametrize(
        ("mean", "spread"),
        [(0.0, 0.0), (0.0, -1.0), (0.0, np.nan), (0.0, np.inf), (np.nan, 1.0), (np.inf, 1.0), (-np.inf, 1.0)],
    )
    def test_refused(self, mean: float, spread: float) -> None:
        """A mean or spread that would make a signal infinite or meaningless is refused, naming the signal."""
        with pytest.raises(ValueError, match=r"'feature\.rms'.*spread > 0"):
            Signal("feature.rms", mean, spread)

    def test_refused_when_read(self) -> None:
        """A bundle cannot bring one in either."""
        with pytest.raises(msgspec.ValidationError, match=r"'feature\.rms'"):
            msgspec.json.decode(b'{"name": "feature.rms", "mean": 0.0, "spread": 0.0}', type=Signal)
