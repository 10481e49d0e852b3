"""The transform against scipy's, in float64, for every length and number of frames that matters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
import scipy.fft
import scipy.signal

from worker.fourier import LANES, LONGEST, Precision, _transform, powers

Array = npt.NDArray[Any]


def noise(samples: int) -> Array:
    return (0.1 * np.random.default_rng(samples).standard_normal(samples)).astype(np.float32)


def magnitudes(padded: Array, n_fft: int, hop_length: int, win_length: int) -> Any:
    n_frames = 1 + (len(padded) - n_fft) // hop_length
    return np.sqrt(powers(padded, 0, n_fft, hop_length, win_length))[:, :n_frames]


def expected(padded: Array, n_fft: int, hop_length: int, win_length: int) -> Any:
    left = (n_fft - win_length) // 2
    window = np.zeros(n_fft)
    window[left : left + win_length] = scipy.signal.get_window("hann", win_length)
    framed = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop_length]
    return np.abs(scipy.fft.rfft(framed * window, axis=-1)).T


@pytest.mark.parametrize(
    "n_fft", [2, 4, 8, 16, 32, 64, 128, 512, 1024, 2048, 4096, LONGEST, 2 * LONGEST, 3, 100, 441, 1201]
)
def test_magnitudes_are_scipys(n_fft: int) -> None:
    """Each power of two, with and without a last step by two, and what is none, to the rounding of float32."""
    for win_length in {n_fft, max(1, n_fft * 2 // 3)}:
        padded = noise(3 * n_fft + 7)
        hop_length = max(1, n_fft // 4)
        found = magnitudes(padded, n_fft, hop_length, win_length)
        reference = expected(padded, n_fft, hop_length, win_length)
        assert np.float32 == found.dtype
        np.testing.assert_allclose(found, reference, rtol=2e-7, atol=2e-7 * max(1e-30, reference.max() * 1e-6))


@pytest.mark.parametrize("n_fft", [64, 128, 2048, 100])
def test_float32_is_float64_but_for_roundings(n_fft: int) -> None:
    """They are a few of the loudest frequency's, which also a tone leaves to the quietest ones."""
    tone = np.sin(np.arange(3 * n_fft + 7)).astype(np.float32)
    for sound in (tone, noise(3 * n_fft + 7)):
        single = powers(sound, 0, n_fft, n_fft // 4, n_fft, "float32")
        double = powers(sound, 0, n_fft, n_fft // 4, n_fft)
        assert np.float32 == single.dtype
        assert (single != double).any()
        np.testing.assert_allclose(np.sqrt(single), np.sqrt(double), rtol=1e-6, atol=3e-7 * np.sqrt(double.max()))


@pytest.mark.parametrize("n_fft", [8, 64, 128, 100])
@pytest.mark.parametrize("samples", [1, 5, 64, 101, 1000])
def test_hops_and_margins_of_any_length(n_fft: int, samples: int) -> None:
    """Hops that do not divide a frame, or are longer than it; zeros around the samples, also where these are few."""
    for hop_length in (1, n_fft // 3, n_fft // 2 + 1, n_fft, 2 * n_fft + 1):
        for margin in (0, 3, n_fft // 2):
            padded = np.pad(noise(samples), margin)
            padded = np.pad(padded, (0, max(0, n_fft - padded.size)))
            found = powers(noise(samples), margin, n_fft, hop_length, n_fft)
            reference = expected(padded, n_fft, hop_length, n_fft) ** 2
            np.testing.assert_allclose(
                found[:, : reference.shape[1]], reference, rtol=2e-7, atol=1e-15 * reference.max()
            )


@pytest.mark.parametrize("n_fft", [64, 128, 2048])
@pytest.mark.parametrize("n_frames", [1, 2, 7, LANES - 1, LANES, LANES + 1, 2 * LANES, 2 * LANES + 5])
def test_a_frame_does_not_depend_on_how_many_there_are(n_frames: int, n_fft: int) -> None:
    """The bits of a frame are those that it has alone."""
    padded = noise(n_fft + 16 * (n_frames - 1))
    together = magnitudes(padded, n_fft, 16, n_fft)
    alone = [magnitudes(padded[16 * t : 16 * t + n_fft], n_fft, 16, n_fft)[:, 0] for t in range(n_frames)]
    assert np.stack(alone, axis=1).tobytes() == together.tobytes()


@pytest.mark.parametrize("n_fft", [64, 100])
@pytest.mark.parametrize("n_frames", [1, LANES, LANES + 1, 3 * LANES - 1])
def test_silence_fills_up_the_columns(n_frames: int, n_fft: int) -> None:
    """Beyond the frames there is nothing, also where another frame would have begun within the samples."""
    found = powers(noise(n_fft + 16 * n_frames - 1), 0, n_fft, 16, n_fft)
    assert 0 == found.shape[1] % LANES
    assert found[:, :n_frames].all()
    assert not found[:, n_frames:].any()


@pytest.mark.parametrize("level", [0.0, 1e-40, 1e-20, float(2**20)])
def test_extremes_stay_finite(level: float) -> None:
    """Silence, denormals and the loudest sound that is heard neither overflow nor turn into NaN."""
    padded = np.full(5000, level, dtype=np.float32) * np.sign(noise(5000))
    found = magnitudes(padded, 2048, 512, 2048)
    np.testing.assert_allclose(found, expected(padded, 2048, 512, 2048), rtol=1e-6, atol=1e-16)


def test_each_length_and_precision_is_kept_apart() -> None:
    """No two of them share a name in the cache of machine code, where one could be taken for the other."""
    lengths, precisions = (4, 8, 16), get_args(Precision)
    named = {_transform(half, precision).__qualname__ for half in lengths for precision in precisions}
    assert len(lengths) * len(precisions) == len(named)


TWICE = """
import numpy as np
from numba.core import event
from worker.fourier import powers

with event.install_recorder("numba:compile") as compiled:
    powers(np.ones(200, np.float32), 32, 64, 32, 64)
print(len(compiled.buffer))
"""


def test_machine_code_is_kept_for_the_next_process(tmp_path: Path) -> None:
    """The first process compiles, and the next one nothing: a worker must not begin with seconds of that."""
    own_cache = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    first, second = (
        int(subprocess.run([sys.executable, "-c", TWICE], env=own_cache, check=True, capture_output=True).stdout)
        for _ in range(2)
    )

    assert first > 0
    assert 0 == second
