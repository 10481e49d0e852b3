"""The wire: what Earshot reads and writes, and how it is encoded.

Everything travels as CloudEvents 1.0 in Kafka's binary mode: the attributes are the headers
``ce_specversion``, ``ce_id``, ``ce_source``, ``ce_type``, ``ce_time`` and ``content-type``, and
the value is the data. This module knows neither a broker nor audio: it turns a `Record` into a
`Chunk` once, at the edge, and results into a `Message` once, on the way out.

A message carries nothing that differs between two runs over the same log. Its ``ce_id`` is made
of the model, topic, partition and offset, so a consumer can drop what it has seen before.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

import msgspec

from worker.errors import BadRecord

JSON_TYPE: Final = "application/json"
PREDICTION_TYPE: Final = "earshot.prediction"
DRIFT_TYPE: Final = "earshot.drift.detected"
RETRAIN_TYPE: Final = "earshot.retrain.requested"

Headers = tuple[tuple[str, bytes], ...]


DLQ_MESSAGE_BYTES: Final = 16 * 1024**2
"""What audio.dlq has to take: the largest record that is accepted by default, twice, so that its copy
fits together with the reason whatever audio.in takes."""


SOURCE_BYTES: Final = 1_024
"""The longest name of a source: each is kept in memory, and a broker takes keys as long as a value."""


class TopicSpec(NamedTuple):
    """A topic as it has to be created; ``max_message_bytes`` None leaves that to the broker."""

    name: str
    partitions: int
    compacted: bool
    max_message_bytes: int | None = None


class Topics(msgspec.Struct, frozen=True):
    """The names of the five topics; ``prefix`` lets several systems share one cluster."""

    prefix: str = ""

    @property
    def audio_in(self) -> str:
        """Chunks of sound, keyed by source."""
        return f"{self.prefix}audio.in"

    @property
    def predictions_out(self) -> str:
        """One prediction for each usable record."""
        return f"{self.prefix}predictions.out"

    @property
    def audio_dlq(self) -> str:
        """Records that could not be used, with the reason."""
        return f"{self.prefix}audio.dlq"

    @property
    def drift_events(self) -> str:
        """What has changed, and requests for retraining."""
        return f"{self.prefix}drift.events"

    @property
    def drift_state(self) -> str:
        """The detectors of each source; compacted, and nobody's business but the worker's."""
        return f"{self.prefix}drift.state"

    def layout(self, partitions: int) -> tuple[TopicSpec, ...]:
        """Return how each topic has to be created.

        ``drift.state`` has as many partitions as ``audio.in``, since the state of a source is
        written to the partition whose records it explains.
        """
        return (
            TopicSpec(self.audio_in, partitions, compacted=False),
            TopicSpec(self.predictions_out, partitions, compacted=False),
            TopicSpec(self.audio_dlq, partitions, compacted=False, max_message_bytes=DLQ_MESSAGE_BYTES),
            TopicSpec(self.drift_events, 1, compacted=False),
            TopicSpec(self.drift_state, partitions, compacted=True),
        )


class Record(msgspec.Struct, frozen=True, gc=False):
    """A record as a broker hands it out; ``timestamp`` is in milliseconds since the epoch."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()


class Message(msgspec.Struct, frozen=True, gc=False):
    """A record still to be written.

    ``partition`` None leaves the choice to the key. ``timestamp`` None means now; what the
    worker writes carries the timestamp of the record it came from, so that a replay is equal.
    """

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    partition: int | None = None
    timestamp: int | None = None


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """A decoded record of ``audio.in``: who sent it, when, and the audio still in its encoding.

    ``content_type`` is None if the record declares none; ``time`` is the event time in
    milliseconds since the epoch: ``ce_time``, or else the record's own timestamp.
    """

    source: str
    content_type: str | None
    data: bytes
    time: int


class ModelId(msgspec.Struct, frozen=True, gc=False):
    """Which model spoke.

    ``name`` can stand in a URI, ``version`` is when it was trained, and ``hash`` is what it is
    (`worker.bundle.model_hash`).
    """

    name: str
    version: str
    hash: str


class Position(msgspec.Struct, frozen=True, gc=False):
    """A place in the log and the event time of the record that stands there."""

    topic: str
    partition: int
    offset: int
    time: datetime


class Classification(msgspec.Struct, frozen=True, gc=False, tag_field="task", tag="classification"):
    """What was heard in one record, by a classifier.

    ``duration`` is in seconds; ``windows`` counts the windows whose probabilities were averaged;
    ``padded`` says that the record was shorter than one window and was filled up with silence.
    """

    source: str
    label: str
    confidence: float
    probabilities: dict[str, float]
    duration: float
    windows: int
    padded: bool
    record: Position
    model: ModelId


