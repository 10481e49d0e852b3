"""What `worker.play` sends, when it sends it, and what its degradations measurably do."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import signal

from worker import audio, messages, play
from worker.broker import Session
from worker.errors import Fatal
from worker.messages import Message, Record, TopicSpec
from worker.play import Degradation

START = datetime(2026, 11, 22, 8, 0, 0, tzinfo=UTC)
RATE = 8_000
STEP = 1 / 32_768  # one step of 16 bits


class RecordingBroker:
    """A broker of which only ``publish`` is of interest here: it notes every batch."""

    def __init__(self) -> None:
        self.batches: list[list[Message]] = []

    def publish(self, messages: Iterable[Message]) -> None:
        self.batches.append(list(messages))

    def create_topics(self, specs: Sequence[TopicSpec]) -> list[str]:
        raise NotImplementedError(specs)

    def join(self, group: str, instance: str) -> Session:
        raise NotImplementedError(group, instance)

    def follow(self, topics: Sequence[str], *, from_beginning: bool) -> Iterator[list[Record]]:
        raise NotImplementedError(topics, from_beginning)

    def read(self, topics: Sequence[str]) -> Iterator[list[Record]]:
        raise NotImplementedError(topics)

    def close(self) -> None: ...


class Clock:
    """A clock that moves only when somebody sleeps on it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def write(path: Path, samples: NDArray[Any], rate: int = RATE) -> Path:
    integers = np.clip(np.rint(np.asarray(samples) * 32_768), -32_768, 32_767).astype(np.int16)
    soundfile.write(path, integers, rate, subtype="PCM_16")
    return path


def noise(seconds: float, level: float = 0.1, seed: int = 3) -> NDArray[np.float32]:
    samples = level * np.random.default_rng(seed).standard_normal(round(seconds * RATE))
    return (np.rint(samples * 32_768) / 32_768).astype(np.float32)


def cut(files: Sequence[Path], *degradations: str, chunk_seconds: float = 1.0, **options: Any) -> list[Message]:
    return list(
        play.chunks(
            files,
            topic="audio.in",
            source="mic-1",
            chunk_seconds=chunk_seconds,
            start_time=START,
            degradations=[play.parse_degradation(text) for text in degradations],
            **options,
        )
    )


def heard(sent: Iterable[Message]) -> list[audio.Sound]:
    """Read the chunks as the worker does."""
    return [audio.decode(message.value or b"", "audio/wav", audio.Limits()) for message in sent]


def joined(sent: Iterable[Message]) -> NDArray[np.float32]:
    return np.concatenate([sound.samples for sound in heard(sent)])


class TestParseDegradation:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("lowpass:2000", Degradation("lowpass", 2_000.0)),
            ("gain:-12", Degradation("gain", -12.0)),
            ("gain:+3.5@0", Degradation("gain", 3.5)),
            ("noise:20@60s", Degradation("noise", 20.0, 60.0)),
            ("noise:20@60", Degradation("noise", 20.0, 60.0)),
            ("noise:-5@2m", Degradation("noise", -5.0, 120.0)),
            (" noise:0@1.5h ", Degradation("noise", 0.0, 5_400.0)),
        ],
    )
    def test_forms(self, text: str, expected: Degradation) -> None:
        """A kind, a value and, if it is to begin later, a time."""
        assert expected == play.parse_degradation(text)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "lowpass",
            "lowpass:",
            "lowpass:0",
            "lowpass:-100",
            "echo:3",
            "gain:loud",
            "noise:20@",
            "noise:20@1d",
            "gain:nan",
            "gain:1e3",
            "noise:20@-5s",
            "lowpass:2000,gain:3",
        ],
    )
    def test_anything_else(self, text: str) -> None:
        """What is not understood is answered with the accepted forms."""
        with pytest.raises(ValueError, match=r"expected lowpass:HERTZ, gain:DECIBELS or noise:SNR_DECIBELS.*@SECONDS"):
            play.parse_degradation(text)

    @given(
        kind=st.sampled_from(["gain", "noise"]),
        value=st.integers(-90, 90),
        start=st.integers(0, 10_000),
        unit=st.sampled_from([("", 1), ("s", 1), ("m", 60), ("h", 3_600)]),
    )
    def test_round_trip(self, kind: str, value: int, start: int, unit: tuple[str, int]) -> None:
        """Every combination of value, start and unit is understood."""
        degradation = play.parse_degradation(f"{kind}:{value}@{start}{unit[0]}")

        assert (kind, value, start * unit[1]) == (degradation.kind, degradation.value, degradation.start)


