"""Feature sets that describe a window by the statistics of its frames.

This module owns how the frames of a window become features. It must not know how a frame's
numbers are computed, or what other sets there are.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

import numpy as np

from worker.compiled import compiled
from worker.frames import Family, Frames, FrameSpec, Tables
from worker.windows import Array, Column, Floats, Window, are_names

Moment = Literal["mean", "std", "skew", "change", "change_std", "change_max"]
"""Mean, population standard deviation and skewness of the frames (0 for a constant); of what changes
from each frame to the next, the mean size, the standard deviation and the largest size."""

Quantile = Literal["min", "p10", "p25", "median", "p75", "p90", "max"]
"""Order statistics of the frames; percentiles interpolate between two."""

Statistic = Moment | Quantile
"""How the frames of a window become one number."""

MOMENTS: Final[tuple[str, ...]] = get_args(Moment)
QUANTILES: Final = {"min": 0.0, "p10": 0.1, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9, "max": 1.0}
STATISTICS: Final[tuple[Statistic, ...]] = (*get_args(Moment), *get_args(Quantile))

CLAMPED: Final = ("mel", "mfcc", "delta", "delta2", "zcr", "rms")
"""Families in which nothing quiet counts beside what is loud, since ``top_db`` clamps it, or since they add energies or
know no spectrum."""

CONSTANT: Final = 1e-6
"""A spread of so much of the mean is the rounding of float32: the skewness of it would be noise."""


class FrameStatistics(FrameSpec, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="frames"):
    """What is computed for each frame of a window, and the statistics of it that are its features.

    A feature is named "family.band.statistic", or "family.statistic" for a family of one band.
    With ``trim_db``, frames whose RMS is more than that below the loudest frame's are left out, so
    that the silence around a sound does not count.
    """

    families: tuple[Family, ...]
    statistics: tuple[Statistic, ...] = ("mean", "std")
    trim_db: float | None = None

    def checks(self, sample_rate: int, window_samples: int) -> tuple[tuple[str, bool, str], ...]:
        """Return settings, whether they hold, and what was expected."""
        families = get_args(Family)
        return (
            *super().checks(sample_rate, window_samples),
            ("families", are_names(self.families, families), f"each once, one or more of {families}"),
            ("statistics", are_names(self.statistics, STATISTICS), f"each once, one or more of {STATISTICS}"),
            ("trim_db", self.trim_db is None or 0 < self.trim_db < np.inf, "more than 0 dB, or none for all frames"),
        )

    def needs_float64(self) -> str:
        """Return which settings look at what is too quiet beside the rest for transforms in float32."""
        return super().needs_float64() or ", ".join(each for each in self.families if each not in CLAMPED)

    def extractor(self, sample_rate: int, window_samples: int) -> FrameExtractor:  # noqa: ARG002  # any length will do
        """Return what computes this set.

        Raises:
            ValueError: the mel filters or the contrast bands are finer than the resolution of n_fft.
        """
        return FrameExtractor(self, Tables.of(self, sample_rate, self.families))


class FrameExtractor:
    """Computes the features of a `FrameStatistics`."""

    def __init__(self, spec: FrameStatistics, tables: Tables) -> None:
        self._spec = spec
        self._tables = tables
        cepstral = dict.fromkeys(("mfcc", "delta", "delta2"), spec.n_mfcc)
        bands = {"mel": spec.n_mels, **cepstral, "contrast": len(tables.contrast.counts)}
        quantiles = [name for name in QUANTILES if name in spec.statistics]
        self._quantiles = np.array([QUANTILES[name] for name in quantiles])
        computed = (*MOMENTS, *quantiles)
        self._only_means = spec.statistics == ("mean",) and spec.trim_db is None
        places = [computed.index(name) for name in spec.statistics]
        self._columns = slice(None) if places == list(range(len(computed))) else places  # all of them need no copy
        self.columns = tuple(
            Column(family, band, statistic)
            for family in spec.families
            for band in (map(str, range(bands[family])) if family in bands else ("",))
            for statistic in spec.statistics
        )

    def __call__(self, window: Window) -> Array:
        """Return the features of a window, shape (features,)."""
        frames = Frames(window, self._spec, self._tables)
        if self._only_means:
            return np.concatenate([frames.means(family) for family in self._spec.families])
        rows = np.concatenate([frames[family] for family in self._spec.families])
        if self._spec.trim_db is not None:
            kept = frames.rms >= frames.rms.max() * 10 ** (-self._spec.trim_db / 20)
            # Of sound that is not finite none is, and then there is nothing to choose.
            rows = rows if kept.all() or not kept.any() else rows.compress(kept, axis=1)
        ordered = np.sort(rows, axis=-1) if self._quantiles.size else rows
        return _summarize(rows, ordered, self._quantiles)[:, self._columns].ravel()


@compiled
def _summarize(rows: Floats, ordered: Floats, quantiles: Array) -> Array:
    """Return `MOMENTS` and then the quantiles of each row over its frames, shape (rows, statistics).

    Args:
        rows: shape (rows, frames), one frame or more.
        ordered: the rows, each sorted; needed for quantiles only.
        quantiles: 0 for the lowest to 1 for the highest.
    """
    n_rows, n_frames = rows.shape
    features = np.zeros((n_rows, 6 + len(quantiles)))
    frames = _transposed(rows)
    features[:, :3] = _moments(frames).T
    features[:, 3:6] = _changes(frames).T
    for column in range(len(quantiles)):
        place = quantiles[column] * (n_frames - 1)
        low = int(place)
        for row in range(n_rows):
            below, above = ordered[row, low], ordered[row, min(low + 1, n_frames - 1)]
            features[row, 6 + column] = below + (place - low) * (np.float64(above) - below)
    return features


@compiled
def _transposed(rows: Floats) -> Floats:
    columns = np.empty((rows.shape[1], rows.shape[0]), np.float32)
    for row in range(rows.shape[0]):
        for t in range(rows.shape[1]):
            columns[t, row] = rows[row, t]
    return columns


@compiled
def _moments(frames: Floats) -> Array:
    """Return mean, standard deviation and skewness of each band of the frames, (frames, bands): shape (3, bands).

    The inner loops run over the bands, so that the compiler computes several at once: within one, each addition waits
    for the last.
    """
    n_frames, n_bands = frames.shape
    moments = np.zeros((3, n_bands))
    mean, std, skew = moments
    for t in range(n_frames):
        for band in range(n_bands):
            mean[band] += frames[t, band]
    mean /= n_frames
    squares, cubes = np.zeros(n_bands), np.zeros(n_bands)
    for t in range(n_frames):
        for band in range(n_bands):
            deviation = frames[t, band] - mean[band]
            squares[band] += deviation * deviation
            cubes[band] += deviation * deviation * deviation
    for band in range(n_bands):
        variance = squares[band] / n_frames
        std[band] = np.sqrt(variance)
        if variance > (CONSTANT * mean[band]) ** 2:
            skew[band] = cubes[band] / n_frames / (variance * std[band])
    return moments


@compiled
def _changes(frames: Floats) -> Array:
    """Return the mean size, the standard deviation and the largest size of the changes, as `_moments` does."""
    n_frames, n_bands = frames.shape
    changes = np.zeros((3, n_bands))
    if n_frames == 1:
        return changes
    size, std, largest = changes
    drift = np.zeros(n_bands)  # their mean, signed
    for t in range(1, n_frames):
        for band in range(n_bands):
            step = np.float64(frames[t, band]) - frames[t - 1, band]
            size[band] += abs(step)
            largest[band] = max(largest[band], abs(step))
            drift[band] += step
    size /= n_frames - 1
    drift /= n_frames - 1
    for t in range(1, n_frames):
        for band in range(n_bands):
            std[band] += (np.float64(frames[t, band]) - frames[t - 1, band] - drift[band]) ** 2
    for band in range(n_bands):
        std[band] = np.sqrt(std[band] / (n_frames - 1))
    return changes
