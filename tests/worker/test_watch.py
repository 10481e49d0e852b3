"""The live view: what a reader gets to see, and what a hostile record cannot do to the reader."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from worker.broker import Session
from worker.broker_sqlite import SqliteBroker
from worker.errors import BadRecord
from worker.messages import (
    Classification,
    DriftDetected,
    Message,
    ModelId,
    Prediction,
    Record,
    Regression,
    SignalShift,
    Topics,
    TopicSpec,
    drift_messages,
    position,
    prediction_message,
    rejection_message,
)
from worker.watch import Style, Tally, watch

TOPICS = Topics()
MODEL = ModelId("demo", "1", "ab" * 32)
START = 1_795_334_400_000  # 2026-11-22 08:00:00 UTC


class FakeBroker:
    """Yields prepared batches, then idles until its reader stops."""

    def __init__(self, *batches: list[Record], idle: threading.Event | None = None) -> None:
        self._batches = batches
        self._idle = idle
        self.followed: list[tuple[tuple[str, ...], bool]] = []

    def follow(self, topics: Sequence[str], *, from_beginning: bool) -> Iterator[list[Record]]:
        self.followed.append((tuple(topics), from_beginning))
        yield from self._batches
        if self._idle is not None:
            self._idle.set()
            while True:
                yield []

    def create_topics(self, specs: Sequence[TopicSpec]) -> list[str]:
        raise NotImplementedError

    def join(self, group: str, instance: str) -> Session:
        raise NotImplementedError

    def publish(self, messages: Iterable[Message]) -> None:
        raise NotImplementedError

    def read(self, topics: Sequence[str]) -> Iterator[list[Record]]:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class AfterABatch(threading.Event):
    """An event that is set when it is asked for the second time."""

    def __init__(self) -> None:
        super().__init__()
        self._asked = 0

    def is_set(self) -> bool:
        self._asked += 1
        return self._asked > 1


def heard(source: str, offset: int) -> Record:
    return Record(TOPICS.audio_in, 0, offset, START + offset * 1000, source.encode(errors="replace"), b"sound")


def stored(message: Message, offset: int = 0) -> Record:
    assert message.timestamp is not None
    return Record(message.topic, 0, offset, message.timestamp, message.key, message.value, message.headers)


def published(record: Record, prediction: Prediction) -> Record:
    return stored(prediction_message(TOPICS, record, prediction), record.offset)


def classified(source: str, offset: int, label: str = "rain", confidence: float = 0.93) -> Record:
    record = heard(source, offset)
    place = position(record, record.timestamp)
    return published(record, Classification(source, label, confidence, {label: 1.0}, 1.0, 1, False, place, MODEL))


def measured(source: str, offset: int) -> Record:
    record = heard(source, offset)
    place = position(record, record.timestamp)
    return published(record, Regression(source, "midi_pitch", 61.234, 60.1, 62.4, 0.84, 1.0, 1, False, place, MODEL))


def rejected(source: str, offset: int, detail: str = "no RIFF header") -> Record:
    return stored(rejection_message(TOPICS, heard(source, offset), BadRecord("undecodable", detail)), offset)


def drifted(source: str, offset: int) -> list[Record]:
    record = heard(source, offset)
    place = position(record, record.timestamp)
    names = ("feature.centroid.mean", "confidence", "share.rain", "feature.rms.mean")
    shifts = tuple(SignalShift(name, 0.1, number - 4.2) for number, name in enumerate(names))
    drift = DriftDetected(source, shifts, place, place, MODEL)
    return [stored(message, number) for number, message in enumerate(drift_messages(TOPICS, record, drift))]


def shown(style: Style, records: list[Record], width: int = 80, height: int = 24) -> tuple[str, Tally]:
    """Return what the last picture, or all lines, held, and the tally."""
    file = io.StringIO()
    console = Console(file=file, width=width, height=height, force_terminal=style == "live", record=True)
    tally = watch(
        FakeBroker(records),
        TOPICS,
        style=style,
        from_beginning=True,
        count=None,
        console=console,
        stop=threading.Event(),
    )
    if style != "live":
        return file.getvalue(), tally
    frames = console.export_text()
    return frames[frames.rindex("predictions ") :], tally


def line_of(text: str, word: str) -> str:
    return next(line for line in text.splitlines() if word in line)


def test_live_row() -> None:
    """A source has one row: how often it was heard, what last, how surely, its rejections, when, and its changes."""
    records = [classified("mic-1", 0, "dog"), classified("mic-1", 1), rejected("mic-1", 2), *drifted("mic-1", 2)]

    picture, tally = shown("live", records)

    assert ["mic-1", "2", "rain", "0.93", "━━━━━", "1", "08:00:02", "▲", "1"] == line_of(picture, "mic-1 ").split()
    assert "predictions 2, rejections 1, drift events 1, sources 1" == picture.splitlines()[0].rstrip()
    assert Tally(predictions=2, rejections=1, drift_events=1) == tally


def test_live_regression() -> None:
    """A regressor's row shows the value, its interval and, as far as it fits, the name of the target."""
    picture, _ = shown("live", [measured("mic-2", 0)], width=140)

    assert "61.23 (60.1 to 62.4) mi" in line_of(picture, "mic-2")


