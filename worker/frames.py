"""One waveform's frames: from samples to the numbers that describe each frame.

This module owns every descriptor that follows from the short-time Fourier transform. It must not
know how sound is cut into windows, or how the frames of a window become features.

The numbers are librosa 0.11's (McFee et al. 2015), waveform by waveform, to a few roundings: frames
are weighted and transformed in float64 (unless float32 is asked for), their power is rounded to
float32, and the clamp of ``top_db`` is relative to the loudest band of that waveform. What librosa
computes anew on each call (window, filterbank, band edges) is kept. Nothing here calls BLAS, and no operation spans two
waveforms, so no bit depends on what else is computed, or on a number of threads.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import Final, Literal, NamedTuple

import numpy as np
import scipy.fft

from worker.compiled import compiled
from worker.filters import Filters, filtered, mel_filters
from worker.windows import Array, FeatureSet, Floats, Stft, Window

Family = Literal[
    "mel", "mfcc", "delta", "delta2", "centroid", "bandwidth", "rolloff", "flatness", "contrast", "zcr", "rms"
]
"""What is computed for every frame: "mel" is the log-mel spectrum in dB, "delta" and "delta2" are
the MFCCs' slope and curvature, the rest carry librosa's names."""

AMIN: Final = 1e-10  # librosa's floor under a power before its logarithm
ROLLOFF: Final = 0.85  # librosa's share of the magnitude below the roll-off frequency
ZERO: Final = 1e-10  # librosa's amplitude up to which a sample counts as zero, hence as positive
TINY: Final = np.finfo(np.float32).tiny  # librosa normalises a spectrum only if it sums to this much

CONTRAST_FMIN: Final = 200.0  # Hz, the top of librosa's lowest contrast band; each further band is an octave
CONTRAST_BANDS: Final = 6  # octaves above CONTRAST_FMIN, as far as they start below Nyquist
CONTRAST_QUANTILE: Final = 0.02  # the share of a band's bins that make its peak and its valley
CONTRAST_TOP_DB: Final = 80.0

FLOAT32_DB: Final = 80.0  # so far under the loudest band, one of a transform in float32 is 0.002 dB off at most

# Least-squares slope and curvature over nine frames (Savitzky and Golay 1964, orders 1 and 2).
_STEPS = np.arange(-4, 5)
SLOPE: Final = _STEPS / 60
CURVATURE: Final = (3 * _STEPS**2 - 20) / 462


class FrameSpec(FeatureSet, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that, with a sample rate, decides what a frame's numbers are.

    Lengths are in samples; ``fmin`` and ``fmax`` are in Hz, and ``fmax`` None means Nyquist;
    ``top_db`` None means no clamp. For ``center`` see `worker.windows.Stft`.
    """

    n_fft: int = 1024
    hop_length: int = 512
    win_length: int = 1024
    center: bool = True
    n_mels: int = 40
    fmin: float = 0.0
    fmax: float | None = None
    n_mfcc: int = 20
    top_db: float | None = 80.0

    @property
    def stft(self) -> Stft:
        """The settings of the transform: sets that have them equal share it."""
        return Stft(self.n_fft, self.hop_length, self.win_length, self.center)

    def checks(self, sample_rate: int, window_samples: int) -> tuple[tuple[str, bool, str], ...]:
        """Return settings, whether they hold, and what was expected; a subclass adds its own."""
        nyquist = sample_rate / 2
        top = nyquist if self.fmax is None else self.fmax
        return (
            (
                "n_fft",
                2 <= self.n_fft <= window_samples,
                f"2 to {window_samples}, the samples of a window; give longer windows or a smaller n_fft",
            ),
            ("win_length", 1 <= self.win_length <= self.n_fft, f"1 to n_fft, which is {self.n_fft}"),
            (
                "hop_length",
                1 <= self.hop_length <= self.win_length,
                f"1 to win_length, which is {self.win_length}: a longer hop leaves samples unheard in between",
            ),
            ("fmax", 0 < top <= nyquist, f"at most half of sample_rate, which is {nyquist:g} Hz, or none for that"),
            ("fmin", 0 <= self.fmin < top, f"0 to less than fmax, which is {top:g} Hz"),
            ("n_mels", self.n_mels >= 1, "at least 1"),
            ("n_mfcc", 1 <= self.n_mfcc <= self.n_mels, f"1 to n_mels, which is {self.n_mels}"),
            ("top_db", self.top_db is None or 0 < self.top_db < np.inf, "more than 0 dB, or none for no clamp"),
        )

    def needs_float64(self) -> str:
        """Return which settings look at what is too quiet beside the rest for transforms in float32."""
        return "" if self.top_db is not None and self.top_db <= FLOAT32_DB else f"top_db {self.top_db}"


