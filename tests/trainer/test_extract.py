"""Extraction: the rows of a data set are the worker's, on any number of cores, and from the cache."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import soundfile

from tests.trainer.test_dataset import write_manifest, write_sound
from trainer import listening
from trainer.cache import Cache
from trainer.dataset import Dataset, load
from trainer.extract import Windows, featurize, too_many_skipped
from trainer.listening import Skipped, read_clip
from worker.errors import Fatal
from worker.features import Featurizer, feature_spec

FEATURIZER = Featurizer(feature_spec("article", window_seconds=0.25, window_hop_seconds=0.1))


def assert_equal(expected: Windows, actual: Windows) -> None:
    assert expected.dataset == actual.dataset
    assert expected.skipped == actual.skipped
    for name in ("features", "owner", "starts", "copies", "gains", "silent"):
        one, other = getattr(expected, name), getattr(actual, name)
        assert one.dtype == other.dtype, name
        np.testing.assert_array_equal(one, other, err_msg=name)


@pytest.fixture(scope="module")
def some(esc10: Path) -> Dataset:
    """Ten real recordings."""
    dataset = load(esc10)
    return msgspec.structs.replace(dataset, clips=dataset.clips[::40])


@pytest.fixture(scope="module")
def expected(some: Dataset) -> Windows:
    return featurize(some, FEATURIZER, jobs=1)


class TestWindows:
    def test_rows_are_those_of_the_worker(self, some: Dataset, expected: Windows) -> None:
        """Each window of each clip, in order, with its owner, its place in the clip and its gain."""
        assert some == expected.dataset
        assert np.float32 == expected.features.dtype
        for index, clip in enumerate(some.clips):
            samples = read_clip(clip, 16_000)
            cut = FEATURIZER.windows(samples)
            rows = expected.owner == index
            np.testing.assert_array_equal(FEATURIZER.transform(cut), expected.features[rows])
            for start, window in zip(expected.starts[rows], cut, strict=True):
                first = round(start * 16_000)
                np.testing.assert_array_equal(window, samples[first : first + 4000])
        assert not expected.copies.any()
        assert not expected.gains.any()

    def test_the_last_window_ends_with_the_clip(self, tmp_path: Path) -> None:
        """Its start is no multiple of the hop; a clip shorter than a window starts at its beginning."""
        write_sound(tmp_path / "a" / "tail.wav", 1, rate=16_000, seconds=0.52)
        write_sound(tmp_path / "b" / "short.wav", 2, rate=16_000, seconds=0.1)
        windows = featurize(load(tmp_path), FEATURIZER, jobs=1)
        assert [0, 0, 0, 0, 1] == windows.owner.tolist()
        np.testing.assert_allclose([0.0, 0.1, 0.2, 0.27, 0.0], windows.starts, rtol=0, atol=1e-12)

    def test_segments_are_clips(self, tmp_path: Path) -> None:
        """Starts count from the beginning of the segment, and rows are of nothing else."""
        write_sound(tmp_path / "long.wav", rate=16_000, seconds=2.0)
        rows = [{"file": "long.wav", "label": "a", "start": "0.5", "end": "0.9"}]
        windows = featurize(load(write_manifest(tmp_path / "meta.csv", rows)), FEATURIZER, jobs=1)
        np.testing.assert_allclose([0.0, 0.1, 0.15], windows.starts)
        alone = read_clip(windows.dataset.clips[0], 16_000)
        assert 6400 == alone.size
        np.testing.assert_array_equal(FEATURIZER.transform(FEATURIZER.windows(alone)), windows.features)

    def test_gains_are_the_featurizers(self, some: Dataset) -> None:
        """With levelling they say by how many dB each window was brought to the level."""
        featurizer = Featurizer(msgspec.structs.replace(FEATURIZER.spec, level_dbfs=-23.0))
        one = msgspec.structs.replace(some, clips=some.clips[:1])
        cut = featurizer.windows(read_clip(some.clips[0], 16_000))
        np.testing.assert_array_equal(featurizer.gains(cut), featurize(one, featurizer, jobs=1).gains)
        assert featurizer.gains(cut).any()


class TestSilence:
    """Windows are silent beside the loudest window of their clip, and not by themselves."""

    def silent(self, tmp_path: Path, levels: dict[str, list[float]]) -> list[list[bool]]:
        """Write clips of windows at these levels in dBFS, one after the other, and return which of them are silent."""
        noise = np.random.default_rng(0).uniform(-1, 1, 4000)
        for name, each in levels.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            samples = np.concatenate([noise * 10 ** (level / 20) for level in each])
            soundfile.write(tmp_path / name, samples, 16_000, subtype="DOUBLE")
        apart = Featurizer(msgspec.structs.replace(FEATURIZER.spec, window_hop_seconds=0.25))
        windows = featurize(load(tmp_path), apart, jobs=1)
        assert not np.isnan(windows.features).any()
        return [windows.silent[windows.owner == clip].tolist() for clip in range(len(levels))]

    def test_from_60_db_under_the_loudest(self, tmp_path: Path) -> None:
        """Wherever that is, and however loud."""
        levels = {"a/loud.wav": [-61.0, 0.0, -59.0, -np.inf], "b/quiet.wav": [-40.0, -99.0, -101.0, -40.0]}
        assert [[True, False, False, True], [False, False, True, False]] == self.silent(tmp_path, levels)

    def test_no_clip_is_silent_throughout(self, tmp_path: Path) -> None:
        """Of a class that is silence, and of what is no sound at all, every window is a specimen."""
        levels = {
            "noise/hiss.wav": [-90.0, -91.0],
            "silence/none.wav": [-np.inf, -np.inf],
            "silence/one.wav": [-np.inf],
        }
        assert [[False, False], [False, False], [False]] == self.silent(tmp_path, levels)

    def test_real_recordings_are_padded(self, some: Dataset, expected: Windows) -> None:
        """Some clips were filled up with digital silence: that is found, and in no other clip."""
        padded = set()
        for index, clip in enumerate(some.clips):
            cut = FEATURIZER.windows(read_clip(clip, 16_000)).astype(np.float64)
            levels = 10 * np.log10(np.square(cut).mean(axis=1) + 1e-30)
            silent = expected.silent[expected.owner == index]
            assert (levels < levels.max() - 60).tolist() == silent.tolist()
            if silent.any():
                padded.add(clip.label)
        assert padded, "no clip of these is padded, so this has shown nothing"


class TestEqualSounds:
    @pytest.mark.parametrize("name", ["b.flac", "b.aiff", "b.wav"])
    def test_other_bytes_of_the_same_sound_are_one_group(self, tmp_path: Path, name: str) -> None:
        """In another container, or with another header, a copy is known by its samples."""
        path = write_sound(tmp_path / "one" / "a.wav", 1)
        samples, rate = soundfile.read(path, dtype="int16")
        (tmp_path / "two").mkdir()
        if name == "b.wav":
            (tmp_path / "two" / name).write_bytes(with_comment(path.read_bytes()))
        else:
            soundfile.write(tmp_path / "two" / name, samples, rate)
        write_sound(tmp_path / "two" / "c.wav", 2)
        dataset = load(tmp_path)
        assert 3 == len({clip.group for clip in dataset.clips})
        windows = featurize(dataset, FEATURIZER, jobs=1)
        groups = [clip.group for clip in windows.dataset.clips]
        assert groups[0] == groups[1] != groups[2]
        assert f"two/{name} has the same sound as one/a.wav; they are held out together" in windows.dataset.warnings
        assert f"two/{name} (two) has the same sound as one/a.wav (one)" in windows.dataset.warnings


def with_comment(wav: bytes) -> bytes:
    """Append a chunk that no decoder cares for."""
    longer = wav + b"note" + (4).to_bytes(4, "little") + b"mine"
    return longer[:4] + (len(longer) - 8).to_bytes(4, "little") + longer[8:]


class TestSameEverywhere:
    def test_on_any_number_of_processes(
        self, some: Dataset, expected: Windows, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two processes give the bits of one."""
        monkeypatch.setattr(listening, "FEWEST", 1)
        assert_equal(expected, featurize(some, FEATURIZER, jobs=2))

    def test_from_the_cache(self, some: Dataset, expected: Windows, tmp_path: Path) -> None:
        """Cold, and warm: then half of the files are not there to be read."""
        cache = Cache(tmp_path / "cache")
        assert_equal(expected, featurize(some, FEATURIZER, jobs=1, cache=cache))
        gone = [
            msgspec.structs.replace(clip, path=tmp_path / "gone") if index % 2 else clip
            for index, clip in enumerate(some.clips)
        ]
        warm = featurize(msgspec.structs.replace(some, clips=tuple(gone)), FEATURIZER, jobs=1, cache=cache)
        assert_equal(expected, warm._replace(dataset=expected.dataset))

    def test_a_cache_that_cannot_be_written_is_a_warning(self, tmp_path: Path) -> None:
        """The features are the same, and the next run computes them again."""
        write_sound(tmp_path / "data" / "a" / "a.wav")
        (tmp_path / "file").write_text("")
        windows = featurize(load(tmp_path / "data"), FEATURIZER, jobs=1, cache=Cache(tmp_path / "file"))
        assert 1 == len(windows.owner)
        assert f"nothing can be kept in {tmp_path}/file" in windows.dataset.warnings[-1]


class TestUnusableClips:
    def test_a_few_are_left_out(self, tmp_path: Path) -> None:
        """They own no window, and the owners of the others count without them."""
        for number in range(11):
            write_sound(tmp_path / "a" / f"{number:02}.wav", number)
        (tmp_path / "a" / "03.wav").write_bytes(b"not a sound")
        windows = featurize(load(tmp_path), FEATURIZER, jobs=1)
        assert [tmp_path / "a" / "03.wav"] == [each.path for each in windows.skipped]
        assert 10 == len(windows.dataset.clips)
        assert list(range(10)) == windows.owner.tolist()

    def test_a_few_bad_clips_are_borne(self) -> None:
        """Up to a tenth may be skipped; more is a mistake in the data set, told with examples."""
        skipped = [Skipped(Path(f"{number}.wav"), "cut off") for number in range(11)]
        too_many_skipped(skipped[:10], 100)
        with pytest.raises(Fatal, match=r"11 of 100 clips are unusable, more than 10%.*0\.wav: cut off; 1\.wav"):
            too_many_skipped(skipped, 100)
