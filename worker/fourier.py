"""The short-time Fourier transform: windows of sound to magnitudes, many frames at once.

This module owns the transform. It must not know what is made of a spectrum.

Libraries transform one frame after the other, and two at most side by side. Here `LANES` frames go
through each step together, so that the compiler can use the whole width of the processor and
reads each factor once for all of them. All arithmetic is float64 and in a fixed order, so that the
bits of a frame depend neither on its neighbours nor on how many there are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.fft
import scipy.signal

from worker.compiled import compiled

Array = Any  # numpy's stubs lose an array's type in arithmetic

LANES: Final = 32
"""Frames transformed together; of 8, 16 and 32 the fastest, and what they need stays in the cache."""

ROWS: Final = 16
"""Pairs of samples that are read from one frame before the next one's turn."""


class Factors(NamedTuple):
    """What a transform of n_fft samples, of which win_length are weighted by a periodic Hann window, needs."""

    window: Array  # (n_fft,), zero outside of win_length
    twiddles: Array  # (n_fft / 2, 2): cosine and sine of -2 pi k / (n_fft / 2)
    halves: Array  # (n_fft / 4 + 1, 2): cosine and sine of -2 pi k / n_fft
    order: Array  # (n_fft / 2,): where the transform leaves the frequency k

    @staticmethod
    @lru_cache(maxsize=16)
    def of(n_fft: int, win_length: int) -> Factors:
        """Compute them; ``n_fft`` is a power of two, 2 or more."""
        half = n_fft // 2
        order, size, stride = np.zeros(half, np.int64), half, 1
        while size > 1:
            radix = 4 if size % 4 == 0 else 2
            size //= radix
            order += np.arange(half) // stride % radix * size
            stride *= radix
        return Factors(
            _hann(n_fft, win_length), _circle(np.arange(half) / half), _circle(np.arange(half // 2 + 1) / n_fft), order
        )


def magnitudes(padded: npt.NDArray[np.float32], n_fft: int, hop_length: int, win_length: int) -> Array:
    """Return the magnitude of the transform of each frame as float32, shape (n_fft / 2 + 1, frames).

    Args:
        padded: the samples, shape (samples,); frame t starts at t * hop_length, as far as it is whole.
        n_fft: the length of a frame; powers of two are much faster.
        hop_length: the distance between two frames.
        win_length: how many samples in the middle of a frame are weighted, by a periodic Hann window.
    """
    if n_fft & (n_fft - 1):
        return _by_library(padded, hop_length, _hann(n_fft, win_length))
    return _magnitudes(padded, hop_length, *Factors.of(n_fft, win_length))


def _by_library(padded: npt.NDArray[np.float32], hop_length: int, hann: Array) -> Array:
    """Transform frames whose length is no power of two."""
    framed = np.lib.stride_tricks.sliding_window_view(padded, len(hann))[::hop_length]
    result = np.empty((len(hann) // 2 + 1, len(framed)), dtype=np.float32)
    for first in range(0, len(framed), LANES):  # all together are too large for the allocator to keep
        frames = slice(first, first + LANES)
        result[:, frames] = np.abs(scipy.fft.rfft(framed[frames] * hann).astype(np.complex64)).T
    return result


@lru_cache(maxsize=16)
def _hann(n_fft: int, win_length: int) -> Array:
    left = (n_fft - win_length) // 2
    window = np.zeros(n_fft)
    window[left : left + win_length] = scipy.signal.get_window("hann", win_length, fftbins=True)
    return window


def _circle(turns: Array) -> Array:
    return np.stack([np.cos(2 * np.pi * turns), -np.sin(2 * np.pi * turns)], axis=1)


@compiled
def _magnitudes(padded: Array, hop_length: int, window: Array, twiddles: Array, halves: Array, order: Array) -> Array:
    """Transform frames of n real samples as n / 2 complex ones, and take the two halves apart again.

    A row of ``z`` holds the real parts of all lanes, and then the imaginary parts.
    """
    half = len(twiddles)
    n_frames = 1 + (len(padded) - 2 * half) // hop_length
    result = np.empty((half + 1, n_frames), np.float32)
    lanes = min(LANES, n_frames)
    z = np.empty((half, 2 * lanes))
    for block in range(0, n_frames, LANES):
        first = min(block, n_frames - lanes)  # the last block is as full as the others: some frames are done twice
        frames = slice(first, first + lanes)
        _weigh(padded[first * hop_length :], hop_length, window, z)
        _transform(z, twiddles)
        for k in range(half // 2 + 1):
            mirrored = z[order[(half - k) % half]]
            _part(z[order[k]], mirrored, halves[k], result[k, frames], result[half - k, frames])
    return result


@compiled
def _weigh(samples: Array, hop_length: int, window: Array, z: Array) -> None:
    """Fill the rows with the weighted samples of each frame: the even ones are real, the odd ones imaginary.

    A few rows at a time, so that a line of the cache is read once and not once for each sample.
    """
    half, lanes = len(z), z.shape[1] // 2
    for start in range(0, half, ROWS):
        for lane in range(lanes):
            for n in range(start, min(start + ROWS, half)):
                z[n, lane] = samples[lane * hop_length + 2 * n] * window[2 * n]
                z[n, lanes + lane] = samples[lane * hop_length + 2 * n + 1] * window[2 * n + 1]


@compiled
def _transform(z: Array, twiddles: Array) -> None:
    """Transform each lane in place (Cooley and Tukey 1965): by radix 4, and last by radix 2 if need be."""
    half = len(z)
    size, stride = half, 1
    while size >= 4:
        quarter = size // 4
        for start in range(0, half, size):
            for n in range(start, start + quarter):
                k = (n - start) * stride
                a, b, c, d = z[n], z[n + quarter], z[n + 2 * quarter], z[n + 3 * quarter]
                _butterfly(a, b, c, d, twiddles[k], twiddles[2 * k], twiddles[3 * k])
        size, stride = quarter, 4 * stride
    if size == 2:
        for n in range(0, half, 2):
            for lane in range(z.shape[1]):
                a, b = z[n, lane], z[n + 1, lane]
                z[n, lane], z[n + 1, lane] = a + b, a - b


@compiled
def _butterfly(a: Array, b: Array, c: Array, d: Array, w1: Array, w2: Array, w3: Array) -> None:
    """Transform four complex numbers of each lane, and turn all but the first."""
    lanes = len(a) // 2
    ar, br, cr, dr = a[:lanes], b[:lanes], c[:lanes], d[:lanes]
    ai, bi, ci, di = a[lanes:], b[lanes:], c[lanes:], d[lanes:]
    w1r, w1i, w2r, w2i, w3r, w3i = w1[0], w1[1], w2[0], w2[1], w3[0], w3[1]
    for lane in range(lanes):
        even_r, even_i = ar[lane] + cr[lane], ai[lane] + ci[lane]
        apart_r, apart_i = ar[lane] - cr[lane], ai[lane] - ci[lane]
        odd_r, odd_i = br[lane] + dr[lane], bi[lane] + di[lane]
        turned_r, turned_i = bi[lane] - di[lane], dr[lane] - br[lane]  # -i (b - d)
        ar[lane], ai[lane] = even_r + odd_r, even_i + odd_i
        x, y = apart_r + turned_r, apart_i + turned_i
        br[lane], bi[lane] = x * w1r - y * w1i, x * w1i + y * w1r
        x, y = even_r - odd_r, even_i - odd_i
        cr[lane], ci[lane] = x * w2r - y * w2i, x * w2i + y * w2r
        x, y = apart_r - turned_r, apart_i - turned_i
        dr[lane], di[lane] = x * w3r - y * w3i, x * w3i + y * w3r


@compiled
def _part(z: Array, mirrored: Array, w: Array, low: Array, high: Array) -> None:
    """Write the magnitudes at k and at n / 2 - k, from the complex transform at both."""
    lanes = len(low)
    zr, zi, mr, mi = z[:lanes], z[lanes:], mirrored[:lanes], mirrored[lanes:]
    wr, wi = 0.5 * w[0], 0.5 * w[1]
    for lane in range(lanes):
        even_r, even_i = 0.5 * (zr[lane] + mr[lane]), 0.5 * (zi[lane] - mi[lane])
        x, y = zi[lane] + mi[lane], mr[lane] - zr[lane]
        odd_r, odd_i = x * wr - y * wi, x * wi + y * wr
        low[lane] = np.sqrt(np.float32((even_r + odd_r) ** 2 + (even_i + odd_i) ** 2))
        high[lane] = np.sqrt(np.float32((even_r - odd_r) ** 2 + (even_i - odd_i) ** 2))
