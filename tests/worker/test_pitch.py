"""The pitch set against librosa's YIN on real notes, on tones of every kind, and on what is no tone."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path
from typing import Any

import librosa
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import ExtraTreesRegressor

from worker.audio import resample
from worker.features import LIMIT, PITCH, FeatureSpec, Featurizer, feature_spec, read_spec
from worker.pitch import NO_PITCH, PitchSet

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

RATE = 16000
FEATURIZER = Featurizer(feature_spec("pitch"))
PIANO = range(21, 109)
UPPER, MIDDLE, LOWER, STRENGTH = range(4)
SECONDS = np.arange(RATE) / RATE


def hertz(midi: float) -> float:
    return float(440 * 2 ** ((midi - 69) / 12))


def tone(midi: float, amplitudes: Array, phases: Array | None = None) -> Floats:
    """One second of a note with harmonics of these amplitudes, as far as they are below Nyquist; peak 0.5."""
    phases = np.arange(1.0, 1 + len(amplitudes)) ** 2 if phases is None else phases
    partials = [
        amplitude * np.sin(2 * np.pi * number * hertz(midi) * SECONDS + phase)
        for number, (amplitude, phase) in enumerate(zip(amplitudes, phases, strict=True), start=1)
        if number * hertz(midi) < 0.45 * RATE
    ]
    sound = np.sum(partials, axis=0)
    return np.asarray(0.5 * sound / np.abs(sound).max(), dtype=np.float32)


def features(*windows: Array) -> Array:
    return FEATURIZER.transform(np.stack(windows).astype(np.float32))


class Note:
    """A recorded note at the model's rate."""

    def __init__(self, folder: Path, row: dict[str, str]) -> None:
        samples, rate = soundfile.read(folder / "audio" / row["filename"], dtype="float32")
        self.samples = resample(samples, rate, RATE)
        self.name, self.group, self.midi = row["filename"], row["group"], float(row["midi_pitch"])


@pytest.fixture(scope="module")
def recorded(notes: Path) -> list[Note]:
    with (notes / "meta.csv").open() as lines:
        return [Note(notes, row) for row in csv.DictReader(lines)]


@pytest.fixture(scope="module")
def windows(recorded: list[Note]) -> Floats:
    """The beginnings of some of the notes, shape (20, RATE)."""
    return np.concatenate([FEATURIZER.windows(note.samples)[:1] for note in recorded[::16]])


class TestRecordedNotes:
    def test_agrees_with_yin(self, recorded: list[Note]) -> None:
        """Within a quarter of a semitone of librosa's YIN (de Cheveigné and Kawahara 2002) on what YIN can do.

        That is notes of middle pitch; in the outer octaves YIN itself is an octave and more off. One
        note in fifty may differ, where a resonance is stronger than the string.
        """
        chosen = [note for note in recorded if 40 <= note.midi <= 84][::4]
        ours, theirs = [], []
        for note in chosen:
            window = FEATURIZER.windows(note.samples)[:1]
            frequencies = librosa.yin(window[0], fmin=60, fmax=1200, sr=RATE, frame_length=2048)
            ours.append(FEATURIZER.transform(window)[0, MIDDLE])
            theirs.append(np.median(librosa.hz_to_midi(frequencies)))
        differ = np.abs(np.subtract(ours, theirs)) > 0.25

        assert len(chosen) > 50
        assert differ.sum() <= len(chosen) / 50

    def test_finds_the_label(self, recorded: list[Note]) -> None:
        """Of 313 notes of six instruments, from A0 to C8, one in a hundred is over three quarters of a semitone off.

        Pianos' highest strings fade within a tenth of a second; and a real piano is out of tune.
        """
        estimates = features(*(FEATURIZER.windows(note.samples)[0] for note in recorded))
        off = np.abs(estimates[:, MIDDLE] - [note.midi for note in recorded])

        assert len(recorded) == 313
        assert np.count_nonzero(off > 0.75) <= len(recorded) / 100
        assert np.median(off) <= 0.1

    def test_an_unseen_instrument(self, recorded: list[Note]) -> None:
        """A forest that has heard other instruments only is a quarter of a semitone off on average."""
        windows = [FEATURIZER.windows(note.samples) for note in recorded]
        owner = np.repeat(np.arange(len(windows)), [len(each) for each in windows])
        rows, midi = FEATURIZER.transform(np.concatenate(windows)), np.array([note.midi for note in recorded])
        groups = np.array([note.group for note in recorded])
        errors: list[float] = []
        for group in np.unique(groups):
            unseen = (groups == group)[owner]
            forest = ExtraTreesRegressor(50, random_state=0).fit(rows[~unseen], midi[owner[~unseen]])
            values = forest.predict(rows[unseen])
            errors += [
                abs(values[owner[unseen] == note].mean() - midi[note]) for note in np.flatnonzero(groups == group)
            ]

        assert np.mean(errors) < 0.25