def test_live_drift_in_words() -> None:
    """A drift event says which source changed, since when, which signals by how much, and what follows."""
    picture, _ = shown("live", [classified("mic-1", 0), *drifted("mic-1", 240)])

    words = " ".join(picture.replace("│", " ").split())
    assert (
        "mic-1 changed at offset 240 (2026-11-22 08:04:00): centroid.mean 0.1 -> -4.2, confidence 0.1 -> -3.2, "
        "share.rain 0.1 -> -2.2, 1 more (training standard deviations); retraining requested"
    ) in words


def test_live_request_without_its_change() -> None:
    """A view that began between a change and its request for retraining shows the request."""
    _, request = drifted("mic-1", 240)

    picture, tally = shown("live", [request])

    assert "mic-1 changed at offset 240 (2026-11-22 08:04:00); retraining requested" in picture
    assert Tally() == tally


@pytest.mark.parametrize("width", [30, 40, 60, 80, 119, 120, 140, 200])
def test_live_fits_any_width(width: int) -> None:
    """No line is wider than the terminal, and the columns of all rows start below their headings."""
    records = [classified("mic-1", 0), measured("a source with a name too long for its column", 1), *drifted("x", 2)]

    picture, _ = shown("live", records, width=width)

    lines = picture.splitlines()
    heading, *_ = (line for line in lines if "source " in line)
    assert width >= max(map(cell_len, lines))
    assert heading.index("last") == line_of(picture, "mic-1").index("rain")
    assert "0.93" in line_of(picture, "mic-1")


@pytest.mark.parametrize("height", [16, 24, 50])
def test_live_many_sources(height: int) -> None:
    """The most recently heard sources that fit are shown, and the others are counted."""
    records = [classified(f"mic-{number:02}", number) for number in range(60)]
    records += [classified("mic-03", 60), rejected("mic-03", 61), *drifted("mic-03", 62), *drifted("mic-03", 63)]

    picture, _ = shown("live", records, height=height)

    rows = [line.split()[0] for line in picture.splitlines() if line.startswith("mic-")]
    assert height > len(picture.rstrip("\n").splitlines())
    assert ["mic-03", *(f"mic-{number:02}" for number in range(61 - len(rows), 60))] == rows
    assert f"{60 - len(rows)} more, heard less recently" in picture


def test_live_label_shares() -> None:
    """A wide terminal has room for the shares of the most frequent labels."""
    labels = ["rain"] * 6 + ["dog"] * 3 + ["siren"]

    picture, _ = shown("live", [classified("mic-1", n, label) for n, label in enumerate(labels)], width=140)

    assert "rain 60%, dog 30%, siren 10%" in picture


def test_plain_lines() -> None:
    """Each event is one line whose columns are aligned with those of the others."""
    records = [classified("mic-1", 0), measured("mic-2", 1), rejected("mic-3", 2), *drifted("mic-1", 240)]

    text, _ = shown("plain", records)

    lines = text.splitlines()
    assert ["mic-1", "mic-2", "mic-3", "mic-1", "mic-1"] == [line[57:].split()[0] for line in lines]
    assert (
        "2026-11-22 08:00:00  prediction  predictions.out/0/0     mic-1             rain                  0.93"
        == lines[0]
    )
    assert lines[1].endswith("  midi_pitch            61.23 (60.1 to 62.4)")
    assert lines[2].endswith("  undecodable           audio.in/0/2: no RIFF header")
    assert "changed at offset 240 (2026-11-22 08:04:00): centroid.mean 0.1 -> -4.2, " in lines[3]
    assert lines[4].endswith("  retraining requested for the change at offset 240 (2026-11-22 08:04:00)")


