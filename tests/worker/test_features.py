"""The featurizer against librosa, and its promises about windows, batches, pickles and settings."""

from __future__ import annotations

import csv
import pickle
import warnings
from pathlib import Path
from typing import Any, get_args

import librosa
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core import event
from sklearn.ensemble import RandomForestClassifier

from worker import audio
from worker.features import ARTICLE, COMPACT, LIMIT, PITCH, RHYTHM, FeatureSpec, Featurizer, feature_spec, read_spec
from worker.frames import Family, Frames, Tables
from worker.statistics import STATISTICS, FrameStatistics
from worker.windows import Window

Array = npt.NDArray[Any]

FAMILIES: tuple[Family, ...] = get_args(Family)
RATE = 16000

SETS = {
    "defaults": COMPACT,
    "centred": FrameStatistics(
        name="centred",
        n_fft=2048,
        win_length=2048,
        hop_length=512,
        families=FAMILIES,
        statistics=STATISTICS,
        trim_db=60.0,
    ),
    "uncentred": FrameStatistics(
        name="uncentred",
        n_fft=1024,
        hop_length=160,
        win_length=401,
        center=False,
        n_mels=26,
        fmin=50.0,
        fmax=3800.0,
        n_mfcc=13,
        top_db=None,
        families=FAMILIES,
    ),
}
RATES = {"defaults": RATE, "centred": RATE, "uncentred": 8000}
SPECS = {name: FeatureSpec(sample_rate=RATES[name], sets=(SETS[name],)) for name in SETS}
FEATURIZERS = {name: Featurizer(spec) for name, spec in SPECS.items()}

# Absolute and relative tolerance of each array: a few roundings of float32, whose eps is 1.2e-7.
TOLERANCES: dict[str, tuple[float, float]] = {
    "stft": (1e-7, 3e-7),
    "mel_power": (1e-12, 2e-6),
    "mel": (2e-5, 0.0),
    "mfcc": (2e-4, 0.0),
    "delta": (5e-5, 0.0),
    "delta2": (5e-5, 0.0),
    "centroid": (1e-3, 1e-6),
    "bandwidth": (1e-3, 1e-6),
    "rolloff": (0.0, 1e-7),
    "flatness": (1e-9, 5e-6),
    "contrast": (2e-5, 0.0),
    "zcr": (0.0, 1e-7),
    "rms": (1e-9, 1e-6),
}


def reference(y: Array, spec: FrameStatistics, rate: int = RATE) -> dict[str, Array]:
    """Ask librosa for the same arrays, as its users would."""
    feature = librosa.feature
    frames: dict[str, Any] = {"n_fft": spec.n_fft, "hop_length": spec.hop_length, "center": spec.center}
    frames["win_length"] = spec.win_length
    framing: dict[str, Any] = {"frame_length": spec.n_fft, "hop_length": spec.hop_length, "center": spec.center}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # n_fft is too large for input signal of length=1
        mel = feature.melspectrogram(y=y, sr=rate, n_mels=spec.n_mels, fmin=spec.fmin, fmax=spec.fmax, **frames)
        db = librosa.power_to_db(mel, top_db=spec.top_db)
        mfcc = feature.mfcc(S=db, n_mfcc=spec.n_mfcc)
        mode = "interp" if mfcc.shape[1] >= 9 else "nearest"
        return {
            "stft": np.abs(librosa.stft(y, **frames)),
            "mel_power": mel,
            "mel": db,
            "mfcc": mfcc,
            "delta": feature.delta(mfcc, mode=mode),
            "delta2": feature.delta(mfcc, order=2, mode=mode),
            "centroid": feature.spectral_centroid(y=y, sr=rate, **frames),
            "bandwidth": feature.spectral_bandwidth(y=y, sr=rate, **frames),
            "rolloff": feature.spectral_rolloff(y=y, sr=rate, **frames),
            "flatness": feature.spectral_flatness(y=y, **frames),
            "contrast": feature.spectral_contrast(y=y, sr=rate, n_bands=6 if rate > 12800 else 5, **frames),
            "zcr": feature.zero_crossing_rate(y, **framing),
            "rms": feature.rms(y=y, **framing),
        }


