"""Augmented copies: each kind does what it says, the same way everywhere, and no test ever hears one."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.trainer.test_dataset import write_sound
from trainer import augment, listening
from trainer.augment import Altered, augmented, check
from trainer.augmentation import CODECS, Augmentation, read_augmentation
from trainer.cache import Cache
from trainer.dataset import Clip, Dataset, load
from trainer.extract import Windows, featurize
from trainer.listening import read_clip
from worker.errors import Fatal
from worker.features import Featurizer, feature_spec

RATE = 16_000
FEATURIZER = Featurizer(feature_spec("article"))
CLIP = Clip(Path("a.wav"), "a.wav", "label", "group", None, "hash of a.wav")
EVERYTHING = read_augmentation(
    "stretch=0.9:1.1,pitch=-1:1,shift=0.2,noise=10:30,highpass=50:200,lowpass=3000:6000,gain=-12:0,"
    "codec=vorbis+opus+mp3+ulaw+gsm,copies=2"
)


def tone(frequency: float = 440.0, seconds: float = 2.0) -> NDArray[np.float32]:
    time = np.arange(round(seconds * RATE)) / RATE
    return (0.1 * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


def copy_of(samples: NDArray[np.float32], text: str, number: int = 1, seed: int = 0) -> NDArray[np.float32]:
    return Altered(read_augmentation(text), seed, number)(samples, RATE, CLIP)


def decibels(samples: NDArray[np.float32]) -> float:
    return float(10 * np.log10(np.mean(np.square(samples, dtype=np.float64))))


def loudest_frequency(samples: NDArray[np.float32]) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(samples.size)))
    return float(np.argmax(spectrum) * RATE / samples.size)


@pytest.fixture(scope="module")
def some(esc10: Path) -> Dataset:
    """Three real recordings."""
    dataset = load(esc10)
    return msgspec.structs.replace(dataset, clips=dataset.clips[::140])


@pytest.fixture(scope="module")
def original(some: Dataset) -> Windows:
    return featurize(some, FEATURIZER, jobs=1)


class TestKinds:
    @pytest.mark.parametrize("number", range(1, 6))
    def test_noise_is_at_the_asked_ratio(self, number: int) -> None:
        """Within the range, and another one for each copy."""
        ratio = decibels(tone()) - decibels(copy_of(tone(), "noise=10:20", number) - tone())
        assert 9.9 < ratio < 20.1
        assert not np.array_equal(copy_of(tone(), "noise=10:20", number), copy_of(tone(), "noise=10:20", number + 1))

    def test_gain_is_in_decibels(self) -> None:
        """A fixed one is what it says, and nothing else changes."""
        np.testing.assert_allclose(tone() * 10 ** (-6 / 20), copy_of(tone(), "gain=-6"), rtol=1e-5)

    def test_shift_rolls_the_clip(self) -> None:
        """What leaves at one end comes back at the other; the energy is what it was."""
        click = np.zeros(RATE, np.float32)
        click[RATE // 2] = 1.0
        moved = [int(np.argmax(copy_of(click, "shift=0.25", number))) - RATE // 2 for number in range(1, 9)]
        assert 8 == len(set(moved))
        assert max(map(abs, moved)) <= RATE // 4 + 1
        assert min(moved) < 0 < max(moved)

    def test_stretch_changes_the_length_and_not_the_pitch(self) -> None:
        """Half the tempo is twice as long."""
        slow = copy_of(tone(), "stretch=0.5")
        assert pytest.approx(2 * tone().size, rel=0.01) == slow.size
        assert pytest.approx(440, abs=3) == loudest_frequency(slow)

    def test_pitch_is_in_semitones(self) -> None:
        """An octave up is twice the frequency, in the same time."""
        high = copy_of(tone(), "pitch=12")
        assert tone().size == high.size
        assert pytest.approx(880, rel=0.01) == loudest_frequency(high)

    @pytest.mark.parametrize(
        ("text", "kept", "lost"), [("lowpass=1000", 200.0, 6000.0), ("highpass=1000", 6000.0, 100.0)]
    )
    def test_band_limits(self, text: str, kept: float, lost: float) -> None:
        """What lies beyond the cut-off falls by 12 dB an octave at least, what lies within does not."""
        assert pytest.approx(decibels(tone(kept)), abs=1.0) == decibels(copy_of(tone(kept), text))
        assert decibels(copy_of(tone(lost), text)) < decibels(tone(lost)) - 25

    @pytest.mark.parametrize("codec", CODECS)
    def test_codecs_alter_the_sound_and_not_its_length(self, codec: str) -> None:
        """It is not what it was, and still the same tone."""
        coded = copy_of(tone(), f"codec={codec}")
        assert tone().size == coded.size
        assert not np.array_equal(tone(), coded)
        assert pytest.approx(440, abs=2) == loudest_frequency(coded)
        assert pytest.approx(decibels(tone()), abs=1.0) == decibels(coded)

    @pytest.mark.parametrize(
        "samples",
        [[0.5], [0.0] * 1600, [1e-42] * 2000, [1.0] * 4000, [1.0, -1.0] * 3000, [0.0] * 5000 + [1.0] + [0.0] * 5000],
    )
    def test_nasty_clips_stay_finite(self, samples: list[float]) -> None:
        """One sample, silence, denormals, full scale and a click come through everything at once."""
        for number in range(1, 6):
            copy = Altered(EVERYTHING, 0, number)(np.array(samples, np.float32), RATE, CLIP)
            assert np.float32 == copy.dtype
            assert copy.size >= 1
            assert np.isfinite(copy).all()


class TestReproducibility:
    def test_a_copy_hangs_on_seed_content_and_number(self) -> None:
        """The same three, the same samples; any other, other samples."""
        first = copy_of(tone(), "noise=10:20")
        assert np.array_equal(first, copy_of(tone(), "noise=10:20"))
        other = Altered(read_augmentation("noise=10:20"), 0, 1)
        for change in ({"sha256": "another"}, {"start": 1.0}, {"end": 2.0}):
            assert not np.array_equal(first, other(tone(), RATE, msgspec.structs.replace(CLIP, **change)))
        assert np.array_equal(first, other(tone(), RATE, msgspec.structs.replace(CLIP, name="elsewhere", label="x")))
        assert not np.array_equal(first, copy_of(tone(), "noise=10:20", seed=1))

    def test_the_random_numbers_of_others_go_on(self) -> None:
        """Who has seeded the process finds them as they would have been."""
        drawn = []
        for disturbed in (False, True):
            random.seed(7)
            np.random.seed(7)  # noqa: NPY002  # what others may rely on
            if disturbed:
                Altered(EVERYTHING, 0, 1)(tone(), RATE, CLIP)
            drawn.append((random.random(), np.random.random()))  # noqa: NPY002  # as above
        assert drawn[0] == drawn[1]

    def test_threads_do_not_share_random_numbers(self) -> None:
        """Eight at a time make the copies that one after the other would."""
        makers = [Altered(read_augmentation("shift=0.5,noise=0:30,gain=-12:0"), 0, number) for number in range(1, 41)]
        expected = [make(tone(), RATE, CLIP) for make in makers]
        with ThreadPoolExecutor(8) as threads:
            for one, other in zip(expected, threads.map(lambda make: make(tone(), RATE, CLIP), makers), strict=True):
                np.testing.assert_array_equal(one, other)

    def test_on_any_number_of_processes_and_from_the_cache(
        self, original: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two processes, one, and what was kept from before give the same rows."""
        first = augmented(original, FEATURIZER, EVERYTHING, jobs=1, cache=Cache(tmp_path))
        monkeypatch.setattr(listening, "FEWEST", 1)
        for other in (
            augmented(original, FEATURIZER, EVERYTHING, jobs=2),
            augmented(original, FEATURIZER, EVERYTHING, jobs=1, cache=Cache(tmp_path)),
        ):
            for name in ("features", "owner", "starts", "copies", "gains"):
                np.testing.assert_array_equal(getattr(first, name), getattr(other, name), err_msg=name)
        reseeded = augmented(original, FEATURIZER, EVERYTHING, seed=1, jobs=1, cache=Cache(tmp_path))
        assert first.features.tobytes() != reseeded.features.tobytes()


