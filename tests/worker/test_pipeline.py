"""The whole flow, from bytes to bytes, with a real model."""

from __future__ import annotations

import gc
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import joblib
import librosa
import msgspec
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.dataset import load
from trainer.training import fit
from worker import audio, bundle, play
from worker.audio import Limits
from worker.calibration import TemperatureScaling
from worker.drift import DriftPolicy
from worker.errors import BadRecord, Fatal
from worker.features import COMPACT, FeatureSpec, feature_spec
from worker.forest import Forest
from worker.hearing import Heard, Hearing
from worker.messages import Classification, DriftDetected, Message, Record, Regression, RetrainRequested, Topics
from worker.pipeline import Batch, Pipeline, Restored, States
from worker.states import Retention

TOPICS = Topics()
START = datetime(2026, 11, 22, 8, tzinfo=UTC)
NOT_A_NUMBER = np.array([0, np.nan], "<f4").tobytes()
POLICY = DriftPolicy(block_seconds=2.0)
SPEC = FeatureSpec()  # of the bundle


@pytest.fixture(scope="module")
def model(machine_bundle: Path) -> bundle.Bundle:
    return bundle.load(machine_bundle)


@pytest.fixture(scope="module")
def pipeline(model: bundle.Bundle) -> Pipeline:
    return Pipeline(model, TOPICS, Limits(), POLICY, Retention())


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


@pytest.fixture(scope="module")
def drifting(machines: Path) -> list[Record]:
    """Two sources on two partitions, in chunks of half a second and of two and a half; both change after a minute."""
    clips = sorted((machines / "audio").glob("*.wav"))
    records = []
    for partition, (seconds, degradation) in enumerate([(0.5, "noise:0@60s"), (2.5, "lowpass:800@60s")]):
        chunks = play.chunks(
            clips,
            topic=TOPICS.audio_in,
            source=f"mic-{partition}",
            chunk_seconds=seconds,
            start_time=START,
            degradations=[play.parse_degradation(degradation)],
            shuffle_seed=partition,
        )
        for offset, chunk in enumerate(chunks):
            time = round(1_000 * seconds * offset)
            records.append(Record(TOPICS.audio_in, partition, offset, time, chunk.key, chunk.value, chunk.headers))
    return sorted(records, key=lambda record: record.timestamp)


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


def encoded(states: States) -> dict[int, dict[bytes, bytes]]:
    """Every state by partition and source; the order in which they were heard is in them."""
    return {
        partition: {key: state.encode() for key, state in sources._states.items()}
        for partition, sources in states.items()
    }


def compacted(messages: Iterable[Message]) -> dict[tuple[int | None, bytes | None], bytes | None]:
    """What drift.state says in the end, by partition and source."""
    return {(m.partition, m.key): m.value for m in messages if m.topic == TOPICS.drift_state}


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


def test_a_long_record_gets_the_mean_of_its_windows(model: bundle.Bundle, pipeline: Pipeline) -> None:
    """Two seconds heard at once are the mean of what the forest says of three windows, calibrated once."""
    samples = noise(2.0)
    windows = np.array([samples[start : start + 16_000] for start in (0, 8_000, 16_000)])
    means = model.scores(model.featurizer.transform(windows)).mean(axis=0, keepdims=True)
    (whole,) = predictions(pipeline.run({}, [record(wav(samples))]).outputs)
    assert model.manifest.calibration.apply(means)[0].tolist() == list(whole.probabilities.values())


def test_a_doubtful_confidence_is_told_as_it_is(pipeline: Pipeline) -> None:
    """It is the probability of the label, also for silence, where no class has half of the probability."""
    (said,) = predictions(pipeline.run({}, [record(wav(0 * noise(1.0)))]).outputs)
    assert 0 < said.confidence < 0.5
    assert max(said.probabilities.values()) == said.probabilities[said.label] == said.confidence


def test_what_is_watched_is_the_mean_over_the_windows(model: bundle.Bundle, pipeline: Pipeline) -> None:
    """The signals of a record that grows quieter, in standard deviations of the training data."""
    sound = wav(noise(2.0) * np.linspace(1.0, 0.01, 32_000, dtype=np.float32))
    states: States = {}
    (said,) = predictions(pipeline.run(states, [record(sound)]).outputs)
    (means,) = states[3]._states[b"mic-1"]._block_means.tolist()

    rows = model.featurizer.transform(model.featurizer.windows(audio.decode(sound, "audio/wav", Limits()).samples))
    assert 3 == len(rows) == said.windows
    names = [f"feature.{name}" for name in model.featurizer.feature_names]
    raw = dict(zip(names, rows.mean(axis=0).tolist(), strict=True))
    raw |= {f"share.{label}": float(label == said.label) for label in said.probabilities}
    raw["confidence"] = said.confidence
    expected = [(raw[signal.name] - signal.mean) / signal.spread for signal in model.profile.signals]
    assert expected == pytest.approx(means, rel=1e-4)


