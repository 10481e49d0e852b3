"""Dead letters: what was rejected and why, and how it goes back to the topic it came from.

Owns the meaning of a record of ``audio.dlq``, what ``dlq list`` shows and what ``dlq replay``
sends. It must not know how a broker is made or what the command line said.

``audio.dlq`` holds two kinds of records. A *rejection* is a record of ``audio.in`` as it was, with
the reason beside its headers. A *note* says that one was sent back: a header ``earshot_replayed``
that names the rejected record, and neither reason nor value. The copy on ``audio.in`` carries the
same header, so that a copy that is rejected as well shows of what it is a copy.

Each rejected record is sent back once, whatever is killed and however often it is tried:

1. Join under one name, which fences a replay that is still under way: it can commit no more, and
   what it has committed can be read.
2. Read the notes, to the end of the topic as of then.
3. Read the rejections, and send the copies of those without a note, in batches; a batch and its
   notes commit in one transaction.

A note stands behind its rejection in the same partition, so it is kept at least as long.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from threading import Event
from typing import Any, Final

import msgspec

from worker.broker import Broker, Session
from worker.messages import Headers, Message, Record, Topics
from worker.text import clean, decoded, place, stamp

OURS: Final = "earshot_"
"""What the names of the headers begin with that Earshot adds, and takes away from what it sends back."""

REPLAYED: Final = "earshot_replayed"

GROUP: Final = "audio.dlq"
INSTANCE: Final = "replay"
"""The one name under which every replay joins: there is at most one at a time."""

SOURCES_SHOWN: Final = 3
"""Sources named for a reason; the others are counted."""


class Rejection(msgspec.Struct, frozen=True):
    """Why a record was rejected, and where and when (milliseconds since the epoch) it stood in its topic."""

    reason: str
    detail: str
    topic: str
    partition: int
    offset: int
    timestamp: int


class Note(msgspec.Struct, frozen=True):
    """Which rejected record was sent back."""

    topic: str
    partition: int
    offset: int


class DeadLetter(msgspec.Struct, frozen=True):
    """A rejection, the record of ``audio.dlq`` that holds it, and what has become of it.

    ``copy_of`` is where the record stood that was sent back and came here once more; else None.
    """

    record: Record
    why: Rejection
    source: str
    sent_back: bool
    copy_of: str | None


class Selection(msgspec.Struct, frozen=True):
    """Which dead letters are meant; None is any."""

    reason: str | None = None
    source: str | None = None

    def takes(self, letter: DeadLetter) -> bool:
        """Say whether a dead letter is one of them."""
        return self.reason in (None, letter.why.reason) and self.source in (None, letter.source)


class Tally(msgspec.Struct):
    """What a replay did: committed copies by reason, and what it left where it is."""

    sent: Counter[str] = msgspec.field(default_factory=Counter)
    sent_before: int = 0
    foreign: int = 0
    """Rejections of records of another topic than this system's ``audio.in``."""


def decode(record: Record) -> Rejection | Note:
    """Read one record of ``audio.dlq``.

    Raises:
        ValueError: it is not Earshot's; the text says why.
    """
    headers = {name: decoded(value) for name, value in record.headers if name.startswith(OURS)}
    if REPLAYED in headers and "earshot_reason" not in headers:
        topic, partition, offset = headers[REPLAYED].rsplit("/", 2)
        return Note(topic, int(partition), int(offset))
    try:
        return Rejection(
            headers["earshot_reason"],
            headers["earshot_detail"],
            headers["earshot_topic"],
            int(headers["earshot_partition"]),
            int(headers["earshot_offset"]),
            int(headers["earshot_timestamp"]),
        )
    except KeyError as error:
        raise ValueError(f"there is no header {error.args[0]}") from None


def letters(
    broker: Broker, topics: Topics, selection: Selection, sent_back: set[Note] | None = None
) -> Iterator[list[DeadLetter]]:
    """Yield the selected dead letters, batch by batch, to the end of ``audio.dlq`` as of this call.

    Args:
        broker: where to read.
        topics: their names.
        selection: which are meant.
        sent_back: what was sent back, for who has read the notes already.

    Raises:
        Retryable: the broker cannot be reached.
        Fatal: access is refused, or there is no such topic.
    """
    done = notes(broker, topics) if sent_back is None else sent_back
    for batch in broker.read([topics.audio_dlq]):
        found = (_letter(record, done) for record in batch)
        yield [letter for letter in found if letter is not None and selection.takes(letter)]


def notes(broker: Broker, topics: Topics) -> set[Note]:
    """Return what was sent back, by all notes up to the end of ``audio.dlq``."""
    events = (_decoded(record) for batch in broker.read([topics.audio_dlq]) for record in batch)
    return {event for event in events if isinstance(event, Note)}


def table(found: Iterable[DeadLetter]) -> Iterator[str]:
    """Yield dead letters by reason, a line each: how many, since when, of whom, and one example."""
    rows: dict[str, _Row] = {}
    for letter in found:
        rows.setdefault(clean(letter.why.reason), _Row(letter)).add(letter)
    if not rows:
        yield "there are no dead letters"
        return
    width = max(map(len, (*rows, "reason")))
    moment = f"{'first':19}  {'last':19}"
    yield f"{'reason':{width}}  records  sent back  rejected again  {moment}  sources; an example"
    for reason, row in sorted(rows.items(), key=lambda each: -each[1].records):
        counts = f"{row.records:7}  {row.sent_back:9}  {row.again:14}"
        example = f"{_origin(row.example)}: {clean(row.example.why.detail)}"
        yield f"{reason:{width}}  {counts}  {stamp(row.first):19}  {stamp(row.last):19}  {row.names()}; {example}"


