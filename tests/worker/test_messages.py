"""What `worker.messages` reads from the wire and writes to it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker import messages
from worker.errors import BadRecord
from worker.messages import (
    Chunk,
    Classification,
    DriftDetected,
    Headers,
    Message,
    ModelId,
    Position,
    Prediction,
    Record,
    Regression,
    RetrainRequested,
    SignalShift,
    Topics,
)

TOPICS = Topics()
MODEL = ModelId("pumps", "3", "0123456789abcdef" * 4)
TIME = 1_795_334_400_250  # 2026-11-22T08:00:00.250Z


def record(
    *headers: tuple[str, bytes], key: bytes | None = b"mic-1", value: bytes | None = b"RIFF", timestamp: int = TIME
) -> Record:
    return Record("audio.in", 2, 41, timestamp, key, value, headers)


def classification(time: int = TIME) -> Classification:
    return Classification(
        source="mic-1",
        label="ok",
        confidence=0.75,
        probabilities={"ok": 0.75, "worn": 0.25},
        duration=1.5,
        windows=2,
        padded=False,
        record=messages.position(record(), time),
        model=MODEL,
    )


def regression() -> Regression:
    return Regression(
        source="mic-1",
        target="midi_pitch",
        value=60.25,
        low=59.0,
        high=61.5,
        spread=0.5,
        duration=0.5,
        windows=1,
        padded=True,
        record=messages.position(record(), TIME),
        model=MODEL,
    )


def drift() -> DriftDetected:
    return DriftDetected(
        source="mic-1",
        signals=(SignalShift("centroid", 0.0, -3.5), SignalShift("level", 0.1, 1.2)),
        since=Position("audio.in", 2, 7, messages.instant(TIME - 34_000)),
        detected=Position("audio.in", 2, 41, messages.instant(TIME)),
        model=MODEL,
    )


def rejection(sent: Record) -> tuple[str, str]:
    with pytest.raises(BadRecord) as caught:
        messages.decode(sent)
    return caught.value.reason, caught.value.detail


class TestDecode:
    def test_bare_record(self) -> None:
        """A key and a value are enough: the time is the record's, and the content is to be sniffed."""
        assert Chunk("mic-1", None, b"RIFF", TIME) == messages.decode(record())

    def test_event(self) -> None:
        """The headers of a CloudEvent say what the value is and when it was heard."""
        sent = record(
            ("ce_specversion", b"1.0"),
            ("ce_source", b"plant/7"),
            ("ce_time", b"2026-11-22T08:00:01Z"),
            ("content-type", b"audio/L16;rate=16000"),
        )

        assert Chunk("mic-1", "audio/L16;rate=16000", b"RIFF", TIME + 750) == messages.decode(sent)

    @pytest.mark.parametrize("key", [None, b""])
    def test_source_without_a_key(self, key: bytes | None) -> None:
        """Where there is no key, ce_source names the source."""
        assert "Pumpe-süd" == messages.decode(record(("ce_source", "Pumpe-süd".encode()), key=key)).source

    def test_the_key_names_the_source(self) -> None:
        """A key goes before ce_source, because the key decides the partition and with it the order."""
        assert "Müller" == messages.decode(record(("ce_source", b"other"), key="Müller".encode())).source

    @pytest.mark.parametrize(
        ("text", "milliseconds"),
        [
            ("2026-11-22T08:00:00Z", 0),
            ("2026-11-22T08:00:00+00:00", 0),
            ("2026-11-22T08:00:00-00:00", 0),
            ("2026-11-22T13:30:00+05:30", 0),
            ("2026-11-21T22:00:00-10:00", 0),
            ("2026-11-22t08:00:00z", 0),
            ("20261122T080000Z", 0),
            ("2026-W47-7T08:00Z", 0),
            ("2026-11-22T08:00:00,5Z", 500),
            ("2026-11-22T08:00:00.5Z", 500),
            ("2026-11-22T08:00:00.123456Z", 123),
            ("2026-11-22T08:00:00.9996+00:00", 999),
        ],
    )
    def test_time(self, text: str, milliseconds: int) -> None:
        """Event times are ISO 8601 with any offset, in capitals or not, and are kept to the millisecond."""
        chunk = messages.decode(record(("ce_time", text.encode())))

        assert TIME - 250 + milliseconds == chunk.time

    @given(
        moment=st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1)),  # noqa: DTZ001 - the zone is drawn below
        minutes=st.integers(-14 * 60, 14 * 60),
    )
    def test_any_time(self, moment: datetime, minutes: int) -> None:
        """Whatever the offset, the instant is the same."""
        aware = moment.replace(tzinfo=timezone(timedelta(minutes=minutes)))

        chunk = messages.decode(record(("ce_time", aware.isoformat().encode())))

        assert timedelta(0) <= aware - messages.instant(chunk.time) < timedelta(milliseconds=1)

    def test_last_header_counts(self) -> None:
        """Kafka allows a header twice: the last one, added closest to us, is the one that counts."""
        sent = record(("content-type", b"audio/wav"), ("content-type", b"audio/flac"))

        assert "audio/flac" == messages.decode(sent).content_type

    @pytest.mark.parametrize(
        ("sent", "reason", "detail"),
        [
            (record(value=None), "empty", "no value"),
            (record(value=b""), "empty", "no value"),
            (record(key=None), "no-source", "ce_source"),
            (record(("ce_source", b""), key=b""), "no-source", "one of them must name the source"),
            (record(key=b"\xff\xfe"), "bad-key", r"UTF-8: b'\xff\xfe'"),
            (record(key=b"k" * 1_025), "bad-key", "1025 bytes, the limit is 1024"),
            (record(("ce_source", b"k" * 1_025), key=None), "bad-header", "1025 bytes, the limit is 1024"),
            (record(("ce_source", b"\xff"), key=None), "bad-header", r"'ce_source' is not UTF-8: b'\xff'"),
            (record(("content-type", b"\xc3")), "bad-header", "'content-type' is not UTF-8"),
            (record(("ce_time", b"\x80")), "bad-header", "'ce_time' is not UTF-8"),
            (record(("ce_time", b"")), "bad-header", "expected ISO 8601"),
            (record(("ce_time", b"yesterday")), "bad-header", "ce_time is 'yesterday', expected ISO 8601"),
            (record(("ce_time", b"1795334400")), "bad-header", "expected ISO 8601"),
            (record(("ce_time", b"2026-11-22T08:00:00")), "bad-header", "no offset from UTC"),
            (record(("ce_time", b"2026-13-01T00:00:00Z")), "bad-header", "month must be in 1..12"),
            (record(("content-type", b"application/cloudevents+json")), "structured-mode", "binary mode"),
            (record(("content-type", b"Application/CloudEvents-Batch+JSON; a=b")), "structured-mode", "audio as the"),
        ],
    )
    def test_rejections(self, sent: Record, reason: str, detail: str) -> None:
        """Each reason is reached, and its detail says what was expected."""
        got_reason, got_detail = rejection(sent)

        assert reason == got_reason
        assert detail in got_detail

    @pytest.mark.parametrize(
        "sent",
        [
            record(key=b"\xff" * 10**6),
            record(("content-type", b"\xff" * 10**6)),
            record(("ce_time", b"x" * 10**6)),
            record(("content-type", b"application/cloudevents" + b"x" * 10**6)),
        ],
        ids=["key", "content-type", "ce_time", "structured-mode"],
    )
    def test_detail_is_short(self, sent: Record) -> None:
        """A megabyte in a header does not become a second megabyte in the rejection, too large for any topic."""
        assert len(rejection(sent)[1]) < 300

    NAMES = st.sampled_from(["content-type", "ce_time", "ce_source", "ce_id", "ce_specversion", "traceparent"])
    TIMES = st.datetimes(timezones=st.none() | st.just(UTC)).map(lambda time: time.isoformat().encode())

    @given(
        key=st.none() | st.binary(max_size=20),
        value=st.none() | st.binary(max_size=20),
        headers=st.lists(
            st.tuples(NAMES, st.binary(max_size=40) | st.text(max_size=40).map(str.encode) | TIMES), max_size=4
        ),
        timestamp=st.integers(-1, 2**41),
    )
    @settings(max_examples=300)
    def test_strangers_records(
        self, key: bytes | None, value: bytes | None, headers: list[tuple[str, bytes]], timestamp: int
    ) -> None:
        """Whatever is in a record, it is a chunk with a source, or a `BadRecord`."""
        sent = record(*headers, key=key, value=value, timestamp=timestamp)
        try:
            chunk = messages.decode(sent)
        except BadRecord as why:
            rejected = messages.rejection_message(TOPICS, sent, why)
            assert value == rejected.value
            return
        assert chunk.source
        assert value == chunk.data

    @pytest.mark.parametrize(
        "sent",
        [
            record(("ce_time", b"0001-01-01T00:00:00+14:00")),
            record(("ce_time", b"9999-12-31T23:59:59-14:00")),
            record(timestamp=2**62),
            record(timestamp=-(2**62)),
        ],
    )
    def test_times_beyond_the_calendar(self, sent: Record) -> None:
        """A time that cannot be written down again is rejected here, and is not a crash further on."""
        assert "bad-header" == rejection(sent)[0]

    @pytest.mark.parametrize("text", ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59.9999Z"])
    def test_ends_of_the_calendar(self, text: str) -> None:
        """The first and the last instant of the calendar can be written down again."""
        chunk = messages.decode(record(("ce_time", text.encode())))

        assert messages.position(record(), chunk.time).time.isoformat()[:19] == text[:19]


class TestPredictions:
    @pytest.mark.parametrize("prediction", [classification(), regression()])
    def test_round_trip(self, prediction: Prediction) -> None:
        """The JSON decodes to the very struct, told apart by its tag."""
        message = messages.prediction_message(TOPICS, record(), prediction)

        assert prediction == msgspec.json.decode(message.value or b"", type=Classification | Regression)

    def test_json(self) -> None:
        """The value is plain JSON with the documented names."""
        value = messages.prediction_message(TOPICS, record(), classification()).value

        assert {
            "task": "classification",
            "source": "mic-1",
            "label": "ok",
            "confidence": 0.75,
            "probabilities": {"ok": 0.75, "worn": 0.25},
            "duration": 1.5,
            "windows": 2,
            "padded": False,
            "record": {"topic": "audio.in", "partition": 2, "offset": 41, "time": "2026-11-22T08:00:00.250000Z"},
            "model": {"name": "pumps", "version": "3", "hash": "0123456789abcdef" * 4},
        } == msgspec.json.decode(value or b"")

    def test_event(self) -> None:
        """A prediction is a CloudEvent under the key and the timestamp of its record."""
        assert 0 == messages.prediction_message(TOPICS, record(timestamp=-(2**62)), regression()).timestamp
        message = messages.prediction_message(TOPICS, record(timestamp=5), regression())

        assert ("predictions.out", b"mic-1", None, 5) == (
            message.topic,
            message.key,
            message.partition,
            message.timestamp,
        )
        assert {
            "ce_specversion": b"1.0",
            "ce_id": b"0123456789abcdef/audio.in/2/41",
            "ce_source": b"earshot/pumps",
            "ce_type": b"earshot.prediction",
            "ce_time": b"2026-11-22T08:00:00.250Z",
            "content-type": b"application/json",
        } == dict(message.headers)

    def test_same_in_every_run(self) -> None:
        """Two runs write equal messages; nothing in them knows the clock."""
        first, second = (messages.prediction_message(TOPICS, record(), classification()) for _ in range(2))

        assert first == second

    def test_ids_tell_apart(self) -> None:
        """Another record, partition, topic or model is another id."""
        ids = {
            messages.event_id(model, Record(topic, partition, offset, 0, None, None))
            for model in (MODEL, ModelId("pumps", "3", "f" * 64))
            for topic in ("a", "b")
            for partition in range(12)
            for offset in range(12)
        }

        assert 2 * 2 * 12 * 12 == len(ids)

    @given(time=st.integers(0, 2**42))
    def test_times_round_trip(self, time: int) -> None:
        """A millisecond goes out and comes back in as that millisecond, in the value and in the header."""
        message = messages.prediction_message(TOPICS, record(), classification(time))

        header = dict(message.headers)["ce_time"]
        assert time == messages.decode(record(("ce_time", header))).time
        decoded = msgspec.json.decode(message.value or b"", type=Classification)
        assert datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=time) == decoded.record.time