@pytest.mark.parametrize(("seconds", "starts"), [(0.5, [0, 4, 8]), (1.0, [0, 2, 4, 6, 8, 10]), (2.5, [*range(12)])])
def test_a_block_is_of_seconds_of_sound(pipeline: Pipeline, seconds: float, starts: list[int]) -> None:
    """Drift is judged by blocks of two seconds, however many records that takes."""
    states: States = {}
    pipeline.run(states, [record(wav(noise(seconds)), offset=i) for i in range(12)])
    assert starts == states[3]._states[b"mic-1"]._block_offsets


def test_every_source_that_was_heard_is_saved(pipeline: Pipeline) -> None:
    """Its state is written to its own partition under its own key, and again only after it was heard again."""
    sound = wav(noise(1.0))
    heard = [(0, b"mic-1"), (0, b"mic-2"), (1, b"mic-1"), (1, b"mic-3")]
    states: States = {}
    records = [Record(TOPICS.audio_in, partition, i, 0, key, sound) for i, (partition, key) in enumerate(heard)]
    first = compacted(pipeline.run(states, records).outputs)
    assert {(partition, key): encoded(states)[partition][key] for partition, key in heard} == first
    again = compacted(pipeline.run(states, [Record(TOPICS.audio_in, 0, 9, 0, b"mic-2", sound)]).outputs)
    assert {(0, b"mic-2"): encoded(states)[0][b"mic-2"]} == again


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
    assert (1, {reason: 1}, {3: 2}) == (batch.predictions, batch.rejections, batch.offsets)


def test_a_batch_of_nothing_but_bad_records_still_moves_on(pipeline: Pipeline) -> None:
    """There is nothing to predict, and the offset advances."""
    batch = pipeline.run({}, [record(b""), record(b"?", offset=1)])
    assert (0, 2, {3: 2}) == (batch.predictions, batch.rejections.total(), batch.offsets)


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
    assert encoded(expected_states) == encoded(states)


@pytest.mark.parametrize("restarted", [False, True])
def test_two_drifts_do_not_depend_on_batches_or_restarts(
    pipeline: Pipeline, drifting: list[Record], *, restarted: bool
) -> None:
    """In small chunks and in large ones a source drifts once, since its minute; drift.state ends the same as well."""
    expected = pipeline.run({}, drifting).outputs
    states: States = {}
    outputs: list[Message] = []
    for start in range(0, len(drifting), 23):
        if restarted:
            saved = compacted(outputs).items()
            states = {}
            pipeline.restore(
                states, [Record(TOPICS.drift_state, p or 0, 0, 0, key, value) for (p, key), value in saved]
            )
        outputs += pipeline.run(states, drifting[start : start + 23]).outputs

    assert compacted(expected) == compacted(outputs)
    assert answers(expected) == answers(outputs)
    events = [m for m in outputs if m.topic == TOPICS.drift_events]
    drifts = [msgspec.json.decode(m.value or b"", type=DriftDetected | RetrainRequested) for m in events]
    since = {d.source: (d.since.time - START).total_seconds() for d in drifts if isinstance(d, DriftDetected)}
    assert 4 == len(events)
    assert {"mic-0": 60, "mic-1": 60} == pytest.approx(since, abs=10)


def answers(messages: Iterable[Message]) -> list[Message]:
    return [message for message in messages if message.topic != TOPICS.drift_state]


def test_states_restored_from_their_messages_go_on_as_if_never_stopped(
    pipeline: Pipeline, stream: list[Record]
) -> None:
    """A run that is stopped after every batch, and restored from drift.state, gives the same output."""
    expected, _ = run_in_batches(pipeline, stream, range(0, len(stream), 32))
    outputs, _, _ = run_with_restarts(pipeline, stream, range(0, len(stream), 32))
    assert expected == outputs


