"""Play: real files as the chunks of a live source, and degrade them on purpose.

This module owns the making of input for demos, tests and load: files are joined into one endless
recording, as a microphone would hear them, cut into chunks and encoded. From a given second on,
the recording may be low-passed, attenuated or drowned in noise, so that drift has something to
find. It knows the wire and a broker's ``publish``; it knows nothing of models or predictions.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np
import soundfile
from numpy.typing import NDArray
from scipy import signal

from worker import audio
from worker.broker import Broker
from worker.errors import BadRecord, Fatal
from worker.messages import Headers, Message

AUDIO_TYPE: Final = "earshot.audio"
BATCH: Final = 64  # messages to a durable publish: enough that its round trip costs little

_LOWPASS_ORDER: Final = 8  # 48 dB an octave: what is an octave above the cut-off is out of hearing
_SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3600}
_FORMS: Final = re.compile(r"(lowpass|gain|noise):([+-]?\d+(?:\.\d+)?)(?:@(\d+(?:\.\d+)?)([smh]?))?")

Effect = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Turns the next samples of a stream into what is heard of them; carries state between calls."""


class Degradation(msgspec.Struct, frozen=True):
    """One thing that goes wrong with a source, from ``start`` seconds of stream time on.

    ``value`` is the cut-off in hertz for ``lowpass``, the gain in dB for ``gain``, and the
    signal-to-noise ratio in dB for ``noise``.
    """

    kind: Literal["lowpass", "gain", "noise"]
    value: float
    start: float = 0.0


def parse_degradation(text: str) -> Degradation:
    """Read a degradation as it is written on the command line, such as ``noise:20@60s``.

    Raises:
        ValueError: the text has none of the accepted forms.
    """
    match = _FORMS.fullmatch(text.strip())
    if match is None or (match[1] == "lowpass" and float(match[2]) <= 0):
        raise ValueError(
            f"{text!r} is no degradation; expected lowpass:HERTZ, gain:DECIBELS or noise:SNR_DECIBELS, "
            "from a time on if @SECONDS follows, as in lowpass:2000, gain:-12@60s or noise:20@2m"
        )
    start = float(match[3] or 0) * _SECONDS[match[4] or ""]
    return msgspec.convert({"kind": match[1], "value": float(match[2]), "start": start}, Degradation)


def chunks(
    files: Sequence[Path],
    *,
    topic: str,
    source: str,
    chunk_seconds: float,
    start_time: datetime,
    degradations: Sequence[Degradation] = (),
    shuffle_seed: int | None = None,
    seed: int = 0,
) -> Iterator[Message]:
    """Yield the files as consecutive chunks of one recording of ``source``, each a WAV of 16 bits.

    The recording has the rate of the first file, and files follow each other without a gap, in
    their order or, with a ``shuffle_seed``, in a shuffled one. Only the last chunk may be shorter
    than ``chunk_seconds``. The event time of a chunk is ``start_time`` (which must be aware) plus
    its place in the recording; ``seed`` is that of the noise. Degradations apply in their order.

    Raises:
        Fatal: a file cannot be read, or a cut-off is not below half the sample rate.
    """
    order = range(len(files)) if shuffle_seed is None else np.random.default_rng(shuffle_seed).permutation(len(files))
    sounds = (_load(files[i]) for i in order)
    first = next(sounds, None)
    if first is None:
        return
    rate = first.sample_rate
    stream = (audio.resample(sound.samples, sound.sample_rate, rate) for sound in chain([first], sounds))
    effects = [(round(d.start * rate), _effect(d, rate, [seed, i])) for i, d in enumerate(degradations)]
    position = 0
    for number, piece in enumerate(_cut(stream, max(1, round(chunk_seconds * rate)))):
        heard = piece
        for start, effect in effects:
            clean = max(start - position, 0)
            if clean < heard.size:
                heard = np.concatenate([heard[:clean], effect(heard[clean:])])
        headers: Headers = (
            ("ce_specversion", b"1.0"),
            ("ce_id", f"{_rfc3339(start_time)}/{number}".encode()),
            ("ce_source", source.encode()),
            ("ce_type", AUDIO_TYPE.encode()),
            ("ce_time", _rfc3339(start_time + timedelta(seconds=position / rate)).encode()),
            ("content-type", b"audio/wav"),
        )
        yield Message(topic, source.encode(), _wav(heard, rate), headers)
        position += piece.size