def frames_of(y: Array, spec: FrameStatistics, rate: int = RATE) -> dict[str, Array]:
    frames = Frames(Window(y), spec, Tables.of(spec, rate, spec.families))
    return {name: frames[name] for name in ("stft", "mel_power", "mel", *spec.families)}


def assert_like_librosa(y: Array, spec: FrameStatistics, rate: int = RATE) -> None:
    frames = frames_of(y, spec, rate)
    expected = reference(y, spec, rate)
    for name in frames:
        absolute, relative = TOLERANCES[name]
        assert expected[name].shape == frames[name].shape, name
        assert np.float32 == frames[name].dtype, name
        np.testing.assert_allclose(frames[name], expected[name], rtol=relative, atol=absolute, err_msg=name)


def clips(folder: Path, count: int, rate: int) -> list[Array]:
    """Decode and resample ``count`` clips that are spread over the whole collection."""
    with (folder / "meta.csv").open(newline="") as file:
        names = [row["filename"] for row in csv.DictReader(file)]
    loaded = []
    for name in names[:: len(names) // count][:count]:
        samples, native = soundfile.read(folder / "audio" / name, dtype="float32")
        loaded.append(soxr.resample(samples, native, rate).astype(np.float32))
    return loaded


def tone(frequency: float, rate: int = RATE, seconds: float = 1.0) -> Array:
    samples: Array = np.cos(2 * np.pi * frequency / rate * np.arange(int(rate * seconds))).astype(np.float32)
    return samples


def noise(samples: int, level: float = 0.1, seed: int = 0) -> Array:
    return (level * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def click(at: int) -> Array:
    samples = np.zeros(RATE, dtype=np.float32)
    samples[at] = 1.0
    return samples


SIGNALS: dict[str, Array] = {
    "silence": np.zeros(RATE, dtype=np.float32),
    "one click": click(5000),
    "a click at the very end": click(RATE - 1),
    "direct current": np.ones(RATE, dtype=np.float32),
    "negative direct current": np.full(RATE, -0.5, dtype=np.float32),
    "a full-scale tone": tone(1000.0),
    "a tone at Nyquist of 16 kHz": tone(8000.0),
    "a tone at Nyquist of 8 kHz": tone(4000.0),
    "a tone near fmin": tone(20.0),
    "a square wave": np.sign(tone(440.0)),
    "white noise": noise(RATE),
    "white noise at -120 dB": noise(RATE, 1e-6),
    "noise after silence": np.concatenate([np.zeros(8000, dtype=np.float32), noise(8000)]),
    "an odd length": noise(3001),
    "a prime length": noise(16007),
    "exactly one frame": noise(2048),
    "one sample more than a frame": noise(2049),
}
SHORT = {f"{count} samples": noise(count, 0.3) for count in (1, 2, 3, 511, 512, 513, 1023, 2047)}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("signal", SIGNALS)
def test_every_array_is_librosas(signal: str, spec: str) -> None:
    """Each array equals librosa's, called for that waveform alone."""
    assert_like_librosa(SIGNALS[signal], SETS[spec], RATES[spec])


@pytest.mark.parametrize("spec", ["centred", "defaults"])
@pytest.mark.parametrize("signal", SHORT)
def test_waveforms_shorter_than_a_frame_are_librosas(signal: str, spec: str) -> None:
    """A centred waveform may be shorter than n_fft, down to one sample."""
    assert_like_librosa(SHORT[signal], SETS[spec], RATES[spec])


@pytest.mark.parametrize("spec", SPECS)
def test_recordings_are_librosas(esc10: Path, notes: Path, spec: str) -> None:
    """Real clips of environmental sounds and of music agree with librosa as well."""
    rate = RATES[spec]
    for clip in [*clips(esc10, 12, rate), *clips(notes, 8, rate)]:
        assert_like_librosa(clip, SETS[spec], rate)


@pytest.mark.parametrize("name", ["article", "rhythm"])
def test_float32_is_a_rounding_away(name: str, esc10: Path, notes: Path) -> None:
    """Of nasty sound and of recordings, mel bands in float32 are within 0.002 dB of those in float64."""
    spec = {"article": ARTICLE, "rhythm": RHYTHM}[name]
    tables = Tables.of(spec, RATE, ())
    sounds = [*SIGNALS.values(), *SHORT.values(), *clips(esc10, 12, RATE), *clips(notes, 8, RATE)]
    exact = [Frames(Window(sound), spec, tables)["mel"] for sound in sounds]
    faster = [Frames(Window(sound, "float32"), spec, tables)["mel"] for sound in sounds]
    assert any((a != b).any() for a, b in zip(exact, faster, strict=True))
    for a, b in zip(exact, faster, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-3)


def test_float32_names_the_same_in_all_of_esc10(esc10: Path) -> None:
    """A forest that was trained in float64 says the same of every window that was computed in float32."""
    with (esc10 / "meta.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    exact, faster = (Featurizer(feature_spec("article", precision=each)) for each in ("float64", "float32"))
    x, other, labels, folds = [], [], [], []
    for row in rows:
        sound = audio.from_container((esc10 / "audio" / row["filename"]).read_bytes())
        windows = exact.windows(audio.resample(sound.samples, sound.sample_rate, RATE))
        x.append(exact.transform(windows))
        other.append(faster.transform(windows))
        labels += [row["label"]] * len(windows)
        folds += [row["fold"]] * len(windows)
    features, rounded = np.concatenate(x), np.concatenate(other)
    assert (features != rounded).any()
    for fold in sorted(set(folds)):
        tested = np.array(folds) == fold
        forest = RandomForestClassifier(50, n_jobs=-1, random_state=0).fit(features[~tested], np.array(labels)[~tested])
        np.testing.assert_array_equal(forest.predict(features[tested]), forest.predict(rounded[tested]))


def test_other_resolutions_are_librosas() -> None:
    """An odd n_fft and a rate above librosa's own default change nothing."""
    spec = FrameStatistics(name="odd", n_fft=1201, win_length=1000, hop_length=300, families=FAMILIES)
    assert_like_librosa(noise(20001), spec, 48000)


@pytest.mark.parametrize("samples", [1, 3, 1000, 1024])
def test_uncentred_waveforms_are_filled_up_to_one_frame(samples: int) -> None:
    """Without centring, where librosa refuses a waveform shorter than n_fft, zeros follow it."""
    short = np.abs(noise(samples))
    filled = np.concatenate([short, np.zeros(1024 - samples, dtype=np.float32)])

    frames, expected = (frames_of(y, SETS["uncentred"], 8000) for y in (short, filled))

    for name, array in expected.items():
        np.testing.assert_array_equal(frames[name], array, err_msg=name)


def test_the_clamp_is_relative_to_its_own_window() -> None:
    """A loud window in the batch leaves a quiet one's decibels alone."""
    featurizer = Featurizer(FeatureSpec(sets=(FrameStatistics(name="mel", families=("mel",), statistics=("min",)),)))
    quiet, loud = noise(RATE, 1e-5), noise(RATE, 1.0)

    alone = featurizer.transform(quiet[np.newaxis])
    beside = featurizer.transform(np.stack([loud, quiet]))

    np.testing.assert_array_equal(alone[0], beside[1])


@pytest.mark.parametrize("spec", SPECS)
def test_int16_is_what_a_decoder_makes_of_it(spec: str) -> None:
    """int16 is float32 divided by 32768, through every entrance."""
    featurizer = FEATURIZERS[spec]
    pcm = np.random.default_rng(1).integers(-32768, 32768, 40000).astype(np.int16)
    decoded = pcm.astype(np.float32) / np.float32(32768)

    np.testing.assert_array_equal(featurizer.windows(decoded), featurizer.windows(pcm))
    length = featurizer.spec.window_samples
    np.testing.assert_array_equal(
        featurizer.transform(decoded[np.newaxis, :length]), featurizer.transform(pcm[np.newaxis, :length])
    )


def test_names_follow_the_spec() -> None:
    """A name is family.band.statistic, or family.statistic where there is only one band."""
    named = FrameStatistics(name="few", n_mfcc=2, families=("centroid", "mfcc"), statistics=("std", "p90"))
    expected = ("centroid.std", "centroid.p90", "mfcc.0.std", "mfcc.0.p90", "mfcc.1.std", "mfcc.1.p90")
    assert expected == Featurizer(FeatureSpec(sets=(named,))).feature_names


def test_each_column_has_one_name() -> None:
    """With everything asked for, names are unique and as many as the columns."""
    featurizer = FEATURIZERS["centred"]
    matrix = featurizer.transform(np.zeros((3, featurizer.spec.window_samples), dtype=np.float32))
    assert (3, len(set(featurizer.feature_names))) == matrix.shape
    assert np.float32 == matrix.dtype


def test_an_empty_batch_has_no_rows() -> None:
    """No windows make a matrix of no rows and of all columns."""
    featurizer = FEATURIZERS["centred"]
    matrix = featurizer.transform(np.zeros((0, featurizer.spec.window_samples), dtype=np.float32))
    assert (0, len(featurizer.feature_names)) == matrix.shape


COUNTING = Featurizer(
    FeatureSpec(
        sample_rate=100,
        window_seconds=1.0,
        window_hop_seconds=0.3,
        sets=(
            FrameStatistics(name="count", n_fft=16, win_length=16, hop_length=8, n_mels=2, n_mfcc=2, families=("rms",)),
        ),
    )
)


@given(st.integers(1, 700))
def test_windows_hear_every_sample_and_pad_none(count: int) -> None:
    """Each window is a stretch of the waveform, on the grid or at its end, and together they cover it."""
    samples = np.arange(1, count + 1, dtype=np.float32)  # a sample's value is its place, and zero is padding

    windows = COUNTING.windows(samples)

    assert np.float32 == windows.dtype
    assert set(samples) == set(windows[windows != 0])
    if count <= 100:
        assert [[*samples, *[0.0] * (100 - count)]] == windows.tolist()
        return
    starts = [int(window[0]) - 1 for window in windows]
    grid = list(range(0, count - 99, 30))
    assert (grid if grid[-1] == count - 100 else [*grid, count - 100]) == starts
    for start, window in zip(starts, windows, strict=True):
        np.testing.assert_array_equal(samples[start : start + 100], window)


def test_windows_do_not_touch_the_waveform() -> None:
    """Windows are copies, so that writing to them leaves the waveform as it was."""
    waveform = noise(40000)
    before = waveform.copy()
    FEATURIZERS["centred"].windows(waveform)[:] = 0.0
    np.testing.assert_array_equal(before, waveform)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_a_row_does_not_depend_on_its_batch(data: st.DataObject) -> None:
    """Whatever the windows beside it, their order and their memory, a row keeps its bits."""
    featurizer = FEATURIZERS["centred"]
    length = featurizer.spec.window_samples
    pool = np.stack([noise(length, 10.0 ** -(seed % 6), seed) for seed in range(6)] + [click(7), tone(50.0)])
    alone = [featurizer.transform(window[np.newaxis]).tobytes() for window in pool]
    chosen = data.draw(st.lists(st.integers(0, len(pool) - 1), min_size=1, max_size=6))
    offset = data.draw(st.integers(0, 15))
    memory = np.empty(len(chosen) * length + offset, dtype=np.float32)  # shifts the alignment of the batch
    batch = memory[offset:].reshape(len(chosen), length)
    batch[:] = pool[chosen]

    rows = featurizer.transform(batch)

    assert [alone[window] for window in chosen] == [row.tobytes() for row in rows]


def test_the_layout_of_memory_changes_nothing() -> None:
    """Column-major and strided batches have the bits of a contiguous one."""
    featurizer = FEATURIZERS["uncentred"]
    batch = noise(4 * 8000).reshape(4, 8000)
    expected = featurizer.transform(batch).tobytes()
    assert expected == featurizer.transform(np.asfortranarray(batch)).tobytes()
    assert expected == featurizer.transform(np.repeat(batch, 2, axis=1)[:, ::2]).tobytes()


def test_what_can_only_be_read_compiles_nothing() -> None:
    """As memory that is mapped from a file: for numba it is of another type, which would take seconds."""
    featurizer = FEATURIZERS["uncentred"]
    batch = noise(2 * 8000).reshape(2, 8000)
    expected = featurizer.transform(batch).tobytes()
    batch.setflags(write=False)
    with event.install_recorder("numba:compile") as compiled:
        assert expected == featurizer.transform(batch).tobytes()
    assert not compiled.buffer


@pytest.mark.parametrize("spec", SPECS)
def test_a_pickle_is_the_spec_and_nothing_else(spec: str) -> None:
    """What comes out of a pickle has equal settings, names and bits, and the pickle holds no table."""
    featurizer = FEATURIZERS[spec]
    windows = featurizer.windows(noise(40000))

    dumped = pickle.dumps(featurizer)
    loaded = pickle.loads(dumped)

    assert len(dumped) < 1000
    assert featurizer.spec == loaded.spec
    assert featurizer.feature_names == loaded.feature_names
    assert featurizer.transform(windows).tobytes() == loaded.transform(windows).tobytes()


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_survives_json(spec: str) -> None:
    """A spec is plain JSON and comes back equal."""
    assert SPECS[spec] == msgspec.json.decode(msgspec.json.encode(SPECS[spec]), type=FeatureSpec)


def test_a_spec_from_json_is_checked() -> None:
    """Misspelt settings, wrong types and impossible values are refused with the name of the setting."""
    for text, words in (
        (b'{"sample_rat": 8000}', "sample_rat"),
        (b'{"sets": [{"kind": "frames", "name": "x", "n_fft": "2048", "families": ["mel"]}]}', "n_fft"),
        (b'{"sets": [{"kind": "frames", "name": "x", "families": ["mffc"]}]}', "mffc"),
        (b'{"sets": [{"kind": "frames", "name": "x", "families": ["mel"], "n_mfcc": 0}]}', "n_mfcc is 0"),
    ):
        with pytest.raises(msgspec.ValidationError, match=words):
            msgspec.json.decode(text, type=FeatureSpec)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_fft": 1}, "n_fft is 1; expected 2 to 16000, the samples of a window"),
        ({"win_length": 4096}, "win_length is 4096; expected 1 to n_fft, which is 2048"),
        ({"win_length": 0}, "win_length is 0; expected 1 to n_fft"),
        ({"hop_length": 0}, "hop_length is 0; expected 1 to win_length"),
        ({"hop_length": 2049}, "hop_length is 2049; .*samples unheard"),
        ({"fmin": -1.0}, "fmin is -1.0; expected 0 to less than fmax"),
        ({"fmin": 8000.0}, "fmin is 8000.0; expected 0 to less than fmax, which is 8000 Hz"),
        ({"fmin": float("nan")}, "fmin is nan"),
        ({"fmax": 8001.0}, "fmax is 8001.0; expected at most half of sample_rate, which is 8000 Hz"),
        ({"fmax": float("nan")}, "fmax is nan"),
        ({"n_mels": 0}, "n_mels is 0; expected at least 1"),
        ({"n_mfcc": 0}, "n_mfcc is 0; expected 1 to n_mels, which is 40"),
        ({"n_mfcc": 41}, "n_mfcc is 41; expected 1 to n_mels, which is 40"),
        ({"top_db": 0.0}, "top_db is 0.0; expected more than 0 dB"),
        ({"top_db": float("inf")}, "top_db is inf"),
        ({"families": ()}, r"families is \(\); expected each once, one or more of .*'mfcc'"),
        ({"families": ("mfcc", "mffc")}, r"families is \('mfcc', 'mffc'\); expected"),
        ({"families": ("mfcc", "mfcc")}, "expected each once"),
        ({"statistics": ("average",)}, r"statistics is \('average',\); expected each once, one or more of .*'mean'"),
    ],
)
def test_impossible_settings_are_named(changed: dict[str, Any], message: str) -> None:
    """A setting that cannot work is refused with its name, its value and what was expected."""
    fitting = FrameStatistics(name="fitting", n_fft=2048, win_length=2048, families=("mel",))
    with pytest.raises(ValueError, match=f"feature set 'fitting': .*{message}"):
        FeatureSpec(sets=(msgspec.structs.replace(fitting, **changed),))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sample_rate": 0}, "sample_rate is 0; expected at least 1 Hz"),
        (
            {"window_seconds": 0.06, "window_hop_seconds": 0.06},
            "feature set 'compact': n_fft is 1024; expected 2 to 960, the samples of a window",
        ),
        ({"window_seconds": 0.0}, "window_seconds is 0.0; expected at least one sample"),
        ({"window_seconds": float("nan")}, "window_seconds is nan"),
        ({"window_seconds": float("inf")}, "window_seconds is inf"),
        ({"window_hop_seconds": 0.0}, "window_hop_seconds is 0.0; expected one sample to window_seconds"),
        ({"window_hop_seconds": 1.5}, "window_hop_seconds is 1.5; .*samples unheard"),
        ({"level_dbfs": 0.1}, "level_dbfs is 0.1; expected more than -100 dB up to 0 dB"),
        ({"level_dbfs": -100.0}, "level_dbfs is -100.0"),
        ({"level_dbfs": float("nan")}, "level_dbfs is nan"),
        ({"precision": "float16"}, "precision is 'float16'; expected float64 or float32"),
        (
            {"precision": "float32"},
            "feature set 'compact': precision is 'float32', too coarse for centroid, .*, contrast; expected float64",
        ),
        (
            {"precision": "float32", "sets": (msgspec.structs.replace(ARTICLE, top_db=81.0),)},
            "precision is 'float32', too coarse for top_db 81.0",
        ),
        (
            {"precision": "float32", "sets": (msgspec.structs.replace(RHYTHM, top_db=None),)},
            "precision is 'float32', too coarse for top_db None",
        ),
        (
            {"precision": "float32", "sets": (PITCH,)},
            "feature set 'pitch': precision is 'float32', too coarse for what is 100 dB under a peak",
        ),
        ({"sets": ()}, "sets are none; expected one or more, each once"),
        ({"sets": (COMPACT, COMPACT)}, r"sets are compact\+compact; expected one or more, each once"),
    ],
)
def test_impossible_windows_are_named(changed: dict[str, Any], message: str) -> None:
    """So is what is said of the windows and of the sets together."""
    with pytest.raises(ValueError, match=message):
        FeatureSpec(**changed)