def test_json_lines() -> None:
    """Each event is one object: where it stands, what it is, and its value as it is on the wire."""
    drift, request = drifted("mic-1", 240)
    records = [classified("mic-1", 7), measured("mic-2", 1), drift, request]

    text, _ = shown("json", records)

    objects = [json.loads(line) for line in text.splitlines()]
    assert [msgspec.json.decode(record.value or b"") for record in records] == [each["data"] for each in objects]
    assert [dict(record.headers)["ce_type"].decode() for record in records] == [each["type"] for each in objects]
    assert ("predictions.out", 0, 7, "mic-1") == tuple(
        objects[0][name] for name in ("topic", "partition", "offset", "key")
    )


def test_json_rejection() -> None:
    """A rejection's data is the reason and where the rejected record stood."""
    text, _ = shown("json", [rejected("mic-1", 5)])

    expected = {
        "topic": "audio.dlq",
        "partition": 0,
        "offset": 5,
        "key": "mic-1",
        "type": "earshot.rejection",
        "data": {
            "reason": "undecodable",
            "detail": "no RIFF header",
            "topic": "audio.in",
            "partition": 0,
            "offset": 5,
            "timestamp": START + 5000,
        },
    }
    assert expected == json.loads(text)


FOREIGN = [
    Record(TOPICS.predictions_out, 3, 17, START, b"k", None),
    Record(TOPICS.predictions_out, 3, 17, START, b"k", b"hello"),
    Record(TOPICS.predictions_out, 3, 17, START, b"k", b'{"task": "classification", "source": "\xff"}'),
    Record(TOPICS.predictions_out, 3, 17, START, b"k", b'{"task": "classification", "x": ' + b"[" * 100_000),
    Record(TOPICS.drift_events, 3, 17, 2**63 - 1, b"\xff", b'{"event": "party"}'),
    Record(TOPICS.audio_dlq, 3, 17, START, None, b"", (("earshot_reason", b"\xff"),)),
    Record(
        TOPICS.audio_dlq,
        3,
        17,
        -(2**63),
        None,
        b"",
        tuple((f"earshot_{x}", b"x") for x in ("reason", "detail", "topic", "partition", "offset")),
    ),
]


@pytest.mark.parametrize("record", FOREIGN)
@pytest.mark.parametrize("style", ["live", "plain", "json"])
def test_unreadable(style: Style, record: Record) -> None:
    """Somebody else's record on a topic is shown as unreadable with its place, and the view goes on."""
    text, tally = shown(style, [record, classified("mic-1", 0)])

    assert Tally(predictions=1, unreadable=1) == tally
    assert "mic-1" in text
    if style == "json":
        found = json.loads(text.splitlines()[0])
        assert (record.topic, 3, 17, "earshot.unreadable") == (
            found["topic"],
            found["partition"],
            found["offset"],
            found["type"],
        )
    else:
        assert f"{record.topic}/3/17" in line_of(text, "unreadable")


def test_rejection_of_an_impossible_time() -> None:
    """A rejected record whose timestamp is no date is shown like any other."""
    text, tally = shown("plain", [msgspec.structs.replace(rejected("mic-1", 5), timestamp=2**63 - 1)])

    assert text.startswith("?  ")
    assert Tally(rejections=1) == tally


@pytest.mark.parametrize("style", ["live", "plain", "json"])
def test_hostile_text(style: Style) -> None:
    """Terminal escapes, line breaks and markup in a source, a label or a detail are only text."""
    evil = "\x1b[31m[red]x\r\n\x9b2J\u202e[/red]"
    console = Console(file=io.StringIO(), width=200, height=24, force_terminal=style == "live", color_system=None)
    records = [classified(evil, 0, evil), rejected(evil, 1, evil), *drifted(evil, 2)]

    watch(
        FakeBroker(records),
        TOPICS,
        style=style,
        from_beginning=True,
        count=None,
        console=console,
        stop=threading.Event(),
    )

    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "[31m[red]x" in text
    assert "\x1b[31m" not in text
    assert not set("\x9b\u202e") & set(text)
    if style != "live":
        assert len(records) == len(text.splitlines())
        assert "\x1b" not in text