def line(letter: DeadLetter) -> str:
    """Return one dead letter on one line."""
    fate = "sent back" if letter.sent_back else "waiting"
    copy = f" (a copy of {clean(letter.copy_of)})" if letter.copy_of else ""
    return (
        f"{stamp(letter.why.timestamp):19}  {_origin(letter):22}  {clean(letter.source) or '-':16}  "
        f"{clean(letter.why.reason):20}  {fate:9}  {clean(letter.why.detail)}{copy}"
    )


def json_line(letter: DeadLetter) -> str:
    """Return one dead letter as a JSON object, in ASCII."""
    why, record = letter.why, letter.record
    fields: dict[str, Any] = {
        "reason": why.reason,
        "detail": why.detail,
        "source": letter.source,
        "topic": why.topic,
        "partition": why.partition,
        "offset": why.offset,
        "timestamp": why.timestamp,
        "sent_back": letter.sent_back,
        "copy_of": letter.copy_of,
        "dlq": {"topic": record.topic, "partition": record.partition, "offset": record.offset},
    }
    # The standard library's encoder, for its ASCII: neither a terminal nor a locale can trip over it.
    return json.dumps(fields)


def messages(topics: Topics, letter: DeadLetter) -> tuple[Message, Message]:
    """Return the copy for ``audio.in`` and its note, which have to be written together."""
    record, why = letter.record, letter.why
    marker: Headers = ((REPLAYED, f"{why.topic}/{why.partition}/{why.offset}".encode()),)
    headers = tuple(header for header in record.headers if not header[0].startswith(OURS))
    return (
        Message(topics.audio_in, record.key, record.value, (*headers, *marker), why.partition, why.timestamp),
        # Empty and not absent: without a value it would be a tombstone, if somebody compacts the topic.
        Message(topics.audio_dlq, record.key, b"", marker, record.partition),
    )


def replay(
    broker: Broker, topics: Topics, selection: Selection, tally: Tally, *, again: bool, dry_run: bool, stop: Event
) -> None:
    """Send the selected dead letters back to ``audio.in``, each once.

    A copy goes to the partition where the record stood, under its key and timestamp, with its
    value and its headers; those that begin with ``earshot_`` stay behind, and ``earshot_replayed``
    is added.

    Args:
        broker: where to read and write.
        topics: their names.
        selection: which are meant.
        tally: counts what was committed, batch by batch, also if this raises in the end.
        again: also send what was sent back before; never twice in one call, though.
        dry_run: only count, and fence nobody.
        stop: ends it after the batch in hand.

    Raises:
        Retryable: the broker failed, or another replay has taken over. What was sent is noted:
            another call sends the rest.
        Fatal: access is refused, there is no such topic or partition, or a copy is too large.
    """
    joined: AbstractContextManager[Session | None]
    joined = nullcontext() if dry_run else closing(broker.join(GROUP, INSTANCE))  # 1
    with joined as session:
        done = set() if again else notes(broker, topics)  # 2
        for batch in letters(broker, topics, selection, done):  # 3
            if stop.is_set():
                break
            chosen: dict[Note, DeadLetter] = {}
            for letter in batch:
                origin = _note(letter.why)
                if letter.why.topic != topics.audio_in:
                    tally.foreign += 1
                elif origin in done or origin in chosen:
                    tally.sent_before += 1
                else:
                    chosen[origin] = letter
            if session is not None and chosen:
                with session.transaction() as transaction:
                    transaction.send(message for letter in chosen.values() for message in messages(topics, letter))
            done |= chosen.keys()
            tally.sent.update(letter.why.reason for letter in chosen.values())


def report(tally: Tally, topics: Topics, *, dry_run: bool) -> Iterator[str]:
    """Yield what a replay did, a line for each reason and one in the end."""
    verb = "would go back" if dry_run else "sent back"
    for reason, count in tally.sent.most_common():
        yield f"{count:7}  {clean(reason)}"
    text = f"{tally.sent.total()} dead letters {verb} to {topics.audio_in}"
    if tally.sent_before:
        text += f"; {tally.sent_before} went back before (--again sends them once more)"
    if tally.foreign:
        text += f"; {tally.foreign} came from another topic and stay"
    yield text


class _Row:
    """The dead letters of one reason, added up."""

    def __init__(self, example: DeadLetter) -> None:
        self.example = example
        self.records = self.sent_back = self.again = 0
        self.first = self.last = example.why.timestamp
        self.sources: set[str] = set()

    def add(self, letter: DeadLetter) -> None:
        self.records += 1
        self.sent_back += letter.sent_back
        self.again += letter.copy_of is not None
        self.first = min(self.first, letter.why.timestamp)
        self.last = max(self.last, letter.why.timestamp)
        self.sources.add(letter.source)

    def names(self) -> str:
        shown = [clean(source) or "-" for source in sorted(self.sources)[:SOURCES_SHOWN]]
        more = len(self.sources) - len(shown)
        return ", ".join([*shown, *([f"{more} more"] if more else [])])


def _letter(record: Record, sent_back: set[Note]) -> DeadLetter | None:
    why = _decoded(record)
    if not isinstance(why, Rejection):
        return None
    headers = dict(record.headers)
    source = decoded(record.key or headers.get("ce_source"))
    copy_of = decoded(headers[REPLAYED]) if REPLAYED in headers else None
    return DeadLetter(record, why, source, _note(why) in sent_back, copy_of)


def _decoded(record: Record) -> Rejection | Note | None:
    """Return what a record means, or None: what somebody else wrote there must not be in the way."""
    try:
        return decode(record)
    except ValueError:
        return None


def _note(why: Rejection) -> Note:
    return Note(why.topic, why.partition, why.offset)


def _origin(letter: DeadLetter) -> str:
    return place(letter.why.topic, letter.why.partition, letter.why.offset)
