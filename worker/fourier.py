"""The short-time Fourier transform: windows of sound to power spectra, many frames at once.

This module owns the transform. It must not know what is made of a spectrum.

Libraries transform one frame after the other. Here `LANES` frames go through each step together, so
that the compiler can use the whole width of the processor and reads each factor once for all of
them. All arithmetic is in one precision and in a fixed order, so that the bits of a frame depend
neither on its neighbours nor on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.fft
import scipy.signal
from numba import literally  # type: ignore[attr-defined]  # it is public, but not in the list that types are read from

from worker.compiled import compiled, for_constants, inlined

Array = Any  # numpy's stubs lose an array's type in arithmetic

Precision = Literal["float64", "float32"]

LANES: Final = 16
"""Frames transformed together; fewer are slower, since each loop has a start. Of more, a part (`_transform`) does not
stay in the first-level cache."""

ROW: Final = 2 * LANES
"""Numbers that hold one complex sample of each frame: first the real parts, then the imaginary ones."""

IMAGINARY: Final = np.uint64(LANES)
"""Where it begins in a row; indices are unsigned since numba then need not look for those from the end."""

BLOCK: Final = 16
"""Samples that are taken from a piece before the next one's: as many as a line of the cache holds."""

SHORTEST: Final = 64
LONGEST: Final = 8192
"""Samples of a frame, from which and up to which `_transform` has stages."""


class Stages(NamedTuple):
    """How a transform of complex numbers is split: by ``radix``, by four, and then by four each part for itself.

    A part has ``part`` rows, and the next one begins ``apart`` rows later: that is one more, since
    rows that are a multiple of 4 KiB apart would take each other's places in the first-level cache.
    """

    radix: int
    part: int
    apart: int

    @staticmethod
    def of(half: int) -> Stages:
        """Return those of a power of two; what a stage by two leaves is a power of four."""
        radix = 4 if half.bit_length() % 2 else 2
        part = half // radix // 4
        return Stages(radix, part, part + 1)


