"""What is done to the copies of clips that a model is trained on, as data and as a user writes it.

This module owns the settings of an augmentation and what they may be. It must not know how any of it
is done.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from trainer.layouts import finite_number
from worker.errors import Fatal

Range = tuple[float, float]
"""The least and the most; what lies between is drawn evenly."""

RANGES: Final[dict[str, Range]] = {
    "stretch": (0.25, 4.0),
    "pitch": (-24.0, 24.0),
    "noise": (-20.0, 100.0),
    "highpass": (1.0, 100_000.0),
    "lowpass": (1.0, 100_000.0),
    "gain": (-100.0, 60.0),
}
"""What ranges may be within: beyond that nothing of a clip is left, or nothing is changed."""

KINDS: Final = ("stretch", "pitch", "shift", *("noise", "highpass", "lowpass", "gain"), "codec")

MOST_COPIES: Final = 100

CODECS: Final = {
    "vorbis": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "ulaw": ("WAV", "ULAW"),
    "gsm": ("WAV", "GSM610"),
}
"""Container and encoding, by the name on the command line; the last two are telephones'."""

EXAMPLE: Final = "noise=10:30,gain=-12:0,shift=0.2,codec=mp3+gsm,copies=2"


class Augmentation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is done to each of the ``copies`` of a clip, in this order; what is None is left out.

    ``stretch`` is the factor of the tempo at the same pitch, ``pitch`` a shift in semitones at the same tempo,
    ``shift`` by how much of its length a clip is rolled, either way, at most. ``noise`` is the signal-to-noise
    ratio of white noise in dB, ``highpass`` and ``lowpass`` are cut-off frequencies in Hz of filters that fall by
    12 to 24 dB per octave, ``gain`` is in dB. ``codec`` are names of `CODECS`, of which each copy passes one.
    """

    copies: int = 1
    stretch: Range | None = None
    pitch: Range | None = None
    shift: float | None = None
    noise: Range | None = None
    highpass: Range | None = None
    lowpass: Range | None = None
    gain: Range | None = None
    codec: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ranges = [(name, getattr(self, name)) for name in RANGES if getattr(self, name) is not None]
        for name, (low, high) in ranges:
            if not RANGES[name][0] <= low <= high <= RANGES[name][1]:
                least, most = RANGES[name]
                raise ValueError(f"{name} is {low:g} to {high:g}; expected a range within {least:g} to {most:g}")
        for setting, holds, expected in (
            ("copies", 1 <= self.copies <= MOST_COPIES, f"1 to {MOST_COPIES}"),
            ("shift", self.shift is None or 0 < self.shift <= 1, "more than 0, up to 1, the whole clip"),
            ("codec", set(self.codec) <= CODECS.keys(), f"some of {', '.join(CODECS)}, joined by +"),
        ):
            if not holds:
                raise ValueError(f"{setting} is {getattr(self, setting)!r}; expected {expected}")
        if not ranges and self.shift is None and not self.codec:
            raise ValueError(f"copies that nothing is done to; expected some of {', '.join(KINDS)}")


def read_augmentation(text: str) -> Augmentation:
    """Return what a user has written, as in `EXAMPLE`.

    A single number stands for a range from itself to itself.

    Raises:
        Fatal: a name or a value is none that is known.
    """
    settings: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = (each.strip() for each in part.partition("="))
        if name in settings:
            raise Fatal(f"--augment says twice what {name} is: {text!r}")
        try:
            settings[name] = _setting(name, value)
        except ValueError:
            raise Fatal(
                f"--augment has {part.strip()!r}; expected some of {', '.join(KINDS)} and copies, as in {EXAMPLE}"
            ) from None
    try:
        return Augmentation(**settings)
    except ValueError as error:
        raise Fatal(f"--augment: {error}") from error


def _setting(name: str, value: str) -> Any:
    """Return what is written as the value of a setting; ValueError: it cannot be one."""
    if name == "codec":
        return tuple(value.split("+"))
    if name == "copies":
        return int(value)
    numbers = [finite_number(each) for each in value.split(":")]
    if None in numbers or name not in KINDS or len(numbers) > (1 if name == "shift" else 2):
        raise ValueError
    return numbers[0] if name == "shift" else (numbers[0], numbers[-1])