class TestChunks:
    def test_one_recording(self, tmp_path: Path) -> None:
        """Files follow each other without a gap, sample for sample; only the last chunk is short."""
        first, second = noise(1.3, seed=1), noise(0.9, seed=2)
        files = [write(tmp_path / "a.wav", first), write(tmp_path / "b.flac", second)]

        sent = cut(files, chunk_seconds=0.5)

        assert [0.5, 0.5, 0.5, 0.5, 0.2] == [sound.duration for sound in heard(sent)]
        np.testing.assert_array_equal(np.concatenate([first, second]), joined(sent))

    def test_files_shorter_than_a_chunk(self, tmp_path: Path) -> None:
        """Many short files fill one chunk."""
        files = [write(tmp_path / f"{i}.wav", noise(0.01, seed=i)) for i in range(5)]

        assert [0.04, 0.01] == [sound.duration for sound in heard(cut(files, chunk_seconds=0.04))]

    def test_event(self, tmp_path: Path) -> None:
        """A chunk is a CloudEvent in binary mode, under the key of its source."""
        sent = cut([write(tmp_path / "a.wav", noise(0.2))], chunk_seconds=0.1)

        assert [(b"mic-1", "audio.in", None, None)] * 2 == [(m.key, m.topic, m.partition, m.timestamp) for m in sent]
        assert {
            "ce_specversion": b"1.0",
            "ce_id": b"2026-11-22T08:00:00.000000Z/1",
            "ce_source": b"mic-1",
            "ce_type": b"earshot.audio",
            "ce_time": b"2026-11-22T08:00:00.100000Z",
            "content-type": b"audio/wav",
        } == dict(sent[1].headers)

    def test_ids_are_unique(self, tmp_path: Path) -> None:
        """No two chunks share an id."""
        sent = cut([write(tmp_path / "a.wav", noise(2))], chunk_seconds=0.01)

        assert 200 == len({dict(message.headers)["ce_id"] for message in sent})

    def test_event_times(self, tmp_path: Path) -> None:
        """Event times are the start plus the samples before, across files and in any time zone."""
        files = [write(tmp_path / "a.wav", noise(1.1)), write(tmp_path / "b.wav", noise(1.1))]
        local = START.astimezone(timezone(timedelta(hours=5, minutes=30)))

        sent = play.chunks(files, topic="t", source="s", chunk_seconds=0.25, start_time=local)
        times = [
            messages.decode(Record("t", 0, i, 0, message.key, message.value, message.headers)).time
            for i, message in enumerate(sent)
        ]

        started = round(START.timestamp() * 1_000)
        assert [started + 250 * i for i in range(9)] == times

    def test_event_times_do_not_wander(self, tmp_path: Path) -> None:
        """Where a chunk is no whole number of samples, the time is that of the samples, not of the request."""
        path = write(tmp_path / "a.wav", noise(4))

        sent = cut([path], chunk_seconds=0.10001)  # 800.08 samples, so 800

        assert b"2026-11-22T08:00:03.900000Z" == dict(sent[39].headers)["ce_time"]

    def test_rate_of_the_first_file(self, tmp_path: Path) -> None:
        """A recording has one rate: later files are resampled to that of the first."""
        tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100)
        files = [write(tmp_path / "a.wav", np.zeros(RATE)), write(tmp_path / "b.wav", tone, 44_100)]

        silent, resampled = heard(cut(files))

        assert (RATE, RATE) == (silent.sample_rate, resampled.sample_rate)
        expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
        np.testing.assert_allclose(resampled.samples[100:-100], expected[100:-100], atol=2 * STEP)

    def test_channels_are_mixed(self, tmp_path: Path) -> None:
        """A stereo file is heard as the average of its channels."""
        stereo = np.stack([np.full(RATE, 0.5), np.full(RATE, 0.25)], axis=1)

        np.testing.assert_array_equal(np.float32(0.375), joined(cut([write(tmp_path / "a.wav", stereo)])))

    def test_shuffle(self, tmp_path: Path) -> None:
        """The same seed gives the same order, another seed another, and nothing is lost."""
        files = [write(tmp_path / f"{i}.wav", np.full(80, i / 64)) for i in range(12)]

        orders = [
            [round(64 * float(sound.samples[0])) for sound in heard(cut(files, chunk_seconds=0.01, shuffle_seed=seed))]
            for seed in (1, 1, 2, None)
        ]

        assert orders[0] == orders[1]
        assert orders[0] != orders[2]
        assert list(range(12)) == orders[3] == sorted(orders[0])

    def test_real_clips(self, esc10: Path) -> None:
        """Real clips come out as their decoder gives them, but for the rounding to 16 bits."""
        clips = sorted((esc10 / "audio").iterdir())[:3]
        expected = np.concatenate([audio.from_container(clip.read_bytes()).samples for clip in clips])

        np.testing.assert_allclose(joined(cut(clips)), np.clip(expected, -1, 1 - STEP), atol=0.51 * STEP)

    def test_nothing_to_play(self) -> None:
        """No files are no chunks."""
        assert [] == cut([])

    @pytest.mark.parametrize("content", [b"", b"not a sound at all", None])
    def test_unreadable_file(self, tmp_path: Path, content: bytes | None) -> None:
        """A file that cannot be played is named, after what came before it was sent."""
        bad = tmp_path / "bad.wav"
        if content is not None:
            bad.write_bytes(content)
        stream = play.chunks(
            [write(tmp_path / "good.wav", noise(1)), bad], topic="t", source="s", chunk_seconds=1.0, start_time=START
        )

        next(stream)
        with pytest.raises(Fatal, match=r"bad\.wav cannot be played.*expected a sound file"):
            next(stream)