class Bands(NamedTuple):
    """Neighbouring bins, and how many of them make the peak or the valley of each band; shape (bands,) each."""

    starts: Array
    stops: Array
    counts: Array


class Tables(NamedTuple):
    """What a spec fixes and librosa would compute on every call."""

    mel: Filters
    cosines: Filters  # float64: in float32 an MFCC would be 7e-4 off
    frequencies: Array  # (bins,), Hz
    contrast: Bands

    @classmethod
    def of(cls, spec: FrameSpec, sample_rate: int, families: Collection[Family]) -> Tables:
        """Compute the tables for a spec at a rate, and the families that will be asked for.

        Raises:
            ValueError: the mel filters, or the contrast bands if they are among ``families``, are
                finer than the resolution of n_fft.
        """
        frequencies = np.fft.rfftfreq(spec.n_fft, 1 / sample_rate)
        fmax = sample_rate / 2 if spec.fmax is None else spec.fmax
        mel, bands = (
            Filters.of(mel_filters(sample_rate, spec.n_fft, spec.n_mels, spec.fmin, fmax)),
            _contrast_bands(sample_rate, frequencies),
        )
        if "contrast" in families and (bands.starts >= bands.stops).any():
            raise ValueError(
                f"families has 'contrast', but n_fft {spec.n_fft} does not resolve its bands; expected more"
            )
        cosines = scipy.fft.dct(np.eye(spec.n_mels), axis=0, type=2, norm="ortho")[: spec.n_mfcc]
        return cls(mel, Filters.of(cosines), frequencies, bands)