class TestTones:
    @pytest.mark.parametrize("slope", [0.5, 1.0, 1.5])
    def test_harmonics(self, slope: float) -> None:
        """Each note of the piano is found, whatever slope its twelve harmonics have; by all estimates from C2 up."""
        found = features(*(tone(midi, np.arange(1.0, 13) ** -slope) for midi in PIANO))

        assert [*PIANO] == pytest.approx(found[:, MIDDLE], abs=0.15)
        assert [*PIANO] == pytest.approx(found[:, LOWER], abs=0.15)
        assert [*PIANO][15:] == pytest.approx(found[15:, UPPER], abs=0.15)
        assert found[:, STRENGTH].min() > 10

    def test_odd_harmonics(self) -> None:
        """Nor do they need the even harmonics, which a closed pipe lacks."""
        found = features(*(tone(midi, np.resize([1.0, 0.0], 12)) for midi in PIANO))

        assert [*PIANO] == pytest.approx(found[:, MIDDLE], abs=0.15)

    def test_a_loud_twelfth(self) -> None:
        """Nor is the lower estimate misled where every third harmonic is 40 dB louder than the others."""
        found = features(*(tone(midi, np.resize([0.01, 0.01, 1.0], 12)) for midi in PIANO[12:-30]))

        assert [*PIANO[12:-30]] == pytest.approx(found[:, LOWER], abs=0.15)

    def test_missing_fundamental(self) -> None:
        """A note is found without its fundamental, as on a telephone: by the lower estimate in all octaves."""
        most = [midi for midi in PIANO if 6 * hertz(midi) < 0.45 * RATE]
        found = features(*(tone(midi, np.array([0.0] + 11 * [1.0])) for midi in most))

        assert most == pytest.approx(found[:, LOWER], abs=0.15)
        assert most[4:57] == pytest.approx(found[4:57, MIDDLE], abs=0.15)

    def test_sines(self) -> None:
        """So is a tone without any harmonics, as exactly as a frame resolves it."""
        found = features(*(tone(midi, np.ones(1)) for midi in PIANO))[:, MIDDLE]

        assert [*PIANO] == pytest.approx(found, abs=1.5)
        assert [*PIANO][12:] == pytest.approx(found[12:], abs=0.5)
        assert [*PIANO][36:] == pytest.approx(found[36:], abs=0.15)

    def test_quarter_tones(self) -> None:
        """Notes between the keys are found between them."""
        between = np.arange(40.0, 90, 2.5)
        found = features(*(tone(midi, np.ones(8)) for midi in between))

        assert between == pytest.approx(found[:, MIDDLE], abs=0.15)

    @pytest.mark.parametrize("rate", [8000, 22050, 44100])
    def test_rates(self, rate: int) -> None:
        """At another sample rate the same note is found, as far as there is room below Nyquist."""
        featurizer = Featurizer(feature_spec("pitch", sample_rate=rate))
        for midi in (33, 60, 84):
            (found,) = featurizer.transform(resample(tone(midi, np.ones(6)), RATE, rate)[np.newaxis])
            assert [midi] * 3 == pytest.approx(found[:STRENGTH], abs=0.15)

    @given(
        midi=st.floats(33, 84),
        amplitudes=st.lists(st.floats(0.1, 1), min_size=6, max_size=12),
        seed=st.integers(0, 99),
    )
    @settings(max_examples=40, deadline=None)
    def test_any_timbre(self, midi: float, amplitudes: list[float], seed: int) -> None:
        """Whatever the harmonics' levels within 20 dB, and whatever their phases, the note is within 0.2 semitones."""
        phases = np.random.default_rng(seed).uniform(0, 2 * np.pi, len(amplitudes))

        assert midi == pytest.approx(features(tone(midi, np.array(amplitudes), phases))[0, MIDDLE], abs=0.2)


