"""How sound moves within a window: modulation, onsets and the envelope.

This module owns features of a window as a whole, for which the order of its frames matters. It
must not know how a frame's numbers are computed, or what other sets there are.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import numpy as np
import scipy.fft

from worker.compiled import compiled
from worker.frames import Frames, FrameSpec, Tables
from worker.windows import Array, Column, Window

MODULATION_EDGES: Final = (1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0)
"""The limits in Hz of the bands of modulation, as far as the frames can tell: speech is at 4 Hz, and
roughness begins at 20."""

MODULATION_FLOOR: Final = 1e-6  # dB², under the logarithm; far below what a steady noise has

SHORTEST_PERIOD: Final = 0.05  # seconds; what repeats faster is heard as a pitch
LONGEST_PERIOD: Final = 1.0  # seconds

ONSET: Final = ("mean", "std", "max", "rate", "interval_mean", "interval_std", "periodicity", "period")
ENVELOPE: Final = ("centroid", "spread", "peak", "crest", "half", "entropy", "active", "periodicity", "period")


class RhythmSet(FrameSpec, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="rhythm"):
    """Modulation spectrum, onset and envelope statistics.

    - ``modulation.<group>.<band>``: how much the level of a group of ``group_size`` neighbouring mel
      bands changes at the rates of a band, as decadic logarithm of its mean power in dB².
    - ``onset.*``: the onset strength is the mean rise of all mel bands since the frame before, in dB
      (Bello et al. 2005). Its mean, spread and maximum; its peaks, a standard deviation above the mean
      or more, per second, and their distances' mean and spread in seconds; the highest value of
      its normalised autocorrelation at lags of 0.05 to 1 s, and that lag in seconds.
    - ``envelope.*``: of the RMS of the frames, centroid, spread and place of the peak (all 0 to 1 of
      the window's length), peak over mean, share of the frames at half the peak or more, entropy (1:
      constant), share of the frames at most ``floor_db`` under the peak, and autocorrelation as above.
    """

    group_size: int = 4
    floor_db: float = 60.0

    def checks(self, sample_rate: int, window_samples: int) -> tuple[tuple[str, bool, str], ...]:
        """Return settings, whether they hold, and what was expected."""
        return (
            *super().checks(sample_rate, window_samples),
            ("group_size", 1 <= self.group_size <= self.n_mels, f"1 to n_mels, which is {self.n_mels}"),
            ("floor_db", 0 < self.floor_db < np.inf, "more than 0 dB"),
        )

    def extractor(self, sample_rate: int, window_samples: int) -> RhythmExtractor:
        """Return what computes this set.

        Raises:
            ValueError: the mel filters are finer than the resolution of n_fft, or the frames are too
                few or too far apart for any band of modulation.
        """
        return RhythmExtractor(self, sample_rate, window_samples)


class RhythmExtractor:
    """Computes the features of a `RhythmSet`."""

    def __init__(self, spec: RhythmSet, sample_rate: int, window_samples: int) -> None:
        self._spec = spec
        self._tables = Tables.of(spec, sample_rate, ())
        self._frame_rate = sample_rate / spec.hop_length
        n_frames = spec.stft.n_frames(window_samples)
        # Without its zeros at both ends, which would weight the outer frames with nothing.
        self._taper = np.hanning(n_frames + 2)[1:-1]
        rates = np.fft.rfftfreq(2 * n_frames, 1 / self._frame_rate)
        bands = [
            (low, high, np.flatnonzero((rates >= low) & (rates < high))) for low, high in pairwise(MODULATION_EDGES)
        ]
        self._bands = [slice(bins[0], bins[-1] + 1) for _, _, bins in bands if bins.size]
        if not self._bands:
            raise ValueError(
                f"hop_length is {spec.hop_length}; expected {int(sample_rate / (2 * MODULATION_EDGES[0]))} or less at"
                f" {sample_rate} Hz, and frames enough in a window to hear modulation at {MODULATION_EDGES[0]:g} to"
                f" {MODULATION_EDGES[-1]:g} Hz"
            )
        self.columns = (
            *(
                Column("modulation", str(group), f"{low:g}-{high:g}Hz")
                for group in range(spec.n_mels // spec.group_size)
                for low, high, bins in bands
                if bins.size
            ),
            *(Column("onset", "", name) for name in ONSET),
            *(Column("envelope", "", name) for name in ENVELOPE),
        )

    def __call__(self, window: Window) -> Array:
        """Return the features of a window, shape (features,)."""
        frames = Frames(window, self._spec, self._tables)
        mel = frames["mel"].astype(np.float64)
        return np.concatenate(
            [
                self._modulation(mel),
                _onset(_onset_strength(mel), self._frame_rate),
                _envelope(frames.rms.astype(np.float64), self._frame_rate, 10 ** (-self._spec.floor_db / 20)),
            ]
        )

    def _modulation(self, mel: Array) -> Array:
        size = self._spec.group_size
        n_groups = len(mel) // size
        groups = mel[: n_groups * size].reshape(n_groups, size, -1).mean(axis=1)
        groups -= groups.mean(axis=1, keepdims=True)
        spectrum = scipy.fft.rfft(groups * self._taper, n=2 * groups.shape[1], axis=1)
        power = (spectrum.real**2 + spectrum.imag**2) / groups.shape[1]
        bands = np.stack([power[:, bins].mean(axis=1) for bins in self._bands], axis=1)
        return np.log10(bands + MODULATION_FLOOR).ravel()


def _onset_strength(mel: Array) -> Array:
    """Return the mean rise of all bands since the frame before, zero for the first, shape (frames,)."""
    strength = np.zeros(mel.shape[1])
    strength[1:] = np.maximum(np.diff(mel, axis=1), 0.0).mean(axis=0)
    return strength


@compiled
def _onset(strength: Array, frame_rate: float) -> Array:
    """Return the features of `ONSET`."""
    n_frames = len(strength)
    mean, std = strength.mean(), strength.std()
    peaks = 0
    first = last = 0
    squares = 0.0  # of the distances between neighbouring peaks, in frames
    for t in range(1, n_frames):
        falls = t == n_frames - 1 or strength[t] >= strength[t + 1]
        if strength[t] > strength[t - 1] and falls and strength[t] >= mean + std:
            if peaks == 0:
                first = t
            else:
                squares += (t - last) ** 2
            last = t
            peaks += 1
    interval = spread = 0.0
    if peaks > 1:
        interval = (last - first) / (peaks - 1)
        spread = np.sqrt(max(squares / (peaks - 1) - interval**2, 0.0))
    periodicity, period = _periodicity(strength, frame_rate)
    rate = peaks * frame_rate / n_frames
    return np.array([mean, std, strength.max(), rate, interval / frame_rate, spread / frame_rate, periodicity, period])


@compiled
def _envelope(rms: Array, frame_rate: float, floor: float) -> Array:
    """Return the features of `ENVELOPE`; all zero in digital silence."""
    n_frames = len(rms)
    features = np.zeros(9)
    peak, total = rms.max(), rms.sum()
    if total == 0.0:
        return features
    centroid = spread = entropy = 0.0
    half = active = 0
    for t in range(n_frames):
        share = rms[t] / total
        centroid += share * t / n_frames
        entropy -= share * np.log(share) if share > 0.0 else 0.0
        half += rms[t] >= peak / 2
        active += rms[t] >= peak * floor
    for t in range(n_frames):
        spread += rms[t] / total * (t / n_frames - centroid) ** 2
    periodicity, period = _periodicity(rms, frame_rate)
    features[:] = (
        centroid,
        np.sqrt(spread),
        rms.argmax() / n_frames,
        peak * n_frames / total,
        half / n_frames,
        entropy / np.log(n_frames) if n_frames > 1 else 0.0,
        active / n_frames,
        periodicity,
        period,
    )
    return features


@compiled
def _periodicity(x: Array, frame_rate: float) -> tuple[float, float]:
    """Return the highest normalised autocorrelation within the periods looked for, and that period in seconds.

    Both are zero if ``x`` is constant, or too short for the shortest period.
    """
    deviation = x - x.mean()
    energy = (deviation**2).sum()
    first = max(1, int(np.ceil(SHORTEST_PERIOD * frame_rate)))
    last = min(len(x) - 2, int(LONGEST_PERIOD * frame_rate))
    best, period = 0.0, 0.0
    if energy <= 1e-20 * (x**2).sum():
        return best, period
    for lag in range(first, last + 1):
        product = 0.0
        for t in range(len(x) - lag):
            product += deviation[t] * deviation[t + lag]
        if product / energy > best:
            best, period = product / energy, lag / frame_rate
    return best, period
