"""The hot path in one process: decode, features, forest, drift, and all of it, beside what others would run."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import joblib
import kaldi_native_fbank
import numpy as np
import onnxruntime
import scipy.fft
import skl2onnx
import soundfile
from numpy.typing import NDArray
from skl2onnx.common.data_types import FloatTensorType
from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier, RandomForestRegressor

from tests.bench import peers
from tests.bench.measure import Row, Task, by_turns
from worker import audio
from worker.bundle import FOREST, Bundle
from worker.drift import DriftPolicy
from worker.features import RICH, FeatureSpec, Featurizer
from worker.forest import Forest
from worker.hearing import Hearing
from worker.messages import Record, Topics
from worker.pipeline import Pipeline, States
from worker.states import Retention

RATE: Final = peers.RATE
BATCHES: Final = (1, 32)
TOPICS: Final = Topics()
IN_FLOAT32: Final = "article in float32"
"""What the model is called that transforms so."""

BATCHED: Final = "… one predict_proba a batch"

Featurize = Callable[[NDArray[Any]], NDArray[Any]]


def wavs(clips: Sequence[Path], count: int) -> list[bytes]:
    """Cut recordings into ``count`` WAV chunks of one second, 16 bits at `RATE`."""
    made = []
    for clip in clips:
        sound = audio.from_container(clip.read_bytes())
        samples = audio.resample(sound.samples, sound.sample_rate, RATE)
        for start in range(0, len(samples) - RATE + 1, RATE):
            buffer = io.BytesIO()
            soundfile.write(buffer, samples[start : start + RATE], RATE, format="WAV", subtype="PCM_16")
            made.append(buffer.getvalue())
            if len(made) == count:
                return made
    raise AssertionError(f"{len(clips)} clips have no {count} seconds")


def records(chunks: Sequence[bytes], first: int = 0) -> list[Record]:
    """Return chunks as records of one microphone, from an offset on."""
    began = datetime(2026, 1, 1, tzinfo=UTC)
    return [
        Record(
            *(TOPICS.audio_in, 0, first + number, 0, b"mic-1", chunk),
            (
                ("content-type", b"audio/wav"),
                ("ce_time", (began + timedelta(seconds=first + number)).isoformat().encode()),
            ),
        )
        for number, chunk in enumerate(chunks)
    ]


def pipeline(bundles: Mapping[str, Bundle], folder: Path, chunks: Sequence[bytes]) -> Iterator[Row]:
    """Yield WAV bytes to probabilities, in batches; all of Earshot, drift and JSON included; in float32; by default."""
    forest = joblib.load(folder / FOREST)
    hearing = {name: Hearing(each, audio.Limits()) for name, each in bundles.items()}
    whole = Pipeline(bundles["article"], TOPICS, audio.Limits(), DriftPolicy(), Retention())
    states: States = {}
    onnx = _onnx(forest)
    for size in BATCHES:
        batch = list(chunks[:size])
        arrived = records(batch)
        contestants: dict[str, Task] = {
            "the article's loop": partial(peers.article_loop, batch, forest),
            BATCHED: partial(peers.batched_loop, batch, forest),
            "… librosa given the batch": partial(peers.librosa_batched, batch, forest),
            "… onnxruntime for the forest": partial(_through, onnx, peers.article_features, batch),
            "kaldi-native-fbank, onnxruntime": partial(_through, onnx, _kaldi, batch),
            "Earshot, bytes to probabilities": partial(_hear, hearing["article"], arrived),
            "Earshot, with drift and JSON": partial(whole.run, states, arrived),
            "Earshot, transforms in float32": partial(_hear, hearing[IN_FLOAT32], arrived),
            "Earshot, compact (the default)": partial(_hear, hearing["compact"], arrived),
        }
        yield from by_turns(f"pipeline, batches of {size}", contestants, items=size, seconds=8, second=BATCHED)


def features(chunks: Sequence[bytes], specs: Mapping[str, FeatureSpec]) -> Iterator[Row]:
    """Yield each feature set, one window and a batch at a time."""
    windows = np.array([peers.load(chunk) for chunk in chunks[:32]], np.float32)
    for size in BATCHES:
        contestants: dict[str, Task] = {"librosa, article": partial(_each, peers.article_features, windows[:size])}
        for name, spec in specs.items():
            featurizer = Featurizer(spec)
            named = f"Earshot, {name} ({len(featurizer.feature_names)})"
            contestants[named] = partial(featurizer.transform, windows[:size])
        yield from by_turns(f"features, {size} windows", contestants, items=size, seconds=6)
    spectral = Featurizer(FeatureSpec(sets=(RICH,)))
    np.testing.assert_allclose(spectral.transform(windows), _each(peers.rich_features, windows), rtol=0.01, atol=0.01)
    for size in BATCHES:
        contestants = {
            "librosa, numpy, scipy": partial(_each, peers.rich_features, windows[:size]),
            "Earshot": partial(spectral.transform, windows[:size]),
        }
        section = f"the {len(spectral.feature_names)} frame statistics of rich, {size} windows"
        yield from by_turns(section, contestants, items=size, seconds=4)


def forests() -> Iterator[Row]:
    """Yield forests of several shapes against scikit-learn and onnxruntime, by rows a call."""
    random = np.random.default_rng(0)
    for trees, columns, classes in ((100, 40, 10), (100, 146, 10), (100, 1500, 50), (1000, 146, 10)):
        x = random.standard_normal((2000, columns)).astype(np.float32)
        y = (x[:, :8] @ random.standard_normal((8, classes)) + random.standard_normal((2000, classes))).argmax(axis=1)
        fitted = RandomForestClassifier(trees, n_jobs=-1, random_state=0).fit(x, y).set_params(n_jobs=None)
        yield from _forest(f"forest, {trees} trees, {columns} features, {classes} classes", fitted, x)
    x = random.standard_normal((2000, 146)).astype(np.float32)
    yield from _forest(
        "extra-trees, 100 trees, 146 features, 10 classes",
        ExtraTreesClassifier(100, n_jobs=-1, random_state=0).fit(x, x[:, :10].argmax(axis=1)).set_params(n_jobs=None),
        x,
    )
    fitted = RandomForestRegressor(100, max_features=0.3, n_jobs=-1, random_state=0).fit(x, x[:, 0] + x[:, 1])
    yield from _forest("forest, 100 trees, 146 features, regression", fitted.set_params(n_jobs=None), x)


def decode(chunks: Sequence[bytes]) -> Iterator[Row]:
    """Yield a second of sound, 16 bits at 16 kHz, from bytes to float32; and at 44.1 kHz, resampled."""
    samples, _ = soundfile.read(io.BytesIO(chunks[0]), dtype="int16")
    raw = samples.astype("<i2").tobytes()
    sounds = {
        "WAV": (chunks[0], "audio/wav"),
        "FLAC": (_encoded(samples, "FLAC"), "audio/flac"),
        "Ogg Vorbis": (_encoded(samples, "OGG", "VORBIS"), "audio/ogg"),
        "WAV at 44.1 kHz": (_encoded(np.resize(samples, 44_100), "WAV", rate=44_100), "audio/wav"),
    }
    for name, (data, media_type) in sounds.items():
        contestants: dict[str, Task] = {
            "soundfile, librosa.resample": partial(peers.load_any, data),
            "Earshot": partial(audio.waveform, data, media_type, RATE, audio.UNLIMITED),
        }
        if name == "WAV":
            contestants["Earshot, raw PCM"] = partial(
                audio.waveform, raw, f"audio/pcm;rate={RATE};format=s16le", RATE, audio.UNLIMITED
            )
        yield from by_turns(f"decode, a second of {name}", contestants, items=1, seconds=2)


def _encoded(samples: NDArray[np.int16], container: str, subtype: str = "PCM_16", rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=container, subtype=subtype)
    return buffer.getvalue()


def drift(bundle: Bundle, chunks: Sequence[bytes]) -> Iterator[Row]:
    """Yield what watching costs a chunk: all signals of a record, River's detectors included."""
    heard = [each for _, each in Hearing(bundle, audio.Limits()).hear(records(chunks))]
    sources = Pipeline(bundle, TOPICS, audio.Limits(), DriftPolicy(), Retention())
    states: States = {}

    def watch() -> None:
        for record, each in zip(records(chunks), heard, strict=True):
            sources._watch(states, record, each)  # type: ignore[arg-type]

    yield from by_turns("drift, a chunk", {"Earshot": watch}, items=len(chunks), seconds=2)


