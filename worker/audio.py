"""Sound from bytes: a value and its content type -> a mono float32 waveform at the model's rate.

This module owns every way a sound is decoded, mixed and resampled; the worker and the trainer
both come here, so that what was trained is what is served. It is pure, and it knows neither
records nor models nor files: bytes in, numbers out.

The bytes are a stranger's. What a header claims is checked against the limits before anything
is decoded, and reading is strictly forward in blocks, so that memory follows the sound that is
there and never the length that was claimed. Whatever cannot be used is a `BadRecord`.
"""

from __future__ import annotations

import io
import math
import sys
from typing import Any, Final

import msgspec
import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from worker.errors import BadRecord, Reason
from worker.wav import PlainWav, plain_wav

MIN_RATE: Final = 1_000  # slow vibration sensors; below it nothing is left of a spectrum worth calling sound
MAX_RATE: Final = 384_000  # the fastest common converters, used for bats and ultrasonic leak detection
MAX_CHANNELS: Final = 32  # large microphone arrays; a header with more is damaged or hostile
MAX_MAGNITUDE: Final = 2.0**31  # an int32 nobody scaled; far above it, power spectra overflow float32

_BLOCK_FRAMES: Final = 65_536  # about a second at the highest rates: few calls, and at most 8 MiB for MAX_CHANNELS
_UNKNOWN_FRAMES: Final = 2**63 - 1  # libsndfile's word for a stream whose header does not tell its length
_PIPED_RIFF_SIZE: Final = (
    0x7FFF_F000  # from here up, the placeholder of a writer that could not seek back (SoX, FFmpeg)
)

_CONTAINERS: Final = {
    "audio/wav": "WAV",
    "audio/wave": "WAV",
    "audio/x-wav": "WAV",
    "audio/vnd.wave": "WAV",
    "audio/flac": "FLAC",
    "audio/x-flac": "FLAC",
    "audio/ogg": "OGG",
    "application/ogg": "OGG",
}
_PCM_FORMATS: Final[dict[str, np.dtype[Any]]] = {"s16le": np.dtype("<i2"), "f32le": np.dtype("<f4")}
_L16: Final[np.dtype[Any]] = np.dtype(">i2")  # RFC 2586: network byte order
_HOW_TO_DECLARE: Final = (
    "send WAV, FLAC or OGG, or declare raw samples in the content-type header, as in "
    "audio/L16;rate=16000;channels=1 (big-endian) or audio/pcm;rate=16000;channels=1;format=s16le (or f32le)"
)


class Limits(msgspec.Struct, frozen=True):
    """How large one sound may be: ``max_bytes`` as it arrives, ``min_seconds`` to ``max_seconds`` once decoded.

    All channels together may hold as many samples as one channel of ``max_seconds`` at `MAX_RATE`.
    That bounds what a few bytes can inflate to, whatever rate and channels they claim: 23 million
    samples by default, which take less than a second, and 184 MB while they are mixed and joined.
    """

    max_bytes: int = 8 * 1024**2
    max_seconds: float = 60.0
    min_seconds: float = 0.0


UNLIMITED: Final = Limits(max_bytes=sys.maxsize, max_seconds=math.inf)


class Sound(msgspec.Struct, frozen=True, eq=False):
    """A decoded sound.

    ``samples`` is mono: one dimension, float32, never empty and always finite. Integers are
    scaled so that full scale is [-1, 1); what a float file holds beyond that is left as it is.
    ``sample_rate`` is in hertz and belongs to ``samples``; ``duration`` is in seconds, as sent.
    """

    samples: NDArray[np.float32]
    sample_rate: int
    duration: float


def waveform(data: bytes, content_type: str | None, sample_rate: int, limits: Limits) -> Sound:
    """Decode a sound and resample it to ``sample_rate``; its duration is that of the original.

    Raises:
        BadRecord: as `decode` does, or it is shorter than the limits allow.
    """
    sound = decode(data, content_type, limits)
    if sound.duration < limits.min_seconds:
        raise BadRecord(
            "too-short",
            f"{sound.duration:.6g} s of sound, expected {limits.min_seconds:g} or more: the rest of the model's window"
            " would be silence; send longer chunks, train with a shorter --window-seconds, or set --min-record-seconds",
        )
    return Sound(resample(sound.samples, sound.sample_rate, sample_rate), sample_rate, sound.duration)