class TestDegradations:
    def test_low_pass(self, tmp_path: Path) -> None:
        """An octave above the cut-off more than 40 dB are gone; an octave below nothing is."""
        path = write(tmp_path / "a.wav", noise(8))

        frequencies, before = signal.welch(joined(cut([path])), RATE, nperseg=1_024)
        _, after = signal.welch(joined(cut([path], "lowpass:1000")), RATE, nperseg=1_024)
        change = 10 * np.log10(after / before)

        assert change[frequencies > 2_000].max() < -40
        assert np.abs(change[(frequencies > 0) & (frequencies < 500)]).max() < 0.1

    @pytest.mark.parametrize("chunk_seconds", [0.02, 0.1, 0.77])
    def test_no_seams(self, tmp_path: Path, chunk_seconds: float) -> None:
        """Filtering chunk by chunk is filtering the whole, so that nothing clicks at a border."""
        samples = noise(3)
        sections = signal.butter(8, 1_000, fs=RATE, output="sos")
        whole, _ = signal.sosfilt(sections, samples, zi=signal.sosfilt_zi(sections) * samples[0])

        chunked = joined(cut([write(tmp_path / "a.wav", samples)], "lowpass:1000", chunk_seconds=chunk_seconds))

        np.testing.assert_allclose(chunked, whole, atol=0.51 * STEP)

    def test_no_click_at_the_start(self, tmp_path: Path) -> None:
        """A constant stays constant when the low-pass sets in, rather than rising from silence."""
        constant = np.full(RATE, 0.25)

        np.testing.assert_allclose(
            joined(cut([write(tmp_path / "a.wav", constant)], "lowpass:500@0.5s")), constant, atol=0.51 * STEP
        )

    @pytest.mark.parametrize("decibels", [-12.0, -6.0, 3.0])
    def test_gain(self, tmp_path: Path, decibels: float) -> None:
        """Gain is exact within the rounding to 16 bits."""
        samples = noise(1)

        louder = joined(cut([write(tmp_path / "a.wav", samples)], f"gain:{decibels}"))

        np.testing.assert_allclose(louder, samples * 10 ** (decibels / 20), atol=0.51 * STEP)

    def test_clipping(self, tmp_path: Path) -> None:
        """What gets louder than full scale is clipped, and does not wrap around."""
        louder = joined(cut([write(tmp_path / "a.wav", np.array([0.5, -0.5]))], "gain:20"))

        assert [1 - STEP, -1.0] == louder.tolist()

    @pytest.mark.parametrize("snr", [0.0, 10.0, 30.0])
    def test_noise(self, tmp_path: Path, snr: float) -> None:
        """Noise has the ratio to the signal that was asked for, within 1 dB."""
        samples = 0.1 * np.sin(2 * np.pi * 440 * np.arange(8 * RATE) / RATE)
        path = write(tmp_path / "a.wav", samples)

        added = joined(cut([path], f"noise:{snr}")) - joined(cut([path]))

        assert pytest.approx(snr, abs=1.0) == 10 * np.log10(np.mean(samples**2) / np.mean(added**2))
        assert abs(np.corrcoef(added[:-1], added[1:])[0, 1]) < 0.05

    def test_noise_is_seeded(self, tmp_path: Path) -> None:
        """The same seed gives the same bytes, another seed others; two noises are not one twice."""
        path = write(tmp_path / "a.wav", noise(1))

        assert cut([path], "noise:10") == cut([path], "noise:10")
        assert cut([path], "noise:10", seed=1) != cut([path], "noise:10")
        one = joined(cut([path], "noise:10")) - noise(1)
        two = joined(cut([path], "noise:10", "noise:10")) - noise(1)
        assert np.corrcoef(one, two - one)[0, 1] < 0.1

    def test_silence_stays_silent(self, tmp_path: Path) -> None:
        """No signal, no noise: the ratio is to nothing."""
        assert not joined(cut([write(tmp_path / "a.wav", np.zeros(RATE))], "noise:0")).any()

    @pytest.mark.parametrize("degradation", ["gain:-12", "noise:10", "lowpass:500"])
    @pytest.mark.parametrize("start", [0.0, 1.0, 1.25, 2.0])
    def test_start(self, tmp_path: Path, degradation: str, start: float) -> None:
        """A degradation begins at its second, in the middle of a chunk if need be, and not before."""
        samples = noise(3)

        degraded = joined(cut([write(tmp_path / "a.wav", samples)], f"{degradation}@{start}s"))

        begin = round(start * RATE)
        changed = np.flatnonzero(degraded != samples)
        np.testing.assert_array_equal(samples[:begin], degraded[:begin])
        assert begin <= changed[0] < begin + 5
        assert changed.size > 0.95 * (samples.size - begin)

    def test_in_their_order(self, tmp_path: Path) -> None:
        """Degradations add up, each from its own start on."""
        samples = noise(3)

        degraded = joined(cut([write(tmp_path / "a.wav", samples)], "gain:-6@1s", "gain:-6@2s"))

        factor = 10 ** (-6 / 20)
        gains = np.repeat([1, factor, factor**2], RATE)
        np.testing.assert_allclose(degraded, samples * gains, atol=0.51 * STEP)

    def test_cutoff_beyond_the_recording(self, tmp_path: Path) -> None:
        """A cut-off that the recording cannot have is refused before anything is sent."""
        path = write(tmp_path / "a.wav", noise(1))

        with pytest.raises(Fatal, match=r"lowpass:4000 cannot be applied to 8000 samples a second.*4000 Hz"):
            cut([path], "lowpass:4000")


