"""Ordinary WAVs: from bytes to where the samples are and how they are stored, with nothing decoded.

Owns the walk over the chunks of a RIFF file, and what of it is ordinary; it must not know limits,
how channels are mixed, or what becomes of a WAV that is not ordinary: that is for libsndfile to say.
"""

from __future__ import annotations

import struct
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

_ENCODINGS: Final[dict[tuple[int, int], tuple[np.dtype[Any], float, float]]] = {
    (1, 8): (np.dtype("u1"), 128.0, 2.0**-7),
    (1, 16): (np.dtype("<i2"), 0.0, 2.0**-15),
    (1, 24): (np.dtype("<i4"), 0.0, 2.0**-31),  # once `_widened`
    (1, 32): (np.dtype("<i4"), 0.0, 2.0**-31),
    (3, 32): (np.dtype("<f4"), 0.0, 1.0),
    (3, 64): (np.dtype("<f8"), 0.0, 1.0),
}
"""By format tag and bits: how samples are stored, what silence is, and what one step is of full scale."""

_CHUNK: Final = struct.Struct("<4sI")  # of a WAV: its name, and how many bytes follow
_FORMAT: Final = struct.Struct("<HHIIHH")  # tag, channels, rate, bytes a second, bytes a frame, bits a sample
_EXTENSIBLE: Final = 0xFFFE
_SUBFORMAT: Final = bytes.fromhex("000000001000800000aa00389b71")
"""What follows the format tag in the identifier of an extensible WAV's encoding."""

_OTHER_CODECS: Final = frozenset({b"OggS", b"wvpk"})  # where samples should begin


class PlainWav(NamedTuple):
    """The samples of a WAV as they are stored, interleaved, and what it takes to read them."""

    stored: memoryview
    encoding: tuple[int, int]
    rate: int
    channels: int
    frames: int

    @property
    def silence(self) -> float:
        """What a sample of silence is stored as."""
        return _ENCODINGS[self.encoding][1]

    @property
    def step(self) -> float:
        """The share of full scale that 1 is."""
        return _ENCODINGS[self.encoding][2]

    def samples(self) -> NDArray[Any]:
        """Return the samples, of shape (frames * channels,), as the numbers that are stored."""
        dtype = _ENCODINGS[self.encoding][0]
        return _widened(self.stored) if self.encoding[1] == 24 else np.frombuffer(self.stored, dtype)


def plain_wav(data: bytes) -> PlainWav | None:
    """Find the samples of an ordinary WAV; what is not ordinary in any way is None, and a case for libsndfile.

    Ordinary is one format, integers or floats of whole bytes; then one stretch of samples; and
    besides them nothing but remarks. A data chunk that claims more than there is was written into
    a pipe, and ends with the bytes.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return None
    shape: tuple[tuple[int, int], int, int, int] | None = None
    found: PlainWav | None = None
    position = 12
    while position < len(data):
        if len(data) - position < 8:
            return None
        name, size = _CHUNK.unpack_from(data, position)
        start = position + 8
        left = len(data) - start
        if name == b"data" and shape is not None and found is None:
            if size == 0 or data[start : start + 4] in _OTHER_CODECS:
                return None  # nothing, or all that follows, or another codec in disguise: libsndfile knows
            size = min(size, left)
            encoding, rate, channels, frame_size = shape
            frames = size // frame_size
            found = PlainWav(memoryview(data)[start : start + frames * frame_size], encoding, rate, channels, frames)
        elif name == b"fmt " and shape is None and 16 <= size <= left:
            shape = _format(data[start : start + size])
            if shape is None:
                return None
        elif size > left or not _is_remark(name, data[start : start + size], shape[2] if shape else 0):
            return None
        position = start + size + size % 2  # chunks start at even positions
    return found


def _is_remark(name: bytes, body: bytes, channels: int) -> bool:
    """Whether a chunk changes nothing of the samples, and is as it should be: libsndfile minds if it is not.

    These are the ones that encoders write: padding, the number of samples, where each channel is loudest (once
    the channels are known), and texts on who made them.
    """
    if name == b"LIST" and body[:4] == b"INFO":
        position = 4
        while len(body) - position >= 8:
            text, size = _CHUNK.unpack_from(body, position)
            if not (text.isalnum() and text[:1] == b"I"):
                return False
            position += 8 + size + size % 2
        return position == len(body)
    if name == b"PEAK":
        return channels > 0 and len(body) == 8 + 8 * channels
    return name == b"JUNK" or (name == b"fact" and len(body) == 4)


def _format(chunk: bytes) -> tuple[tuple[int, int], int, int, int] | None:
    """Return encoding, rate, channels and the bytes of a frame, if they are known and fit each other."""
    tag, channels, rate, _, frame_size, bits = _FORMAT.unpack_from(chunk)
    if tag == _EXTENSIBLE:
        if len(chunk) != 40 or chunk[26:] != _SUBFORMAT or int.from_bytes(chunk[18:20], "little") != bits:
            return None
        tag = int.from_bytes(chunk[24:26], "little")
    fits = (tag, bits) in _ENCODINGS and channels > 0 and frame_size == channels * bits // 8
    return ((tag, bits), rate, channels, frame_size) if fits else None


def _widened(stored: memoryview) -> NDArray[np.int32]:
    """Return samples of 24 bits as the upper three quarters of 32."""
    # Four bytes from every third one on, the lowest of which belongs to the sample before.
    overlapping = np.ndarray(len(stored) // 3, np.dtype("<i4"), b"\0" + stored, strides=(3,))
    return overlapping & ~0xFF