def test_bands_finer_than_the_transform_are_refused() -> None:
    """Mel filters between two bins and contrast bands without a bin would be constant: say so."""
    with pytest.raises(ValueError, match=r"n_mels is 128, but .* lie between two bins of n_fft 256"):
        Featurizer(
            FeatureSpec(sets=(msgspec.structs.replace(COMPACT, n_fft=256, win_length=256, hop_length=128, n_mels=128),))
        )
    coarse = FrameStatistics(
        name="coarse", n_fft=32, win_length=32, hop_length=16, n_mels=4, n_mfcc=4, families=("contrast",)
    )
    with pytest.raises(ValueError, match=r"feature set 'coarse': .* n_fft 32 does not resolve"):
        Featurizer(FeatureSpec(sets=(coarse,)))


@pytest.mark.parametrize(
    ("waveform", "error", "message"),
    [
        (np.zeros(0, dtype=np.float32), ValueError, "at least one sample"),
        (np.zeros((2, 9), dtype=np.float32), ValueError, r"shape \(2, 9\)"),
        (np.zeros(9), TypeError, "float64; expected float32"),
        (np.zeros(9, dtype=np.int32), TypeError, "int32; expected float32"),
    ],
)
def test_what_is_no_waveform_is_refused(waveform: Any, error: type[Exception], message: str) -> None:
    """Another shape or type is refused by name instead of being guessed at."""
    with pytest.raises(error, match=message):
        FEATURIZERS["centred"].windows(waveform)


