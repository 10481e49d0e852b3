"""The survey: facts that can be computed by hand, and a warning for each way in which data misleads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from tests.trainer.test_dataset import write_manifest, write_sound
from trainer.cache import Cache
from trainer.dataset import Clip, Dataset, load
from trainer.results import ClipFacts, Survey
from trainer.survey import Looking, describe, survey
from worker.audio import Sound

RATE = 16_000
TONE = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
"""A second of a tone: its peak is at 0 dB, its RMS 3.01 dB below."""


def write(path: Path, samples: NDArray[np.float64], rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype="FLOAT")
    return path


def facts_of(path: Path) -> ClipFacts:
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    clip = Clip(path, "name", "label", "group", None, "hash")
    return Looking()(Sound(samples.mean(axis=1), rate, len(samples) / rate), clip).facts


def surveyed(folder: Path, task: str | None = None) -> Survey:
    dataset = load(folder)
    return survey(msgspec.structs.replace(dataset, task=task or dataset.task), jobs=1)


def warnings_about(word: str, survey: Survey) -> list[str]:
    return [warning for warning in survey.warnings if word in warning]


def classes(folder: Path, counts: dict[str, int]) -> Path:
    """Write so many sounds of each class, all different, of half a second."""
    seed = 0
    for label, count in counts.items():
        for number in range(count):
            seed += 1
            write_sound(folder / label / f"{number}.wav", seed, seconds=0.1)
    return folder


class TestFacts:
    def test_a_tone(self, tmp_path: Path) -> None:
        """Level, length and format are what was written."""
        facts = facts_of(write(tmp_path / "a.wav", 0.1 * TONE))
        assert ("name", 1.0, RATE, 1) == (facts.name, facts.seconds, facts.sample_rate, facts.channels)
        assert pytest.approx(-20.0, abs=0.01) == facts.peak
        assert pytest.approx(-23.01, abs=0.01) == facts.rms
        assert (0.0, 0.0) == (facts.clipped, facts.silent)

    def test_channels_are_counted_and_mixed(self, tmp_path: Path) -> None:
        """A side that is silent halves the level, as it does for the model."""
        facts = facts_of(write(tmp_path / "a.wav", np.column_stack([0.1 * TONE, 0 * TONE])))
        assert 2 == facts.channels
        assert pytest.approx(-26.02, abs=0.01) == facts.peak

    def test_silence_has_a_number(self, tmp_path: Path) -> None:
        """Digital silence is at -120 dB, which JSON can hold."""
        facts = facts_of(write(tmp_path / "a.wav", 0 * TONE))
        assert (-120.0, -120.0, 1.0) == (facts.peak, facts.rms, facts.silent)

    @pytest.mark.parametrize(("gain", "share"), [(0.99, 0.0), (10.0, 0.936)])
    def test_clipping_is_the_share_of_flat_tops(self, tmp_path: Path, gain: float, share: float) -> None:
        """A tone ten times too loud is at full scale for the share of time that its arc sine says."""
        facts = facts_of(write(tmp_path / "a.wav", np.clip(gain * TONE, -1.0, 1.0)))
        assert pytest.approx(share, abs=0.002) == facts.clipped

    @pytest.mark.parametrize(("length", "share"), [(1, 0.0), (2, 0.0), (3, 0.003), (7, 0.007)])
    def test_a_single_loudest_sample_is_not_clipped(self, tmp_path: Path, length: int, share: float) -> None:
        """Three in a row are, at either end of the scale and of the clip."""
        samples = np.zeros(2000)
        samples[:length] = -1.0
        samples[-length:] = 1.0
        assert pytest.approx(share) == facts_of(write(tmp_path / "a.wav", samples)).clipped

    def test_silence_is_measured_in_blocks(self, tmp_path: Path) -> None:
        """What is under -60 dBFS counts, be it padding or a faint hiss, and not a tone's zero crossings."""
        hiss = np.random.default_rng(0).normal(scale=10 ** (-63 / 20), size=RATE)
        for padding, expected in ((0 * TONE, 0.5), (hiss, 0.5), (10 * hiss, 0.0)):
            facts = facts_of(write(tmp_path / "a.wav", np.concatenate([0.1 * TONE, padding])))
            assert pytest.approx(expected, abs=0.02) == facts.silent

    @pytest.mark.parametrize("samples", [[0.5], [1e-45] * 50, [1.0] * 321])
    def test_nasty_clips(self, tmp_path: Path, samples: Sequence[float]) -> None:
        """One sample, denormals and a block that is not full have finite facts."""
        facts = facts_of(write(tmp_path / "a.wav", np.array(samples)))
        for value in (facts.peak, facts.rms, facts.clipped, facts.silent):
            assert np.isfinite(value)
        assert -120.0 <= facts.rms <= facts.peak