class TestDriftEvents:
    def test_pair(self) -> None:
        """A drift and the request for retraining travel together, and the request names its cause."""
        detected, requested = messages.drift_messages(TOPICS, record(timestamp=5), drift())

        assert drift() == msgspec.json.decode(detected.value or b"", type=DriftDetected | RetrainRequested)
        assert RetrainRequested(
            "mic-1", "0123456789abcdef/audio.in/2/41/drift", drift().since, MODEL
        ) == msgspec.json.decode(requested.value or b"", type=DriftDetected | RetrainRequested)
        assert [("drift.events", b"mic-1", 5)] * 2 == [(m.topic, m.key, m.timestamp) for m in (detected, requested)]

    def test_headers(self) -> None:
        """Both are CloudEvents with ids and types of their own, at the time of the detection."""
        detected, requested = (dict(message.headers) for message in messages.drift_messages(TOPICS, record(), drift()))

        assert b"0123456789abcdef/audio.in/2/41/drift" == detected["ce_id"]
        assert b"0123456789abcdef/audio.in/2/41/retrain" == requested["ce_id"]
        assert b"earshot.drift.detected" == detected["ce_type"]
        assert b"earshot.retrain.requested" == requested["ce_type"]
        assert b"2026-11-22T08:00:00.250Z" == detected["ce_time"] == requested["ce_time"]

    def test_same_in_every_run(self) -> None:
        """Two runs announce the same drift with equal messages."""
        assert messages.drift_messages(TOPICS, record(), drift()) == messages.drift_messages(TOPICS, record(), drift())