class Regression(msgspec.Struct, frozen=True, gc=False, tag_field="task", tag="regression"):
    """What was measured in one record, by a regressor.

    ``value`` is in the unit of ``target`` (the trained column), and so are ``low`` and ``high``, between
    which 90 % of the windows held out in training lay, and ``spread``, the standard deviation over the trees
    of the forest.
    """

    source: str
    target: str
    value: float
    low: float
    high: float
    spread: float
    duration: float
    windows: int
    padded: bool
    record: Position
    model: ModelId


Prediction = Classification | Regression


class SignalShift(msgspec.Struct, frozen=True, gc=False):
    """One watched signal before and after a shift, in standard deviations of the training data."""

    signal: str
    before: float
    after: float


class DriftDetected(msgspec.Struct, frozen=True, gc=False, tag_field="event", tag="drift.detected"):
    """The sound of one source has changed: what, by how much, since when, and for which model.

    ``signals`` is sorted by the size of the shift, the largest first; ``since`` is the first
    record of the first block that belongs to the change, ``detected`` the record that proved it.
    """

    source: str
    signals: tuple[SignalShift, ...]
    since: Position
    detected: Position
    model: ModelId


class RetrainRequested(msgspec.Struct, frozen=True, gc=False, tag_field="event", tag="retrain.requested"):
    """A request for a new model, and the ``ce_id`` of the drift event that gave the cause."""

    source: str
    cause: str
    since: Position
    model: ModelId


DriftEvent = DriftDetected | RetrainRequested

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST: Final = (datetime.min.replace(tzinfo=UTC) - _EPOCH) // timedelta(milliseconds=1)
_LAST: Final = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // timedelta(milliseconds=1)
_encoder: Final = msgspec.json.Encoder()


def position(record: Record, time: int) -> Position:
    """Return where ``record`` stands, with its event ``time`` in milliseconds."""
    return Position(record.topic, record.partition, record.offset, instant(time))


def instant(time: int) -> datetime:
    """Return milliseconds since the epoch as an aware UTC datetime."""
    return _EPOCH + timedelta(milliseconds=time)


def decode(record: Record) -> Chunk:
    """Read one record of ``audio.in``.

    Raises:
        BadRecord: no value, no source, a key or header that is not UTF-8, a ``ce_time`` that is
            not ISO 8601 with an offset from UTC, or a structured-mode CloudEvent.
    """
    if not record.value:
        raise BadRecord("empty", "the record has no value; expected the bytes of a sound")
    headers = dict(record.headers)
    content_type = _header(headers, "content-type")
    if content_type is not None and content_type.lower().startswith("application/cloudevents"):
        raise BadRecord(
            "structured-mode",
            f"content-type is {content_type!r}; send CloudEvents in Kafka's binary mode, with the audio as the value",
        )
    return Chunk(
        source=_source(record.key, headers),
        content_type=content_type,
        data=record.value,
        time=_event_time(headers, record.timestamp),
    )


def event_id(model: ModelId, record: Record) -> str:
    """Return the ``ce_id`` of what ``model`` makes of ``record``: the same in every run."""
    return f"{model.hash[:16]}/{record.topic}/{record.partition}/{record.offset}"


def prediction_message(topics: Topics, record: Record, prediction: Prediction) -> Message:
    """Encode a prediction under the key of its record."""
    name = event_id(prediction.model, record)
    return _event(topics.predictions_out, record, record.key, prediction, PREDICTION_TYPE, name, prediction.record.time)


def drift_messages(topics: Topics, record: Record, drift: DriftDetected) -> tuple[Message, Message]:
    """Encode a drift event and the request for retraining that follows from it, under their source."""
    name = event_id(drift.model, record)
    cause = f"{name}/drift"
    request = RetrainRequested(drift.source, cause, drift.since, drift.model)
    key, time = drift.source.encode(), drift.detected.time
    return (
        _event(topics.drift_events, record, key, drift, DRIFT_TYPE, cause, time),
        _event(topics.drift_events, record, key, request, RETRAIN_TYPE, f"{name}/retrain", time),
    )


def rejection_message(topics: Topics, record: Record, why: BadRecord) -> Message:
    """Wrap a record that cannot be used: its bytes, key and headers, and the reason beside them."""
    headers: Headers = (
        *record.headers,
        ("earshot_reason", why.reason.encode()),
        ("earshot_detail", why.detail.encode()),
        ("earshot_topic", record.topic.encode()),
        ("earshot_partition", str(record.partition).encode()),
        ("earshot_offset", str(record.offset).encode()),
        ("earshot_timestamp", str(record.timestamp).encode()),
    )
    return Message(topics.audio_dlq, record.key, record.value, headers, timestamp=_timestamp(record))


