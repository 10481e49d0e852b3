"""The reference profile: what is watched, and what it is on clips that were not heard."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.reference import ALWAYS_WATCHED, FINEST_CONFIDENCE, WATCHED_FEATURES, reference_profile, watched_features


class TestWatchedFeatures:
    NAMES = tuple(f"f{number}" for number in range(12))

    def test_the_most_important_come_first(self) -> None:
        """They are ranked, there are no more than a state can hold, and equals stay in the featurizer's order."""
        importances = np.array([0.0, 0.3, 0.1, 0.0, 0.2, 0.1, 0.0, 0.05, 0.06, 0.07, 0.08, 0.04])
        expected = ("f1", "f4", "f2", "f5", "f10", "f9", "f8", "f7")
        assert WATCHED_FEATURES == len(expected)
        assert expected == watched_features(importances, self.NAMES)

    def test_the_level_is_watched_whatever_its_importance(self) -> None:
        """It comes last if it is not among the most important, where it stands if it is, and never twice."""
        names = (*self.NAMES, ALWAYS_WATCHED[0])
        unimportant = np.append(np.ones(12), 0.0)
        assert (*self.NAMES[:WATCHED_FEATURES], ALWAYS_WATCHED[0]) == watched_features(unimportant, names)
        important = np.append(np.ones(12), 2.0)
        assert (ALWAYS_WATCHED[0], *self.NAMES[: WATCHED_FEATURES - 1]) == watched_features(important, names)

    def test_fewer_features_than_places(self) -> None:
        """All of them are watched."""
        assert ("b", "a") == watched_features(np.array([0.1, 0.9]), ("a", "b"))


class TestReferenceProfile:
    def test_a_classifier_by_hand(self) -> None:
        """The confidence, the share of each class and the watched features, in the profile's order."""
        scores = np.array([[0.6, 0.4], [0.1, 0.9], [0.2, 0.8], [0.7, 0.3]])
        features = np.array([[0, 1], [0, 2], [0, 3], [0, 6]], np.float32)
        profile = reference_profile(scores, features, classes=("a", "b"), watched=("y",), names=("x", "y"))
        assert ("confidence", "share.a", "share.b", "feature.y") == profile.names
        assert [0.75, 0.5, 0.5, 3.0] == pytest.approx([signal.mean for signal in profile.signals])
        spreads = [np.sqrt(0.0125), 0.5, 0.5, np.sqrt(14 / 4)]  # of the population, as for every signal in a stream
        assert spreads == pytest.approx([signal.spread for signal in profile.signals])

    def test_a_regressor_by_hand(self) -> None:
        """The value, its spread over the trees and the watched features."""
        scores = np.array([[10.0, 1.0], [14.0, 3.0]])
        features = np.array([[5.0], [9.0]], np.float32)
        profile = reference_profile(scores, features, classes=(), watched=("x",), names=("x",))
        assert ("value", "spread", "feature.x") == profile.names
        assert [12.0, 2.0, 7.0] == [signal.mean for signal in profile.signals]
        assert [2.0, 1.0, 2.0] == [signal.spread for signal in profile.signals]

    def test_a_constant_signal_keeps_its_own_unit(self) -> None:
        """A class that is never named, and a feature that never moves, get a spread of one and stay finite."""
        scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.9, 0.1]])
        features = np.full((3, 1), 0.1, np.float32)
        profile = reference_profile(scores, features, classes=("a", "b"), watched=("x",), names=("x",))
        spreads = {signal.name: signal.spread for signal in profile.signals}
        assert {"share.a": 1.0, "share.b": 1.0, "feature.x": 1.0} == {
            name: spreads[name] for name in ("share.a", "share.b", "feature.x")
        }
        assert 0 < spreads["confidence"] < 1
        standard = profile.standardise(np.array([[0.9, 0.0, 1.0, 0.1]]))
        assert [-1.0, 1.0] == standard[0, 1:3].tolist()

    def test_a_model_that_is_always_sure_is_not_alarmed_by_an_ordinary_confidence(self) -> None:
        """Confidences that differ by millionths have the spread of what a forest can tell apart."""
        scores = np.array([[1.0, 0.0], [1e-6, 1 - 1e-6]])
        profile = reference_profile(scores, np.zeros((2, 1), np.float32), classes=("a", "b"), watched=(), names=("x",))
        assert FINEST_CONFIDENCE == profile.signals[0].spread

    def test_the_gain_of_a_model_that_levels_is_watched(self) -> None:
        """It is the last signal, in dB."""
        scores = np.array([[0.6, 0.4], [0.1, 0.9]])
        features, gains = np.zeros((2, 1), np.float32), np.array([3.0, 9.0], np.float32)
        profile = reference_profile(scores, features, gains, classes=("a", "b"), watched=("x",), names=("x",))
        assert ("level.gain", 6.0, 3.0) == (profile.names[-1], profile.signals[-1].mean, profile.signals[-1].spread)