class TestInvariances:
    def test_level(self, windows: Floats) -> None:
        """Level does not count: not one bit at a power of two, and no step of the estimates at -37 dB."""
        expected = FEATURIZER.transform(windows)

        assert np.array_equal(expected, FEATURIZER.transform(windows / np.float32(64)))
        assert np.array_equal(expected, FEATURIZER.transform(-windows))
        assert expected == pytest.approx(FEATURIZER.transform(windows * np.float32(0.014)), abs=1e-3)

    def test_offset(self, windows: Floats) -> None:
        """Nor does a constant offset: it is the microphone's, not the sound's."""
        moved = FEATURIZER.transform(windows + np.float32(0.25))

        assert FEATURIZER.transform(windows)[:, MIDDLE] == pytest.approx(moved[:, MIDDLE], abs=0.15)

    def test_sixteen_bits(self, windows: Floats) -> None:
        """A decoder's 16 bits give the same notes."""
        quantised = FEATURIZER.transform(np.rint(windows * 32768).astype(np.int16))

        assert FEATURIZER.transform(windows)[:, :STRENGTH] == pytest.approx(quantised[:, :STRENGTH], abs=0.15)

    def test_batches(self, windows: Floats) -> None:
        """A row has the same bits whatever the batch is, and after pickling."""
        expected = FEATURIZER.transform(windows)
        copy = pickle.loads(pickle.dumps(FEATURIZER))

        for row, window in zip(expected, windows, strict=True):
            assert row.tobytes() == copy.transform(window[np.newaxis]).tobytes()

    def test_beside_another_set(self, windows: Floats) -> None:
        """Beside other sets the columns are the same, under the same names."""
        both = Featurizer(feature_spec("compact+pitch"))

        assert FEATURIZER.feature_names == both.feature_names[-4:]
        assert np.array_equal(FEATURIZER.transform(windows), both.transform(windows)[:, -4:])