class TestRows:
    def test_originals_come_first_and_stay_as_they_are(self, original: Windows) -> None:
        """Then the first copy of each clip, then the second, each row with its owner."""
        rows = augmented(original, FEATURIZER, Augmentation(gain=(-6.0, -6.0), copies=2), jobs=1)
        count = len(original.owner)
        assert 3 * count == len(rows.owner) == len(rows.features) == len(rows.gains)
        assert [0, 1, 2] == rows.copies[::count].tolist()
        np.testing.assert_array_equal(np.tile(original.owner, 3), rows.owner)
        np.testing.assert_array_equal(np.tile(original.starts, 3), rows.starts)
        np.testing.assert_array_equal(original.features, rows.features[:count])
        np.testing.assert_array_equal(rows.features[rows.copies == 1], rows.features[rows.copies == 2])
        assert original.dataset == rows.dataset

    def test_rows_are_of_the_changed_waveform(self, original: Windows) -> None:
        """At the model's rate: it is changed after resampling, and cut after that."""
        change = Altered(read_augmentation("stretch=1.5,noise=20"), 3, 1)
        rows = augmented(original, FEATURIZER, change.augmentation, seed=3, jobs=1)
        clip = original.dataset.clips[2]
        changed = change(read_clip(clip, RATE), RATE, clip)
        expected = FEATURIZER.transform(FEATURIZER.windows(changed))
        np.testing.assert_array_equal(expected, rows.features[(rows.copies == 1) & (rows.owner == 2)])