def test_windows_of_another_length_are_refused() -> None:
    """Windows that windows() did not cut are not featurized."""
    for shape in ((1, RATE - 1), (RATE,)):
        with pytest.raises(ValueError, match=r"expected \(n, 16000\)"):
            FEATURIZERS["centred"].transform(np.zeros(shape, dtype=np.float32))


@pytest.mark.parametrize("spec", SPECS)
def test_finite_sound_has_finite_features(spec: str) -> None:
    """Neither the largest nor the smallest floats, nor any edge between them, yield NaN or infinity."""
    featurizer = FEATURIZERS[spec]
    length = featurizer.spec.window_samples
    largest, smallest = np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal
    signs = np.where(np.arange(length) % 2, 1.0, -1.0)
    mixed = 10.0 ** np.random.default_rng(2).uniform(-45, 38, length) * signs
    nasty = [
        np.zeros(length),
        np.full(length, -0.0),
        np.full(length, largest),
        signs * largest,
        np.full(length, smallest),
        signs * 1e-30,
        signs * 1e-19,
        mixed,
        np.where(np.arange(length) == 3, largest, smallest),
    ]
    with np.errstate(all="raise", under="ignore"):
        features = featurizer.transform(np.array(nasty).astype(np.float32))
    assert np.isfinite(features).all()


