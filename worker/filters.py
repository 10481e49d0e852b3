"""Filters: weighted sums over neighbouring rows of a spectrum, and the mel filterbank.

This module owns how they are made and applied. It must not know what a spectrum is of.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np

from worker.compiled import compiled

Array = Any  # numpy's stubs lose an array's type in arithmetic

MEL_KNEE: Final = 1000.0  # Hz, up to which mels are evenly spaced
MEL_STEP: Final = 200 / 3  # Hz, one mel there
MEL_LOG_STEP: Final = np.log(6.4) / 27  # one mel above, where 27 of them are a factor of 6.4


class Filters(NamedTuple):
    """Weights of sums over neighbouring rows: what is outside of ``starts`` to ``stops`` is zero, and left out."""

    weights: Array  # (filters, rows)
    starts: Array  # (filters,)
    stops: Array  # (filters,)

    @classmethod
    def of(cls, weights: Array) -> Filters:
        """Find where each of the filters, shape (filters, rows), begins and ends."""
        some = weights != 0
        return cls(weights, some.argmax(axis=1), weights.shape[1] - some[:, ::-1].argmax(axis=1))


def mel_filters(sample_rate: int, n_fft: int, n_mels: int, fmin: float, fmax: float) -> Array:
    """Return triangles of equal area from ``fmin`` to ``fmax``, evenly spaced in mel (Slaney 1998).

    librosa has the same; but whoever imports it compiles, and needs a folder to keep that in.

    Returns:
        float32 of shape (n_mels, n_fft / 2 + 1).

    Raises:
        ValueError: filters are finer than the resolution of n_fft.
    """
    edges = _hertz(np.linspace(_mel(fmin), _mel(fmax), n_mels + 2))
    slopes = np.subtract.outer(edges, np.fft.rfftfreq(n_fft, 1 / sample_rate))
    widths = np.diff(edges)[:, np.newaxis]
    triangles = np.minimum(-slopes[:-2] / widths[:-1], slopes[2:] / widths[1:])
    filters = np.maximum(0, triangles).astype(np.float32)
    filters *= (2.0 / (edges[2:] - edges[:-2]))[:, np.newaxis]
    empty = np.count_nonzero(filters.max(axis=-1) == 0)
    if empty:
        raise ValueError(
            f"n_mels is {n_mels}, but {empty} of these filters lie between two bins of n_fft {n_fft}; "
            "expected fewer, or a larger n_fft"
        )
    return filters


@compiled
def filtered(weights: Array, starts: Array, stops: Array, rows: Array) -> Array:
    """Return the weighted sums of rows, shape (filters, columns), summed in the precision of the weights."""
    n_columns = rows.shape[1]
    sums = np.zeros((len(weights), n_columns), weights.dtype)
    for band in range(len(weights)):
        total, start, stop = sums[band], starts[band], stops[band]
        whole = start + (stop - start) // 4 * 4
        for k in range(start, whole, 4):  # four for each time that the sums are read and written
            a, b, c, d = weights[band, k], weights[band, k + 1], weights[band, k + 2], weights[band, k + 3]
            p, q, r, s = rows[k], rows[k + 1], rows[k + 2], rows[k + 3]
            for t in range(n_columns):
                total[t] += a * p[t] + b * q[t] + (c * r[t] + d * s[t])
        for k in range(whole, stop):
            weight, row = weights[band, k], rows[k]
            for t in range(n_columns):
                total[t] += weight * row[t]
    return sums


def _mel(hertz: float) -> float:
    """Return a frequency on Slaney's mel scale: even up to `MEL_KNEE`, and in octaves above."""
    if hertz < MEL_KNEE:
        return hertz / MEL_STEP
    return float(MEL_KNEE / MEL_STEP + np.log(hertz / MEL_KNEE) / MEL_LOG_STEP)


def _hertz(mel: Array) -> Array:
    above = MEL_KNEE * np.exp(MEL_LOG_STEP * (mel - MEL_KNEE / MEL_STEP))
    return np.where(mel < MEL_KNEE / MEL_STEP, MEL_STEP * mel, above)