class Frames:
    """The frames of one window; each array is computed when it is first asked for.

    ``frames[name]`` is the array of that name as float32 of shape (bands, frames), whether it has
    one band or many. The attributes are what it is made from, which may be float64 still. Those that
    come from the transform have its columns: the frames, and then silence (`worker.fourier.powers`).
    Bins run from 0 Hz to Nyquist.
    """

    def __init__(self, window: Window, spec: FrameSpec, tables: Tables) -> None:
        self._window = window
        self._spec = spec
        self._tables = tables
        self._n_frames = spec.stft.n_frames(window.samples.size)

    def __getitem__(self, name: str) -> Floats:
        return self._rows(name)[:, : self._n_frames]

    def means(self, name: str) -> Array:
        """Return the mean of each band of that name over the frames, float64 of shape (bands,).

        MFCCs are a linear map of the log-mel spectrum, and so is their mean of its mean: the frames need no MFCCs.
        """
        if name == "mfcc":
            return _weighted(self._tables.cosines.weights, self._mel_means)
        return self._mel_means if name == "mel" else _means(self._rows(name), self._n_frames)

    def _rows(self, name: str) -> Floats:
        rows: Array = getattr(self, name)
        bands: Floats = rows.reshape(-1, rows.shape[-1]).astype(np.float32, copy=False)
        return bands

    @cached_property
    def stft(self) -> Array:
        """Magnitude of the short-time Fourier transform, (bins, columns)."""
        return self._window.magnitude(self._spec.stft)

    @cached_property
    def power(self) -> Array:
        """Squared magnitude, (bins, columns)."""
        return self._window.power(self._spec.stft)

    @cached_property
    def mel_power(self) -> Array:
        """Power in each mel filter, (n_mels, columns)."""
        return filtered(*self._tables.mel, self.power)

    @cached_property
    def mel(self) -> Array:
        """Log-mel spectrum in dB, (n_mels, columns), at most ``top_db`` below its loudest number."""
        return _to_db(self.mel_power, self._spec.top_db)

    @cached_property
    def _mel_means(self) -> Array:
        return _means(self._rows("mel"), self._n_frames)

    @cached_property
    def mfcc(self) -> Array:
        """Mel-frequency cepstral coefficients (Davis and Mermelstein 1980), (n_mfcc, columns)."""
        return filtered(*self._tables.cosines, self.mel)

    @cached_property
    def delta(self) -> Array:
        """Slope of the MFCCs over nine frames, (n_mfcc, frames)."""
        return _savgol(self.mfcc, SLOPE, self._n_frames)

    @cached_property
    def delta2(self) -> Array:
        """Curvature of the MFCCs over nine frames, (n_mfcc, frames)."""
        return _savgol(self.mfcc, CURVATURE, self._n_frames)

    @cached_property
    def _shape(self) -> Array:
        return _shapes(self.stft, self._tables.frequencies, np.float32(ROLLOFF))

    @property
    def centroid(self) -> Array:
        """Mean frequency, weighted by magnitude, in Hz, (columns,)."""
        return self._shape[0]

    @property
    def bandwidth(self) -> Array:
        """Standard deviation of frequency, weighted by magnitude, in Hz, (columns,)."""
        return self._shape[1]

    @property
    def rolloff(self) -> Array:
        """Frequency below which lies `ROLLOFF` of the magnitude, in Hz, (columns,)."""
        return self._shape[2]

    @cached_property
    def flatness(self) -> Array:
        """Geometric over arithmetic mean of the power: 1 for white noise, 0 for a tone, (columns,)."""
        return _flatness(self.power, np.float32(AMIN))

    @cached_property
    def contrast(self) -> Array:
        """Peak over valley in dB of each octave band (Jiang et al. 2002), (bands, columns)."""
        valleys, peaks = _extremes(self.stft, *self._tables.contrast)
        return _to_db(peaks, CONTRAST_TOP_DB) - _to_db(valleys, CONTRAST_TOP_DB)

    @cached_property
    def zcr(self) -> Array:
        """Share of neighbouring samples between which the sign changes, (frames,)."""
        stft = self._spec.stft
        return _crossing_rates(self._window.samples, stft.margin, stft.n_fft, stft.hop_length, self._n_frames)

    @cached_property
    def rms(self) -> Array:
        """Root mean square of the samples, before any weighting, (frames,)."""
        stft = self._spec.stft
        return _root_mean_squares(self._window.samples, stft.margin, stft.n_fft, stft.hop_length, self._n_frames)


