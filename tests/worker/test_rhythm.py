"""Modulation, onsets and envelope against plain definitions, and on sounds whose rhythm is known."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import numpy.typing as npt
import pytest
import scipy.signal

from worker.features import FeatureSpec, Featurizer
from worker.frames import Frames, Tables
from worker.rhythm import MODULATION_EDGES, RhythmSet
from worker.windows import Window

Array = npt.NDArray[Any]

RATE = 16000
SET = RhythmSet(name="rhythm", hop_length=256)
FRAME_RATE = RATE / 256
FEATURIZER = Featurizer(FeatureSpec(window_seconds=2.0, sets=(SET,)))
SAMPLES = FEATURIZER.spec.window_samples


def noise(seed: int = 0) -> Array:
    return (0.1 * np.random.default_rng(seed).standard_normal(SAMPLES)).astype(np.float32)


def features(sound: Array) -> dict[str, float]:
    row = FEATURIZER.transform(sound.astype(np.float32)[np.newaxis])[0]
    return dict(zip(FEATURIZER.feature_names, row.tolist(), strict=True))


def autocorrelation(x: Array) -> tuple[float, float]:
    deviation = x - x.mean()
    whole = np.correlate(deviation, deviation, "full")[len(x) - 1 :]
    if whole[0] <= 1e-20 * np.sum(x**2):
        return 0.0, 0.0
    lags = np.arange(int(np.ceil(0.05 * FRAME_RATE)), min(len(x) - 2, int(FRAME_RATE)) + 1)
    best = lags[np.argmax(whole[lags])]
    value = whole[best] / whole[0]
    return (value, best / FRAME_RATE) if value > 0 else (0.0, 0.0)


def by_definition(sound: Array) -> dict[str, float]:
    """Compute the features once more, in the plainest way."""
    frames = Frames(Window(sound), SET, Tables.of(SET, RATE, ()))
    mel, rms = frames["mel"].astype(float), frames["rms"][0].astype(float)
    n_frames = len(rms)
    expected = {}
    for group in range(10):
        level = mel[4 * group : 4 * group + 4].mean(axis=0)
        n_fft = 2 * n_frames
        spectrum = np.fft.rfft((level - level.mean()) * np.hanning(n_frames + 2)[1:-1], n=n_fft)
        rates = np.fft.rfftfreq(n_fft, 1 / FRAME_RATE)
        for low, high in pairwise(MODULATION_EDGES):
            power = np.mean(np.abs(spectrum[(rates >= low) & (rates < high)]) ** 2) / n_frames
            expected[f"modulation.{group}.{low:g}-{high:g}Hz"] = np.log10(power + 1e-6)
    onset = np.array([0.0, *np.mean(np.maximum(0, mel[:, 1:] - mel[:, :-1]), axis=0)])
    padded = np.array([*onset, -np.inf])
    peaks, _ = scipy.signal.find_peaks(padded, height=onset.mean() + onset.std())
    gaps = np.diff(peaks) / FRAME_RATE if len(peaks) > 1 else np.zeros(1)
    expected |= {"onset.mean": onset.mean(), "onset.std": onset.std(), "onset.max": onset.max()}
    expected |= {"onset.rate": len(peaks) / n_frames * FRAME_RATE}
    expected |= {"onset.interval_mean": gaps.mean(), "onset.interval_std": gaps.std()}
    expected["onset.periodicity"], expected["onset.period"] = autocorrelation(onset)
    share, place = rms / rms.sum(), np.arange(n_frames) / n_frames
    centroid = np.sum(share * place)
    expected |= {"envelope.centroid": centroid, "envelope.spread": np.sqrt(np.sum(share * (place - centroid) ** 2))}
    expected |= {"envelope.peak": rms.argmax() / n_frames, "envelope.crest": rms.max() / rms.mean()}
    expected |= {"envelope.half": np.mean(rms >= rms.max() / 2), "envelope.active": np.mean(rms >= rms.max() / 1000)}
    expected["envelope.entropy"] = -np.sum(share[share > 0] * np.log(share[share > 0])) / np.log(n_frames)
    expected["envelope.periodicity"], expected["envelope.period"] = autocorrelation(rms)
    return expected


def test_features_are_what_they_are_defined_to_be(esc10: Path) -> None:
    """On noise, clicks and recordings each feature equals its plain definition."""
    clicks = np.zeros(SAMPLES, dtype=np.float32)
    clicks[[100, 9000, 9100, 20000]] = 1.0
    recordings = [librosa.load(clip, sr=RATE, duration=2.0)[0] for clip in sorted((esc10 / "audio").iterdir())[7::50]]
    for sound in (noise(), clicks, *recordings):
        assert pytest.approx(by_definition(sound), rel=1e-5, abs=1e-6) == features(sound)


def test_a_modulated_noise_shows_its_rate() -> None:
    """Of noise whose level goes up and down six times a second, the band from 4 to 8 Hz has the most power."""
    found = features(noise() * (1.1 + np.sin(2 * np.pi * 6 * np.arange(SAMPLES) / RATE)))
    bands = {name.split(".")[2]: value for name, value in found.items() if name.startswith("modulation.5.")}
    assert "4-8Hz" == max(bands, key=lambda name: bands[name])
    assert bands["4-8Hz"] > bands["12-16Hz"] + 1


def test_clicks_are_counted_and_timed() -> None:
    """A click every quarter of a second is four onsets a second, with that distance and period."""
    clicks = noise() * 1e-3
    clicks[2000::4000] += 1.0
    found = features(clicks)
    assert pytest.approx(4.0, abs=0.1) == found["onset.rate"]
    assert pytest.approx(0.25, abs=0.01) == found["onset.interval_mean"]
    assert found["onset.interval_std"] < 0.02
    assert pytest.approx(0.25, abs=0.01) == found["onset.period"]
    assert pytest.approx(0.25, abs=0.01) == found["envelope.period"]
    assert found["envelope.periodicity"] > 0.5


def test_the_envelope_says_when_and_how_long() -> None:
    """A burst at three quarters of the window is there, short, and alone above the floor."""
    burst = np.zeros(SAMPLES, dtype=np.float32)
    burst[24000:25000] = noise()[:1000]
    found = features(burst)
    assert pytest.approx(0.765, abs=0.02) == found["envelope.centroid"]
    assert found["envelope.spread"] < 0.05
    assert found["envelope.active"] < 0.1
    steady = features(noise())
    assert pytest.approx(1.0, abs=0.01) == steady["envelope.entropy"]
    assert 1.0 == steady["envelope.active"]


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_silence_and_direct_current_have_no_rhythm(level: float) -> None:
    """Where nothing changes there is neither an onset nor a period, and nothing is divided by zero."""
    with np.errstate(all="raise", under="ignore"):
        found = features(np.full(SAMPLES, level))
    assert all(np.isfinite(list(found.values())))
    assert 0.0 == features(np.zeros(SAMPLES))["onset.rate"]
    assert 0.0 == features(np.zeros(SAMPLES))["envelope.periodicity"]


def test_bands_that_the_frames_cannot_tell_are_left_out() -> None:
    """Frames 62.5 a second hear no modulation above 31.25 Hz, and short windows no slow one."""
    spec = FeatureSpec(window_seconds=0.2, window_hop_seconds=0.1, sets=(SET,))
    names = Featurizer(spec).feature_names
    assert "modulation.0.24-32Hz" in names
    assert "modulation.0.1-2Hz" not in names


def test_frames_too_far_apart_for_any_band_are_refused() -> None:
    """Frames once a second hear nothing that modulates once a second or faster."""
    sets = (RhythmSet(name="rhythm", hop_length=1024),)
    with pytest.raises(ValueError, match="hop_length is 1024; expected 500 or less at 1000 Hz"):
        Featurizer(FeatureSpec(sample_rate=1000, window_seconds=10.0, window_hop_seconds=10.0, sets=sets))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"group_size": 0}, "group_size is 0; expected 1 to n_mels, which is 40"),
        ({"floor_db": 0.0}, "floor_db is 0.0; expected more than 0 dB"),
        ({"n_mels": 0}, "n_mels is 0"),
    ],
)
def test_impossible_settings_are_named(changed: dict[str, Any], message: str) -> None:
    """A setting that cannot work is refused with its name, its value and what was expected."""
    with pytest.raises(ValueError, match=message):
        FeatureSpec(sets=(RhythmSet(name="rhythm", **changed),))
