"""Statistics of frames against numpy and scipy, on frames of real and of nasty sound."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import librosa
import numpy as np
import numpy.typing as npt
import pytest
import scipy.stats

from worker.features import ARTICLE, FeatureSpec, Featurizer, feature_spec
from worker.frames import Family, Frames, Tables
from worker.statistics import STATISTICS, FrameStatistics
from worker.windows import Window

Array = npt.NDArray[Any]

RATE = 16000
EVERYTHING = FrameStatistics(name="all", families=get_args(Family), statistics=STATISTICS)

DEFINITIONS: dict[str, Callable[[Array], Any]] = {
    "mean": np.mean,
    "std": np.std,
    "skew": lambda row: scipy.stats.skew(row) if np.std(row) > 1e-6 * abs(np.mean(row)) else 0.0,
    "change": lambda row: np.mean(np.abs(np.diff(row))),
    "change_std": lambda row: np.std(np.diff(row)),
    "change_max": lambda row: np.max(np.abs(np.diff(row))),
    "min": np.min,
    "p10": lambda row: np.percentile(row, 10),
    "p25": lambda row: np.percentile(row, 25),
    "median": np.median,
    "p75": lambda row: np.percentile(row, 75),
    "p90": lambda row: np.percentile(row, 90),
    "max": np.max,
}


def noise(samples: int, level: float = 0.1, seed: int = 0) -> Array:
    return (level * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def a_click_in_silence() -> Array:
    samples = np.zeros(RATE, dtype=np.float32)
    samples[9000] = 1.0
    return samples


SOUNDS = {
    "noise": noise(RATE),
    "silence": np.zeros(RATE, dtype=np.float32),
    "direct current": np.ones(RATE, dtype=np.float32),
    "a click in silence": a_click_in_silence(),
    "full scale": np.sign(noise(RATE)),
    "denormals": np.full(RATE, 1e-40, dtype=np.float32),
    "noise after silence": np.concatenate([np.zeros(9000, dtype=np.float32), noise(7000)]),
}


def expected_features(rows: dict[str, Array], featurizer: Featurizer) -> Array:
    return np.array(
        [
            DEFINITIONS[column.statistic](rows[column.family][int(column.band or 0)].astype(np.float64))
            for column in featurizer.columns
        ]
    )


@pytest.mark.parametrize("sound", SOUNDS)
@pytest.mark.parametrize("trim_db", [None, 60.0])
def test_statistics_are_numpys(sound: str, trim_db: float | None) -> None:
    """A column is the named statistic of the named row of frames, of those that are loud enough."""
    spec = FrameStatistics(name="all", families=get_args(Family), statistics=STATISTICS, trim_db=trim_db)
    featurizer = Featurizer(FeatureSpec(sets=(spec,)))
    frames = Frames(Window(SOUNDS[sound]), spec, Tables.of(spec, RATE, spec.families))
    rms = frames["rms"][0]
    heard = np.ones(rms.size, dtype=bool) if trim_db is None else rms >= rms.max() * 10 ** (-trim_db / 20)
    rows: dict[str, Array] = {family: frames[family][:, heard] for family in spec.families}
    if heard.sum() == 1:  # nothing changes, and numpy has no mean of nothing
        rows = {name: np.repeat(row, 2, axis=1) for name, row in rows.items()}

    features = featurizer.transform(SOUNDS[sound][np.newaxis])[0]

    scale = np.array([np.abs(rows[column.family][int(column.band or 0)]).max() for column in featurizer.columns])
    tolerance = 1e-6 * scale + 1e-6 * (np.array([column.statistic for column in featurizer.columns]) == "skew") + 1e-12
    expected = expected_features(rows, featurizer)
    off = np.abs(expected - features) - tolerance - 1e-6 * np.abs(expected)
    assert off.max() <= 0, featurizer.feature_names[int(off.argmax())]


def test_only_loud_frames_count() -> None:
    """With trim_db, silence around a sound changes nothing but the frames that hear both."""
    sounding = noise(RATE)
    sounding[: RATE // 2] *= np.float32(1e-4)  # 80 dB
    spec = FrameStatistics(name="rms", families=("rms",), statistics=("mean", "min"), trim_db=60.0)
    trimmed = Featurizer(FeatureSpec(sets=(spec,))).transform(sounding[np.newaxis])[0]
    assert pytest.approx(0.1, rel=0.1) == trimmed[0]
    assert trimmed[1] > 0.01


def test_sound_that_is_not_finite_has_statistics_that_are_not() -> None:
    """No frame is as loud as any other then; all of them are taken, and no memory that is somebody else's."""
    spec = FrameStatistics(name="rms", families=("rms",), statistics=("mean", "max"), trim_db=60.0)
    broken = noise(RATE)
    broken[100] = np.nan
    assert np.isnan(Featurizer(FeatureSpec(sets=(spec,))).transform(broken[np.newaxis])).all()


def test_one_frame_has_no_spread_and_no_change() -> None:
    """A window of a single frame has finite statistics."""
    spec = FrameStatistics(
        name="one", n_fft=512, win_length=512, hop_length=512, center=False, families=("rms",), statistics=STATISTICS
    )
    featurizer = Featurizer(FeatureSpec(window_seconds=0.032, window_hop_seconds=0.032, sets=(spec,)))
    features = dict(zip(STATISTICS, featurizer.transform(noise(512)[np.newaxis])[0], strict=True))
    assert {"std": 0.0, "skew": 0.0, "change": 0.0, "change_std": 0.0, "change_max": 0.0} == {
        name: features[name] for name in ("std", "skew", "change", "change_std", "change_max")
    }
    assert 1 == len({features[name] for name in ("mean", "min", "p10", "p25", "median", "p75", "p90", "max")})


def test_the_article_is_librosas_defaults(esc10: Path) -> None:
    """The set "article" is what a notebook computes with librosa and no setting of its own."""
    featurizer = Featurizer(feature_spec("article"))
    assert 148 == len(featurizer.feature_names)
    assert ARTICLE == featurizer.spec.sets[0]
    for clip in sorted((esc10 / "audio").iterdir())[::40]:
        samples, _ = librosa.load(clip, sr=RATE)
        for window in featurizer.windows(samples)[::3]:
            mel = librosa.power_to_db(librosa.feature.melspectrogram(y=window, sr=RATE))
            mfcc = librosa.feature.mfcc(S=mel, n_mfcc=20)
            expected = np.concatenate([mel.mean(axis=1), mfcc.mean(axis=1)])
            np.testing.assert_allclose(featurizer.transform(window[np.newaxis])[0], expected, rtol=0, atol=2e-4)
