"""One window of sound, and what a feature set makes of it.

This module owns what all feature sets share: the samples of a window, its short-time Fourier
transform, and the shape of a set. It must not know what any set computes, or how sound is cut.

A window is a waveform of its own and is given to the sets alone, so no bit of a feature can
depend on what else is in a batch, or on a number of threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, cast

import msgspec
import numpy as np
import numpy.typing as npt

from worker.fourier import Precision, powers

Array = Any  # numpy's stubs lose an array's type in arithmetic
Floats = npt.NDArray[np.float32]
Waveform = npt.NDArray[np.float32] | npt.NDArray[np.int16]


class Stft(NamedTuple):
    """The settings of a short-time Fourier transform, in samples, with a periodic Hann window.

    ``center`` puts frame t around sample t * hop_length, with zeros beyond both ends; otherwise it
    starts there.
    """

    n_fft: int
    hop_length: int
    win_length: int
    center: bool

    @property
    def margin(self) -> int:
        """How many zeros stand before and after the samples."""
        return self.n_fft // 2 if self.center else 0

    def n_frames(self, samples: int) -> int:
        """How many frames a waveform of so many samples has."""
        return 1 + max(samples + 2 * self.margin - self.n_fft, 0) // self.hop_length


class Window:
    """A waveform of float32, shape (samples,), and what several sets may ask of it.

    ``precision`` is that of its transforms.
    """

    def __init__(self, samples: Floats, precision: Precision = "float64") -> None:
        self.samples = samples
        self._precision = precision
        self._powers: dict[Stft, Floats] = {}
        self._magnitudes: dict[Stft, Floats] = {}

    def power(self, stft: Stft) -> Floats:
        """Return the squared magnitude of the transform, shape (bins, columns), from 0 Hz to Nyquist.

        The frames are the first columns, and silence may follow (`worker.fourier.powers`). Computed once
        for equal settings, by default in float64 as librosa does, and then rounded to float32.
        """
        if stft not in self._powers:
            margin, precision = stft.margin, self._precision
            self._powers[stft] = powers(self.samples, margin, stft.n_fft, stft.hop_length, stft.win_length, precision)
        return self._powers[stft]

    def magnitude(self, stft: Stft) -> Floats:
        """Return the magnitude of the transform, shape (bins, columns), from 0 Hz to Nyquist."""
        if stft not in self._magnitudes:
            self._magnitudes[stft] = np.sqrt(self.power(stft))
        return self._magnitudes[stft]


class Column(NamedTuple):
    """What one feature is: a statistic of one band of a family; what does not apply is empty."""

    family: str
    band: str
    statistic: str

    def __str__(self) -> str:
        return ".".join(part for part in self if part)


class Extractor(Protocol):
    """What computes the features of a set, with its tables at hand; safe to share between threads."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """What the features are, in their order."""

    def __call__(self, window: Window) -> Array:
        """Return the features of a window, shape (features,)."""


class FeatureSet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """The settings of a set of features; with a sample rate they decide the numbers.

    Each kind of set is a subclass with a tag of its own. ``name`` is what users and, where two sets
    have a feature of the same name, feature names call it.
    """

    name: str

    def check(self, sample_rate: int, window_samples: int) -> None:
        """Check the settings against each other and the windows they are for.

        Raises:
            ValueError: a setting makes no sense, or does not agree with another one.
        """
        for setting, holds, expected in self.checks(sample_rate, window_samples):
            if not holds:
                raise ValueError(f"{setting} is {getattr(self, setting)!r}; expected {expected}")

    def checks(self, sample_rate: int, window_samples: int) -> tuple[tuple[str, bool, str], ...]:
        """Return settings, whether they hold, and what was expected."""
        raise NotImplementedError

    def needs_float64(self) -> str:
        """Return which settings look at what is too quiet beside the rest for transforms in float32; mostly none."""
        return ""

    def extractor(self, sample_rate: int, window_samples: int) -> Extractor:
        """Return what computes this set.

        Raises:
            ValueError: the settings cannot be computed at this rate.
        """
        raise NotImplementedError


def as_float32(waveform: Waveform) -> Floats:
    """Return a waveform, shape (samples,), as float32 with full scale at 1.0; int16 is scaled by 1/32768.

    Raises:
        ValueError: it has another shape, or not one sample.
        TypeError: it is neither float32 nor int16.
    """
    if waveform.ndim != 1 or waveform.size == 0:
        raise ValueError(f"a waveform has shape {waveform.shape}; expected (samples,) with at least one sample")
    if waveform.dtype == np.float32:
        return cast("Floats", waveform)
    if waveform.dtype == np.int16:
        return np.multiply(waveform, np.float32(1 / 32768), dtype=np.float32)
    raise TypeError(f"a waveform is {waveform.dtype}; expected float32 with full scale at 1.0, or int16")


def are_names(names: tuple[str, ...], known: tuple[str, ...]) -> bool:
    """Return whether ``names`` are one or more of ``known``, each once."""
    return len(names) > 0 and len(set(names)) == len(names) and set(names) <= set(known)