class TestPlay:
    MESSAGES = tuple(Message("audio.in", b"s", str(i).encode()) for i in range(150))

    def run(
        self,
        broker: RecordingBroker,
        sent: Iterable[Message],
        clock: Clock,
        *,
        speed: float,
        stop: threading.Event | None = None,
    ) -> tuple[int, list[int]]:
        told: list[int] = []
        count = play.play(
            broker,
            sent,
            speed=speed,
            chunk_seconds=0.5,
            stop=stop or threading.Event(),
            on_sent=told.append,
            clock=clock,
            sleep=clock.sleep,
        )
        return count, told

    def test_as_fast_as_possible(self) -> None:
        """Speed 0 never sleeps, sends full batches and the rest, and keeps the order."""
        broker, clock = RecordingBroker(), Clock()

        assert (150, [64, 64, 22]) == self.run(broker, self.MESSAGES, clock, speed=0)
        assert [] == clock.slept
        assert [64, 64, 22] == [len(batch) for batch in broker.batches]
        assert list(self.MESSAGES) == [message for batch in broker.batches for message in batch]

    @pytest.mark.parametrize(("speed", "interval"), [(1.0, 0.5), (4.0, 0.125), (0.5, 1.0)])
    def test_real_time(self, speed: float, interval: float) -> None:
        """Chunks go out one by one, at their time divided by the speed."""
        broker, clock = RecordingBroker(), Clock()

        assert (5, [1] * 5) == self.run(broker, self.MESSAGES[:5], clock, speed=speed)
        assert [interval] * 4 == clock.slept

    def test_each_is_sent_before_the_wait_for_the_next(self) -> None:
        """A chunk that is due does not wait for its successor."""
        broker, clock = RecordingBroker(), Clock()
        published_at: list[float] = []

        play.play(
            broker,
            self.MESSAGES[:4],
            speed=1.0,
            chunk_seconds=0.5,
            stop=threading.Event(),
            on_sent=lambda _: published_at.append(clock.now),
            clock=clock,
            sleep=clock.sleep,
        )

        assert [100.0, 100.5, 101.0, 101.5] == published_at

    def test_catching_up(self) -> None:
        """After a delay everything that has become due goes out together, and the pace is kept."""
        broker, clock = RecordingBroker(), Clock()

        def slow() -> Iterator[Message]:
            yield from self.MESSAGES[:2]
            clock.now += 1.5
            yield from self.MESSAGES[2:6]

        self.run(broker, slow(), clock, speed=1.0)

        assert [1, 1, 3, 1] == [len(batch) for batch in broker.batches]
        assert 102.5 == clock.now

    def test_stop(self) -> None:
        """Once stopped, nothing more is taken; what was due has been sent."""
        broker, clock, stop = RecordingBroker(), Clock(), threading.Event()

        def until_third() -> Iterator[Message]:
            yield from self.MESSAGES[:3]
            stop.set()
            yield from self.MESSAGES[3:]

        assert (3, [1, 1, 1]) == self.run(broker, until_third(), clock, speed=1.0, stop=stop)
        assert list(self.MESSAGES[:3]) == [message for batch in broker.batches for message in batch]

    def test_stop_ends_the_wait(self) -> None:
        """With the event's own wait as the sleep, a stop ends an hour's pause at once."""
        broker, stop = RecordingBroker(), threading.Event()
        timer = threading.Timer(0.05, stop.set)
        timer.start()
        clock = Clock()

        count = play.play(
            broker,
            self.MESSAGES,
            speed=1.0,
            chunk_seconds=3_600.0,
            stop=stop,
            on_sent=lambda _: None,
            clock=clock,
            sleep=stop.wait,
        )

        timer.join()
        assert 1 == count

    def test_nothing(self) -> None:
        """Nothing to play is nothing published."""
        broker, clock = RecordingBroker(), Clock()

        assert (0, []) == self.run(broker, [], clock, speed=1.0)
        assert [] == broker.batches
