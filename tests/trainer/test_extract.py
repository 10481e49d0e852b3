"""Extraction: what is trained is what is served, whatever the files, the cores and the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.trainer.test_dataset import RATE, write_sound
from trainer.extract import Skipped, read_clip, too_many_skipped
from worker.audio import Limits, waveform
from worker.errors import BadRecord, Fatal


class TestReading:
    @pytest.mark.parametrize(
        ("name", "rate", "channels"),
        [("a.wav", 44100, 2), ("a.flac", 8000, 1), ("a.ogg", 48000, 1), ("a.aiff", 22050, 3), ("a.mp3", 16000, 1)],
    )
    def test_any_format_becomes_mono_at_the_asked_rate(
        self, tmp_path: Path, name: str, rate: int, channels: int
    ) -> None:
        """A quarter of a second stays one, whatever it was recorded as."""
        samples = read_clip(write_sound(tmp_path / name, rate=rate, channels=channels, seconds=0.25), 16_000)
        assert ("float32", 1) == (samples.dtype.name, samples.ndim)
        assert pytest.approx(4000, abs=1) == samples.size
        assert 0.02 < np.sqrt(np.mean(samples**2)) < 0.5

    def test_what_is_trained_is_what_is_served(self, tmp_path: Path) -> None:
        """The same bits come out of a file here and out of a record in the worker."""
        path = write_sound(tmp_path / "a.wav", rate=44_100, channels=2, seconds=0.3)
        served = waveform(path.read_bytes(), "audio/wav", 16_000, Limits())
        assert np.array_equal(served.samples, read_clip(path, 16_000))

    def test_unusable_files_are_bad_records(self, tmp_path: Path) -> None:
        """Damaged, empty, non-finite and vanished files each have their reason."""
        damaged = tmp_path / "damaged.flac"
        damaged.write_bytes(b"fLaC, but not really")
        empty = write_sound(tmp_path / "empty.wav", seconds=0)
        infinite = tmp_path / "infinite.wav"
        soundfile.write(infinite, np.array([0.0, np.inf]), RATE, subtype="FLOAT")
        reasons = []
        for path in (damaged, empty, infinite, tmp_path / "gone.wav"):
            with pytest.raises(BadRecord) as caught:
                read_clip(path, RATE)
            reasons.append(caught.value.reason)
        assert ["undecodable", "empty", "non-finite", "undecodable"] == reasons

    def test_a_few_bad_clips_are_borne(self) -> None:
        """Up to a tenth may be skipped; more is a mistake in the data set, told with examples."""
        skipped = [Skipped(Path(f"{number}.wav"), "cut off") for number in range(11)]
        too_many_skipped(skipped[:10], 100)
        with pytest.raises(Fatal, match=r"11 of 100 clips are unusable, more than 10%.*0\.wav: cut off; 1\.wav"):
            too_many_skipped(skipped, 100)
