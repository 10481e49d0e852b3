"""Excerpts: the telling stretch of a clip, unchanged, and never more of them than a mail carries."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from trainer import excerpts
from trainer.excerpts import Excerpt

RATE = 16000
NOISE = np.random.default_rng(0).uniform(-1, 1, 6 * RATE).astype(np.float32)


def decoded(uri: str) -> tuple[np.ndarray, int]:
    """What a browser makes of an URI."""
    kind, _, data = uri.partition(",")
    assert "data:audio/flac;base64" == kind
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(data)), dtype="float32")
    return samples, rate


class TestDataUri:
    def test_it_is_the_sound(self) -> None:
        """What is heard is what the model heard, to 16 bits."""
        samples, rate = decoded(excerpts.data_uri(Excerpt(NOISE, RATE, 0.0)))
        assert RATE == rate
        np.testing.assert_allclose(samples, NOISE, atol=1.01 / 32768)

    def test_what_is_beyond_full_scale_is_clipped(self) -> None:
        """A float file may hold it; wrapped around it would be a click that nobody recorded."""
        samples, _ = decoded(excerpts.data_uri(Excerpt(np.array([0.5, 3.0, -3.0], np.float32), RATE, 0.0)))
        np.testing.assert_allclose(samples, [0.5, 1.0, -1.0], atol=1e-4)

    def test_the_same_sound_gives_the_same_text(self) -> None:
        """No time is in the file."""
        assert excerpts.data_uri(Excerpt(NOISE, RATE, 0.0)) == excerpts.data_uri(Excerpt(NOISE, RATE, 0.0))

    @pytest.mark.parametrize("rate", [1000, 8000, 44100, 192000])
    def test_any_rate(self, rate: int) -> None:
        """A model may hear at any rate."""
        assert rate == decoded(excerpts.data_uri(Excerpt(NOISE[:1000], rate, 0.0)))[1]


class TestLength:
    @pytest.mark.parametrize(("count", "rate"), [(1, 16000), (24, 16000), (24, 48000), (24, 192000)])
    def test_the_budget_holds_for_noise(self, count: int, rate: int) -> None:
        """White noise, which nothing compresses, stays within it however many excerpts there are."""
        seconds = excerpts.longest(count, rate)
        samples = np.random.default_rng(1).uniform(-1, 1, int(seconds * rate)).astype(np.float32)
        assert 0 < seconds <= excerpts.LONGEST
        assert count * len(excerpts.data_uri(Excerpt(samples, rate, 0.0))) <= excerpts.BUDGET

    def test_few_excerpts_are_no_longer_than_they_need_be(self) -> None:
        """Nor is there a division by none."""
        assert excerpts.LONGEST == excerpts.longest(0, RATE) == excerpts.longest(4, RATE)


class TestLoudest:
    def test_it_finds_what_sounds(self) -> None:
        """Of ten seconds of hiss with a second of noise, the excerpt holds the noise, and says where."""
        samples = np.concatenate([0.001 * NOISE, NOISE[:RATE], 0.001 * NOISE[: 3 * RATE]])
        excerpt = excerpts.loudest(samples, RATE, 2.0)
        assert 2.0 == excerpt.seconds
        assert 5.0 <= excerpt.start <= 6.0
        start = round(excerpt.start * RATE)
        np.testing.assert_array_equal(samples[start : start + 2 * RATE], excerpt.samples)

    def test_a_short_clip_is_heard_whole(self) -> None:
        """Nothing is cut, and nothing is added."""
        excerpt = excerpts.loudest(NOISE[:100], RATE, 5.0)
        assert 0.0 == excerpt.start
        np.testing.assert_array_equal(NOISE[:100], excerpt.samples)

    @given(st.integers(1, 5000), st.floats(0.001, 1.0), st.integers(100, 10000))
    def test_it_is_a_stretch_of_the_clip(self, size: int, seconds: float, rate: int) -> None:
        """Of any clip, no longer than asked for, and never empty."""
        samples = np.arange(size, dtype=np.float32)
        excerpt = excerpts.loudest(samples, rate, seconds)
        start = round(excerpt.start * rate)
        assert 1 <= len(excerpt.samples) <= max(1, seconds * rate)
        np.testing.assert_array_equal(samples[start : start + len(excerpt.samples)], excerpt.samples)