def test_only_what_is_no_sound_is_clipped() -> None:
    """Up to 120 dB over full scale the numbers are librosa's; beyond that they stay there."""
    loudest = (noise(RATE, 0.2).clip(-1, 1) * LIMIT).astype(np.float32)
    mel = FrameStatistics(name="mel", families=("mel",))
    featurizer = Featurizer(FeatureSpec(sets=(mel,)))
    expected = reference(loudest, mel)["mel"].mean(axis=1)
    features = featurizer.transform(loudest[np.newaxis])
    np.testing.assert_allclose(expected, features[0, ::2], rtol=0, atol=4e-5)
    beyond = np.where(np.abs(loudest) == LIMIT, loudest * 8, loudest)
    np.testing.assert_array_equal(features, featurizer.transform(beyond[np.newaxis]))


def test_named_sets_are_combined() -> None:
    """A spec by names has their sets; what a later set has in common with an earlier one carries its name."""
    spec = feature_spec("compact+article", sample_rate=22050, level_dbfs=-23.0)
    assert FeatureSpec(sample_rate=22050, level_dbfs=-23.0, sets=(COMPACT, ARTICLE)) == spec
    compact, article, both = (Featurizer(feature_spec(name)) for name in ("compact", "article", "compact+article"))
    window = noise(RATE)[np.newaxis]

    mel, mfcc = article.feature_names[:128], article.feature_names[128:]
    assert "mfcc.0.mean" == mfcc[0]
    assert (*compact.feature_names, *mel, *(f"article.{name}" for name in mfcc)) == both.feature_names
    assert (*compact.columns, *article.columns) == both.columns
    apart = np.column_stack([compact.transform(window), article.transform(window)])
    assert apart.tobytes() == both.transform(window).tobytes()


