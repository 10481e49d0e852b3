"""The only featurizer: windows of sound in, one row of numbers each out.

This module owns what a window is, how it is cut and levelled, and which feature sets there are.
The trainer pickles a `Featurizer` with its forest and the worker uses that object, so there is no
second implementation to disagree with. It must not know about models, messages or labels, or how
a set computes its features.
"""

from __future__ import annotations

from typing import Any, Final, get_args

import msgspec
import numpy as np

from worker.compiled import compiled
from worker.fourier import Precision
from worker.frames import FLOAT32_DB
from worker.pitch import PitchSet
from worker.rhythm import RhythmSet
from worker.statistics import CLAMPED, FrameStatistics
from worker.windows import Column, Extractor, Floats, Waveform, Window, as_float32

ARTICLE: Final = FrameStatistics(
    name="article", n_fft=2048, win_length=2048, n_mels=128, families=("mel", "mfcc"), statistics=("mean",)
)
"""A notebook's features: librosa's melspectrogram with its defaults, power_to_db and 20 MFCCs, each
averaged over the window (148 features). A forest of 100 trees names 69 % of ESC-10's clips from them."""

COMPACT: Final = FrameStatistics(
    name="compact",
    families=(
        *("mfcc", "delta", "delta2"),
        *("centroid", "bandwidth", "rolloff", "flatness", "contrast", "zcr", "rms"),
    ),
)
"""146 features, from which a forest of 100 trees names 87 % of ESC-10's clips (its five folds, the
windows' probabilities averaged). More statistics did not name more, and without the spectral
contrast it is 84 %."""

RICH: Final = FrameStatistics(
    name="rich",
    hop_length=256,
    n_mels=64,
    families=("mel", "mfcc", "centroid", "bandwidth", "rolloff", "flatness", "contrast", "zcr", "rms"),
    statistics=(
        *("mean", "std", "skew", "change", "change_std", "change_max"),
        *("min", "p10", "median", "p90", "max"),
    ),
    trim_db=60.0,
)
RHYTHM: Final = RhythmSet(name="rhythm", hop_length=256, n_mels=64)
"""Together they are the set "rich", 1,196 features of a second at 16 kHz: for forests of hundreds of extra-trees and
windows as long as a whole sound. Of whole ESC-10 clips at 22.05 kHz, levelled to -23 dBFS, 500 trees name 90.5 %
(two seeds; 90.9 % if each split looks at a tenth of the features). Without the skewness and what changes from frame
to frame it is 89.2 %. Windows of a second are better not levelled: how loud they are in a clip tells something."""

PITCH: Final = PitchSet()
"""Which note is played, and how clearly (4 features), for a regression of pitch: a forest is 0.1
semitones off on average, also on an instrument that it has never heard."""

AnySet = FrameStatistics | RhythmSet | PitchSet

NAMED: Final[dict[str, tuple[AnySet, ...]]] = {
    "article": (ARTICLE,),
    "compact": (COMPACT,),
    "rich": (RICH, RHYTHM),
    "pitch": (PITCH,),
}
"""What can be asked for by name; a user's own sets come from a file."""

# A float file can hold 1e38, whose power float32 cannot. 120 dB over full scale is no sound.
LIMIT: Final = float(2**20)
LIMIT_BITS: Final = int(np.float32(LIMIT).view(np.uint32))

LEVEL_GAIN: Final = "level.gain"
"""What the signal of `Featurizer.gains` is called."""

QUIETEST_DBFS: Final = -100.0
"""What is more quiet is taken to be this loud: digital silence stays silent, and its gain finite.
The noise of 16-bit quantisation is at -101 dBFS."""


class FeatureSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides a feature's value; equal specs give equal bits.

    Sound at ``sample_rate`` (Hz) is cut into windows, their length and the distance between their
    starts in seconds. With ``level_dbfs`` each window is scaled to that RMS level (dB relative to
    full scale), so that the features do not depend on how loud it was. Then the sets are computed.
    With ``precision`` "float32" instead of librosa's "float64", Fourier transforms take three fifths of
    their time, and mel bands are up to 0.002 dB off. What looks at the quietest frequencies beside the
    loudest, such as the spectral contrast, is refused then.

    Raises:
        ValueError: a setting makes no sense, or does not agree with another one.
    """

    sample_rate: int = 16000
    window_seconds: float = 1.0
    window_hop_seconds: float = 0.5
    level_dbfs: float | None = None
    precision: Precision = "float64"
    sets: tuple[AnySet, ...] = (COMPACT,)

    def __post_init__(self) -> None:
        seconds, names = self.window_seconds, [each.name for each in self.sets]
        for setting, holds, expected in (
            ("sample_rate", self.sample_rate >= 1, "at least 1 Hz"),
            ("window_seconds", 1 <= seconds * self.sample_rate < np.inf, "at least one sample"),
            (
                "window_hop_seconds",
                self.window_hop_seconds * self.sample_rate >= 1 and self.window_hop_seconds <= seconds,
                f"one sample to window_seconds, which is {seconds}: a longer hop leaves samples unheard in between",
            ),
            (
                "level_dbfs",
                self.level_dbfs is None or QUIETEST_DBFS < self.level_dbfs <= 0,
                f"more than {QUIETEST_DBFS:g} dB up to 0 dB, full scale, or none for no levelling",
            ),
            ("precision", self.precision in get_args(Precision), "float64 or float32"),
        ):
            if not holds:
                raise ValueError(f"{setting} is {getattr(self, setting)!r}; expected {expected}")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"sets are {'+'.join(names) or 'none'}; expected one or more, each once")
        for each in self.sets:
            try:
                each.check(self.sample_rate, self.window_samples)
            except ValueError as error:
                raise ValueError(f"feature set {each.name!r}: {error}") from None
            if self.precision == "float32" and (found := each.needs_float64()):
                raise ValueError(
                    f"feature set {each.name!r}: precision is 'float32', too coarse for {found}; expected float64, or"
                    f" sets of {', '.join(CLAMPED)} with a top_db of {FLOAT32_DB:g} or less, such as {ARTICLE.name}"
                )

    @property
    def window_samples(self) -> int:
        """The length of one window in samples."""
        return round(self.window_seconds * self.sample_rate)

    @property
    def window_hop_samples(self) -> int:
        """The distance between the starts of two windows in samples."""
        return round(self.window_hop_seconds * self.sample_rate)

    @property
    def shortest_seconds(self) -> float:
        """Half a window: of shorter sound, most of what is heard is the silence that fills the window up."""
        return self.window_seconds / 2


def feature_spec(names: str = COMPACT.name, **settings: Any) -> FeatureSpec:
    """Return the spec for the sets of these names, joined by "+", and the settings of `FeatureSpec`.

    Raises:
        ValueError: there is no set of a name, or a setting makes no sense.
    """
    unknown = [name for name in names.split("+") if name not in NAMED]
    if unknown:
        raise ValueError(f"there is no feature set {unknown[0]!r}; expected {', '.join(NAMED)}, or several joined by +")
    return FeatureSpec(sets=tuple(each for name in names.split("+") for each in NAMED[name]), **settings)


def read_spec(text: str) -> FeatureSpec:
    """Return the spec that a user has written, in JSON if it begins with "{", else in TOML.

    Raises:
        ValueError: it is neither, or a setting is unknown, missing or makes no sense.
    """
    decode = msgspec.json.decode if text.lstrip().startswith("{") else msgspec.toml.decode
    return decode(text, type=FeatureSpec)


class Featurizer:
    """Turns sound into features as a `FeatureSpec` says; safe to share between threads.

    ``columns`` say what each column of `transform` is, and ``feature_names`` what it is called. A
    name that a set has in common with an earlier one is preceded by the set's.

    Sound is float32 with full scale at 1.0, or int16, which is scaled by 1/32768 as a decoder
    would: wherever it enters, and nowhere else. Samples beyond 120 dB over full scale are clipped
    to that, so that finite sound has finite features.

    Raises:
        ValueError: a set cannot be computed at this rate; in a method, sound has another shape than
            described there, or not one sample.
        TypeError: sound is neither float32 nor int16.
    """

    def __init__(self, spec: FeatureSpec) -> None:
        self.spec = spec
        self._extractors: list[tuple[slice, Extractor]] = []
        names: dict[str, Column] = {}
        for each in spec.sets:
            try:
                extractor = each.extractor(spec.sample_rate, spec.window_samples)
            except ValueError as error:
                raise ValueError(f"feature set {each.name!r}: {error}") from None
            self._extractors.append((slice(len(names), len(names) + len(extractor.columns)), extractor))
            names |= {
                f"{each.name}.{column}" if str(column) in names else str(column): column for column in extractor.columns
            }
        self.feature_names: tuple[str, ...] = tuple(names)
        self.columns: tuple[Column, ...] = tuple(names.values())

    def __reduce__(self) -> tuple[type[Featurizer], tuple[FeatureSpec]]:
        """Pickle the spec only: the tables are its consequence."""
        return type(self), (self.spec,)

    def windows(self, waveform: Waveform) -> Floats:
        """Cut a waveform, shape (samples,), into windows, shape (k, window_samples).

        A waveform shorter than one window is filled up with zeros at its end. A longer one is cut
        every ``window_hop_seconds``, and once more at its very end if that leaves a tail: every
        sample is heard, and nothing is padded.
        """
        samples = as_float32(waveform)
        length = self.spec.window_samples
        if samples.size == length:
            return samples[np.newaxis]
        if samples.size < length:
            window = np.zeros((1, length), dtype=np.float32)
            window[0, : samples.size] = samples
            return window
        last = samples.size - length
        starts = np.arange(0, last + 1, self.spec.window_hop_samples)
        if starts[-1] < last:
            starts = np.append(starts, last)
        return np.lib.stride_tricks.sliding_window_view(samples, length)[starts]

    def transform(self, windows: Waveform) -> Floats:
        """Compute the features of windows, shape (n, window_samples): a matrix (n, features)."""
        self._expect_windows(windows)
        features = np.empty((len(windows), len(self.feature_names)), dtype=np.float32)
        for row, window in zip(features, windows, strict=True):
            samples = _audible(window)
            if self.spec.level_dbfs is not None:
                samples = samples * np.float32(_factor(samples, self.spec.level_dbfs))
            prepared = Window(samples, self.spec.precision)
            for columns, extractor in self._extractors:
                row[columns] = extractor(prepared)
        return features

    def gains(self, windows: Waveform) -> Floats:
        """Return by how many dB `transform` amplifies each of the windows, shape (n,).

        It is no feature, since a forest that sees it can undo the levelling; but it is to be
        watched, or a drift of the level would go unseen. Without ``level_dbfs`` it is 0 dB.
        """
        self._expect_windows(windows)
        level = self.spec.level_dbfs
        factors = [1.0 if level is None else _factor(_audible(window), level) for window in windows]
        return 20 * np.log10(np.array(factors, dtype=np.float32))

    def _expect_windows(self, windows: Waveform) -> None:
        if windows.ndim != 2 or windows.shape[1] != self.spec.window_samples:
            raise ValueError(
                f"windows have shape {windows.shape}; expected (n, {self.spec.window_samples}), as windows() cuts them"
            )


def _audible(window: Waveform) -> Floats:
    """Return a window that is clipped to `LIMIT`; it may be the one that was given."""
    samples = as_float32(window)
    if not samples.flags.carray:  # for any other layout, and for what can only be read, all would be compiled once more
        samples = samples.copy()
    return samples if _peak_bits(samples) <= LIMIT_BITS else samples.clip(-LIMIT, LIMIT)  # NaN stays


@compiled
def _peak_bits(samples: Floats) -> int:
    """Return the bits of the largest magnitude: as integers they have the same order, and the compiler compares many.

    Those of NaN are larger than any number's.
    """
    bits, peak = samples.view(np.uint32), np.uint32(0)
    for n in range(np.uint64(len(bits))):
        peak = np.uint32(max(peak, bits[n] & np.uint32(0x7FFFFFFF)))
    return int(peak)


def _factor(samples: Floats, level_dbfs: float) -> float:
    """Return what brings samples to an RMS level when they are multiplied by it."""
    rms = np.sqrt(np.mean(np.square(samples, dtype=np.float64)))
    return float(10 ** (level_dbfs / 20) / max(rms, 10 ** (QUIETEST_DBFS / 20)))
