"""Text from the wire, made fit for a terminal.

Whoever may write to a topic must not own the terminal of a reader: this module owns what becomes
of their bytes before anybody sees them. It knows neither a message nor a layout.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

from worker.messages import instant

TEXT_LIMIT: Final = 200
"""Characters shown of one text from the wire: a detail fits, a flood does not."""


def decoded(raw: bytes | None) -> str:
    """Return bytes as text, with escapes for what is not UTF-8; not yet clean."""
    return (raw or b"").decode(errors="backslashreplace")


def clean(text: str) -> str:
    """Return a text on one line and not too long, with nothing in it that moves or colours a terminal."""
    cut = text if len(text) <= TEXT_LIMIT else f"{text[:TEXT_LIMIT]}…"
    line = " ".join(cut.split())
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)


def stamp(time: datetime | int) -> str:
    """Return a time (aware, in UTC; or in milliseconds since the epoch) to the second; ``?`` where there is no date."""
    try:
        return f"{time if isinstance(time, datetime) else instant(time):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError):  # a producer may claim any 64 bits
        return "?"


def place(topic: str, partition: int, offset: int) -> str:
    """Return where a record stands, clean."""
    return f"{clean(topic)}/{partition}/{offset}"