class TestRefusals:
    @pytest.mark.parametrize("text", ["pitch=-1:1", "stretch=0.9:1.1"])
    def test_what_would_make_a_quantity_untrue(self, tmp_path: Path, text: str) -> None:
        """A shifted note is no longer the note of its label; nothing is listened to."""
        for label in ("1.5", "2.5"):
            write_sound(tmp_path / label / "a.wav", seed=int(float(label)), rate=RATE, seconds=0.2)
        windows = featurize(load(tmp_path, task="regression"), FEATURIZER, jobs=1)
        with pytest.raises(Fatal, match=f"--augment {text.partition('=')[0]} changes the pitch or the speed"):
            augmented(windows, FEATURIZER, read_augmentation(text))
        check(read_augmentation(text), "classification", RATE)

    @pytest.mark.parametrize("level", [0.0, 0.9999999, 1.0])
    @pytest.mark.parametrize("codec", sorted(augment.COMPRESSIBLE))
    def test_any_level_of_compression(self, codec: str, level: float) -> None:
        """Whatever is drawn, there is a sound: libsndfile refuses an MP3 of less than the least quality but one."""
        sound = np.sin(np.arange(RATE, dtype=np.float32) / 10)
        assert sound.shape == augment._through(sound, RATE, codec, level).shape

    @pytest.mark.parametrize(
        ("text", "rate", "message"),
        [
            ("lowpass=3000:8000", 16_000, "lowpass is up to 8000 Hz; expected less than 8000 Hz"),
            ("highpass=100:9000", 16_000, "highpass is up to 9000 Hz; expected less than 8000 Hz"),
            ("codec=vorbis+opus", 22_050, "codec=opus at 22050 Hz: .*only supports sample rates"),
            ("codec=mp3", 10_000, "codec=mp3 at 10000 Hz: .*only supports sample rates"),
        ],
    )
    def test_what_cannot_be_done_at_this_rate(self, text: str, rate: int, message: str) -> None:
        """Found out before anything is listened to."""
        with pytest.raises(Fatal, match=f"--augment {message}"):
            check(read_augmentation(text), "classification", rate)