class TestSurvey:
    def test_what_there_is(self, tmp_path: Path) -> None:
        """Clips, groups, length, and the clips of each class; a facts for each clip, under its name."""
        found = surveyed(classes(tmp_path, {"cat": 3, "Noise": 2}))
        assert (5, 5, {"Noise": 2, "cat": 3}, ("Noise",)) == (found.clips, found.groups, found.counts, found.background)
        assert pytest.approx(0.5) == found.seconds
        assert ["Noise/0.wav", "Noise/1.wav", "cat/0.wav", "cat/1.wav", "cat/2.wav"] == [
            each.name for each in found.facts
        ]
        assert found == msgspec.json.decode(msgspec.json.encode(found), type=Survey)

    def test_a_quantity_has_no_classes(self, tmp_path: Path) -> None:
        """There is nothing to count then."""
        assert {} == surveyed(classes(tmp_path, {"1.5": 2, "2.5": 1}), task="regression").counts

    def test_facts_are_of_segments(self, tmp_path: Path) -> None:
        """The loud half of a file is loud, the silent half silent."""
        write(tmp_path / "a.wav", np.concatenate([TONE, 0 * TONE]))
        spans = (("loud", "0", "1"), ("still", "1", ""))
        rows = [{"file": "a.wav", "label": label, "start": start, "end": end} for label, start, end in spans]
        write_manifest(tmp_path / "meta.csv", rows)
        loud, still = surveyed(tmp_path).facts
        assert (1.0, 0.0, 1.0, 1.0) == (loud.seconds, loud.silent, still.seconds, still.silent)

    def test_equal_clips_keep_their_names_in_the_cache(self, tmp_path: Path) -> None:
        """Facts are kept by content, and names are not part of it."""
        for name in ("a", "b"):
            write(tmp_path / "data" / "x" / f"{name}.wav", TONE)
        dataset, cache = load(tmp_path / "data"), Cache(tmp_path / "cache")
        first = survey(dataset, jobs=1, cache=cache)
        assert ["x/a.wav", "x/b.wav"] == [each.name for each in first.facts]
        assert first == survey(dataset, jobs=1, cache=cache)

    def test_nothing_usable_is_told(self, tmp_path: Path) -> None:
        """Each clip with its reason; there are no facts, and that can be described."""
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "a.wav").write_bytes(b"not a sound")
        found = surveyed(tmp_path)
        assert (0, 0.0, ()) == (found.clips, found.seconds, found.facts)
        assert 1 == len(warnings_about("x/a.wav cannot be used: libsndfile", found))
        assert describe(found).startswith("0 clips of 0 groups, 0.0 s")


