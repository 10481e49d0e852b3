"""The oracle of exactly once: compares what two runs over the same log have committed.

A record's identity is the place in ``audio.in`` that it speaks of; what it says is its key, value,
headers and timestamp. Of ``drift.state`` only the last word on each source counts. This module
knows neither a broker nor how a run went.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from worker.messages import Record, Topics

QUOTED: Final = 400
"""Characters of a value that a mismatch shows."""

PLAIN: Final = Topics()
"""The names by which the oracle knows the topics, whatever prefix a run had."""

WRITTEN: Final = (PLAIN.predictions_out, PLAIN.audio_dlq, PLAIN.drift_events, PLAIN.drift_state)
"""The topics that a worker writes."""

Log = Mapping[str, Sequence[Record]]
"""The committed records of each topic, in offset order within each partition."""


class Verdict(NamedTuple):
    """What is wrong with a run, and a line on each thing that is."""

    lost: int
    doubled: int
    differing: int
    mismatches: list[str]

    @property
    def flawless(self) -> bool:
        """Whether the run equals the one that it was compared with."""
        return not (self.lost or self.doubled or self.differing)


class Origin(NamedTuple):
    """What a record is about: a record of ``audio.in``, or the state of a source; ``what`` tells its results apart."""

    partition: str
    place: str
    what: str = ""


def compare(expected: Log, actual: Log) -> Verdict:
    """Hold a run against one that nothing happened to.

    A record is *lost* if only the expected run has it, *doubled* once for each time too many, and
    *differing* if it says something else, if only the actual run has it, or if it does not stand
    in its place among the records of its key.
    """
    verdict = Verdict(0, 0, 0, [])
    for topic, records in expected.items():
        verdict = _plus(verdict, _compare(topic, _tidy(topic, records), _tidy(topic, actual[topic])))
    return verdict


def origin(record: Record) -> Origin:
    """Return what a record is about."""
    headers = {name: data.decode(errors="replace") for name, data in record.headers}
    if record.topic == PLAIN.drift_state:
        return Origin(str(record.partition), repr(record.key))
    if record.topic == PLAIN.audio_dlq:
        return Origin(headers["earshot_partition"], headers["earshot_offset"])
    _model, _topic, partition, offset, *what = headers["ce_id"].split("/")
    return Origin(partition, offset, *what)


def without(prefix: str, record: Record) -> Record:
    """Return the record as it would be if its topics had no prefix."""

    def strip(data: bytes | None) -> bytes | None:
        return None if data is None else data.replace(f"{prefix}audio.in".encode(), PLAIN.audio_in.encode())

    value = record.value if record.topic.endswith(PLAIN.audio_dlq) else strip(record.value)
    headers = tuple((name, strip(data) or b"") for name, data in record.headers)
    return msgspec.structs.replace(record, topic=record.topic.removeprefix(prefix), value=value, headers=headers)


def _tidy(topic: str, records: Sequence[Record]) -> Sequence[Record]:
    """Leave only the last word on each source if the topic is one of states; when that was said is no matter."""
    if topic != PLAIN.drift_state:
        return records
    latest = {(record.partition, record.key): record for record in records}
    return [msgspec.structs.replace(record, timestamp=0) for record in latest.values() if record.value is not None]


def _compare(topic: str, expected: Sequence[Record], actual: Sequence[Record]) -> Verdict:
    wanted = {origin(record): record for record in expected}
    found: dict[Origin, Record] = {}
    for record in actual:
        found.setdefault(origin(record), record)
    lost = [f"lost: {_quote(wanted[each])}" for each in wanted.keys() - found.keys()]
    times = Counter(map(origin, actual))
    doubled = [f"{count} times: {_quote(found[each])}" for each, count in times.items() if count > 1]
    differing = [f"not expected: {_quote(found[each])}" for each in found.keys() - wanted.keys()]
    differing += [
        f"differing: expected {_quote(record)}\n  and found {_quote(found[each])}"
        for each, record in wanted.items()
        if each in found and _content(record) != _content(found[each])
    ]
    if topic != PLAIN.drift_state:  # a compacted topic has no order to keep
        differing += _disorder(wanted, found)
    return Verdict(len(lost), sum(times.values()) - len(times), len(differing), [*lost, *doubled, *differing])


def _disorder(wanted: Mapping[Origin, Record], found: Mapping[Origin, Record]) -> Iterator[str]:
    """Say which records stand in another place than they should among those of their source that both runs have."""
    common = {each for each, record in wanted.items() if each in found and found[each].key == record.key}
    should, does = _lanes(wanted, common), _lanes(found, common)
    for lane, origins in should.items():
        for one, other in zip(origins, does[lane], strict=True):
            if one != other:
                yield f"out of order: expected {_quote(wanted[one])}\n  and found {_quote(found[other])}"


def _lanes(records: Mapping[Origin, Record], common: Container[Origin]) -> dict[tuple[bytes, str], list[Origin]]:
    """Return what has to stay in order: what came from one partition under one key. Without a key there is no order."""
    lanes: dict[tuple[bytes, str], list[Origin]] = defaultdict(list)
    for each, record in records.items():
        if each in common and record.key is not None:
            lanes[record.key, each.partition].append(each)
    return lanes


def _content(record: Record) -> tuple[object, ...]:
    return record.key, record.value, record.headers, record.timestamp


def _quote(record: Record) -> str:
    value = repr(record.value)
    shown = value if len(value) <= QUOTED else f"{value[:QUOTED]}… ({len(record.value or b'')} bytes)"
    return (
        f"{record.topic}/{record.partition}/{record.offset} about {'/'.join(origin(record))}: key {record.key!r}, "
        f"timestamp {record.timestamp}, headers {record.headers}, value {shown}"
    )


def _plus(one: Verdict, other: Verdict) -> Verdict:
    return Verdict(
        one.lost + other.lost,
        one.doubled + other.doubled,
        one.differing + other.differing,
        one.mismatches + other.mismatches,
    )
