"""Mutated sounds, headers, keys and timestamps through the real pipeline, in a process of its own.

    python -m tests.system.fuzz BUNDLE --records 10000 --seed 0

Every record has to end as one prediction or one rejection that can be written and read again, in
bounded time and memory. Prints the figures as one JSON object; whatever does not hold is a
traceback, and a crash of a decoder is a signal in the exit status.
"""

from __future__ import annotations

import argparse
import io
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import soundfile

from worker import bundle
from worker.audio import Limits
from worker.drift import DriftPolicy
from worker.messages import Classification, DriftDetected, Headers, Message, Record, RetrainRequested, Topics
from worker.pipeline import Pipeline, States
from worker.states import Retention

TOPICS: Final = Topics()
RETENTION: Final = Retention(max_sources=8, forget_after=300)
WARM_UP: Final = 500
"""Records after which memory counts: libraries, tables and detectors are there."""

REPEATED: Final = 1_000
"""Records that are run a second time, one by one, and must give the same."""

PCM: Final = (
    b"audio/L16;rate=16000;channels=1",
    b"audio/pcm;rate=8000;format=s16le",
    b"audio/pcm;rate=16000;format=f32le",
)
CONTENT_TYPES: Final = (
    *(*PCM, b"audio/wav", b"audio/flac", b"audio/ogg", b"application/ogg", b"application/octet-stream", b""),
    *(b"audio/L16", b"audio/L16;rate=-1", b"audio/L16;rate=99999999999", b"audio/L16;rate=16000;channels=4"),
    *(b"audio/pcm;rate=1000;channels=32;format=f32le", b"application/cloudevents+json", b"text/html", b"\xff\xfe"),
)
TIMES: Final = (
    b"2026-11-22T08:00:00Z",
    b"2026-11-22t08:00:00.123456789+05:30",
    b"9999-12-31T23:59:59-23:59",
    b"now",
    b"\xc3",
)
TIMESTAMPS: Final = (0, -1, 1, 1_795_338_132_345, 2**31, 2**53, 2**63 - 1, -(2**63), 253_402_300_799_999)
KEYS: Final = (None, b"", b"\xff\xfe", b"\x00", "ünï-✓".encode(), b"k" * 10_000)
EXTREMES: Final = (
    b"\x00" * 4,
    b"\xff" * 4,
    b"\xff\xff\xff\x7f",
    b"\x00\x00\x00\x80",
    b"\x01\x00\x00\x00",
    b"\x00\x00\x00\x01",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    model = bundle.load(options.bundle)
    pipeline = Pipeline(model, TOPICS, Limits(), DriftPolicy(block_seconds=1.0), RETENTION)

    states: States = {}
    outcomes: Counter[str] = Counter()
    first: list[Record] = []
    expected: list[Message] = []
    done = base = 0
    slowest = 0.0
    for batch in batches(random.Random(options.seed), options.records):
        started = time.process_time()
        made = pipeline.run(states, batch)
        slowest = max(slowest, time.process_time() - started)
        if made.failure is not None:
            raise AssertionError(made.failure)
        check(batch, made.outputs)
        assert all(len(sources) <= RETENTION.max_sources for sources in states.values())
        outcomes.update(made.rejections)
        outcomes["prediction"] += made.predictions
        done += len(batch)
        if done <= REPEATED:
            first += batch
            expected += stateless(made.outputs)
        if done >= WARM_UP and not base:
            base = peak_bytes()
    growth = peak_bytes() - base
    assert done == outcomes.total()

    one_by_one: States = {}
    assert expected == [each for record in first for each in stateless(pipeline.run(one_by_one, [record]).outputs)]
    figures = {"records": done, "slowest_cpu_seconds": slowest, "peak_growth_bytes": growth, "outcomes": outcomes}
    print(msgspec.json.encode(figures, order="sorted").decode())
    return 0


def stateless(outputs: Sequence[Message]) -> list[Message]:
    """Leave out the states: how often one is saved does depend on the batches."""
    return [message for message in outputs if message.topic != TOPICS.drift_state]


def check(batch: Sequence[Record], outputs: Sequence[Message]) -> None:
    """Insist that each record has one answer, and that all that is written can be read."""
    places = []
    for message in outputs:
        msgspec.msgpack.encode(message)
        headers = dict(message.headers)
        assert all(isinstance(value, bytes) for value in headers.values())
        if message.topic == TOPICS.predictions_out:
            prediction = msgspec.json.decode(message.value or b"", type=Classification)
            assert abs(sum(prediction.probabilities.values()) - 1) < 1e-6
            assert 0 < prediction.duration <= Limits().max_seconds
            places.append((prediction.record.partition, prediction.record.offset))
        elif message.topic == TOPICS.audio_dlq:
            assert 0 < len(headers["earshot_detail"].decode()) < 1_000
            places.append((int(headers["earshot_partition"]), int(headers["earshot_offset"])))
        elif message.topic == TOPICS.drift_events:
            msgspec.json.decode(message.value or b"", type=DriftDetected | RetrainRequested)
        else:
            assert TOPICS.drift_state == message.topic
    assert [(record.partition, record.offset) for record in batch] == places


def batches(dice: random.Random, count: int) -> Iterator[list[Record]]:
    """Yield so many records in batches of random size, each bomb alone, so that its time and memory are its own."""
    seeds = sounds()
    bombs = dict(zip(dice.sample(range(WARM_UP, count), 4), inflating(), strict=True))
    offsets = [0, 0]
    batch: list[Record] = []
    for number in range(count):
        partition = dice.randrange(2)
        value, headers = dice.choice(seeds)
        bomb = bombs.get(number)
        record = Record(
            TOPICS.audio_in,
            partition,
            offsets[partition],
            dice.choice(TIMESTAMPS) if dice.random() < 0.05 else 1_795_338_132_345 + number,
            dice.choice(KEYS) if dice.random() < 0.1 else b"mic-%d" % dice.choice([0, 0, 0, 1, 1, 2, number]),
            bomb or mutated(dice, value, seeds),
            () if bomb else shuffled(dice, headers),
        )
        offsets[partition] += dice.choice([1, 1, 1, 2])
        if bomb and batch:
            yield batch
            batch = []
        batch.append(record)
        if bomb or len(batch) >= dice.randint(1, 40):
            yield batch
            batch = []
    if batch:
        yield batch


def sounds() -> list[tuple[bytes, Headers]]:
    """Return sounds in every encoding that is taken, in several rates, lengths and numbers of channels."""
    made: list[tuple[bytes, Headers]] = []
    noise = np.random.default_rng(0)
    kinds = [("WAV", each) for each in ("PCM_16", "PCM_24", "PCM_U8", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM")]
    kinds += [("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("RF64", "PCM_16")]
    for rate, seconds, channels in ((16_000, 0.5, 1), (8_000, 1.2, 1), (48_000, 0.1, 2), (16_000, 0.02, 3)):
        samples = 0.1 * noise.standard_normal((round(rate * seconds), channels))
        for container, subtype in kinds:
            if subtype == "IMA_ADPCM" and channels > 2:
                continue
            buffer = io.BytesIO()
            soundfile.write(buffer, samples, rate, format=container, subtype=subtype)
            declared: Headers = (("content-type", b"audio/" + container.lower().encode()),)
            made.append((buffer.getvalue(), () if container == "RF64" or rate == 8_000 else declared))
        made += [
            (
                (samples * 32767).astype(">i2").tobytes(),
                (("content-type", b"audio/L16;rate=%d;channels=%d" % (rate, channels)),),
            ),
            (
                (samples * 32767).astype("<i2").tobytes(),
                (("content-type", b"audio/pcm;rate=%d;channels=%d;format=s16le" % (rate, channels)),),
            ),
            (
                samples.astype("<f4").tobytes(),
                (("content-type", b"audio/pcm;rate=%d;channels=%d;format=f32le" % (rate, channels)),),
            ),
        ]
    return made


def inflating() -> Iterator[bytes]:
    """Yield silence of which few bytes become much sound: the longest that is taken, and three that are not."""
    for rate, channels, seconds in ((384_000, 1, 60), (384_000, 8, 60), (48_000, 2, 240), (655_350, 1, 30)):
        buffer = io.BytesIO()
        with soundfile.SoundFile(buffer, "w", samplerate=rate, channels=channels, format="FLAC") as file:
            for _ in range(seconds):
                file.write(np.zeros((rate, channels), np.float32))
        yield buffer.getvalue()


def mutated(dice: random.Random, value: bytes, seeds: Sequence[tuple[bytes, Headers]]) -> bytes:
    """Return ``value`` as it is, or damaged once or a few times; an OGG page gets its checksum, so that it is read."""
    for _ in range(dice.choice([0, 1, 1, 1, 2, 3, 8])):
        value = dice.choice(DAMAGES)(dice, value, dice.choice(seeds)[0])
    return with_ogg_checksums(value) if value[:4] == b"OggS" and dice.random() < 0.7 else value


def _flip(dice: random.Random, value: bytes, _: bytes) -> bytes:
    damaged = bytearray(value)
    for _each in range(dice.choice([1, 1, 4, 64])):
        if damaged:
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
    return bytes(damaged)


def _flip_early(dice: random.Random, value: bytes, _: bytes) -> bytes:
    return _flip(dice, value[:128], b"") + value[128:]


def _extreme(dice: random.Random, value: bytes, _: bytes) -> bytes:
    at = dice.randrange(64)
    return value[:at] + dice.choice(EXTREMES) + value[at + 4 :]


def _cut(dice: random.Random, value: bytes, _: bytes) -> bytes:
    return value[: dice.randint(0, len(value))]


def _behead(dice: random.Random, value: bytes, _: bytes) -> bytes:
    return value[dice.randint(0, min(len(value), 64)) :]


def _zeros(dice: random.Random, value: bytes, _: bytes) -> bytes:
    at, length = dice.randint(0, len(value)), dice.choice([1, 16, 400])
    return value[:at] + bytes(len(value[at : at + length])) + value[at + length :]


def _repeat(dice: random.Random, value: bytes, _: bytes) -> bytes:
    start, stop = sorted((dice.randint(0, len(value)), dice.randint(0, len(value))))
    return value[:stop] + value[start:stop][:4096] + value[stop:]


def _splice(dice: random.Random, value: bytes, other: bytes) -> bytes:
    return value[: dice.randint(0, len(value))] + other[dice.randint(0, len(other)) :]


def _noise(dice: random.Random, _: bytes, __: bytes) -> bytes:
    return dice.randbytes(dice.choice([1, 4, 44, 1_000]))


DAMAGES: Final[tuple[Callable[[random.Random, bytes, bytes], bytes], ...]] = (
    *(_flip, _flip, _flip_early, _flip_early, _extreme, _extreme),
    *(_cut, _behead, _zeros, _repeat, _splice, _noise),
)


def shuffled(dice: random.Random, headers: Headers) -> Headers:
    """Return mostly the right headers, and now and then wrong ones, too many or none."""
    made = list(headers)
    if dice.random() < 0.15:
        made = [("content-type", dice.choice(CONTENT_TYPES))]
    if dice.random() < 0.1:
        made.append(("ce_time", dice.choice(TIMES)))
    if dice.random() < 0.05:
        made.append(("ce_source", dice.choice([b"", b"\xff", b"https://example.org/mic"])))
    if dice.random() < 0.05:
        made += [
            (dice.choice(["", "x", "content-type", "ce_time", "ünï"]), dice.randbytes(dice.randrange(50)))
            for _ in range(9)
        ]
    return tuple(made)


def with_ogg_checksums(value: bytes) -> bytes:
    """Return OGG pages with the checksums that their content asks for (RFC 3533)."""
    fixed, start = bytearray(value), 0
    while fixed[start : start + 4] == b"OggS" and start + 27 <= len(fixed):
        segments = fixed[start + 26]
        end = start + 27 + segments + sum(fixed[start + 27 : start + 27 + segments])
        fixed[start + 22 : start + 26] = bytes(4)
        checksum = 0
        for byte in fixed[start:end]:
            checksum = (checksum << 8 & 0xFFFFFFFF) ^ CRC[checksum >> 24 ^ byte]
        fixed[start + 22 : start + 26] = checksum.to_bytes(4, "little")
        start = end
    return bytes(fixed)


def _crc_entry(byte: int) -> int:
    register = byte << 24
    for _ in range(8):
        register = register << 1 ^ (0x104C11DB7 if register & 0x80000000 else 0)
    return register


CRC: Final = tuple(_crc_entry(byte) for byte in range(256))


def peak_bytes() -> int:
    """Return the most memory that this process has had: from /proc if there is one, where a parent's does not count."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    sys.exit(main())