class TestRejections:
    def test_nothing_is_lost(self) -> None:
        """A rejected record keeps its bytes, key, headers and time; the reason stands beside them."""
        headers: Headers = (("ce_time", b"\xff"), ("traceparent", b"00-1"), ("traceparent", b"00-2"))
        sent = record(*headers, key=b"\xff", value=b"\x00garbage")

        message = messages.rejection_message(TOPICS, sent, BadRecord("bad-header", "ce_time is „\ufffd“"))

        added: Headers = (
            ("earshot_reason", b"bad-header"),
            ("earshot_detail", "ce_time is „\ufffd“".encode()),
            ("earshot_topic", b"audio.in"),
            ("earshot_partition", b"2"),
            ("earshot_offset", b"41"),
            ("earshot_timestamp", str(TIME).encode()),
        )
        assert Message("audio.dlq", b"\xff", b"\x00garbage", headers + added, timestamp=TIME) == message

    def test_can_be_sent_again(self) -> None:
        """A rejected record that is moved back to audio.in is the record that it was."""
        sent = record(("content-type", b"audio/wav"))
        rejected = messages.rejection_message(TOPICS, sent, BadRecord("undecodable", "cut off"))

        again = Record("audio.in", 0, 0, TIME, rejected.key, rejected.value, rejected.headers)

        assert messages.decode(sent) == messages.decode(again)


