"""Sound to listen to inside a page: short, small, and in a format that every browser plays.

This module owns which stretch of a clip is heard and how it becomes text. It must not know why a clip is heard, or
what stands around it.
"""

from __future__ import annotations

import base64
import io
from typing import Final, NamedTuple

import numpy as np
import soundfile
from markupsafe import Markup
from numpy.typing import NDArray

LONGEST: Final = 5.0
"""Seconds of one excerpt: time enough to recognise a sound."""

BUDGET: Final = 6_000_000
"""Characters that all excerpts of a page may take together: a mail carries it."""

MEDIA_TYPE: Final = "audio/flac"
"""Without loss, half of a WAV file, and played by Chromium, Firefox and Safari since 2017."""

HEADER: Final = 16_384
"""Bytes that a FLAC file may have beyond its samples; libsndfile's are half of it."""


class Excerpt(NamedTuple):
    """A stretch of a clip: mono ``samples`` at ``sample_rate`` in Hz, and the seconds at which it starts."""

    samples: NDArray[np.float32]
    sample_rate: int
    start: float

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.samples) / self.sample_rate


def longest(excerpts: int, sample_rate: int) -> float:
    """Return the seconds that each of so many excerpts may have within `BUDGET`, however noisy they are."""
    characters_a_second = sample_rate * 2 * 4 / 3  # 16 bits a sample, in base64
    return min(LONGEST, (BUDGET / max(excerpts, 1) - HEADER * 4 / 3) / characters_a_second)


def loudest(samples: NDArray[np.float32], sample_rate: int, seconds: float) -> Excerpt:
    """Return the stretch of so many ``seconds`` that has the most energy; a shorter clip is returned whole."""
    length = max(1, int(seconds * sample_rate))
    if samples.size <= length:
        return Excerpt(samples, sample_rate, 0.0)
    energy = np.concatenate([[0.0], np.cumsum(np.square(samples, dtype=np.float64))])
    step = max(1, sample_rate // 10)
    starts = np.arange(0, samples.size - length + 1, step)
    start = int(starts[np.argmax(energy[starts + length] - energy[starts])])
    return Excerpt(samples[start : start + length], sample_rate, start / sample_rate)


def data_uri(excerpt: Excerpt) -> Markup:
    """Return an excerpt as a ``data:`` URI for an audio element; what is beyond full scale is clipped."""
    buffer = io.BytesIO()
    clipped = np.clip(excerpt.samples, -1.0, 1.0)
    soundfile.write(buffer, clipped, excerpt.sample_rate, format="FLAC", subtype="PCM_16")
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Markup(f"data:{MEDIA_TYPE};base64,{encoded}")  # noqa: S704  # base64 has nothing to escape
