"""Feature sets that describe a window by the statistics of its frames.

This module owns how the frames of a window become features. It must not know how a frame's
numbers are computed, or what other sets there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal, get_args

import numpy as np

from worker.frames import Family, Frames, FrameSpec, Tables
from worker.windows import Array, Column, Floats, Window, are_names

Statistic = Literal["mean", "std", "min", "p10", "median", "p90", "max"]
"""How the frames of a window become one number; "std" is the population's, percentiles interpolate."""

QUANTILES: Final[dict[str, float]] = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}


class FrameStatistics(FrameSpec, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="frames"):
    """What is computed for each frame of a window, and the statistics of it that are its features.

    A feature is named "family.band.statistic", or "family.statistic" for a family of one band.
    """

    families: tuple[Family, ...]
    statistics: tuple[Statistic, ...] = ("mean", "std")

    def checks(self, sample_rate: int, window_samples: int) -> tuple[tuple[str, bool, str], ...]:
        """Return settings, whether they hold, and what was expected."""
        families, statistics = get_args(Family), get_args(Statistic)
        return (
            *super().checks(sample_rate, window_samples),
            ("families", are_names(self.families, families), f"each once, one or more of {families}"),
            ("statistics", are_names(self.statistics, statistics), f"each once, one or more of {statistics}"),
        )

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
        bands = {"mel": spec.n_mels, **cepstral, "contrast": len(tables.contrast)}
        self.columns = tuple(
            Column(family, band, statistic)
            for family in spec.families
            for band in (map(str, range(bands[family])) if family in bands else ("",))
            for statistic in spec.statistics
        )

    def __call__(self, window: Window) -> Array:
        """Return the features of a window, shape (features,)."""
        frames = Frames(window, self._spec, self._tables)
        rows = np.concatenate([frames[family] for family in self._spec.families])
        return _summarize(rows, self._spec.statistics).ravel()


def _summarize(rows: Floats, statistics: Iterable[Statistic]) -> Array:
    """Return the statistics of each row over its frames, shape (rows, statistics)."""
    mean: Array = np.mean(rows, axis=-1, dtype=np.float64)
    ordered = np.sort(rows, axis=-1)
    columns = []
    for statistic in statistics:
        if statistic == "mean":
            columns.append(mean)
        elif statistic == "std":
            columns.append(np.sqrt(np.mean(np.square(rows - mean[:, np.newaxis]), axis=-1)))
        else:
            between, low = np.modf(QUANTILES[statistic] * (rows.shape[-1] - 1))
            below, above = ordered[:, int(low)], ordered[:, int(np.ceil(low + between))]
            columns.append(below + between * (above - below))
    return np.stack(columns, axis=-1)
