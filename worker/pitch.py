"""Which note a window holds: the `pitch` set, by harmonic summation.

This module owns how a fundamental frequency is estimated, from the transform of a window to four
numbers. It must not know how sound is cut into windows, or what a forest makes of the numbers.

1. The spectrum in dB is averaged over the frames of the window, each frame counting the same, and
   read off on a grid of semitones, where the harmonics of every note have the same distances.
2. What rises above the mean of its surroundings is left, so that neither level nor timbre counts.
3. The salience of a note is the weighted sum of what is left at its harmonics (Schroeder 1968,
   Noll 1969, Hermes 1988), as far as they are below Nyquist, divided by the root of the weights'
   sum. Undivided, notes near the top would never win, for want of harmonics; divided by the whole
   sum, they would win too often.
4. A note an octave or a twelfth too high finds every second or third harmonic of the true one and
   leaves others between its own: they count against it, as in SWIPE (Camacho and Harris 2008).
   How much they should count differs between instruments, so there is an estimate for each of
   three `PENALTIES`. Where they agree there is no doubt about the octave.

Nothing here calls BLAS or compares windows, so no bit depends on a batch or a number of threads.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import scipy.fft
import scipy.ndimage

from worker.windows import Array, Column, FeatureSet, Stft, Window

NO_PITCH: Final = 0.0
"""All four features of a window in which nothing rises above its surroundings, as in silence."""

PENALTIES: Final = {"upper": 0.0, "middle": 0.25, "lower": 0.5}
"""How much of what lies between a note's harmonics is taken from its salience, by the estimate's name."""

PERIODS: Final = 7  # of the lowest note in a frame: its harmonics are seven bins apart, a Hann peak is four wide
STEP: Final = 0.1  # semitones of the grid, hence of the estimates
MARGIN: Final = 0.5  # semitones beyond both ends, for a note that is out of tune
TOP: Final = 0.95  # of Nyquist, beyond which resampling leaves nothing
FLOOR_DB: Final = 100.0  # under the highest peak; the noise of 16 bits is at about this level in a spectrum
SURROUNDINGS: Final = 12.0  # semitones of the running mean
RISE_DB: Final = 6.0  # over the surroundings before it counts: the mean spectrum of noise hardly reaches it
BLUR: Final = 0.2  # semitones, standard deviation of a Gaussian: harmonics of strings are not quite harmonic

# Harmonics count by their number's power of -1/2. Between them, those of the octave below are at
# halves, those of the twelfth below at thirds; thirds count half, since there are two of them.
HARMONICS: Final = np.arange(1.0, 13.0)
BETWEEN: Final = np.concatenate([HARMONICS - 1 / 2, HARMONICS - 1 / 3, HARMONICS - 2 / 3])
WEIGHTS: Final = HARMONICS**-0.5
BETWEEN_WEIGHTS: Final = np.concatenate([WEIGHTS, WEIGHTS / 2, WEIGHTS / 2])


class PitchSet(FeatureSet, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="pitch"):
    """The settings of the estimator: the lowest and the highest note, in Hz.

    The defaults are the piano's range. Notes above 95 % of Nyquist are not looked for.
    """

    name: str = "pitch"
    fmin: float = 27.5
    fmax: float = 4186.0

    def checks(self, sample_rate: int, window_samples: int) -> tuple[tuple[str, bool, str], ...]:
        """Return settings, whether they hold, and what was expected."""
        lowest = PERIODS * sample_rate / window_samples
        top = min(self.fmax, TOP * sample_rate / 2)
        return (
            ("fmax", 0 < self.fmax < np.inf, "more than 0 Hz"),
            (
                "fmin",
                lowest <= self.fmin < top,
                f"at least {lowest:g} Hz, of which a window holds {PERIODS} periods, to less than {top:g} Hz",
            ),
        )

    def needs_float64(self) -> str:
        """Return which settings look at what is too quiet beside the rest for transforms in float32."""
        return f"what is {FLOOR_DB:g} dB under a peak"

    def extractor(self, sample_rate: int, window_samples: int) -> PitchExtractor:  # noqa: ARG002  # frames fit into any window that passed
        """Return what computes this set."""
        return PitchExtractor(self.fmin, self.fmax, sample_rate)


class PitchExtractor:
    """Estimates the fundamental frequency of a window, in MIDI semitones (69 is 440 Hz) in steps of 0.1.

    The features are the estimates for three `PENALTIES`, and "pitch.strength": by how many dB the
    harmonics of the middle one rise over their surroundings, what lies between them taken off.
    Where nothing rises, all four are `NO_PITCH`, which is far below the lowest note.
    """

    columns = tuple(Column("pitch", band, "") for band in (*PENALTIES, "strength"))

    def __init__(self, fmin: float, fmax: float, sample_rate: int) -> None:
        n_fft = scipy.fft.next_fast_len(math.ceil(PERIODS * sample_rate / fmin), real=True)
        self._stft = Stft(n_fft, hop_length=n_fft // 2, win_length=n_fft, center=True)
        lowest, highest = _midi(fmin) - MARGIN, _midi(fmax) + MARGIN
        first = round(SURROUNDINGS / 2 / STEP)  # below the lowest note there must be surroundings, too
        top = _midi(min(TOP * sample_rate / 2, HARMONICS[-1] * fmax))
        grid = np.arange(lowest - first * STEP, top, STEP)
        self._bins = 440 * 2 ** ((grid - 69) / 12) * n_fft / sample_rate
        self._audible = slice(int(self._bins[0]), int(self._bins[-1]) + 2)
        self._notes = grid[first:][grid[first:] <= highest]
        self._harmonics = self._places(HARMONICS, first)
        self._between = self._places(BETWEEN, first)
        self._total = _sum(WEIGHTS, self._harmonics < len(grid))

    def __call__(self, window: Window) -> Array:
        """Return the features of a window, shape (4,)."""
        rises = self._rises(window)
        harmonics, between = _sum(WEIGHTS, rises[self._harmonics]), _sum(BETWEEN_WEIGHTS, rises[self._between])
        if not harmonics.any():
            return np.full(len(self.columns), NO_PITCH)
        sums = {name: harmonics - penalty * between for name, penalty in PENALTIES.items()}
        best = {name: int(np.argmax(each / np.sqrt(self._total))) for name, each in sums.items()}
        strength = sums["middle"][best["middle"]] / self._total[best["middle"]]
        return np.array([*(self._notes[place] for place in best.values()), strength])

    def _places(self, multiples: Array, first: int) -> Array:
        """Return where multiples of each note are on the grid, (multiples, notes); off it, the place after its end."""
        steps = np.rint(12 * np.log2(multiples) / STEP).astype(int)
        places = steps[:, np.newaxis] + first + np.arange(len(self._notes))
        return np.where((places >= 0) & (places < len(self._bins)), places, len(self._bins))

    def _rises(self, window: Window) -> Array:
        """Return by how many dB the mean spectrum rises over its surroundings, (grid + 1,); the last one is 0."""
        frames = slice(self._stft.n_frames(window.samples.size))
        power = np.square(window.magnitude(self._stft)[self._audible, frames], dtype=np.float64)
        loudest = power.max()
        if loudest == 0:
            return np.zeros(len(self._bins) + 1)
        decibels = 10 * np.log10(np.maximum(power / loudest, 10 ** (-FLOOR_DB / 10)))
        bins = np.arange(self._audible.start, self._audible.start + len(power))
        spectrum = np.interp(self._bins, bins, np.mean(decibels, axis=1))
        around = scipy.ndimage.uniform_filter1d(spectrum, round(SURROUNDINGS / STEP), mode="nearest")
        rises = np.maximum(spectrum - around - RISE_DB, 0)
        return np.append(scipy.ndimage.gaussian_filter1d(rises, BLUR / STEP, mode="constant"), 0.0)


def _midi(frequency: float) -> float:
    return 69 + 12 * math.log2(frequency / 440)


def _sum(weights: Array, rows: Array) -> Array:
    """Return the weighted sum of rows, in their order."""
    return np.sum(weights[:, np.newaxis] * rows, axis=0)