@pytest.mark.parametrize("style", ["live", "plain"])
def test_terminal_without_unicode(style: Style) -> None:
    """Where the encoding is ASCII, the picture is drawn in ASCII, and only what the wire brings is replaced."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", errors="replace")
    console = Console(file=file, width=140, height=24, force_terminal=style == "live", color_system=None)
    records = [classified("mic-1", 0), classified("mic-\N{GREEK SMALL LETTER MU}", 1), *drifted("mic-1", 2)]

    watch(
        FakeBroker(records),
        TOPICS,
        style=style,
        from_beginning=True,
        count=None,
        console=console,
        stop=threading.Event(),
    )

    file.flush()
    _, _, text = raw.getvalue().decode("ascii").rpartition("predictions ")  # the last picture, or all lines
    assert "mic-?" in text
    assert "?" not in text.replace("mic-?", "").replace("\x1b[?25h", "")  # which shows the cursor
    if style == "live":
        assert "0.93 ---------" in line_of(text, "mic-1 ")
        assert "! 1" in line_of(text, "mic-1 ")


@given(st.text(), st.text())
def test_any_text_is_one_line(source: str, label: str) -> None:
    """Whatever a source and a label are, a prediction is one printable line."""
    source, label = (text.encode(errors="replace").decode() for text in (source, label))

    text, _ = shown("plain", [classified(source, 0, label)])

    assert 1 == text.count("\n")
    assert text[:-1].isprintable()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_count(count: int) -> None:
    """The view ends after so many predictions and rejections, within a batch too; drift events are not counted."""
    records = [
        *drifted("mic-1", 0),
        classified("mic-1", 1),
        rejected("mic-1", 2),
        classified("mic-1", 3),
        measured("m", 4),
    ]
    broker = FakeBroker(records, idle=threading.Event())
    console = Console(file=io.StringIO())

    tally = watch(
        broker, TOPICS, style="plain", from_beginning=True, count=count, console=console, stop=threading.Event()
    )

    assert count == tally.predictions + tally.rejections
    assert [(("predictions.out", "audio.dlq", "drift.events"), True)] == broker.followed


@pytest.mark.parametrize("style", ["live", "plain", "json"])
def test_stop(style: Style) -> None:
    """An idle view ends when it is told to, and keeps what it has shown."""
    stop = threading.Event()
    console = Console(file=io.StringIO(), force_terminal=style == "live")
    broker = FakeBroker([classified("mic-1", 0)], idle=stop)  # being idle is what stops it

    tally = watch(broker, TOPICS, style=style, from_beginning=False, count=None, console=console, stop=stop)

    assert Tally(predictions=1) == tally


@pytest.mark.parametrize("style", ["plain", "json"])
def test_closed_pipe(style: Style) -> None:
    """A reader that has gone, as in ``| head``, ends the view quietly, and nothing complains at exit."""
    read, write = os.pipe()
    os.close(read)
    broker = FakeBroker([classified("mic-1", 0)], idle=threading.Event())
    with open(write, "w", encoding="utf-8") as file:  # noqa: PTH123 - it is a descriptor
        console = Console(file=file)

        tally = watch(
            broker, TOPICS, style=style, from_beginning=True, count=None, console=console, stop=threading.Event()
        )

    assert Tally(predictions=1) == tally


def test_sqlite_broker(tmp_path: Path) -> None:
    """What is written to the embedded broker is seen, with its real offsets."""
    broker = SqliteBroker(tmp_path / "earshot.db", TOPICS)
    broker.create_topics(TOPICS.layout(1))
    records = [classified("mic-1", 0), *drifted("mic-1", 0), rejected("mic-1", 1), classified("mic-1", 2)]
    broker.publish(
        Message(record.topic, record.key, record.value, record.headers, timestamp=record.timestamp)
        for record in records
    )
    console = Console(file=io.StringIO())

    tally = watch(broker, TOPICS, style="json", from_beginning=True, count=None, console=console, stop=AfterABatch())

    broker.close()
    assert isinstance(console.file, io.StringIO)
    found = [json.loads(line) for line in console.file.getvalue().splitlines()]
    assert Tally(predictions=2, rejections=1, drift_events=1) == tally
    assert {
        ("predictions.out", 0),
        ("predictions.out", 1),
        ("audio.dlq", 0),
        ("drift.events", 0),
        ("drift.events", 1),
    } == {(each["topic"], each["offset"]) for each in found}