@compiled
def _weighted(rows: Array, weights: Array) -> Array:
    """Return the weighted sum of each row, of as many columns as there are weights, shape (rows,).

    Four rows are added up at a time, since each addition waits for the last one.
    """
    n_rows, n_columns = len(rows), len(weights)
    sums = np.zeros(n_rows)
    for row in range(0, n_rows - 3, 4):
        a = b = c = d = 0.0
        for t in range(n_columns):
            a += weights[t] * rows[row, t]
            b += weights[t] * rows[row + 1, t]
            c += weights[t] * rows[row + 2, t]
            d += weights[t] * rows[row + 3, t]
        sums[row], sums[row + 1], sums[row + 2], sums[row + 3] = a, b, c, d
    for row in range(n_rows // 4 * 4, n_rows):
        for t in range(n_columns):
            sums[row] += weights[t] * rows[row, t]
    return sums


@compiled
def _means(rows: Floats, n_frames: int) -> Array:
    """Return the mean of each row over its first ``n_frames`` columns, shape (rows,)."""
    return _weighted(rows, np.ones(n_frames)) / n_frames


def _to_db(power: Array, top_db: float | None) -> Array:
    """Return power, shape (bands, columns), in dB, at most ``top_db`` below its loudest number."""
    db = np.maximum(power, AMIN)
    np.log10(db, out=db)
    _scale_and_clamp(db, np.inf if top_db is None else top_db)
    return db


@compiled
def _scale_and_clamp(bels: Array, top_db: float) -> None:
    """Make decibels of bels, shape (bands, columns), in place; none is more than ``top_db`` below the loudest."""
    n_bands, n_columns = bels.shape
    loudest = np.full(n_columns, -np.inf, bels.dtype)  # of each frame, so that the compiler compares several at once
    for band in range(n_bands):
        for t in range(n_columns):
            bels[band, t] *= 10.0
            loudest[t] = max(loudest[t], bels[band, t])
    quietest = loudest.max() - top_db
    for band in range(n_bands):
        for t in range(n_columns):
            bels[band, t] = max(bels[band, t], quietest)


@compiled
def _savgol(rows: Array, kernel: Array, n_frames: int) -> Array:
    """Differentiate along the frames as ``librosa.feature.delta`` does: shape (rows, frames).

    Its "interp" mode fits a polynomial to the outer nine frames. The derivative taken is the
    polynomial's highest, so it is the same for all nine. With fewer frames, mode "nearest".
    """
    reach = len(kernel) // 2
    derivatives = np.zeros((len(rows), n_frames))
    for row in range(len(rows)):
        derivative = derivatives[row]
        if n_frames < len(kernel):
            for t in range(n_frames):
                for step in range(len(kernel)):
                    derivative[t] += kernel[step] * rows[row, min(max(t + step - reach, 0), n_frames - 1)]
            continue
        fitted = derivative[reach : n_frames - reach]
        for step in range(len(kernel)):
            for t in range(len(fitted)):
                fitted[t] += kernel[step] * rows[row, t + step]
        derivative[:reach] = fitted[0]
        derivative[n_frames - reach :] = fitted[-1]
    return derivatives


@compiled
def _shapes(magnitudes: Floats, frequencies: Array, share: np.float32) -> Array:
    """Return centroid, bandwidth and roll-off at ``share`` of each frame, shape (3, columns).

    The inner loops run over the frames, so that the compiler computes several at once.
    """
    n_bins, n_columns = magnitudes.shape
    total = np.zeros(n_columns)
    below = np.zeros(n_columns, np.float32)  # librosa accumulates in the type of the magnitudes
    shapes = np.zeros((3, n_columns))
    centroid, bandwidth, rolloff = shapes[0], shapes[1], shapes[2]
    for k in range(n_bins):
        for t in range(n_columns):
            total[t] += magnitudes[k, t]
            below[t] += magnitudes[k, t]
            centroid[t] += frequencies[k] * magnitudes[k, t]
    for t in range(n_columns):
        total[t] = 1.0 if total[t] < TINY else total[t]
        centroid[t] /= total[t]
    enough = share * below
    below[:] = 0.0
    for k in range(n_bins):
        for t in range(n_columns):
            bandwidth[t] += (frequencies[k] - centroid[t]) ** 2 * magnitudes[k, t]
            rolloff[t] += below[t] < enough[t]
            below[t] += magnitudes[k, t]
    for t in range(n_columns):
        bandwidth[t] = np.sqrt(bandwidth[t] / total[t])
        rolloff[t] = frequencies[max(0, int(rolloff[t]) - 1)]
    return shapes


@compiled
def _flatness(power: Floats, amin: np.float32) -> Array:
    """Return the spectral flatness of each frame, shape (columns,); no power counts for less than ``amin``.

    A logarithm of a product of sixteen powers takes the time of one, and stays within float64.
    """
    n_bins, n_columns = power.shape
    arithmetic, logarithm, product = np.zeros(n_columns), np.zeros(n_columns), np.ones(n_columns)
    for k in range(n_bins):
        for t in range(n_columns):
            floored = max(power[k, t], amin)
            arithmetic[t] += floored
            product[t] *= floored
        if k % 16 == 15 or k == n_bins - 1:
            for t in range(n_columns):
                logarithm[t] += np.log(product[t])
                product[t] = 1.0
    return np.exp(logarithm / n_bins) / (arithmetic / n_bins)


@compiled
def _crossing_rates(samples: Floats, margin: int, n_fft: int, hop_length: int, n_frames: int) -> Array:
    """Return at which share of the samples of each frame the sign changes, shape (frames,)."""
    crossings = _crossings(samples)
    rates = np.empty(n_frames)
    for t in range(n_frames):
        # Padding repeats the outer samples, so no frame crosses zero beyond them.
        first = max(t * hop_length - margin, 0)
        last = min(t * hop_length - margin + n_fft, len(samples)) - 1
        rates[t] = (crossings[last] - crossings[first]) / n_fft
    return rates


@compiled
def _crossings(samples: Floats) -> Array:
    """Return how often the sign has changed up to each sample, shape (samples,)."""
    floor, n_samples = np.float32(-ZERO), np.uint64(len(samples))
    changes = np.zeros(len(samples), np.uint8)  # apart from the sum, for which each sample has to wait
    for n in range(np.uint64(1), n_samples):
        changes[n] = (samples[n] < floor) != (samples[n - np.uint64(1)] < floor)
    crossings = np.empty(len(samples), np.int32)
    count = np.int32(0)
    for n in range(n_samples):
        count += changes[n]
        crossings[n] = count
    return crossings


@compiled
def _root_mean_squares(samples: Floats, margin: int, n_fft: int, hop_length: int, n_frames: int) -> Array:
    """Return the root mean square of each frame, shape (frames,).

    Frames overlap, and so the samples between two of their starts are squared and added up once for all of them.
    """
    whole, rest = divmod(n_fft, hop_length)
    pieces = np.empty(n_frames + whole)
    for piece in range(len(pieces)):
        pieces[piece] = _energy(samples, piece * hop_length - margin, hop_length)
    means = np.empty(n_frames)
    for t in range(n_frames):
        energy = _energy(samples, (t + whole) * hop_length - margin, rest)
        for piece in range(t, t + whole):
            energy += pieces[piece]
        means[t] = np.sqrt(energy / n_fft)
    return means


@compiled
def _energy(samples: Floats, start: int, count: int) -> float:
    """Return the sum of the squares of ``count`` samples, of those that there are; added up in four places at once."""
    first, last = max(start, 0), min(start + count, len(samples))
    a = b = c = d = 0.0
    for n in range(first, last - 3, 4):
        a += np.float64(samples[n]) ** 2
        b += np.float64(samples[n + 1]) ** 2
        c += np.float64(samples[n + 2]) ** 2
        d += np.float64(samples[n + 3]) ** 2
    for n in range(last - max(last - first, 0) % 4, last):
        a += np.float64(samples[n]) ** 2
    return (a + b) + (c + d)


@compiled
def _extremes(magnitudes: Floats, starts: Array, stops: Array, counts: Array) -> Array:
    """Return the mean of the lowest and of the highest bins of each band, shape (2, bands, columns).

    A band is the bins from ``starts`` to ``stops``, of which ``counts`` are taken at either end. Each bin goes down the
    ranks, and at each of them the more extreme of two stays: without a branch, for many frames at once. Up to about
    thirty ranks (n_fft 4096) that is faster than to look for its place.
    """
    n_columns = magnitudes.shape[1]
    extremes = np.zeros((2, len(counts), n_columns))
    low, high = np.empty(n_columns, np.float32), np.empty(n_columns, np.float32)  # on their way down
    for band in range(len(counts)):
        count = counts[band]
        lowest = np.full((count, n_columns), np.inf, np.float32)  # the most extreme one first
        highest = np.full((count, n_columns), -np.inf, np.float32)
        for k in range(starts[band], stops[band]):
            for t in range(n_columns):
                low[t] = high[t] = magnitudes[k, t]
            for place in range(count):
                least, most = lowest[place], highest[place]
                for t in range(n_columns):
                    a, b, c, d = least[t], low[t], most[t], high[t]
                    least[t], low[t] = min(a, b), max(a, b)
                    most[t], high[t] = max(c, d), min(c, d)
        valley, peak = extremes[0, band], extremes[1, band]
        for place in range(count):
            for t in range(n_columns):
                valley[t] += lowest[place, t]
                peak[t] += highest[place, t]
        for t in range(n_columns):
            valley[t] /= count
            peak[t] /= count
    return extremes


def _contrast_bands(sample_rate: int, frequencies: Array) -> Bands:
    """Return librosa's sub-bands: below 200 Hz, octaves above, the last one up to Nyquist."""
    octaves = CONTRAST_FMIN * 2.0 ** np.arange(CONTRAST_BANDS)
    edges = np.array([0.0, *octaves[octaves < sample_rate / 2]])
    starts = np.searchsorted(frequencies, edges)
    stops = np.append(np.searchsorted(frequencies, edges[1:], side="right"), len(frequencies))
    starts[1:] -= 1  # a band reaches one bin down into its neighbour …
    counts = np.maximum(1, np.rint(CONTRAST_QUANTILE * (stops - starts))).astype(int)
    stops[:-1] -= 1  # … and what both contain belongs to the higher one
    return Bands(starts, stops, counts)