class TestTopics:
    def test_prefix(self) -> None:
        """A prefix keeps several systems on one cluster apart."""
        topics = Topics("plant7.")

        names = [spec.name for spec in topics.layout(4)]

        assert ["plant7.audio.in", "plant7.predictions.out", "plant7.audio.dlq"] == names[:3]
        assert ["plant7.drift.events", "plant7.drift.state"] == names[3:]
        assert "plant7.predictions.out" == messages.prediction_message(topics, record(), regression()).topic
        assert "plant7.audio.dlq" == messages.rejection_message(topics, record(), BadRecord("empty", "")).topic
        assert {"plant7.drift.events"} == {m.topic for m in messages.drift_messages(topics, record(), drift())}

    def test_state_stands_beside_audio(self) -> None:
        """The state is compacted and has a partition for each of audio.in; nothing else is compacted."""
        layout = {spec.name: spec for spec in TOPICS.layout(6)}

        assert 6 == layout["audio.in"].partitions == layout["drift.state"].partitions
        assert ["drift.state"] == [name for name, spec in layout.items() if spec.compacted]


def conforms(value: Any, schema: dict[str, Any], schemas: dict[str, Any]) -> bool:
    """Check a value against the few words of JSON Schema that the document uses."""
    if "$ref" in schema:
        return conforms(value, schemas[schema["$ref"].removeprefix("#/components/schemas/")], schemas)
    if "enum" in schema:
        return value in schema["enum"]
    match schema["type"]:
        case "object":
            properties = schema.get("properties", {})
            others = schema.get("additionalProperties", {})
            return (
                isinstance(value, dict)
                and set(schema.get("required", ())) <= set(value)
                and all(conforms(item, properties.get(name, others), schemas) for name, item in value.items())
            )
        case "array":
            return isinstance(value, list) and all(conforms(item, schema["items"], schemas) for item in value)
        case name:
            types: dict[str, Any] = {"string": str, "number": (int, float), "integer": int, "boolean": bool}
            return isinstance(value, types[name])