class Factors(NamedTuple):
    """What a transform of n_fft samples, of which win_length are weighted by a periodic Hann window, needs.

    The transform has the precision of the first three.
    """

    window: Array  # (n_fft,), zero outside of win_length; half as high, for `_part` adds what is to be averaged
    twiddles: Array  # (n_fft / 2, 2): cosine and sine of -2 pi k / (n_fft / 2)
    halves: Array  # (n_fft / 2, 2): cosine and sine of -2 pi k / n_fft
    order: Array  # (n_fft / 8,): the row from which on the last stage finds the frequency k, with three more
    rows: Array  # (n_fft,): in which row of `_columns` a sample is
    shifts: Array  # (n_fft,): how many columns it is from the first sample of its frame

    @staticmethod
    @lru_cache(maxsize=16)
    def of(n_fft: int, win_length: int, hop_length: int, precision: Precision) -> Factors:
        """Compute them; ``n_fft`` is a power of two."""
        half = n_fft // 2
        stages = Stages.of(half)
        order, size, stride = np.zeros(half // 4, np.int64), half, 1
        while size > 4:
            radix = stages.radix if size == half else 4
            size //= radix
            order += np.arange(half // 4) // stride % radix * size
            stride *= radix
        order += order // stages.part * (stages.apart - stages.part)
        turns = np.arange(half) / half
        samples = np.arange(n_fft, dtype=np.uint64)
        return Factors(
            _hann(n_fft, win_length, precision) / 2,
            _circle(turns).astype(precision),
            _circle(turns / 2).astype(precision),
            order,
            samples % np.uint64(hop_length),
            samples // np.uint64(hop_length),
        )


def powers(
    samples: npt.NDArray[np.float32],
    margin: int,
    n_fft: int,
    hop_length: int,
    win_length: int,
    precision: Precision = "float64",
) -> Array:
    """Return the squared magnitude of the transform of each frame as float32, shape (n_fft / 2 + 1, columns).

    The frames are the first columns. Silence follows, up to a multiple of `LANES`: a loop over such rows has no rest
    that the compiler takes one by one; of 63 frames that was up to half of its time.

    Args:
        samples: shape (samples,).
        margin: how many zeros are taken to stand before and after the samples.
        n_fft: the length of a frame; powers of two are much faster.
        hop_length: the distance between two frames. All of them are whole, but for one that is longer than everything.
        win_length: how many samples in the middle of a frame are weighted, by a periodic Hann window.
        precision: what is computed in. Whatever it is, the powers are float32.
    """
    n_frames = 1 + max(len(samples) + 2 * margin - n_fft, 0) // hop_length
    if n_fft & (n_fft - 1) or not SHORTEST <= n_fft <= LONGEST:
        return _by_library(samples, margin, n_frames, hop_length, _hann(n_fft, win_length, precision))
    factors = Factors.of(n_fft, win_length, hop_length, precision)
    return _transform(n_fft // 2, precision)(samples, margin, hop_length, n_frames, *factors)


def _by_library(
    samples: npt.NDArray[np.float32], margin: int, n_frames: int, hop_length: int, hann: Array
) -> npt.NDArray[np.float32]:
    """Transform frames of a length that has no stages."""
    padded = np.zeros(max(len(samples) + 2 * margin, len(hann)), np.float32)
    padded[margin : margin + len(samples)] = samples
    framed = np.lib.stride_tricks.sliding_window_view(padded, len(hann))[::hop_length]
    result = np.zeros((len(hann) // 2 + 1, _columns_of(n_frames)), dtype=np.float32)
    for first in range(0, n_frames, LANES):  # all together are too large for the allocator to keep
        frames = slice(first, min(first + LANES, n_frames))
        spectra = scipy.fft.rfft(framed[frames] * hann)
        result[:, frames] = (spectra.real**2 + spectra.imag**2).T
    return result


@compiled
def _columns_of(n_frames: int) -> int:
    return -(-n_frames // LANES) * LANES


@lru_cache(maxsize=16)
def _hann(n_fft: int, win_length: int, precision: Precision) -> Array:
    left = (n_fft - win_length) // 2
    window = np.zeros(n_fft)
    window[left : left + win_length] = scipy.signal.get_window("hann", win_length, fftbins=True)
    return window.astype(precision)


def _circle(turns: Array) -> Array:
    return np.stack([np.cos(2 * np.pi * turns), -np.sin(2 * np.pi * turns)], axis=1)


@lru_cache(maxsize=16)
def _transform(half: int, precision: Precision) -> Callable[..., Array]:
    """Return the transform of frames of 2 * half samples.

    There is machine code for each length and precision: only if the distance between the numbers of a stage is
    known does the compiler see that they do not overlap, and then it is more than three times as
    fast. It sees it in each of three functions, and no longer in one that has all their loops.

    The numbers are fetched from the second-level cache three times: two stages are taken with the
    samples, all but the last of each part (`Stages`) while it is in the first-level cache, and the
    last one with the powers.
    """
    radix, part, apart = Stages.of(half)

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
        filled = _columns_of(n_frames)
        n_columns = filled + 2 * half // hop_length
        columns = _columns(samples, margin, hop_length, n_columns)
        places = rows * np.uint64(n_columns) + shifts
        spectra = np.empty((half + 1) * filled, np.float32)
        z = np.empty(4 * radix * apart * ROW, window.dtype)  # of the precision that was asked for
        opening, ending = np.empty(4 * radix * ROW, window.dtype), np.empty(8 * LANES, np.float32)
        for first in range(0, filled, LANES):
            _begin(columns, places, first, window, twiddles, opening, z, radix, part, apart)
            _split(z, twiddles, radix, part, apart)
            _end(z, order, halves, spectra, first, filled, ending, half)
        whole = spectra.reshape(half + 1, filled)
        whole[:, n_frames:] = 0.0
        return whole

    # Each has a place of its own in the cache: two processes that add to one at once can mix them up for good.
    transform.__qualname__ += f"_{half}_{precision}"
    return compiled(transform)


@for_constants
def _begin(
    columns: Array,
    places: Array,
    first: int,
    window: Array,
    twiddles: Array,
    opening: Array,
    z: Array,
    radix: int,
    part: int,
    apart: int,
) -> None:
    """Take the first two stages, from the samples to the parts."""
    literally(radix), literally(part), literally(apart)
    for n in range(part):
        for row in range(4):
            if radix == 4:
                _open_by_four(columns, places, first, window, twiddles, n + row * part, opening, row)
            else:
                _open_by_two(columns, places, first, window, twiddles, n + row * part, opening, row)
        for quarter in range(radix):
            _by_four(opening, 4 * quarter, 1, z, 4 * quarter * apart + n, apart, twiddles, n * radix)


@for_constants
def _split(z: Array, twiddles: Array, radix: int, part: int, apart: int) -> None:
    """Take all other stages of each part but the last one."""
    literally(radix), literally(part), literally(apart)
    for start in range(0, 4 * radix * apart, apart):
        _split_part(z, start, part, part, twiddles, 4 * radix * part)
        _split_part(z, start, part, part // 4, twiddles, 4 * radix * part)
        _split_part(z, start, part, part // 16, twiddles, 4 * radix * part)


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
def _butterfly(a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any) -> Any:
    """Transform the complex numbers a + ib, c + id, e + if and g + ih."""
    even_r, even_i, odd_r, odd_i = a + e, b + f, c + g, d + h
    apart_r, apart_i, turned_r, turned_i = a - e, b - f, d - h, g - c  # turned by -i
    return (
        *(even_r + odd_r, even_i + odd_i),
        *(apart_r + turned_r, apart_i + turned_i),
        *(even_r - odd_r, even_i - odd_i),
        *(apart_r - turned_r, apart_i - turned_i),
    )


@inlined
def _turned(x: Any, y: Any, w: Any, v: Any) -> Any:
    """Turn the complex number x + iy by the factor w + iv."""
    return x * w - y * v, x * v + y * w


@inlined
def _turning_butterfly(
    a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any, w1: Any, v1: Any, w2: Any, v2: Any, w3: Any, v3: Any
) -> Any:
    """Transform four complex numbers as `_butterfly` does, and turn all but the first by factors w + iv."""
    x0, y0, x1, y1, x2, y2, x3, y3 = _butterfly(a, b, c, d, e, f, g, h)
    return (x0, y0, *_turned(x1, y1, w1, v1), *_turned(x2, y2, w2, v2), *_turned(x3, y3, w3, v3))


@inlined
def _open_by_four(
    columns: Array, places: Array, first: int, window: Array, twiddles: Array, n: int, opening: Array, row: int
) -> None:
    """Weigh the samples, the even ones real and the odd ones imaginary, and take butterfly n of the first stage.

    Of every fourth row of ``opening``, from ``row`` on, each is for another of the transforms that are left.
    """
    quarter, start = len(twiddles) // 4, np.uint64(first)
    i, j, k, m = 2 * n, 2 * (n + quarter), 2 * (n + 2 * quarter), 2 * (n + 3 * quarter)
    a, b, c, d = places[i] + start, places[i + 1] + start, places[j] + start, places[j + 1] + start
    e, f, g, h = places[k] + start, places[k + 1] + start, places[m] + start, places[m + 1] + start
    ra, rb, rc, rd = window[i], window[i + 1], window[j], window[j + 1]
    re, rf, rg, rh = window[k], window[k + 1], window[m], window[m + 1]
    w1, v1, w2, v2 = twiddles[n, 0], twiddles[n, 1], twiddles[2 * n, 0], twiddles[2 * n, 1]
    w3, v3 = twiddles[3 * n, 0], twiddles[3 * n, 1]
    for lane in range(np.uint64(LANES)):
        p = np.uint64(row * ROW) + lane
        q, r, s = p + np.uint64(4 * ROW), p + np.uint64(8 * ROW), p + np.uint64(12 * ROW)
        x0, y0, x1, y1, x2, y2, x3, y3 = _turning_butterfly(
            *(columns[a + lane] * ra, columns[b + lane] * rb, columns[c + lane] * rc, columns[d + lane] * rd),
            *(columns[e + lane] * re, columns[f + lane] * rf, columns[g + lane] * rg, columns[h + lane] * rh),
            *(w1, v1, w2, v2, w3, v3),
        )
        opening[p], opening[p + IMAGINARY], opening[q], opening[q + IMAGINARY] = x0, y0, x1, y1
        opening[r], opening[r + IMAGINARY], opening[s], opening[s + IMAGINARY] = x2, y2, x3, y3


@inlined
def _open_by_two(
    columns: Array, places: Array, first: int, window: Array, twiddles: Array, n: int, opening: Array, row: int
) -> None:
    """Do what `_open_by_four` does where the first stage is by two."""
    i, j, start = 2 * n, 2 * n + len(twiddles), np.uint64(first)
    a, b, c, d = places[i] + start, places[i + 1] + start, places[j] + start, places[j + 1] + start
    ra, rb, rc, rd = window[i], window[i + 1], window[j], window[j + 1]
    w, v = twiddles[n, 0], twiddles[n, 1]
    for lane in range(np.uint64(LANES)):
        p = np.uint64(row * ROW) + lane
        q = p + np.uint64(4 * ROW)
        e, f, g, h = columns[a + lane] * ra, columns[b + lane] * rb, columns[c + lane] * rc, columns[d + lane] * rd
        opening[p], opening[p + IMAGINARY] = e + g, f + h
        opening[q], opening[q + IMAGINARY] = _turned(e - g, f - h, w, v)


@inlined
def _by_four(
    source: Array, row: int, step: int, target: Array, place: int, apart: int, twiddles: Array, turn: int
) -> None:
    """Take a butterfly from four rows of ``source`` to four of ``target``, turned by multiples of ``turn``."""
    w1, v1, w2, v2 = twiddles[turn, 0], twiddles[turn, 1], twiddles[2 * turn, 0], twiddles[2 * turn, 1]
    w3, v3 = twiddles[3 * turn, 0], twiddles[3 * turn, 1]
    near, far = np.uint64(step * ROW), np.uint64(apart * ROW)
    for lane in range(np.uint64(LANES)):
        i, p = np.uint64(row * ROW) + lane, np.uint64(place * ROW) + lane
        j, k, m = i + near, i + 2 * near, i + 3 * near
        q, r, s = p + far, p + 2 * far, p + 3 * far
        x0, y0, x1, y1, x2, y2, x3, y3 = _turning_butterfly(
            *(source[i], source[i + IMAGINARY], source[j], source[j + IMAGINARY]),
            *(source[k], source[k + IMAGINARY], source[m], source[m + IMAGINARY]),
            *(w1, v1, w2, v2, w3, v3),
        )
        target[p], target[p + IMAGINARY], target[q], target[q + IMAGINARY] = x0, y0, x1, y1
        target[r], target[r + IMAGINARY], target[s], target[s + IMAGINARY] = x2, y2, x3, y3


@inlined
def _split_part(z: Array, start: int, part: int, size: int, twiddles: Array, half: int) -> None:
    """Split the transforms of ``size`` numbers in a part into four each, in place, but for the last stage."""
    if size < 16:
        return
    quarter = size // 4
    for first in range(start, start + part, size):
        for n in range(quarter):
            _by_four(z, first + n, quarter, z, first + n, quarter, twiddles, n * (half // size))


@inlined
def _last(z: Array, p: Any) -> Any:
    """Take a butterfly of the last stage, of four rows that follow each other; it has no factors."""
    q, r, s = p + np.uint64(ROW), p + np.uint64(2 * ROW), p + np.uint64(3 * ROW)
    return _butterfly(
        *(z[p], z[p + IMAGINARY], z[q], z[q + IMAGINARY]),
        *(z[r], z[r + IMAGINARY], z[s], z[s + IMAGINARY]),
    )


@inlined
def _part(zr: Any, zi: Any, mr: Any, mi: Any, wr: Any, wi: Any) -> Any:
    """Return the powers at frequencies k and n / 2 - k, of which the transform of n / 2 numbers had z and m."""
    even_r, even_i = zr + mr, zi - mi
    odd_r, odd_i = _turned(zi + mi, mr - zr, wr, wi)
    return (even_r + odd_r) ** 2 + (even_i + odd_i) ** 2, (even_r - odd_r) ** 2 + (even_i - odd_i) ** 2


@for_constants
def _end(
    z: Array, order: Array, halves: Array, spectra: Array, first: int, n_frames: int, ending: Array, half: int
) -> None:
    """Take the last stage, and write the powers of `LANES` frames, of which n real numbers were n / 2 complex ones."""
    literally(half)
    quarter = half // 4
    width, row = np.uint64(n_frames), np.uint64(LANES)
    rows = np.uint64(quarter) * width
    for k in range(1, quarter // 2 + 1):
        here, mirrored = np.uint64(order[k] * ROW), np.uint64(order[quarter - k] * ROW)
        w0, v0, w1, v1 = halves[k, 0], halves[k, 1], halves[k + quarter, 0], halves[k + quarter, 1]
        w2, v2 = halves[k + 2 * quarter, 0], halves[k + 2 * quarter, 1]
        w3, v3 = halves[k + 3 * quarter, 0], halves[k + 3 * quarter, 1]
        for lane in range(row):
            a, b, c, d, e, f, g, h = _last(z, here + lane)
            i, j, m, n, o, p, q, r = _last(z, mirrored + lane)
            ending[lane], ending[lane + 7 * row] = _part(a, b, q, r, w0, v0)
            ending[lane + row], ending[lane + 6 * row] = _part(c, d, o, p, w1, v1)
            ending[lane + 2 * row], ending[lane + 5 * row] = _part(e, f, m, n, w2, v2)
            ending[lane + 3 * row], ending[lane + 4 * row] = _part(g, h, i, j, w3, v3)
        low, high = np.uint64(k) * width + np.uint64(first), np.uint64(quarter - k) * width + np.uint64(first)
        for number in range(np.uint64(4)):
            _keep(ending, number * row, spectra, low + number * rows)
            _keep(ending, (number + np.uint64(4)) * row, spectra, high + number * rows)
    w0, v0, w1, v1 = halves[0, 0], halves[0, 1], halves[quarter, 0], halves[quarter, 1]
    w2, v2 = halves[2 * quarter, 0], halves[2 * quarter, 1]
    for lane in range(row):  # the frequency 0 and its multiples are their own mirror
        a, b, c, d, e, f, g, h = _last(z, lane)
        ending[lane], ending[lane + 4 * row] = _part(a, b, a, b, w0, v0)
        ending[lane + row], ending[lane + 3 * row] = _part(c, d, g, h, w1, v1)
        ending[lane + 2 * row], _ = _part(e, f, e, f, w2, v2)
    for number in range(np.uint64(5)):
        _keep(ending, number * row, spectra, np.uint64(first) + number * rows)


@inlined
def _keep(ending: Array, row: Any, spectra: Array, place: Any) -> None:
    """Copy the powers of a frequency."""
    for lane in range(np.uint64(0), np.uint64(LANES), np.uint64(8)):
        _copy_eight(ending, row + lane, spectra, place + lane)


@inlined
def _copy_eight(source: Array, i: Any, target: Array, j: Any) -> None:
    """Copy numbers, of which all are read before one is written: so the compiler need not find out if they overlap."""
    i1, i2, i3, i4 = i + np.uint64(1), i + np.uint64(2), i + np.uint64(3), i + np.uint64(4)
    i5, i6, i7 = i + np.uint64(5), i + np.uint64(6), i + np.uint64(7)
    j1, j2, j3, j4 = j + np.uint64(1), j + np.uint64(2), j + np.uint64(3), j + np.uint64(4)
    j5, j6, j7 = j + np.uint64(5), j + np.uint64(6), j + np.uint64(7)
    a, b, c, d = source[i], source[i1], source[i2], source[i3]
    e, f, g, h = source[i4], source[i5], source[i6], source[i7]
    target[j], target[j1], target[j2], target[j3] = a, b, c, d
    target[j4], target[j5], target[j6], target[j7] = e, f, g, h
