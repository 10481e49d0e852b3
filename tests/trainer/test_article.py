"""A notebook's own code beside ours, on real recordings: the same features, and the same forest is found to be best.

The notebook is how it is usually written: librosa with its defaults, in a loop over chunks; the mean over time of the
mel spectrogram in dB and of 20 MFCCs; a random forest, and scikit-learn's GridSearchCV.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import librosa
import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import Pipeline

from trainer.dataset import load
from trainer.grid import ARTICLE_GRID
from trainer.transformer import AudioFeatures

RATE = 16_000


class Chunks(NamedTuple):
    """One second of each clip, shape (clips, samples), and its class and recording."""

    sounds: NDArray[np.float32]
    labels: NDArray[np.str_]
    groups: NDArray[np.str_]


@pytest.fixture(scope="module")
def chunks(esc10: Path) -> Chunks:
    """Eight clips of each class."""
    clips = sorted(load(esc10).clips, key=lambda clip: clip.label)[::5]
    sounds = [librosa.load(clip.path, sr=RATE, duration=1.0)[0] for clip in clips]
    assert {RATE} == {len(sound) for sound in sounds}
    return Chunks(np.array(sounds), np.array([clip.label for clip in clips]), np.array([clip.group for clip in clips]))


def extract_features(y: NDArray[np.float32], sr: int) -> NDArray[np.float32]:
    """Do what the notebook does with a chunk."""
    mel = librosa.feature.melspectrogram(y=y, sr=sr)
    mel_db = librosa.power_to_db(mel)
    mfcc = librosa.feature.mfcc(S=mel_db, n_mfcc=20)
    return np.hstack([np.mean(mel_db, axis=1), np.mean(mfcc, axis=1)])


def test_the_features_are_those_of_the_notebook(chunks: Chunks) -> None:
    """Each to 2e-4, in dB or in units of the cepstrum; between clips they differ by tens."""
    expected = np.array([extract_features(sound, RATE) for sound in chunks.sounds])
    found = AudioFeatures("article").fit_transform(chunks.sounds)
    np.testing.assert_allclose(expected, found, rtol=0, atol=2e-4)
    assert expected.std(axis=0).min() > 1.0


@pytest.mark.parametrize(
    "trees", [[10, 20, 40], pytest.param(ARTICLE_GRID["n_estimators"], marks=pytest.mark.long)], ids=["quick", "full"]
)
def test_the_search_finds_the_same(chunks: Chunks, tmp_path: Path, trees: list[int]) -> None:
    """Of the notebook's grid the same parameters are best, and every candidate has the same score but for a clip."""
    grid = {**ARTICLE_GRID, "n_estimators": trees}
    features = np.array([extract_features(sound, RATE) for sound in chunks.sounds])
    forest, folds = RandomForestClassifier(random_state=42), GroupKFold(3)
    theirs = GridSearchCV(forest, grid, cv=folds, n_jobs=2)
    theirs.fit(features, chunks.labels, groups=chunks.groups)
    pipeline = Pipeline([("audio", AudioFeatures("article")), ("forest", forest)], memory=str(tmp_path))
    ours = GridSearchCV(pipeline, {f"forest__{name}": values for name, values in grid.items()}, cv=folds, n_jobs=2)
    ours.fit(chunks.sounds, chunks.labels, groups=chunks.groups)
    print(f"best: {theirs.best_params_}, {theirs.best_score_:.3f} and {ours.best_score_:.3f}")
    assert theirs.best_params_ == {name.removeprefix("forest__"): value for name, value in ours.best_params_.items()}
    off = np.abs(theirs.cv_results_["mean_test_score"] - ours.cv_results_["mean_test_score"])
    assert off.max() <= 2 / len(chunks.labels)
