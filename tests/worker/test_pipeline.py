"""The whole flow, from bytes to bytes, with a real model."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import librosa
import msgspec
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from worker import bundle, play
from worker.audio import Limits
from worker.drift import DriftPolicy
from worker.messages import Classification, DriftDetected, Message, Record, Regression, RetrainRequested, Topics
from worker.pipeline import Batch, Pipeline, States

TOPICS = Topics()
START = datetime(2026, 11, 22, 8, tzinfo=UTC)
NOT_A_NUMBER = np.array([0, np.nan], "<f4").tobytes()
POLICY = DriftPolicy(block_seconds=2.0)


@pytest.fixture(scope="module")
def model(machine_bundle: Path) -> bundle.Bundle:
    return bundle.load(machine_bundle)


@pytest.fixture(scope="module")
def pipeline(model: bundle.Bundle) -> Pipeline:
    return Pipeline(model, TOPICS, Limits(), POLICY)


@pytest.fixture(scope="module")
def stream(machines: Path) -> list[Record]:
    """Two sources on two partitions; the first is covered after a minute, and some records are poison."""
    clips = sorted((machines / "audio").glob("*.wav"))
    records = []
    for partition, (source, degradations) in enumerate(
        {"mic-1": [play.parse_degradation("lowpass:800@60s")], "mic-2": []}.items()
    ):
        chunks = play.chunks(
            clips * 2,
            topic=TOPICS.audio_in,
            source=source,
            chunk_seconds=1.0,
            start_time=START,
            degradations=degradations,
            shuffle_seed=partition,
        )
        for offset, chunk in enumerate(chunks):
            value = b"RIFF no sound" if offset % 50 == 20 else chunk.value
            records.append(Record(TOPICS.audio_in, partition, offset, 1_000 * offset, chunk.key, value, chunk.headers))
    return sorted(records, key=lambda record: (record.offset, record.partition))


def record(value: bytes | None, *headers: tuple[str, bytes], key: bytes | None = b"mic-1", offset: int = 0) -> Record:
    return Record(TOPICS.audio_in, 3, offset, 1_000, key, value, headers)


def wav(samples: np.ndarray[tuple[int], np.dtype[np.float32]], rate: int = 16_000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def noise(seconds: float, rate: int = 16_000) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return (0.1 * np.random.default_rng(0).standard_normal(round(seconds * rate))).astype(np.float32)


def predictions(messages: Iterable[Message]) -> list[Classification]:
    return [
        msgspec.json.decode(message.value or b"", type=Classification)
        for message in messages
        if message.topic == TOPICS.predictions_out
    ]


def run_in_batches(pipeline: Pipeline, records: Sequence[Record], cuts: Sequence[int]) -> tuple[list[Message], States]:
    """Return all outputs but the states, and the states at the end, of a run cut into batches."""
    states: States = {}
    outputs: list[Message] = []
    edges = [0, *sorted(cuts), len(records)]
    for start, stop in pairwise(edges):
        batch = pipeline.run(states, records[start:stop])
        outputs += [message for message in batch.outputs if message.topic != TOPICS.drift_state]
    return outputs, states


def test_a_record_becomes_a_prediction_under_its_key(pipeline: Pipeline) -> None:
    """Everything a consumer needs is in the value, and the key is that of the record."""
    batch = pipeline.run({}, [record(wav(noise(1.0)), ("ce_time", b"2026-11-22T08:00:00Z"))])
    (message,) = [m for m in batch.outputs if m.topic == TOPICS.predictions_out]
    prediction = msgspec.json.decode(message.value or b"", type=Classification)
    assert b"mic-1" == message.key
    assert "mic-1" == prediction.source
    assert 1.0 == pytest.approx(sum(prediction.probabilities.values()))
    assert max(prediction.probabilities, key=lambda label: prediction.probabilities[label]) == prediction.label
    assert prediction.probabilities[prediction.label] == prediction.confidence
    assert (1.0, 1, False) == (prediction.duration, prediction.windows, prediction.padded)
    assert (TOPICS.audio_in, 3, 0, START) == tuple(msgspec.structs.astuple(prediction.record))
    assert {3: 1} == batch.offsets


def test_long_records_are_windowed_and_short_ones_padded(pipeline: Pipeline) -> None:
    """A prediction says over how many windows it is, and whether silence was added."""
    records = [record(wav(noise(seconds)), offset=i) for i, seconds in enumerate((0.3, 1.0, 2.5))]
    found = predictions(pipeline.run({}, records).outputs)
    assert [(1, True), (1, False), (4, False)] == [(p.windows, p.padded) for p in found]
    assert [0.3, 1.0, 2.5] == [pytest.approx(p.duration) for p in found]


def test_a_long_record_gets_the_mean_of_its_windows(pipeline: Pipeline) -> None:
    """Two seconds heard at once are the mean of their three windows heard one by one."""
    samples = noise(2.0)
    windows = [samples[start : start + 16_000] for start in (0, 8_000, 16_000)]
    single = predictions(pipeline.run({}, [record(wav(w), offset=i) for i, w in enumerate(windows)]).outputs)
    (whole,) = predictions(pipeline.run({}, [record(wav(samples))]).outputs)
    for label, probability in whole.probabilities.items():
        assert np.mean([each.probabilities[label] for each in single]) == pytest.approx(probability)


def test_any_encoding_rate_and_channel_count_is_heard(pipeline: Pipeline) -> None:
    """WAV, FLAC, OGG and both kinds of raw PCM, mono or stereo, at any rate, are one sound."""
    samples = noise(1.0, 48_000)
    stereo = np.stack([samples, samples], axis=1)
    flac, ogg = io.BytesIO(), io.BytesIO()
    soundfile.write(flac, stereo, 48_000, format="FLAC")
    soundfile.write(ogg, samples, 48_000, format="OGG")
    pcm = (samples * 32767).astype("<i2")
    sounds = {
        b"audio/wav": wav(samples, 48_000),
        b"audio/flac": flac.getvalue(),
        b"audio/ogg": ogg.getvalue(),
        b"audio/L16;rate=48000;channels=1": pcm.astype(">i2").tobytes(),
        b"audio/pcm;rate=48000;format=s16le": pcm.tobytes(),
        b"audio/pcm;rate=48000;format=f32le": samples.astype("<f4").tobytes(),
    }
    records = [
        record(value, ("content-type", kind), offset=offset) for offset, (kind, value) in enumerate(sounds.items())
    ]
    found = predictions(pipeline.run({}, records).outputs)
    assert len(sounds) == len(found)
    assert {found[0].label} == {prediction.label for prediction in found}
    assert [1.0] * len(sounds) == [prediction.duration for prediction in found]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record(None), "empty"),
        (record(b"\x00" * 100), "unknown-content-type"),
        (record(b"\x00" * 100, ("content-type", b"text/plain")), "unknown-content-type"),
        (record(b"RIFF", ("content-type", b"audio/wav")), "undecodable"),
        (record(wav(noise(61.0))), "too-long"),
        (record(b"RIFF" + bytes(9 * 1024**2)), "too-large"),
        (record(wav(noise(1.0)), key=None), "no-source"),
        (record(wav(noise(1.0)), key=b"\xff"), "bad-key"),
        (record(wav(noise(1.0)), ("ce_time", b"yesterday")), "bad-header"),
        (record(b"{}", ("content-type", b"application/cloudevents+json")), "structured-mode"),
        (record(NOT_A_NUMBER, ("content-type", b"audio/pcm;rate=16000;format=f32le")), "non-finite"),
        (record(bytes(32), ("content-type", b"audio/L16;rate=2")), "bad-rate"),
        (record(bytes(32), ("content-type", b"audio/L16;rate=16000;channels=0")), "bad-channels"),
    ],
)
def test_a_bad_record_costs_nothing(pipeline: Pipeline, bad: Record, reason: str) -> None:
    """It is rejected with its bytes, key, headers and the reason, and its neighbours are heard."""
    good = record(wav(noise(1.0)), offset=1)
    batch = pipeline.run({}, [bad, good])
    (rejection,) = [message for message in batch.outputs if message.topic == TOPICS.audio_dlq]
    assert (bad.key, bad.value) == (rejection.key, rejection.value)
    assert bad.headers == rejection.headers[: len(bad.headers)]
    assert reason == dict(rejection.headers)["earshot_reason"].decode()
    assert 1 == len(predictions(batch.outputs))
    assert (1, 1, {3: 2}) == (batch.predictions, batch.rejections, batch.offsets)


def test_a_batch_of_nothing_but_bad_records_still_moves_on(pipeline: Pipeline) -> None:
    """There is nothing to predict, and the offset advances."""
    batch = pipeline.run({}, [record(b""), record(b"?", offset=1)])
    assert (0, 2, {3: 2}) == (batch.predictions, batch.rejections, batch.offsets)


def test_each_record_of_a_stream_has_one_answer_in_order(pipeline: Pipeline, stream: list[Record]) -> None:
    """Predictions and rejections together are the records, and stand in their order in each partition."""
    outputs, _ = run_in_batches(pipeline, stream, range(0, len(stream), 32))
    heard = [(p.record.partition, p.record.offset) for p in predictions(outputs)]
    rejected = [
        (int(dict(m.headers)["earshot_partition"]), int(dict(m.headers)["earshot_offset"]))
        for m in outputs
        if m.topic == TOPICS.audio_dlq
    ]
    assert sorted((r.partition, r.offset) for r in stream) == sorted(heard + rejected)
    for partition in (0, 1):
        offsets = [offset for p, offset in heard if p == partition]
        assert sorted(offsets) == offsets


def test_a_covered_microphone_is_one_event_that_names_what_changed(pipeline: Pipeline, stream: list[Record]) -> None:
    """The covered source drifts once, since the right second, and the other one does not."""
    outputs, _ = run_in_batches(pipeline, stream, range(0, len(stream), 32))
    drift, request = (
        msgspec.json.decode(m.value or b"", type=DriftDetected | RetrainRequested)
        for m in outputs
        if m.topic == TOPICS.drift_events
    )
    assert isinstance(drift, DriftDetected)
    assert isinstance(request, RetrainRequested)
    assert "mic-1" == drift.source == request.source
    assert 60 == pytest.approx(drift.since.offset, abs=10)
    assert drift.since.offset < drift.detected.offset
    assert (drift.since.time - START).total_seconds() == drift.since.offset
    sizes = [abs(shift.after - shift.before) for shift in drift.signals]
    assert sorted(sizes, reverse=True) == sizes
    assert sizes[0] > 1.0
    causes = [dict(m.headers)["ce_id"].decode() for m in outputs if m.topic == TOPICS.drift_events]
    assert causes[0] == request.cause


@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_what_comes_out_does_not_depend_on_the_batches(
    pipeline: Pipeline, stream: list[Record], data: st.DataObject
) -> None:
    """Cut anywhere, the same log gives the same messages and the same states, bit for bit."""
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=40))
    expected, expected_states = run_in_batches(pipeline, stream, range(0, len(stream), 64))
    outputs, states = run_in_batches(pipeline, stream, cuts)

    def by_partition(messages: list[Message]) -> list[Message]:
        # Rejections are written before the predictions of their batch: only the order within a topic is promised.
        return sorted(messages, key=lambda message: message.topic)

    assert by_partition(expected) == by_partition(outputs)
    assert {k: s.encode() for k, s in expected_states.items()} == {k: s.encode() for k, s in states.items()}


def test_states_restored_from_their_messages_go_on_as_if_never_stopped(
    pipeline: Pipeline, stream: list[Record]
) -> None:
    """A run that is stopped after every batch, and restored from drift.state, gives the same output."""
    expected, _ = run_in_batches(pipeline, stream, range(0, len(stream), 32))
    saved: dict[tuple[int | None, bytes | None], Message] = {}
    outputs: list[Message] = []
    for start in range(0, len(stream), 32):
        states: States = {}
        for (partition, key), message in saved.items():
            assert pipeline.restore(
                states, Record(message.topic, partition or 0, 0, 0, key, message.value, message.headers)
            )
        batch: Batch = pipeline.run(states, stream[start : start + 32])
        for message in batch.outputs:
            if message.topic == TOPICS.drift_state:
                saved[message.partition, message.key] = message
            else:
                outputs.append(message)
    assert expected == outputs


def test_serving_is_librosa_and_scikit_learn(model: bundle.Bundle, machine_bundle: Path, machines: Path) -> None:
    """What the worker says of a clip is what a notebook with librosa's features and the pickled forest says."""
    import joblib  # noqa: PLC0415 - the oracle reads the pickle by itself

    forest = joblib.load(machine_bundle / bundle.FOREST)
    spec = model.manifest.spec
    clip = min((machines / "audio").glob("*.wav"))
    samples, rate = librosa.load(clip, sr=None)
    assert spec.sample_rate == rate
    window = samples[: spec.window_samples]
    mfcc = librosa.feature.mfcc(
        y=window, sr=rate, n_mfcc=spec.n_mfcc, n_fft=spec.n_fft, hop_length=spec.hop_length, n_mels=spec.n_mels
    )
    features = model.featurizer.transform(model.featurizer.windows(window))
    column = model.featurizer.feature_names.index("mfcc.0.mean")
    assert mfcc[0].mean() == pytest.approx(features[0, column], abs=2e-4)
    assert np.array_equal(forest.predict_proba(features), model.scores(features))


def test_a_regressor_says_a_value_and_a_spread(rpm_bundle: Path) -> None:
    """The value is in the unit of the trained column, and its spread is that of the trees."""
    pipeline = Pipeline(bundle.load(rpm_bundle), TOPICS, Limits(), POLICY)
    (message,) = [m for m in pipeline.run({}, [record(wav(noise(1.0)))]).outputs if m.topic == TOPICS.predictions_out]
    prediction = msgspec.json.decode(message.value or b"", type=Regression)
    assert "rpm" == prediction.target
    assert 1200 <= prediction.value <= 3600
    assert prediction.spread > 0
