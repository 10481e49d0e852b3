"""The stream of the chaos test: real sound from twelve sources, some of which drift, and poison in between.

It makes the messages, deterministically, and knows neither a broker nor what comes of them. Each
poisoned record names in a header of its own the reason for which it has to be rejected.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import count, cycle, islice
from pathlib import Path
from typing import Final

import numpy as np
import soundfile
from msgspec.structs import replace

from worker import audio, play
from worker.errors import Reason
from worker.messages import Message

SOURCES: Final = 12
RATE: Final = 16_000
MAX_RECORD_BYTES: Final = 200_000
"""What the workers have to be told: then a record that is too large need not be megabytes."""

POISONED: Final = 0.05
"""The share of the records that cannot be used."""

EXPECTED: Final = "expected_reason"
"""The header that says why a record has to be rejected; those that are fine do not have it."""

_PCM: Final = f"audio/pcm;rate={RATE};format=s16le"
_START: Final = datetime(2026, 1, 1, tzinfo=UTC)
_DRIFTS: Final = ("lowpass:1000@{}s", "noise:0@{}s", "gain:-24@{}s")


def as_wav(clips: Sequence[Path], folder: Path) -> list[Path]:
    """Write recordings as WAV at `RATE`, so that what is cut from them is as small as it may be."""
    folder.mkdir(exist_ok=True)
    written = []
    for clip in clips:
        sound = audio.from_container(clip.read_bytes())
        path = folder / f"{clip.stem}.wav"
        soundfile.write(path, audio.resample(sound.samples, sound.sample_rate, RATE), RATE, subtype="PCM_16")
        written.append(path)
    return written


def stream(clips: Sequence[Path], records: int, partitions: int, seed: int) -> Iterator[Message]:
    """Yield ``records`` messages, the sources in turn; of four sources three drift, halfway through, and one rests."""
    chance = random.Random(seed)
    turns = -(-records * 13 // (SOURCES * 12))  # a twelfth more than without the rests
    sources = [_source(clips, number, turns, seed) for number in range(SOURCES)]
    interleaved = (
        replace(next(source), partition=number % partitions)
        for turn in count()
        for number, source in enumerate(sources)
        if number % 4 < len(_DRIFTS) or turn not in range(turns * 4 // 10, turns * 7 // 10)
    )
    for placed in islice(interleaved, records):
        yield _poison(placed, chance) if chance.random() < POISONED else _dress(placed, chance)


def _source(clips: Sequence[Path], number: int, seconds: int, seed: int) -> Iterator[Message]:
    """Yield one microphone's chunks: its own order of the clips, and its own trouble from halfway on."""
    order = random.Random(f"{seed}/{number}").sample(clips, k=len(clips))
    drifts = [_DRIFTS[number % 4].format(seconds // 2)] if number % 4 < len(_DRIFTS) else []
    needed = -(-seconds // max(1, int(soundfile.info(order[0]).duration)))
    return play.chunks(
        list(islice(cycle(order), 2 * needed)),  # some are shorter than the first
        topic="",
        source=f"mic-{number}",
        chunk_seconds=1.0,
        start_time=_START,
        degradations=[play.parse_degradation(each) for each in drifts],
        seed=seed,
    )


def _dress(message: Message, chance: random.Random) -> Message:
    """Send a chunk in one of the ways in which it may come; most are raw PCM."""
    way = chance.random()
    if way < 0.1:
        return message  # a WAV
    pcm = soundfile.read(io.BytesIO(message.value or b""), dtype="int16")[0].tobytes()
    if way < 0.15:
        pcm = pcm[: len(pcm) // 4 * 2]  # half a second, which is filled up with silence
    if way < 0.2:
        message = replace(message, key=None)  # ce_source tells
    return _typed(message, _PCM, pcm)


def _poison(message: Message, chance: random.Random) -> Message:
    reason = chance.choice(sorted(_POISONS))
    return _marked(_POISONS[reason](message), reason)


def _marked(message: Message, reason: Reason) -> Message:
    return replace(message, headers=(*message.headers, (EXPECTED, reason.encode())))


def _typed(message: Message, content_type: str, value: bytes | None = None) -> Message:
    headers = tuple((k, content_type.encode() if k == "content-type" else v) for k, v in message.headers)
    return replace(message, headers=headers, value=message.value if value is None else value)


def _anonymous(message: Message) -> Message:
    return replace(message, key=None, headers=tuple(each for each in message.headers if each[0] != "ce_source"))


def _timed(message: Message, time: bytes) -> Message:
    return replace(message, headers=tuple((k, time if k == "ce_time" else v) for k, v in message.headers))


_NANS: Final = np.full(RATE, np.nan, "<f4").tobytes()
_POISONS: Final[dict[Reason, Callable[[Message], Message]]] = {
    "bad-header": lambda message: _timed(message, b"yesterday"),
    "bad-key": lambda message: replace(message, key=b"\xff\xfe"),
    "no-source": _anonymous,
    "structured-mode": lambda message: _typed(message, "application/cloudevents+json", b"{}"),
    "unknown-content-type": lambda message: _typed(message, "video/mp4"),
    "undecodable": lambda message: _typed(message, "audio/flac", b"fLaC and nothing that follows from it"),
    "empty": lambda message: replace(message, value=None),
    "too-large": lambda message: _typed(message, _PCM, bytes(MAX_RECORD_BYTES + 2)),
    "too-long": lambda message: _typed(message, "audio/pcm;rate=1000;format=s16le", bytes(2 * 61 * 1000)),
    "bad-rate": lambda message: _typed(message, "audio/pcm;rate=7;format=s16le"),
    "bad-channels": lambda message: _typed(message, f"{_PCM};channels=99"),
    "non-finite": lambda message: _typed(message, "audio/pcm;rate=16000;format=f32le", _NANS),
}
