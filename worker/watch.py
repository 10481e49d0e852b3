"""The live view: what comes out of Earshot, as a table that moves, as lines, or as JSON.

Owns how predictions, rejections and drift events are put before a reader. It must not know how a
broker is made or what the command line said. It only follows: no offset is committed, and any
number of views may be open.

Sources, labels and details come from the wire, and whoever may write there must not own the
reader's terminal. So every text is cleaned before it is shown, and none is taken for markup.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

import msgspec
from rich.console import Console
from rich.live import Live

from worker.board import Board
from worker.broker import Broker
from worker.dlq import Note, Rejection, decode
from worker.messages import (
    DRIFT_TYPE,
    PREDICTION_TYPE,
    RETRAIN_TYPE,
    Classification,
    DriftDetected,
    DriftEvent,
    Position,
    Prediction,
    Record,
    Regression,
    RetrainRequested,
    Topics,
)
from worker.text import clean, decoded, place, stamp

SIGNALS_SHOWN: Final = 3
"""Signals named for a drift event, the largest shifts first; the others are counted."""

REFRESHES: Final = 4
"""Pictures a second: drawing a large one takes 50 ms, and the sound is to have the processor."""

Style = Literal["live", "plain", "json"]


class Tally(msgspec.Struct):
    """How much was shown; a change and the request for retraining that follows are one drift event."""

    predictions: int = 0
    rejections: int = 0
    drift_events: int = 0
    unreadable: int = 0

    @property
    def heard(self) -> int:
        """Records of ``audio.in`` whose result was shown."""
        return self.predictions + self.rejections


class Unreadable(msgspec.Struct, frozen=True):
    """What is wrong with a record that is not Earshot's."""

    detail: str


Event = Prediction | DriftEvent | Rejection | Note | Unreadable


class _Seen(msgspec.Struct, frozen=True):
    """A record, what it means, and, clean, whom it is about and when that was (UTC)."""

    record: Record
    event: Event
    source: str
    time: str


_Show = Callable[[list[_Seen]], bool]
"""Shows a batch, which may be empty; False once nobody reads any more."""

_TYPES: Final[dict[type, str]] = {
    Classification: PREDICTION_TYPE,
    Regression: PREDICTION_TYPE,
    DriftDetected: DRIFT_TYPE,
    RetrainRequested: RETRAIN_TYPE,
    Rejection: "earshot.rejection",
    Note: "earshot.replayed",
    Unreadable: "earshot.unreadable",
}


def watch(
    broker: Broker,
    topics: Topics,
    *,
    style: Style,
    from_beginning: bool,
    count: int | None,
    console: Console,
    stop: threading.Event,
) -> Tally:
    """Show what the worker publishes, until told to stop.

    Args:
        broker: where to follow ``predictions.out``, ``audio.dlq`` and ``drift.events``.
        topics: their names.
        style: ``live`` draws on a terminal; ``plain`` writes a line for each event; ``json``
            writes an object a line, in ASCII: ``topic``, ``partition``, ``offset``, ``key``,
            ``type`` and ``data``.
        from_beginning: also show what is there already.
        count: end after so many predictions and rejections; None never does.
        console: where to draw; lines go to its file, which is flushed after each batch, and whose
            error handler says what becomes of a character that its encoding lacks.
        stop: ends the view within about a second. A reader who closes the pipe ends it too.

    Returns:
        How much was shown.

    Raises:
        Retryable: the broker cannot be reached.
        Fatal: access is refused, or a topic is missing.
    """
    tally = Tally()
    followed = (topics.predictions_out, topics.audio_dlq, topics.drift_events)
    with _view(style, console) as show:
        for batch in broker.follow(followed, from_beginning=from_beginning):
            if stop.is_set():
                break
            seen = list(_counted(batch, topics, tally, count))
            if not show(seen) or tally.heard == count:
                break
    return tally


def _counted(batch: list[Record], topics: Topics, tally: Tally, count: int | None) -> Iterator[_Seen]:
    """Read the records of a batch and count them, until ``count`` is reached."""
    for record in batch:
        if tally.heard == count:
            return
        seen = _read(record, topics)
        match seen.event:
            case Classification() | Regression():
                tally.predictions += 1
            case Rejection():
                tally.rejections += 1
            case DriftDetected():
                tally.drift_events += 1
            case Unreadable():
                tally.unreadable += 1
        yield seen