def run_with_restarts(
    pipeline: Pipeline, records: Sequence[Record], cuts: Sequence[int]
) -> tuple[list[Message], States, Counter[str]]:
    """As `run_in_batches`, but nothing outlives a batch except what drift.state keeps; and who was forgotten."""
    saved: dict[tuple[int | None, bytes | None], Message] = {}
    outputs: list[Message] = []
    states: States = {}
    forgotten: Counter[str] = Counter()
    for start, stop in pairwise([0, *sorted(cuts), len(records)]):
        states = {}
        kept = [
            Record(message.topic, partition or 0, 0, 0, key, message.value, message.headers)
            for (partition, key), message in saved.items()
            if message.value is not None
        ]
        assert Restored(len(kept), 0, 0) == pipeline.restore(states, kept)
        batch: Batch = pipeline.run(states, records[start:stop])
        forgotten += Counter(silent=batch.silent, crowded_out=batch.crowded_out)
        for message in batch.outputs:
            if message.topic == TOPICS.drift_state:
                saved[message.partition, message.key] = message
            else:
                outputs.append(message)
    return outputs, states, forgotten


@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_forgetting_does_not_depend_on_batches_or_restarts(
    model: bundle.Bundle, stream: list[Record], data: st.DataObject
) -> None:
    """With more sources than are remembered, cut and restarted anywhere: the same messages, states and numbers."""
    pipeline = Pipeline(model, TOPICS, Limits(), POLICY, Retention(max_sources=3, forget_after=6))
    names = np.random.default_rng(0).permutation(np.repeat([0, 0, 0, 1, 1, 2, 3, 4], 15)).tolist()
    crowd = [msgspec.structs.replace(record, key=b"mic-%d" % name) for record, name in zip(stream, names, strict=False)]
    cuts = data.draw(st.lists(st.integers(0, len(crowd)), max_size=20), label="cuts")
    whole: States = {}
    batch = pipeline.run(whole, crowd)
    expected = [message for message in batch.outputs if message.topic != TOPICS.drift_state]

    outputs, states, forgotten = run_with_restarts(pipeline, crowd, cuts)

    assert batch.silent > 0
    assert batch.crowded_out > 0
    assert expected == outputs
    assert encoded(whole) == {partition: each for partition, each in encoded(states).items() if each}
    assert {"silent": batch.silent, "crowded_out": batch.crowded_out} == {**forgotten}


class TestRestore:
    def state(self, pipeline: Pipeline, key: bytes = b"mic-1") -> Message:
        batch = pipeline.run({}, [record(wav(noise(1.0)), key=key)])
        (message,) = [message for message in batch.outputs if message.topic == TOPICS.drift_state]
        return message

    def saved(self, value: bytes | None, key: bytes = b"mic-1") -> Record:
        return Record(TOPICS.drift_state, 3, 0, 0, key, value)

    def test_a_state_that_cannot_be_read_stops_the_worker(self, pipeline: Pipeline) -> None:
        """The message names the source, its partition, and the way out."""
        with pytest.raises(Fatal, match=r"b'mic-1' in partition 3 of drift.state: .*--reset-state"):
            pipeline.restore({}, [self.saved(b"garbage")])

    def test_unless_it_was_told_to_start_anew(self, model: bundle.Bundle, pipeline: Pipeline) -> None:
        """With the flag such a state is counted, replaced by nothing in drift.state, and the others are kept."""
        lenient = Pipeline(model, TOPICS, Limits(), POLICY, Retention(), reset_state=True)
        good = self.state(pipeline)
        states: States = {}
        saved = [self.saved(b"garbage", b"mic-2"), self.saved(good.value), self.saved(b"", b"\xff")]

        assert Restored(1, 0, 2) == lenient.restore(states, saved)
        assert {3: {b"mic-1": good.value}} == encoded(states)
        outputs = lenient.run(states, [record(b"no sound", offset=1)]).outputs
        buried = [(m.partition, m.key, m.value) for m in outputs if m.topic == TOPICS.drift_state]
        assert [(3, b"mic-2", None), (3, b"\xff", None)] == buried

    def test_another_model_s_state_is_replaced(self, model: bundle.Bundle, pipeline: Pipeline) -> None:
        """A state of another model is counted, and its source starts anew."""
        other = Pipeline(model, TOPICS, Limits(), DriftPolicy(block_seconds=3.0), Retention())
        states: States = {}
        assert Restored(0, 1, 0) == pipeline.restore(states, [self.saved(self.state(other).value)])
        assert {3: {}} == encoded(states)
        outputs = pipeline.run(states, [record(b"no sound")]).outputs
        assert {(3, b"mic-1"): None} == compacted(outputs)
        assert (
            self.state(pipeline).value
            == compacted(pipeline.run(states, [record(wav(noise(1.0)))]).outputs)[3, b"mic-1"]
        )