def decode(data: bytes, content_type: str | None, limits: Limits) -> Sound:
    """Decode a sound at its own rate.

    WAV, FLAC and OGG are recognised by their first bytes, which must agree with the content
    type if there is one. Raw samples have to be declared.

    Raises:
        BadRecord: the bytes are not a sound that Earshot can use, or exceed a limit.
    """
    if not data:
        raise BadRecord("empty", "the value has no bytes; expected a sound")
    if len(data) > limits.max_bytes:
        raise BadRecord("too-large", f"{len(data)} bytes, the limit is {limits.max_bytes}; send shorter chunks")
    media_type, parameters = _parse_media_type(content_type or "")
    declared = (content_type or "")[:100]  # as much of it as belongs into a detail
    found = _sniff(data)
    if media_type == "audio/l16":
        return _from_pcm(data, _L16, parameters, limits)
    if media_type == "audio/pcm":
        encoding = parameters.get("format", "")
        if encoding not in _PCM_FORMATS:
            raise BadRecord("unknown-content-type", f"content-type is {declared!r}; {_HOW_TO_DECLARE}")
        return _from_pcm(data, _PCM_FORMATS[encoding], parameters, limits)
    if media_type in {"", "application/octet-stream"}:
        if found is None:
            raise BadRecord("unknown-content-type", f"undeclared bytes begin with {data[:12]!r}; {_HOW_TO_DECLARE}")
    elif media_type not in _CONTAINERS:
        raise BadRecord("unknown-content-type", f"content-type is {declared!r}; {_HOW_TO_DECLARE}")
    elif found != _CONTAINERS[media_type]:
        raise BadRecord("undecodable", f"declared as {media_type}, but the bytes begin with {data[:12]!r}")
    return from_container(data, limits)


def from_container(data: bytes, limits: Limits = UNLIMITED) -> Sound:
    """Decode a sound in any container that libsndfile reads, at its own rate.

    Raises:
        BadRecord: the container is damaged or cut off, or holds no usable sound.
    """
    missing = _missing_bytes(data)
    if missing > 0:
        raise BadRecord("undecodable", f"cut off: {missing} bytes of the container are missing after {len(data)}")
    wav = plain_wav(data)
    if wav is not None and MIN_RATE <= wav.rate <= MAX_RATE and wav.channels <= MAX_CHANNELS:
        return _from_plain_wav(wav, limits)
    try:
        with _ForwardReader(io.BytesIO(data)) as reader:
            return _read(reader, limits)
    except soundfile.LibsndfileError as error:
        # Not str(error): that has the address of the buffer in it, and a replay must give the same rejection.
        raise BadRecord("undecodable", f"libsndfile: {error.error_string}") from None