def _read(record: Record, topics: Topics) -> _Seen:
    event = _event(record, topics)
    match event:
        case (
            Classification(source=source, record=at)
            | Regression(source=source, record=at)
            | DriftDetected(source=source, detected=at)
            | RetrainRequested(source=source, since=at)
        ):
            time = stamp(at.time)
        case _:
            source = decoded(record.key or dict(record.headers).get("ce_source"))
            time = stamp(record.timestamp)
    return _Seen(record, event, clean(source), time)


def _event(record: Record, topics: Topics) -> Event:
    """Return what a record means; one that somebody else wrote to a topic of ours must not end the view."""
    try:
        if record.topic != topics.audio_dlq:
            kind = Prediction if record.topic == topics.predictions_out else DriftEvent
            event: Event = msgspec.json.decode(record.value or b"", type=kind)
            return event
        return decode(record)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        return Unreadable(str(error))


@contextmanager
def _view(style: Style, console: Console) -> Iterator[_Show]:
    if style == "live":
        board = Board(console)
        with Live(board.picture(), console=console, refresh_per_second=REFRESHES) as live:

            def draw(batch: list[_Seen]) -> bool:
                for seen in batch:
                    _take(board, seen)
                live.update(board.picture())
                return True

            yield draw
    else:
        line = _plain_line if style == "plain" else _json_line
        yield lambda batch: _write(console, "".join(f"{line(seen)}\n" for seen in batch))


def _take(board: Board, seen: _Seen) -> None:
    event, source, time = seen.event, seen.source, seen.time
    _, words = _described(event)
    match event:
        case Classification():
            board.classified(source, time, clean(event.label), event.confidence)
        case Regression():
            board.measured(source, time, f"{_measured(event)} {clean(event.target)}")
        case Rejection():
            board.rejected(source, time, " ".join(words.split()))
        case DriftDetected():
            board.changed(source, event.since, words)
        case RetrainRequested():
            board.requested(source, event.since, f"changed {_since(event.since)}")
        case Note():
            pass  # its copy comes with a prediction or a rejection of its own
        case Unreadable():
            board.unreadable(f"{_place(seen.record)}: {words}")


def _write(console: Console, text: str) -> bool:
    try:
        console.file.write(text)
        console.file.flush()
    except BrokenPipeError:
        # What is left in the buffer must go somewhere, or Python complains about it when it exits.
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), console.file.fileno())
        return False
    return True


def _json_line(seen: _Seen) -> str:
    record = seen.record
    # The standard library's encoder, for its ASCII: neither a terminal nor a locale can trip over it.
    return json.dumps(
        {
            "topic": record.topic,
            "partition": record.partition,
            "offset": record.offset,
            "key": None if record.key is None else decoded(record.key),
            "type": _TYPES[type(seen.event)],
            "data": msgspec.to_builtins(seen.event),
        }
    )


def _plain_line(seen: _Seen) -> str:
    kind, words = _described(seen.event)
    return f"{seen.time:19}  {kind:10}  {_place(seen.record):22}  {seen.source or '-':16}  {words}"


def _described(event: Event) -> tuple[str, str]:
    """Return the kind of an event in one word, and the event in words."""
    match event:
        case Classification() | Regression():
            return "prediction", _heard(event)
        case Rejection():
            return "rejection", f"{clean(event.reason):20}  {_place(event)}: {clean(event.detail)}"
        case DriftDetected():
            return "drift", f"changed {_since(event.since)}: {_shifts(event)} (training standard deviations)"
        case RetrainRequested():
            return "retrain", f"retraining requested for the change {_since(event.since)}"
        case Note():
            return "replay", f"{_place(event)} was sent back"
        case Unreadable():
            return "unreadable", clean(event.detail)


def _shifts(drift: DriftDetected) -> str:
    words = [
        f"{clean(shift.signal.removeprefix('feature.'))} {shift.before:.1f} -> {shift.after:.1f}"
        for shift in drift.signals[:SIGNALS_SHOWN]
    ]
    if more := len(drift.signals) - len(words):
        words.append(f"{more} more")
    return ", ".join(words)


def _since(since: Position) -> str:
    return f"at offset {since.offset} ({stamp(since.time)})"


def _heard(prediction: Prediction) -> str:
    if isinstance(prediction, Classification):
        return f"{clean(prediction.label):20}  {prediction.confidence:.2f}"
    return f"{clean(prediction.target):20}  {_measured(prediction)}"


def _measured(regression: Regression) -> str:
    return f"{regression.value:.4g} ({regression.low:.4g} to {regression.high:.4g})"


def _place(at: Record | Rejection | Note) -> str:
    return place(at.topic, at.partition, at.offset)