@pytest.mark.parametrize("names", ["", "compct", "compact+", "compact,article"])
def test_unknown_names_are_refused(names: str) -> None:
    """A name that there is not is quoted beside those that there are."""
    with pytest.raises(ValueError, match=r"there is no feature set '.*'; expected article, compact"):
        feature_spec(names)


def test_a_spec_is_written_by_hand_in_toml_or_json() -> None:
    """Both give the same spec, and what is wrong with one is said."""
    by_hand = 'window_seconds = 2.0\n[[sets]]\nkind = "frames"\nname = "mine"\nfamilies = ["mfcc"]\nn_mfcc = 13\n'
    expected = FeatureSpec(window_seconds=2.0, sets=(FrameStatistics(name="mine", families=("mfcc",), n_mfcc=13),))
    assert expected == read_spec(by_hand)
    assert expected == read_spec("\n" + msgspec.json.encode(expected).decode())
    for wrong, words in (
        ("{", "truncated"),
        ("a b", "Expected"),
        ("rate = 1", "rate"),
        ("sample_rate = 0", "at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            read_spec(wrong)


def test_levelled_features_do_not_depend_on_the_level() -> None:
    """A window 30 dB quieter has the same features and 30 dB more gain; its RMS is what was asked for."""
    featurizer = Featurizer(feature_spec("compact", level_dbfs=-23.0))
    loud = noise(RATE, 0.2)
    windows = np.stack([loud, loud / np.float32(2**5)])

    features = featurizer.transform(windows)

    np.testing.assert_array_equal(features[0], features[1])
    gains = featurizer.gains(windows)
    assert np.float32 == gains.dtype
    rms = 20 * np.log10(np.sqrt(np.mean(np.square(loud, dtype=np.float64))))
    assert pytest.approx([-23 - rms, -23 - rms + 20 * np.log10(2**5)], abs=1e-5) == gains
    levelled = loud * 10 ** (gains[0] / 20)
    plain = Featurizer(feature_spec("compact"))
    np.testing.assert_allclose(plain.transform(levelled[np.newaxis]).ravel(), features[0], rtol=1e-3, atol=1e-3)
    assert [0.0, 0.0] == plain.gains(windows).tolist()


def test_silence_is_not_amplified_without_end() -> None:
    """What is below -100 dBFS gets the gain of -100 dBFS: silence stays silent, and nothing overflows."""
    featurizer = Featurizer(feature_spec("compact", level_dbfs=-23.0))
    windows = np.stack([np.zeros(RATE), np.full(RATE, 1e-30), np.full(RATE, np.finfo(np.float32).max)])

    with np.errstate(all="raise", under="ignore"):
        gains, features = featurizer.gains(windows.astype(np.float32)), featurizer.transform(windows.astype(np.float32))

    assert pytest.approx([77.0, 77.0, -23 - 20 * np.log10(LIMIT)], abs=1e-4) == gains
    assert np.isfinite(features).all()
    assert 0.0 == features[0, featurizer.feature_names.index("rms.mean")]


@pytest.mark.parametrize("band", [(0.0, None), (50.0, 3500.0), (1200.0, 3900.0)])
@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
def test_mel_filters_are_librosas_to_the_bit(rate: int, band: tuple[float, float | None]) -> None:
    """Below the knee of the scale, above it and across; of lengths of frames that are powers of two and not."""
    for n_fft, n_mels in ((1024, 20), (2048, 64), (1200, 32)):
        spec = FrameStatistics(
            name="mel",
            n_fft=n_fft,
            win_length=n_fft,
            n_mels=n_mels,
            fmin=band[0],
            fmax=band[1],
            families=("mel",),
        )
        expected = librosa.filters.mel(sr=rate, n_fft=n_fft, n_mels=n_mels, fmin=band[0], fmax=band[1])
        assert expected.tobytes() == Tables.of(spec, rate, ()).mel.weights.tobytes()