def asyncapi(topics: Topics) -> dict[str, Any]:
    """Return the AsyncAPI 3.0 document of the wire, generated from the types of this module."""
    published = (Classification, Regression, DriftDetected, RetrainRequested)
    _, schemas = msgspec.json.schema_components(published, ref_template="#/components/schemas/{name}")
    channels: dict[str, tuple[str, tuple[str, ...]]] = {
        "audioIn": (topics.audio_in, ("Audio",)),
        "predictionsOut": (topics.predictions_out, ("Classification", "Regression")),
        "audioDlq": (topics.audio_dlq, ("Rejection", "Replayed")),
        "driftEvents": (topics.drift_events, ("DriftDetected", "RetrainRequested")),
    }
    audio = {
        "title": "One chunk of sound; the key is its source",
        "headers": {
            "type": "object",
            "properties": {"content-type": {"type": "string"}, "ce_time": {"type": "string", "format": "date-time"}},
        },
        "payload": {"type": "string", "format": "binary"},
    }
    reasons = ("reason", "detail", "topic", "partition", "offset", "timestamp")
    rejection = {
        "title": "A record that could not be used: its own key, value and headers, and the reason beside them",
        "headers": {"type": "object", "properties": {f"earshot_{name}": {"type": "string"} for name in reasons}},
        "payload": {"type": "string", "format": "binary"},
    }
    replayed = {
        "title": "A note that a rejected record, named as topic/partition/offset, was sent back to audio.in; no value",
        "headers": {"type": "object", "properties": {"earshot_replayed": {"type": "string"}}},
    }
    messages: dict[str, Any] = {"Audio": audio, "Rejection": rejection, "Replayed": replayed}
    for struct in published:
        name = struct.__name__
        messages[name] = {"contentType": JSON_TYPE, "payload": {"$ref": f"#/components/schemas/{name}"}}
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "Earshot", "version": "1.0.0", "description": "Machine hearing on streams."},
        "channels": {
            channel: {
                "address": address,
                "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in names},
            }
            for channel, (address, names) in channels.items()
        },
        "operations": {
            channel: {
                "action": "receive" if channel == "audioIn" else "send",
                "channel": {"$ref": f"#/channels/{channel}"},
            }
            for channel in channels
        },
        "components": {"messages": messages, "schemas": schemas},
    }


def _event(
    topic: str, record: Record, key: bytes | None, data: Prediction | DriftEvent, type: str, id: str, time: datetime
) -> Message:
    headers: Headers = (
        ("ce_specversion", b"1.0"),
        ("ce_id", id.encode()),
        ("ce_source", f"earshot/{data.model.name}".encode()),
        ("ce_type", type.encode()),
        ("ce_time", time.isoformat(timespec="milliseconds").replace("+00:00", "Z").encode()),
        ("content-type", JSON_TYPE.encode()),
    )
    return Message(topic, key, _encoder.encode(data), headers, timestamp=_timestamp(record))


def _timestamp(record: Record) -> int:
    """Return when the record was sent; 1970 at the earliest, since brokers refuse what is older than a moving limit.

    A record that was just young enough when it was taken would leave an answer that no broker takes.
    """
    return max(record.timestamp, 0)


def _header(headers: Mapping[str, bytes], name: str) -> str | None:
    raw = headers.get(name)
    if raw is None:
        return None
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise BadRecord("bad-header", f"header {name!r} is not UTF-8: {raw[:40]!r}") from None


def _source(key: bytes | None, headers: Mapping[str, bytes]) -> str:
    length = len(key or headers.get("ce_source", b""))
    if length > SOURCE_BYTES:
        named = f"the source is named with {length} bytes, the limit is {SOURCE_BYTES}"
        raise BadRecord("bad-key" if key else "bad-header", named)
    if key:
        try:
            return key.decode()
        except UnicodeDecodeError:
            raise BadRecord("bad-key", f"the key names the source and must be UTF-8: {key[:40]!r}") from None
    source = _header(headers, "ce_source")
    if not source:
        raise BadRecord("no-source", "neither a key nor a ce_source header: one of them must name the source")
    return source


def _event_time(headers: Mapping[str, bytes], timestamp: int) -> int:
    text = _header(headers, "ce_time")
    if text is None:
        if not _FIRST <= timestamp <= _LAST:
            expected = "expected milliseconds from the year 1 to 9999"
            raise BadRecord("bad-header", f"the record's timestamp is {timestamp} ms, {expected}")
        return timestamp
    try:
        time = datetime.fromisoformat(text.upper())
        if time.tzinfo is None:
            raise ValueError("no offset from UTC")
        return (time.astimezone(UTC) - _EPOCH) // timedelta(milliseconds=1)
    except (ValueError, OverflowError) as error:
        raise BadRecord(
            "bad-header", f"ce_time is {text[:40]!r}, expected ISO 8601 with an offset from UTC: {error}"
        ) from None