def play(
    broker: Broker,
    messages: Iterable[Message],
    *,
    speed: float,
    chunk_seconds: float,
    stop: threading.Event,
    on_sent: Callable[[int], None],
    clock: Callable[[], float],
    sleep: Callable[[float], object],
) -> int:
    """Publish the chunks as they would arrive, ``speed`` times as fast; return how many were.

    A ``speed`` of 0 does not wait at all. Chunks that are already due go out together, up to
    `BATCH` of them, and ``on_sent`` is told the size of each batch once it is durable. After
    ``stop`` is set nothing more is taken; with ``stop.wait`` as the ``sleep`` that is at once.

    Raises:
        Retryable: the broker cannot be reached.
        Fatal: as `chunks` does.
    """
    interval = chunk_seconds / speed if speed else 0.0
    started = clock()
    sent = 0
    batch: list[Message] = []
    for number, message in enumerate(messages):
        ahead = started + number * interval - clock()
        if ahead > 0:
            sleep(ahead)
        if stop.is_set():
            break
        batch.append(message)
        if len(batch) == BATCH or clock() < started + (number + 1) * interval:
            sent += _publish(broker, batch, on_sent)
            batch = []
    return sent + _publish(broker, batch, on_sent)


def _publish(broker: Broker, batch: list[Message], on_sent: Callable[[int], None]) -> int:
    if batch:
        broker.publish(batch)
        on_sent(len(batch))
    return len(batch)


def _load(path: Path) -> audio.Sound:
    try:
        return audio.from_container(path.read_bytes())
    except (OSError, BadRecord) as error:
        raise Fatal(f"{path} cannot be played: {error}; expected a sound file, such as WAV, FLAC or OGG") from error


def _cut(stream: Iterable[NDArray[np.float32]], frames: int) -> Iterator[NDArray[np.float32]]:
    """Yield a stream in pieces of ``frames`` samples, and what remains at its end."""
    pending = np.empty(0, np.float32)
    for samples in stream:
        pending = np.concatenate([pending, samples])
        whole = pending.size - pending.size % frames
        for at in range(0, whole, frames):
            yield pending[at : at + frames]
        pending = pending[whole:]
    if pending.size:
        yield pending


def _effect(degradation: Degradation, rate: int, seed: Sequence[int]) -> Effect:
    if degradation.kind == "gain":
        factor = np.float32(10 ** (degradation.value / 20))
        return lambda samples: samples * factor
    if degradation.kind == "noise":
        return _Noise(degradation.value, np.random.default_rng(seed))
    if degradation.value >= rate / 2:
        raise Fatal(
            f"lowpass:{degradation.value:g} cannot be applied to {rate} samples a second; "
            f"the cut-off must be below half of that, {rate / 2:g} Hz"
        )
    return _LowPass(degradation.value, rate)


class _LowPass:
    """A causal Butterworth filter whose state goes from call to call, so that no seam is heard."""

    def __init__(self, cutoff: float, rate: int) -> None:
        self._sections = signal.butter(_LOWPASS_ORDER, cutoff, fs=rate, output="sos")
        self._state: NDArray[np.float64] | None = None

    def __call__(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._state is None:
            # As if the first sample had lasted for ever: starting from silence would be a click of its own.
            self._state = signal.sosfilt_zi(self._sections) * samples[0]
        filtered, self._state = signal.sosfilt(self._sections, samples, zi=self._state)
        return np.asarray(filtered, np.float32)


class _Noise:
    """White noise at a ratio to the mean power of the signal since the noise began."""

    def __init__(self, snr: float, random: np.random.Generator) -> None:
        self._ratio = 10 ** (-snr / 10)
        self._random = random
        self._energy = 0.0
        self._frames = 0

    def __call__(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        self._energy += float(np.square(samples, dtype=np.float64).sum())
        self._frames += samples.size
        deviation = np.float32(np.sqrt(self._ratio * self._energy / self._frames))
        return samples + deviation * self._random.standard_normal(samples.size, np.float32)


def _wav(samples: NDArray[np.float32], rate: int) -> bytes:
    """Encode as 16-bit WAV; what was 16 bits before comes out as it was, and louder than full scale is clipped."""
    integers = np.clip(np.rint(samples * 32768), -32768, 32767).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, integers, rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def _rfc3339(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