class TestAsyncApi:
    DOCUMENT = messages.asyncapi(TOPICS)
    EXAMPLES = (
        ("Classification", messages.prediction_message(TOPICS, record(), classification())),
        ("Regression", messages.prediction_message(TOPICS, record(), regression())),
        ("DriftDetected", messages.drift_messages(TOPICS, record(), drift())[0]),
        ("RetrainRequested", messages.drift_messages(TOPICS, record(), drift())[1]),
    )

    def test_topics(self) -> None:
        """The document names the four public topics, under their prefix, and not the worker's own state."""
        for prefix in ("", "plant7."):
            channels = messages.asyncapi(Topics(prefix))["channels"].values()

            assert [f"{prefix}{name}" for name in ("audio.in", "predictions.out", "audio.dlq", "drift.events")] == [
                channel["address"] for channel in channels
            ]

    def test_directions(self) -> None:
        """The worker receives audio and sends everything else."""
        actions = {name: operation["action"] for name, operation in self.DOCUMENT["operations"].items()}

        assert {"audioIn": "receive", "predictionsOut": "send", "audioDlq": "send", "driftEvents": "send"} == actions

    def test_references(self) -> None:
        """Every reference leads somewhere."""

        def references(node: Any) -> list[str]:
            if isinstance(node, dict):
                own = [node["$ref"]] if "$ref" in node else []
                return own + [found for item in node.values() for found in references(item)]
            if isinstance(node, list | tuple):
                return [found for item in node for found in references(item)]
            return []

        found = references(self.DOCUMENT)

        assert len(found) > 10
        for reference in found:
            node: Any = self.DOCUMENT
            for part in reference.removeprefix("#/").split("/"):
                node = node[part]

    def test_is_json(self) -> None:
        """The document can be written down as JSON, as its own `asyncapi` field announces."""
        assert "3.0.0" == msgspec.json.decode(msgspec.json.encode(self.DOCUMENT))["asyncapi"]

    @pytest.mark.parametrize(("name", "message"), EXAMPLES)
    def test_examples_conform(self, name: str, message: Message) -> None:
        """What is really sent conforms to its schema, and does not once any required field is gone."""
        schemas = self.DOCUMENT["components"]["schemas"]
        value = msgspec.json.decode(message.value or b"")

        assert conforms(value, schemas[name], schemas)
        assert set(schemas[name]["properties"]) == set(value)
        for field in schemas[name]["required"]:
            without = {other: item for other, item in value.items() if other != field}
            assert not conforms(without, schemas[name], schemas)

    def test_schemas_tell_apart(self) -> None:
        """A message conforms to its own schema only."""
        schemas = self.DOCUMENT["components"]["schemas"]
        for name, message in self.EXAMPLES:
            value = msgspec.json.decode(message.value or b"")

            assert [name] == [other for other, _ in self.EXAMPLES if conforms(value, schemas[other], schemas)]

    def test_rejection_headers(self) -> None:
        """The documented headers of a rejection are those that are really written."""
        documented = self.DOCUMENT["components"]["messages"]["Rejection"]["headers"]["properties"]
        written = messages.rejection_message(TOPICS, record(), BadRecord("empty", "")).headers

        assert set(documented) == {name for name, _ in written}