def to_mono(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Average the channels of (frames, channels) samples; one channel is passed through."""
    if samples.shape[1] == 1:
        return samples[:, 0]
    # Infinities and NaNs, signalling ones too, are for `_sound` to reject, not for a warning.
    with np.errstate(invalid="ignore", over="ignore"):
        total = samples[:, 0].astype(np.float64)  # float32 may overflow
        for channel in range(1, samples.shape[1]):
            total += samples[:, channel]
        total /= samples.shape[1]
        return total.astype(np.float32)


def resample(samples: NDArray[np.float32], from_rate: int, to_rate: int) -> NDArray[np.float32]:
    """Resample a whole waveform with soxr at its "HQ" quality, band-limited below both Nyquist rates.

    At least one sample comes back for a waveform that is not empty. Resampling chunk by chunk is
    not resampling the stream: call this with everything that belongs together.
    """
    if from_rate == to_rate:
        return samples
    resampled: NDArray[np.float32] = soxr.resample(samples, from_rate, to_rate, quality="HQ")
    return resampled if resampled.size else samples[:1]


class _ForwardReader(soundfile.SoundFile):  # type: ignore[misc]  # soundfile ships no types
    """A sound file that is read from its beginning to its end, whatever length its header claims.

    Where soundfile believes it can seek, it trusts the header's length and moves the read
    position itself after every block, which fails at the end of a FLAC stream of unknown length.
    """

    def seekable(self) -> bool:
        return False


def _read(reader: _ForwardReader, limits: Limits) -> Sound:
    rate, channels, claimed = reader.samplerate, reader.channels, reader.frames
    _check_shape(rate, channels)
    known = claimed != _UNKNOWN_FRAMES
    if known:
        _check_length(claimed, rate, channels, limits)
    blocks: list[NDArray[np.float32]] = []
    frames, last = 0, _BLOCK_FRAMES
    while last == _BLOCK_FRAMES:
        block = reader.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)
        blocks.append(to_mono(block))
        last = len(block)
        frames += last
        _check_length(frames, rate, channels, limits)
    if known and frames < claimed:
        raise BadRecord("undecodable", f"cut off: the header claims {claimed} frames, {frames} are there")
    return _sound(np.concatenate(blocks), rate)


def _from_plain_wav(wav: PlainWav, limits: Limits) -> Sound:
    _check_length(wav.frames, wav.rate, wav.channels, limits)
    return _from_stored(wav.samples(), wav.rate, wav.channels, wav.silence, wav.step)


def _from_stored(stored: NDArray[Any], rate: int, channels: int, silence: float, step: float) -> Sound:
    """Scale interleaved samples to float32 and mix them."""
    if stored.dtype.kind != "f" and stored.size:
        samples = stored.astype(np.float32)
        if silence:
            samples -= np.float32(silence)
        samples *= np.float32(step)
        return Sound(to_mono(samples.reshape(-1, channels)), rate, stored.size // channels / rate)
    # Float64 may hold what float32 does not, and a cast warns of a signalling NaN: `_sound` rejects both.
    with np.errstate(invalid="ignore", over="ignore"):
        samples = stored.astype(np.float32)
    return _sound(to_mono(samples.reshape(-1, channels)), rate)


def _from_pcm(data: bytes, dtype: np.dtype[Any], parameters: dict[str, str], limits: Limits) -> Sound:
    rate = _whole_number(parameters, "rate", "", "bad-rate")
    channels = _whole_number(parameters, "channels", "1", "bad-channels")
    _check_shape(rate, channels)
    frame_size = dtype.itemsize * channels
    if len(data) % frame_size:
        raise BadRecord("undecodable", f"{len(data)} bytes are no whole number of frames of {frame_size} bytes")
    _check_length(len(data) // frame_size, rate, channels, limits)
    step = 2.0**-15 if dtype.kind == "i" else 1.0
    return _from_stored(np.frombuffer(data, dtype), rate, channels, silence=0.0, step=step)


def _sound(samples: NDArray[np.float32], rate: int) -> Sound:
    if not samples.size:
        raise BadRecord("empty", "the container is well-formed and holds no samples")
    lowest, highest = float(samples.min()), float(samples.max())
    if not (lowest >= -MAX_MAGNITUDE and highest <= MAX_MAGNITUDE):  # so written because NaN compares false
        raise BadRecord("non-finite", f"samples reach from {lowest} to {highest}; expected numbers, at best in [-1, 1]")
    return Sound(samples, rate, samples.size / rate)


def _check_shape(rate: int, channels: int) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise BadRecord("bad-rate", f"{rate} samples a second; expected {MIN_RATE} to {MAX_RATE}")
    if not 1 <= channels <= MAX_CHANNELS:
        raise BadRecord("bad-channels", f"{channels} channels; expected 1 to {MAX_CHANNELS}")


def _check_length(frames: int, rate: int, channels: int, limits: Limits) -> None:
    if frames > limits.max_seconds * rate:
        raise BadRecord("too-long", f"{frames / rate:.1f} s or more, the limit is {limits.max_seconds:g} s")
    most = limits.max_seconds * MAX_RATE
    if frames * channels > most:
        told = f"{frames} frames of {channels} channels or more, the limit is {most:.0f} samples in all channels"
        raise BadRecord("too-long", f"{told}; send shorter chunks or fewer channels")


def _parse_media_type(text: str) -> tuple[str, dict[str, str]]:
    """Split a media type from its parameters; names and values are all case-insensitive here."""
    media_type, *pairs = text.lower().split(";")
    parameters = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        parameters[name.strip()] = value.strip().strip('"').strip()
    return media_type.strip(), parameters


def _whole_number(parameters: dict[str, str], name: str, default: str, reason: Reason) -> int:
    text = parameters.get(name, default)
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise BadRecord(reason, f"raw samples are declared with {name}={text[:20]!r}; {_HOW_TO_DECLARE}")
    return int(text)


def _sniff(data: bytes) -> str | None:
    """Return the container that the first bytes announce."""
    if data[:4] in {b"RIFF", b"RF64"} and data[8:12] == b"WAVE":
        return "WAV"
    return {b"fLaC": "FLAC", b"OggS": "OGG"}.get(data[:4])


def _missing_bytes(data: bytes) -> int:
    """Return how many bytes short of its own sizes a WAV or OGG is; libsndfile would not mention it."""
    container = _sniff(data)
    if container == "WAV":
        riff_size = int.from_bytes(data[4:8], "little")
        if data[:4] == b"RF64":
            riff_size = int.from_bytes(data[20:28], "little")  # RF64 keeps it in its first chunk, ds64
        elif riff_size >= _PIPED_RIFF_SIZE:
            return 0
        return riff_size + 8 - len(data)
    end = 0
    if container == "OGG":
        while data[end : end + 4] == b"OggS":  # page after page, RFC 3533
            segments = data[end + 26] if end + 26 < len(data) else 0
            end += 27 + segments + sum(data[end + 27 : end + 27 + segments])
    return end - len(data)