class TestWarnings:
    def test_a_good_data_set_has_none(self, tmp_path: Path) -> None:
        """Nothing is said where nothing is wrong."""
        assert () == surveyed(classes(tmp_path, {"cat": 10, "dog": 12})).warnings

    def test_those_of_the_data_set_are_kept(self, tmp_path: Path) -> None:
        """What was found without listening is told with the rest."""
        dataset = Dataset(load(classes(tmp_path, {"cat": 10})).clips, "label", "classification", ("found before",))
        assert "found before" == survey(dataset, jobs=1).warnings[0]

    def test_few_clips(self, tmp_path: Path) -> None:
        """A class of nine is named."""
        found = surveyed(classes(tmp_path, {"cat": 10, "dog": 9}))
        assert ("class 'dog' has 9 clips: too few to learn it, or to know how well it is learnt",) == found.warnings

    def test_unbalanced_classes(self, tmp_path: Path) -> None:
        """More than ten to one, the largest and the smallest are named."""
        found = surveyed(classes(tmp_path, {"cat": 31, "dog": 3}))
        assert "class 'cat' has 31 clips and 'dog' 3: weigh the classes" in found.warnings[-1]

    def test_a_class_that_another_recorder_recorded(self, tmp_path: Path) -> None:
        """Its rate gives it away, so the leak is named with its class and rates."""
        classes(tmp_path, {"cat": 10, "dog": 10})
        for number in range(10):
            write_sound(tmp_path / "cow" / f"{number}.wav", 100 + number, rate=44_100)
        found = surveyed(tmp_path)
        rates, why = "8000 Hz (20 clips), 44100 Hz (10 clips)", "a model may learn the recorder and not the sound"
        assert [
            f"clips are of different sample rates: {rates}; a model can hear that, record all alike",
            f"class 'cow' has other sample rates (44100 Hz) than most others: {why}",
        ] == warnings_about("sample rates", found)

    def test_rates_that_do_not_tell_classes_apart(self, tmp_path: Path) -> None:
        """If every class has both, only the mixture is told."""
        classes(tmp_path, {"cat": 10, "dog": 10})
        for label in ("cat", "dog"):
            for number in range(4):
                write_sound(tmp_path / label / f"more{number}.wav", ord(label[0]) + number, rate=16_000)
        assert 1 == len(warnings_about("sample rates", surveyed(tmp_path)))

    def test_stereo_among_mono(self, tmp_path: Path) -> None:
        """The same goes for channels."""
        classes(tmp_path, {"cat": 10})
        for number in range(10):
            write_sound(tmp_path / "dog" / f"{number}.wav", 100 + number, channels=2)
        assert 3 == len(warnings_about("numbers of channels", surveyed(tmp_path)))

    def test_clipped_and_silent_clips(self, tmp_path: Path) -> None:
        """They are counted, and the worst are named first."""
        for number, gain in enumerate((2.0, 10.0, 3.0, 4.0)):
            write(tmp_path / "x" / f"loud{number}.wav", np.clip(gain * TONE, -1, 1))
        write(tmp_path / "x" / "mute.wav", 1e-4 * TONE)
        write(tmp_path / "x" / "still.wav", np.concatenate([TONE[:4000] / 2, np.zeros(12_000)]))
        found = surveyed(tmp_path)
        (clipped,) = warnings_about("clipped", found)
        assert "4 clips are clipped: x/loud1.wav (93.5 %), x/loud3.wav" in clipped
        assert clipped.endswith(", … of the samples")
        assert ["1 clip is silent throughout: x/mute.wav"] == warnings_about("throughout", found)
        assert warnings_about("half of the time", found)[0].endswith("x/still.wav (74 %)")

    def test_clips_that_a_worker_would_reject(self, tmp_path: Path) -> None:
        """Those shorter than the limit, the shortest first, with what to do; one that is as long is none of them."""
        for name, length in (("a", 8000), ("b", 7999), ("c", 800)):
            write(tmp_path / "x" / f"{name}.wav", TONE[:length])
        found = survey(load(tmp_path), shortest_seconds=0.5, jobs=1)
        (told,) = warnings_about("half a window", found)
        assert told.startswith(
            "2 clips are shorter than half a window, 0.5 s, and silence fills it up: x/c.wav, x/b.wav."
        )
        assert [] == warnings_about("half a window", surveyed(tmp_path))

    def test_equal_sounds(self, tmp_path: Path) -> None:
        """A copy in another container is found, and counted as one group with its original."""
        samples, rate = soundfile.read(write_sound(tmp_path / "x" / "a.wav"), dtype="int16")
        soundfile.write(tmp_path / "x" / "b.flac", samples, rate)
        found = surveyed(tmp_path)
        assert 1 == found.groups
        assert 1 == len(warnings_about("x/b.flac has the same sound as x/a.wav", found))


class TestDescription:
    def test_it_reads_as_a_table(self) -> None:
        """Columns are aligned, and warnings come last."""
        facts = [ClipFacts(f"{n}", 1.0 + n, RATE, 1 + n % 2, -6.0, -20.0 - n, 0.0, 0.0) for n in range(3)]
        text = describe(Survey(3, 2, 6.0, {"cat": 1, "other": 2}, ("other",), tuple(facts), ("mind the gap",)))
        assert text.splitlines() == [
            "3 clips of 2 groups, 6.0 s",
            "  sample rate  16000 Hz",
            "  channels     1 (2 clips), 2 (1 clip)",
            "  duration     1.00 to 3.00 s, median 2.00",
            "  peak         -6.0 dBFS",
            "  RMS level    -22.0 to -20.0 dBFS, median -21.0",
            "  cat          1",
            "  other        2  background",
            "warning: mind the gap",
        ]


class TestRealRecordings:
    def test_notes(self, notes: Path) -> None:
        """What the data set's own description says is found: rate, channels, peak and length."""
        found = survey(load(notes, label="midi_pitch"))
        assert (313, 6, {}) == (found.clips, found.groups, found.counts)
        assert {(22_050, 1)} == {(each.sample_rate, each.channels) for each in found.facts}
        np.testing.assert_allclose([each.peak for each in found.facts], -6.02, rtol=0, atol=0.05)
        assert max(each.seconds for each in found.facts) < 1.6