def _forest(section: str, fitted: Any, x: NDArray[np.float32]) -> Iterator[Row]:
    flat = Forest.from_sklearn(fitted)
    onnx = _onnx(fitted)
    classifier = hasattr(fitted, "classes_")
    predict = fitted.predict_proba if classifier else fitted.predict
    ours = flat.predict_proba if classifier else flat.predict
    for rows in (1, 32, 1000):
        some = x[:rows]
        contestants: dict[str, Task] = {
            "scikit-learn": partial(predict, some),
            "onnxruntime": partial(onnx, some),
            "Earshot": partial(ours, some),
        }
        yield from by_turns(f"{section}, {rows} rows", contestants, items=rows, seconds=3)


def _each(featurize: Featurize, windows: NDArray[np.float32]) -> list[NDArray[Any]]:
    return [featurize(window) for window in windows]


def _through(predict: Any, featurize: Featurize, batch: Sequence[bytes]) -> Any:
    return predict(np.array([featurize(peers.load(wav)) for wav in batch]))


def _hear(hearing: Hearing, batch: Sequence[Record]) -> list[Any]:
    return list(hearing.hear(batch))


def _onnx(fitted: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model = skl2onnx.convert_sklearn(
        fitted,
        initial_types=[("x", FloatTensorType([None, fitted.n_features_in_]))],
        options={id(fitted): {"zipmap": False}} if hasattr(fitted, "classes_") else None,
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return lambda x: session.run(None, {"x": np.asarray(x, np.float32)})[-1]


def _kaldi(samples: NDArray[Any]) -> NDArray[Any]:
    """Return means of Kaldi's mel bands and of cepstra made of them: other numbers than librosa's, and as many."""
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = RATE
    options.frame_opts.dither = 0
    options.frame_opts.frame_length_ms = 128
    options.frame_opts.frame_shift_ms = 32
    options.mel_opts.num_bins = 128
    fbank = kaldi_native_fbank.OnlineFbank(options)
    fbank.accept_waveform(RATE, samples.tolist())
    fbank.input_finished()
    mel = np.array([fbank.get_frame(i) for i in range(fbank.num_frames_ready)])
    cepstra = scipy.fft.dct(mel, norm="ortho")[:, : peers.N_MFCC]
    return np.concatenate([mel.mean(axis=0), cepstra.mean(axis=0)])