class TestNoNote:
    @pytest.mark.parametrize(
        "window",
        [
            pytest.param(np.zeros(RATE), id="silence"),
            pytest.param(np.ones(RATE), id="offset"),
            pytest.param(np.full(RATE, 1e-40), id="denormal"),
            pytest.param(np.eye(1, RATE, 0)[0], id="click at the start"),
            pytest.param(np.eye(1, RATE, RATE // 2)[0], id="click"),
            pytest.param(SECONDS, id="ramp"),
            pytest.param(tone(6, np.ones(1)), id="below the range"),
        ],
    )
    def test_nothing_rises(self, window: Array) -> None:
        """Where the spectrum has no peaks there is no pitch, and that has a number of its own."""
        assert np.array_equal(np.full((1, 4), NO_PITCH), features(window))

    @pytest.mark.parametrize("colour", [0, 1, 2])
    def test_noise(self, colour: int) -> None:
        """Noise, white, pink or brown, has no pitch, or one time in five a weak one: under 1 dB, and notes have 10."""
        spectrum = np.random.default_rng(0).standard_normal((20, RATE // 2 + 1, 2)) @ [1, 1j]
        slope = np.maximum(np.arange(RATE // 2 + 1), 20) ** (-colour / 2)
        found = features(*np.fft.irfft(spectrum * slope))

        assert np.count_nonzero(found[:, STRENGTH]) <= 4
        assert found[:, STRENGTH].max() < 1

    @pytest.mark.parametrize(
        "window",
        [
            pytest.param(LIMIT * np.sign(tone(69, np.ones(1))), id="120 dB over full scale"),
            pytest.param(np.sign(tone(45, np.ones(1))), id="clipped"),
            pytest.param(1e-40 * tone(69, np.ones(1)), id="denormal tone"),
            pytest.param(np.cos(np.pi * np.arange(RATE)), id="Nyquist"),
            pytest.param(np.concatenate([np.zeros(RATE - 1), [1e-38]]), id="one sample"),
            pytest.param(tone(60, np.ones(8)) * (SECONDS < 0.05), id="blip"),
        ],
    )
    def test_finite(self, window: Array) -> None:
        """Whatever comes, estimates are notes in the range or `NO_PITCH`, and strength is finite and not negative."""
        (found,) = features(window)

        assert np.isfinite(found).all()
        assert all(each == NO_PITCH or 20.4 <= each <= 108.6 for each in found[:STRENGTH])
        assert found[STRENGTH] >= 0

    @given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=50), st.integers(0, 2**32 - 1))
    @settings(max_examples=40, deadline=None)
    def test_anything(self, values: list[float], seed: int) -> None:
        """So for samples of a few values in any order."""
        self.test_finite(np.random.default_rng(seed).choice(np.array(values), RATE))


class TestSettings:
    def test_names(self) -> None:
        """The features' names, and the family by which importances are told."""
        assert ("pitch.upper", "pitch.middle", "pitch.lower", "pitch.strength") == FEATURIZER.feature_names
        assert {"pitch"} == {column.family for column in FEATURIZER.columns}

    def test_range(self) -> None:
        """Notes are looked for between fmin and fmax only, and half a semitone beyond."""
        spec = FeatureSpec(sets=(PitchSet(fmin=hertz(60), fmax=hertz(72)),))
        found = Featurizer(spec).transform(np.stack([tone(midi, np.ones(8)) for midi in (48, 59.6, 66, 72.4, 84)]))

        assert [59.6, 66, 72.4] == pytest.approx(found[1:4, MIDDLE], abs=0.15)
        assert ((found[:, :3] > 59.4) & (found[:, :3] < 72.6)).all()

    def test_written(self) -> None:
        """A user's own range can be written down, and comes back from a manifest."""
        written = read_spec('[[sets]]\nkind = "pitch"\nname = "bass"\nfmin = 30.0\nfmax = 400.0\n')

        assert FeatureSpec(sets=(PitchSet(name="bass", fmin=30.0, fmax=400.0),)) == written
        assert written == read_spec(msgspec.json.encode(written).decode())
        assert feature_spec("pitch") == FeatureSpec(sets=(PITCH,))

    @pytest.mark.parametrize(
        ("setting", "expected"),
        [
            ({"fmin": 0.0}, "fmin is 0.0; expected at least 7 Hz"),
            ({"fmin": 6.9}, "fmin is 6.9; expected at least 7 Hz, of which a window holds 7 periods"),
            ({"fmin": 5000.0}, "fmin is 5000.0; expected .* to less than 4186 Hz"),
            ({"fmin": 7600.0, "fmax": 9000.0}, "fmin is 7600.0; expected .* to less than 7600 Hz"),
            ({"fmin": float("nan")}, "fmin is nan; expected"),
            ({"fmax": float("inf")}, "fmax is inf; expected more than 0 Hz"),
            ({"fmax": float("nan")}, "fmax is nan; expected more than 0 Hz"),
        ],
    )
    def test_refused(self, setting: dict[str, Any], expected: str) -> None:
        """A range that cannot be is refused, with what can."""
        with pytest.raises(ValueError, match=f"feature set 'pitch': {expected}"):
            FeatureSpec(sets=(PitchSet(**setting),))

    def test_short_windows(self) -> None:
        """A window that holds too few periods of the lowest note is refused."""
        with pytest.raises(ValueError, match=r"feature set 'pitch': fmin is 27\.5; expected at least 28 Hz"):
            feature_spec("pitch", window_seconds=0.25, window_hop_seconds=0.25)

        assert feature_spec("pitch", window_seconds=0.26, window_hop_seconds=0.25).sets == (PITCH,)
