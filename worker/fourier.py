"""The short-time Fourier transform: windows of sound to power spectra, many frames at once.

This module owns the transform. It must not know what is made of a spectrum.

Libraries transform one frame after the other. Here `LANES` frames go through each step together, so
that the compiler can use the whole width of the processor and reads each factor once for all of
them. All arithmetic is float64 and in a fixed order, so that the bits of a frame depend neither on
its neighbours nor on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.fft
import scipy.signal

from worker.compiled import compiled, inlined

Array = Any  # numpy's stubs lose an array's type in arithmetic

LANES: Final = 32
"""Frames transformed together; fewer are slower, since each loop has a start, and more leave the second-level cache."""

ROW: Final = 2 * LANES
"""Numbers that hold one complex sample of each frame: first the real parts, then the imaginary ones."""

IMAGINARY: Final = np.uint64(LANES)
"""Where it begins in a row; indices are unsigned since numba then need not look for those from the end."""

BLOCK: Final = 16
"""Samples that are taken from a piece before the next one's: as many as a line of the cache holds."""

LONGEST: Final = 8192
"""Samples of a frame, up to which `_transform` has stages."""


class Factors(NamedTuple):
    """What a transform of n_fft samples, of which win_length are weighted by a periodic Hann window, needs."""

    window: Array  # (n_fft,), zero outside of win_length; half as high, for `_part` adds what is to be averaged
    twiddles: Array  # (n_fft / 2, 2): cosine and sine of -2 pi k / (n_fft / 2)
    halves: Array  # (n_fft / 4 + 1, 2): cosine and sine of -2 pi k / n_fft
    order: Array  # (n_fft / 2,): where the stages leave the frequency k
    rows: Array  # (n_fft,): in which row of `_columns` a sample is
    shifts: Array  # (n_fft,): how many columns it is from the first sample of its frame

    @staticmethod
    @lru_cache(maxsize=16)
    def of(n_fft: int, win_length: int, hop_length: int) -> Factors:
        """Compute them; ``n_fft`` is a power of two."""
        half = n_fft // 2
        order, size, stride = np.zeros(half, np.int64), half, 1
        while size > 1:
            radix = 4 if size % 4 == 0 else 2
            size //= radix
            order += np.arange(half) // stride % radix * size
            stride *= radix
        turns = np.arange(half) / half
        samples = np.arange(n_fft, dtype=np.uint64)
        return Factors(
            _hann(n_fft, win_length) / 2,
            _circle(turns),
            _circle(turns[: half // 2 + 1] / 2),
            order,
            samples % np.uint64(hop_length),
            samples // np.uint64(hop_length),
        )


def powers(samples: npt.NDArray[np.float32], margin: int, n_fft: int, hop_length: int, win_length: int) -> Array:
    """Return the squared magnitude of the transform of each frame as float32, shape (n_fft / 2 + 1, frames).

    Args:
        samples: shape (samples,).
        margin: how many zeros are taken to stand before and after the samples.
        n_fft: the length of a frame; powers of two are much faster.
        hop_length: the distance between two frames. All of them are whole, but for one that is longer than everything.
        win_length: how many samples in the middle of a frame are weighted, by a periodic Hann window.
    """
    n_frames = 1 + max(len(samples) + 2 * margin - n_fft, 0) // hop_length
    if n_fft & (n_fft - 1) or not 8 <= n_fft <= LONGEST:
        return _by_library(samples, margin, n_frames, hop_length, _hann(n_fft, win_length))
    spectra = _transform(n_fft // 2)(samples, margin, hop_length, n_frames, *Factors.of(n_fft, win_length, hop_length))
    return np.ascontiguousarray(spectra[:, :n_frames])


def _by_library(
    samples: npt.NDArray[np.float32], margin: int, n_frames: int, hop_length: int, hann: Array
) -> npt.NDArray[np.float32]:
    """Transform frames of a length that has no stages."""
    padded = np.zeros(max(len(samples) + 2 * margin, len(hann)), np.float32)
    padded[margin : margin + len(samples)] = samples
    framed = np.lib.stride_tricks.sliding_window_view(padded, len(hann))[::hop_length]
    result = np.empty((len(hann) // 2 + 1, n_frames), dtype=np.float32)
    for first in range(0, n_frames, LANES):  # all together are too large for the allocator to keep
        frames = slice(first, first + LANES)
        spectra = scipy.fft.rfft(framed[frames] * hann)
        result[:, frames] = (spectra.real**2 + spectra.imag**2).T
    return result


@lru_cache(maxsize=16)
def _hann(n_fft: int, win_length: int) -> Array:
    left = (n_fft - win_length) // 2
    window = np.zeros(n_fft)
    window[left : left + win_length] = scipy.signal.get_window("hann", win_length, fftbins=True)
    return window


def _circle(turns: Array) -> Array:
    return np.stack([np.cos(2 * np.pi * turns), -np.sin(2 * np.pi * turns)], axis=1)


@lru_cache(maxsize=16)
def _transform(half: int) -> Callable[..., Array]:
    """Return the transform of frames of 2 * half samples.

    There is machine code for each length: only if the distance between the numbers of a stage is
    known does the compiler see that they do not overlap, and then it is more than three times as fast.
    """

    def transform(
        samples: Array,
        margin: int,
        hop_length: int,
        n_frames: int,
        window: Array,
        twiddles: Array,
        halves: Array,
        order: Array,
        rows: Array,
        shifts: Array,
    ) -> Array:
        filled = max(n_frames, LANES)
        n_columns = filled + 2 * half // hop_length
        columns = _columns(samples, margin, hop_length, n_columns)
        places = rows * np.uint64(n_columns) + shifts
        spectra = np.empty((half + 1, filled), np.float32)
        z = np.empty(half * ROW)
        for block in range(0, n_frames, LANES):
            first = min(block, filled - LANES)  # the last block is full too: some frames are done twice
            _open(columns, places, first, window, twiddles, z, half)
            _by_four(z, twiddles, half, half // 4)
            _by_four(z, twiddles, half, half // 16)
            _by_four(z, twiddles, half, half // 64)
            _by_four(z, twiddles, half, half // 256)
            _by_four(z, twiddles, half, half // 1024)
            _by_two(z, half)
            _part(z, order, halves, spectra, first)
        return spectra

    # Each length has a place of its own in the cache: two processes that add to one at once can mix them up for good.
    transform.__qualname__ += f"_{half}"
    return compiled(transform)


@compiled
def _columns(samples: Array, margin: int, hop_length: int, n_columns: int) -> Array:
    """Cut the samples every hop_length, and stand the pieces side by side: shape (hop_length * n_columns,).

    Sample n of frame t is then in row n % hop_length and column t + n // hop_length: the same
    sample of neighbouring frames is in neighbouring places. What is missing at the ends is zero.
    """
    columns = np.empty(hop_length * n_columns, np.float32)
    for top in range(0, hop_length, BLOCK):
        rows = min(BLOCK, hop_length - top)
        for column in range(n_columns):
            source, target = column * hop_length + top - margin, np.uint64(top * n_columns + column)
            if rows == BLOCK and 0 <= source <= len(samples) - BLOCK:
                piece = np.uint64(source)  # nearly all are so, with no bounds to check for each sample
                for row in range(np.uint64(BLOCK)):
                    columns[target + row * np.uint64(n_columns)] = samples[piece + row]
            else:
                for row in range(rows):
                    there = 0 <= source + row < len(samples)
                    columns[target + np.uint64(row * n_columns)] = samples[source + row] if there else 0.0
    return columns


@inlined
def _butterfly(
    a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any, w1: Any, v1: Any, w2: Any, v2: Any, w3: Any, v3: Any
) -> Any:
    """Transform the complex numbers a + ib, c + id, e + if and g + ih, and turn all but the first by factors w + iv."""
    even_r, even_i, odd_r, odd_i = a + e, b + f, c + g, d + h
    apart_r, apart_i, turned_r, turned_i = a - e, b - f, d - h, g - c  # turned by -i
    x1, y1 = apart_r + turned_r, apart_i + turned_i
    x2, y2 = even_r - odd_r, even_i - odd_i
    x3, y3 = apart_r - turned_r, apart_i - turned_i
    return (
        *(even_r + odd_r, even_i + odd_i),
        *(x1 * w1 - y1 * v1, x1 * v1 + y1 * w1),
        *(x2 * w2 - y2 * v2, x2 * v2 + y2 * w2),
        *(x3 * w3 - y3 * v3, x3 * v3 + y3 * w3),
    )


@inlined
def _open(columns: Array, places: Array, first: int, window: Array, twiddles: Array, z: Array, half: int) -> None:
    """Weigh the samples, the even ones real and the odd ones imaginary, and take the first stage with them."""
    quarter = half // 4
    apart, start = np.uint64(quarter * ROW), np.uint64(first)
    for n in range(quarter):
        i, j, k, m = 2 * n, 2 * (n + quarter), 2 * (n + 2 * quarter), 2 * (n + 3 * quarter)
        a, b, c, d = places[i] + start, places[i + 1] + start, places[j] + start, places[j + 1] + start
        e, f, g, h = places[k] + start, places[k + 1] + start, places[m] + start, places[m + 1] + start
        ra, rb, rc, rd = window[i], window[i + 1], window[j], window[j + 1]
        re, rf, rg, rh = window[k], window[k + 1], window[m], window[m + 1]
        w1, v1, w2, v2 = twiddles[n, 0], twiddles[n, 1], twiddles[2 * n, 0], twiddles[2 * n, 1]
        w3, v3 = twiddles[3 * n, 0], twiddles[3 * n, 1]
        for lane in range(np.uint64(LANES)):
            p = np.uint64(n * ROW) + lane
            q, r, s = p + apart, p + 2 * apart, p + 3 * apart
            z[p], z[p + IMAGINARY], z[q], z[q + IMAGINARY], z[r], z[r + IMAGINARY], z[s], z[s + IMAGINARY] = _butterfly(
                *(columns[a + lane] * ra, columns[b + lane] * rb, columns[c + lane] * rc, columns[d + lane] * rd),
                *(columns[e + lane] * re, columns[f + lane] * rf, columns[g + lane] * rg, columns[h + lane] * rh),
                *(w1, v1, w2, v2, w3, v3),
            )


@inlined
def _by_four(z: Array, twiddles: Array, half: int, size: int) -> None:
    """Split transforms of ``size`` numbers into four each, in place (Cooley and Tukey 1965), if they are as large."""
    if size < 4:
        return
    quarter = size // 4
    apart, stride = np.uint64(quarter * ROW), half // size
    for start in range(0, half, size):
        for n in range(quarter):
            k = n * stride
            w1, v1, w2, v2 = twiddles[k, 0], twiddles[k, 1], twiddles[2 * k, 0], twiddles[2 * k, 1]
            w3, v3 = twiddles[3 * k, 0], twiddles[3 * k, 1]
            for lane in range(np.uint64(LANES)):
                p = np.uint64((start + n) * ROW) + lane
                q, r, s = p + apart, p + 2 * apart, p + 3 * apart
                z[p], z[p + IMAGINARY], z[q], z[q + IMAGINARY], z[r], z[r + IMAGINARY], z[s], z[s + IMAGINARY] = (
                    _butterfly(
                        *(z[p], z[p + IMAGINARY], z[q], z[q + IMAGINARY]),
                        *(z[r], z[r + IMAGINARY], z[s], z[s + IMAGINARY]),
                        *(w1, v1, w2, v2, w3, v3),
                    )
                )


@inlined
def _by_two(z: Array, half: int) -> None:
    """Transform pairs of numbers, in place: the last stage if ``half`` is no power of four."""
    if half in (8, 32, 128, 512, 2048):
        for start in range(0, half * ROW, 2 * ROW):
            for number in range(np.uint64(ROW)):
                p = np.uint64(start) + number
                q = p + np.uint64(ROW)
                z[p], z[q] = z[p] + z[q], z[p] - z[q]


@inlined
def _part(z: Array, order: Array, halves: Array, spectra: Array, first: int) -> None:
    """Write the powers of `LANES` frames, from the transform of n / 2 complex numbers that were n real ones."""
    half = len(order)
    rows = z.reshape(half, ROW)
    for k in range(half // 2 + 1):
        low, high = spectra[k, first : first + LANES], spectra[half - k, first : first + LANES]
        here, mirrored = rows[order[k]], rows[order[(half - k) % half]]
        wr, wi = halves[k, 0], halves[k, 1]
        for lane in range(LANES):
            zr, zi, mr, mi = here[lane], here[LANES + lane], mirrored[lane], mirrored[LANES + lane]
            even_r, even_i = zr + mr, zi - mi
            x, y = zi + mi, mr - zr
            odd_r, odd_i = x * wr - y * wi, x * wi + y * wr
            low[lane] = (even_r + odd_r) ** 2 + (even_i + odd_i) ** 2
            high[lane] = (even_r - odd_r) ** 2 + (even_i - odd_i) ** 2
