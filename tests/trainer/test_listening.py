"""Listening: what is heard is what the worker would hear, each file once, on any cores and from the cache."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import soundfile

from tests.trainer.test_dataset import RATE, write_sound
from trainer import listening
from trainer.cache import Cache
from trainer.dataset import Clip
from trainer.listening import Skipped, listen, read_clip, sound_of
from worker.audio import Limits, Sound, waveform
from worker.errors import BadRecord, Fatal


def clip_of(path: Path, start: float = 0.0, end: float | None = None) -> Clip:
    return Clip(path, f"{path.name}@{start}", "label", path.name, None, f"hash of {path.name}", start, end)


class Length(msgspec.Struct, frozen=True):
    samples: int
    loudest: float


class Measuring(msgspec.Struct, frozen=True):
    """The simplest work there is."""

    factor: float = 1.0

    @property
    def identity(self) -> Any:
        return self.factor

    def __call__(self, sound: Sound, _clip: Clip) -> Length:
        return Length(sound.samples.size, self.factor * float(np.abs(sound.samples).max()))


class Telling(Measuring, frozen=True):
    """Work that tells in which process it is done, and when, in place of a length."""

    def __call__(self, _sound: Sound, _clip: Clip) -> Length:
        return Length(os.getpid(), time.monotonic())


class Dying(Measuring, frozen=True):
    """Work that ends its process, if that is not the one that is spared."""

    spared: int = 0

    def __call__(self, sound: Sound, clip: Clip) -> Length:
        if os.getpid() != self.spared:
            os._exit(1)
        return super().__call__(sound, clip)


def measured(clips: list[Clip], cache: Cache | None = None, factor: float = 1.0) -> list[Length | Skipped]:
    tasks = [(clip, Measuring(factor)) for clip in clips]
    return listen(tasks, Length, stage="measuring", jobs=1, cache=cache)


class TestReading:
    @pytest.mark.parametrize(
        ("name", "rate", "channels"),
        [("a.wav", 44100, 2), ("a.flac", 8000, 1), ("a.ogg", 48000, 1), ("a.aiff", 22050, 3), ("a.mp3", 16000, 1)],
    )
    def test_any_format_becomes_mono_at_the_asked_rate(
        self, tmp_path: Path, name: str, rate: int, channels: int
    ) -> None:
        """A quarter of a second stays one, whatever it was recorded as."""
        samples = read_clip(clip_of(write_sound(tmp_path / name, rate=rate, channels=channels, seconds=0.25)), 16_000)
        assert ("float32", 1) == (samples.dtype.name, samples.ndim)
        assert pytest.approx(4000, abs=1) == samples.size
        assert 0.02 < np.sqrt(np.mean(samples**2)) < 0.5

    def test_what_is_trained_is_what_is_served(self, tmp_path: Path) -> None:
        """The same bits come out of a file here and out of a record in the worker."""
        path = write_sound(tmp_path / "a.wav", rate=44_100, channels=2, seconds=0.3)
        served = waveform(path.read_bytes(), "audio/wav", 16_000, Limits())
        assert np.array_equal(served.samples, read_clip(clip_of(path), 16_000))

    def test_a_segment_is_what_the_worker_would_get_of_it(self, tmp_path: Path) -> None:
        """It is cut before it is resampled: a record would hold these samples and no others."""
        whole = sound_of(clip_of(write_sound(tmp_path / "a.wav", rate=44_100, seconds=1.0)))
        soundfile.write(tmp_path / "b.wav", whole.samples[11_025:33_075], 44_100, subtype="FLOAT")
        segment = sound_of(clip_of(tmp_path / "a.wav", 0.25, 0.75))
        assert (22_050, 44_100, 0.5) == (segment.samples.size, segment.sample_rate, segment.duration)
        assert np.array_equal(
            read_clip(clip_of(tmp_path / "b.wav"), 16_000), read_clip(clip_of(tmp_path / "a.wav", 0.25, 0.75), 16_000)
        )

    @pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.aiff"])
    def test_a_segment_is_a_part_of_the_whole(self, tmp_path: Path, name: str) -> None:
        """To the bit, in any container that can be searched, and with all channels."""
        path = write_sound(tmp_path / name, rate=16_000, channels=2, seconds=2.0)
        whole = sound_of(clip_of(path)).samples
        for start, end in ((0.0, 0.5), (0.3, 1.1), (1.5, 2.0)):
            segment = sound_of(clip_of(path, start, end)).samples
            assert np.array_equal(whole[round(start * 16_000) : round(end * 16_000)], segment)

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
    def test_a_segment_of_a_file_whose_name_is_not_utf8(self, tmp_path: Path) -> None:
        """Whatever a disk calls a file, a part of it can be heard."""
        path = write_sound(tmp_path / "a.wav", seconds=1.0).rename(tmp_path / os.fsdecode(b"br\xe9ve.wav"))
        assert 0.25 == sound_of(clip_of(path, 0.25, 0.5)).duration

    def test_a_segment_ends_with_its_file(self, tmp_path: Path) -> None:
        """Somebody who rounded the end up gets what there is; one that begins after the end is none."""
        path = write_sound(tmp_path / "a.wav", seconds=1.0)
        assert 0.25 == sound_of(clip_of(path, 0.75, 2.0)).duration == sound_of(clip_of(path, 0.75)).duration
        with pytest.raises(BadRecord, match=r"a\.wav@1\.5 has no samples: the file is 1 s long"):
            sound_of(clip_of(path, 1.5, 2.0))

    def test_unusable_files_are_bad_records(self, tmp_path: Path) -> None:
        """Damaged, empty, non-finite and vanished files each have their reason, and so have segments of them."""
        damaged = tmp_path / "damaged.flac"
        damaged.write_bytes(b"fLaC, but not really")
        empty = write_sound(tmp_path / "empty.wav", seconds=0)
        infinite = tmp_path / "infinite.wav"
        soundfile.write(infinite, np.array([0.0, np.inf]), RATE, subtype="FLOAT")
        reasons = []
        for path in (damaged, empty, infinite, tmp_path / "gone.wav"):
            for end in (None, 1.0):
                with pytest.raises(BadRecord) as caught:
                    sound_of(clip_of(path, 0.0, end))
                reasons.append(caught.value.reason)
        assert ["undecodable"] * 2 + ["empty"] * 2 + ["non-finite"] * 2 + ["undecodable"] * 2 == reasons


class TestListening:
    def test_results_are_in_the_order_of_the_tasks(self, tmp_path: Path) -> None:
        """Though the segments of a file are listened to together, and unusable ones lie between."""
        long = write_sound(tmp_path / "long.wav", seconds=1.0)
        short = write_sound(tmp_path / "short.wav", seconds=0.5)
        clips = [
            clip_of(long, 0.0, 0.1),
            clip_of(tmp_path / "gone.wav"),
            clip_of(short),
            clip_of(long, 2.0),
            clip_of(long, 0.5),
        ]
        found = measured(clips)
        assert [800, None, 4000, None, 4000] == [getattr(each, "samples", None) for each in found]
        assert [clips[1].path, clips[3].path] == [each.path for each in found if isinstance(each, Skipped)]

    def test_a_clip_is_decoded_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """However much work there is on it."""
        clip = clip_of(write_sound(tmp_path / "a.wav"))
        heard = []

        def listening_to(clip: Clip) -> Sound:
            heard.append(clip)
            return sound_of(clip)

        monkeypatch.setattr(listening, "sound_of", listening_to)
        found = listen([(clip, Measuring(factor)) for factor in (1.0, 2.0, 3.0)], Length, stage="measuring", jobs=1)
        assert [clip] == heard
        assert 3 == len({each.loudest for each in found if isinstance(each, Length)})

    def test_a_process_that_is_killed_is_no_traceback(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As by the kernel when memory runs out: what may help is said."""
        monkeypatch.setattr(listening, "FEWEST", 1)
        clips = [clip_of(write_sound(tmp_path / f"{number}.wav", number)) for number in range(4)]
        with pytest.raises(Fatal, match=r"measuring: a process was killed on the way, .*; try fewer --jobs"):
            listen([(clip, Dying(spared=os.getpid())) for clip in clips], Length, stage="measuring", jobs=2)

    def test_the_first_clip_is_heard_before_there_are_processes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first that can be used: what is compiled for it is then on disk for all of them."""
        monkeypatch.setattr(listening, "FEWEST", 1)
        clips = [clip_of(write_sound(tmp_path / f"{number}.wav", number)) for number in range(4)]
        found = listen([(clip, Telling()) for clip in [clip_of(tmp_path), *clips]], Length, stage="measuring", jobs=2)
        first, *others = [each for each in found if isinstance(each, Length)]
        assert os.getpid() == first.samples
        assert 3 == len(others)
        assert all(os.getpid() != each.samples and first.loudest < each.loudest for each in others)

    def test_progress_counts_clips(self, tmp_path: Path) -> None:
        """From those that are known already up to all of them."""
        path = write_sound(tmp_path / "long.wav", seconds=1.0)
        clips = [clip_of(path, 0.0, 0.5), clip_of(path, 0.5), clip_of(write_sound(tmp_path / "b.wav"))]
        cache = Cache(tmp_path / "cache")
        measured(clips[:1], cache)
        told: list[tuple[str, int, int]] = []
        tasks = [(clip, Measuring()) for clip in clips]
        listen(tasks, Length, stage="measuring", jobs=1, cache=cache, on_progress=lambda *each: told.append(each))
        assert [("measuring", 1, 3), ("measuring", 2, 3), ("measuring", 3, 3)] == told


class TestCaching:
    def test_what_is_known_is_not_read_again(self, tmp_path: Path) -> None:
        """The file may be gone: its content is what counts, and that is known by its hash."""
        path = write_sound(tmp_path / "a.wav", 1)
        first = measured([clip_of(path)], Cache(tmp_path / "cache"))
        path.unlink()
        assert first == measured([clip_of(path)], Cache(tmp_path / "cache"))
        assert isinstance(measured([clip_of(path)])[0], Skipped)

    def test_other_work_content_or_span_is_not_known(self, tmp_path: Path) -> None:
        """Everything that decides the result decides whether it is known."""
        path = write_sound(tmp_path / "a.wav", 1)
        cache = Cache(tmp_path / "cache")
        clip = clip_of(path, 0.01, 0.02)
        known = measured([clip], cache)
        path.unlink()
        assert known == measured([clip], cache)
        for change in ({"start": 0.0}, {"end": 0.03}, {"end": None}, {"sha256": "another"}):
            assert isinstance(measured([msgspec.structs.replace(clip, **change)], cache)[0], Skipped), change
        assert isinstance(measured([clip], cache, factor=2.0)[0], Skipped)

    def test_what_cannot_be_used_is_not_kept(self, tmp_path: Path) -> None:
        """A file that was not mounted may be there the next time."""
        path = tmp_path / "a.wav"
        cache = Cache(tmp_path / "cache")
        assert isinstance(measured([clip_of(path)], cache)[0], Skipped)
        write_sound(path)
        assert isinstance(measured([clip_of(path)], cache)[0], Length)

    def test_a_damaged_entry_is_computed_again(self, tmp_path: Path) -> None:
        """And nobody notices."""
        path = write_sound(tmp_path / "a.wav", 1)
        cache = Cache(tmp_path / "cache")
        first = measured([clip_of(path)], cache)
        for entry in (tmp_path / "cache").glob("??/*"):
            entry.write_bytes(entry.read_bytes()[:-1])
        assert first == measured([clip_of(path)], cache)