class TestInternalErrors:
    """A bug that only some records meet, simulated in the featurizer and in the forest."""

    POISON = wav(noise(0.5))

    @pytest.fixture(params=["featurizer", "forest"])
    def buggy(self, request: pytest.FixtureRequest, machine_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
        """Return a pipeline with a model that fails with one record, and shows its address in memory."""
        model = bundle.load(machine_bundle)
        windows = model.featurizer.windows(audio.decode(self.POISON, "audio/wav", Limits()).samples)
        poisoned = model.featurizer.transform(windows)
        part, name = (model.featurizer, "transform") if request.param == "featurizer" else (model, "scores")
        marker = windows if request.param == "featurizer" else poisoned
        real = getattr(part, name)

        def fails(given: np.ndarray[Any, Any]) -> Any:
            if any(np.array_equal(row, marker[0]) for row in given):
                raise ZeroDivisionError(f"a bug in {object()}")
            return real(given)

        monkeypatch.setattr(part, name, fails)
        return Pipeline(model, TOPICS, Limits(), POLICY, Retention())

    def test_leave_no_garbage(self, buggy: Pipeline) -> None:
        """All that a batch was made of is freed with it; until the collector comes, many batches could gather."""
        flac = io.BytesIO()
        soundfile.write(flac, noise(1.0), 16_000, format="FLAC")
        values = [wav(noise(1.0)), self.POISON, b"no sound", flac.getvalue()[:2000]]
        batch = [record(value, offset=offset) for offset, value in enumerate(values)]
        buggy.run({}, batch)  # compiles, and fills caches
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)  # keeps what it finds: other tests may have left threads, which make some too
        try:
            rejections = buggy.run({}, batch).rejections
            gc.collect()
            assert [] == [each for each in gc.garbage if isinstance(each, (BadRecord, Heard))]
            assert 3 == rejections.total()
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()

    def test_cost_one_record(self, buggy: Pipeline, pipeline: Pipeline) -> None:
        """The record that meets a bug is rejected, in its place; its neighbours get what they get without it."""
        good = [record(wav(noise(1.0)), offset=0), record(wav(noise(2.0)), offset=2)]
        poison = record(self.POISON, offset=1)
        batch = buggy.run({}, [good[0], poison, good[1]])
        alone = pipeline.run({}, good)

        assert (2, {"internal-error": 1}) == (batch.predictions, batch.rejections)
        assert batch.failure is not None
        assert re.fullmatch(r"Traceback .*\bin fails\n.*\nZeroDivisionError: a bug in .*\n", batch.failure, re.DOTALL)
        first, rejection, second = batch.outputs[:3]
        assert alone.outputs[:2] == [first, second]
        headers = dict(rejection.headers)
        assert b"internal-error" == headers["earshot_reason"]
        assert "ZeroDivisionError: a bug in <object object at 0x…>" == headers["earshot_detail"].decode()
        assert {3: 3} == batch.offsets

    def test_do_not_depend_on_the_batches(self, buggy: Pipeline) -> None:
        """Met in a batch or alone, a bug gives the same rejection."""
        records = [record(self.POISON if i % 3 == 1 else wav(noise(1.0)), offset=i) for i in range(6)]
        expected, expected_states = run_in_batches(buggy, records, [])
        outputs, states = run_in_batches(buggy, records, range(1, 6))
        assert expected == outputs
        assert encoded(expected_states) == encoded(states)

    @pytest.mark.parametrize("part", ["transform", "predict_proba"])
    def test_that_every_record_would_meet_are_fatal(
        self, machine_bundle: Path, monkeypatch: pytest.MonkeyPatch, part: str
    ) -> None:
        """If the golden clips fail as well nothing is rejected: the worker stops and says what is broken."""
        model = bundle.load(machine_bundle)
        monkeypatch.setattr(Forest if part == "predict_proba" else model.featurizer, part, broken)
        pipeline = Pipeline(model, TOPICS, Limits(), POLICY, Retention())
        with pytest.raises(Fatal, match=r"record 7 of partition 3 .*golden clips.*the compiler is gone"):
            pipeline.run({}, [record(wav(noise(1.0)), offset=7)])

    def test_out_of_memory_is_fatal(self, machine_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine without memory says nothing about a record: the worker stops and names the settings."""

        def exhausted(_: object) -> None:
            raise MemoryError

        model = bundle.load(machine_bundle)
        monkeypatch.setattr(model.featurizer, "transform", exhausted)
        pipeline = Pipeline(model, TOPICS, Limits(), POLICY, Retention())
        with pytest.raises(Fatal, match=r"out of memory with record 7 .*--max-record-bytes"):
            pipeline.run({}, [record(wav(noise(1.0)), offset=7)])


def broken(*_: object) -> None:
    raise OSError("the compiler is gone")


def by_librosa(window: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the default features of one window as a notebook computes them, shape (features,)."""
    stft: dict[str, Any] = {"n_fft": COMPACT.n_fft, "hop_length": COMPACT.hop_length}
    frames: dict[str, Any] = {"y": window, "frame_length": COMPACT.n_fft, "hop_length": COMPACT.hop_length}
    sound: dict[str, Any] = {"y": window, "sr": SPEC.sample_rate, **stft}
    mfcc = librosa.feature.mfcc(**sound, n_mfcc=COMPACT.n_mfcc, n_mels=COMPACT.n_mels)
    rows = np.concatenate(
        [
            mfcc,
            librosa.feature.delta(mfcc),
            librosa.feature.delta(mfcc, order=2),
            librosa.feature.spectral_centroid(**sound),
            librosa.feature.spectral_bandwidth(**sound),
            librosa.feature.spectral_rolloff(**sound),
            librosa.feature.spectral_flatness(y=window, **stft),
            librosa.feature.spectral_contrast(**sound),
            librosa.feature.zero_crossing_rate(**frames),
            librosa.feature.rms(**frames),
        ]
    )
    return np.column_stack([rows.mean(axis=1), rows.std(axis=1)]).ravel()


def test_serving_is_librosa_and_scikit_learn(machine_bundle: Path, machines: Path, pipeline: Pipeline) -> None:
    """What the worker says of a clip's bytes is what a notebook with librosa and the pickled forest says."""
    forest, calibration = joblib.load(machine_bundle / bundle.FOREST), bundle.load(machine_bundle).manifest.calibration
    assert isinstance(calibration, TemperatureScaling)
    clips = sorted((machines / "audio").glob("*.wav"))[::12]
    said = predictions(pipeline.run({}, [record(clip.read_bytes(), offset=i) for i, clip in enumerate(clips)]).outputs)
    assert 6 == len(said)
    for clip, prediction in zip(clips, said, strict=True):
        samples, _ = librosa.load(clip, sr=SPEC.sample_rate)
        windows = [samples[start : start + 16_000] for start in (0, 8_000, 16_000)]
        votes = forest.predict_proba([by_librosa(window) for window in windows]).mean(axis=0)
        assert forest.classes_[votes.argmax()] == prediction.label
        powers = (votes + calibration.smoothing) ** (calibration.sixteenths / 16)
        expected = dict(zip(forest.classes_, powers / powers.sum(), strict=True))
        # The last bits of a feature depend on the processor, and may turn one of 20 trees in one of 3 windows.
        assert expected == pytest.approx(prediction.probabilities, abs=0.05)


def test_a_regressor_says_a_value_and_an_interval(rpm_bundle: Path) -> None:
    """The value is in the unit of the trained column; how wide its interval is hangs on the trees' spread."""
    pipeline = Pipeline(bundle.load(rpm_bundle), TOPICS, Limits(), POLICY, Retention())
    (message,) = [m for m in pipeline.run({}, [record(wav(noise(1.0)))]).outputs if m.topic == TOPICS.predictions_out]
    prediction = msgspec.json.decode(message.value or b"", type=Regression)
    assert "rpm" == prediction.target
    assert 1200 <= prediction.value <= 3600
    assert prediction.spread > 0
    assert prediction.low < prediction.value < prediction.high


def test_a_model_that_levels_watches_how_much(machines: Path, tmp_path: Path) -> None:
    """A stream that is 12 dB quieter gets the same answers; what tells of it is the gain, and no feature."""
    fit(load(machines), tmp_path / "levelled", spec=feature_spec("article", level_dbfs=-23.0), trees=5)
    model = bundle.load(tmp_path / "levelled")
    hearing = Hearing(model, Limits())
    sounds = [noise(1.0), noise(1.0) * np.float32(0.25)]
    heard = [each for _, each in hearing.hear([record(wav(sound), offset=n) for n, sound in enumerate(sounds)])]
    loud, quiet = (each for each in heard if isinstance(each, Heard))
    assert isinstance(loud.prediction, Classification)
    assert isinstance(quiet.prediction, Classification)
    assert loud.prediction.probabilities == pytest.approx(quiet.prediction.probabilities, abs=0.01)
    *others, gain = (quiet.signals - loud.signals).tolist()
    assert "level.gain" == model.profile.names[-1]
    assert 20 * np.log10(4) == pytest.approx(gain * model.profile.signals[-1].spread, abs=0.01)
    assert max(map(abs, others)) < 0.05
