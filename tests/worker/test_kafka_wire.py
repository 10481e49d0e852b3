"""What is read from a socket, here on real pairs of them, the bytes of a response, and records in them."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Iterator
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka.errors import CorruptRecordError, KafkaConnectionError
from kafka.protocol import parser
from kafka.protocol.consumer import FetchResponse
from kafka.protocol.consumer.group import SyncGroupResponse
from kafka.protocol.consumer.metadata import ConsumerProtocolAssignment
from kafka.protocol.frame import KafkaBytes
from kafka.record import memory_records
from kafka.record.default_records import DefaultRecordBatch, DefaultRecordBatchBuilder

from worker import kafka_wire
from worker.kafka_wire import MANY_RECORDS, Selector, _Batch, _BatchBuilder, _Frame, _known, _received, _Receiver

Pair = tuple[socket.socket, socket.socket]
PATIENCE = 10.0  # seconds to wait for what must come


def readable(sock: socket.socket, seconds: float) -> bool:
    """Whether a socket is ready to be read, now or within so many seconds."""
    return bool(select.select([sock], [], [], seconds)[0])


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two ends of a connection, the first of which does not wait."""
    here, there = socket.socketpair()
    here.setblocking(False)
    with here, there:
        yield here, there


class TestReceived:
    def test_nothing_yet(self, pair: Pair) -> None:
        """Nothing has come, and nothing has ended."""
        assert (b"", None) == _received(pair[0])

    def test_what_has_come(self, pair: Pair) -> None:
        """All of it, if it is not much."""
        here, there = pair
        there.sendall(b"a response")

        assert (b"a response", None) == _received(here)

    def test_as_much_as_is_joined_cheaply(self, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of more the rest stays where it is, and whoever waits for the socket is told of it again."""
        monkeypatch.setattr(kafka_wire, "RECEIVE_BYTES", 1000)
        here, there = pair
        there.sendall(bytes(range(250)) * 10)

        pieces = [_received(here)[0] for _ in range(3)]

        assert bytes(range(250)) * 10 == b"".join(pieces)
        assert max(map(len, pieces)) <= 1000

    def test_what_came_before_the_end(self, pair: Pair) -> None:
        """It is handed on, and the end is told when there is nothing else to tell."""
        here, there = pair
        there.send(b"refused")
        there.close()

        assert (b"refused", None) == _received(here)
        received, error = _received(here)
        assert b"" == received
        assert isinstance(error, KafkaConnectionError)

    def test_a_response_that_has_begun(self, pair: Pair) -> None:
        """It is read into its frame, but for the last byte, which comes with what follows."""
        here, there = pair
        frame = _Frame(10)
        frame.write(b"012")

        there.sendall(b"3456")
        assert (b"", None) == _received(here, frame)
        there.sendall(b"789next")
        assert (b"9next", None) == _received(here, frame)

        frame.write(b"9")
        frame.seek(0)
        assert b"0123456789" == frame.read()

    def test_the_end_of_a_response_that_has_begun(self, pair: Pair) -> None:
        """It is told, although something has come before it: that was in vain."""
        here, there = pair
        there.sendall(b"012")
        there.close()

        received, error = _received(here, _Frame(10))

        assert b"" == received
        assert isinstance(error, KafkaConnectionError)

    def test_a_connection_that_broke(self, pair: Pair) -> None:
        """The reason is told."""
        here, _ = pair
        here.close()

        received, error = _received(here)

        assert b"" == received
        assert "Bad file descriptor" in str(error)


class TestSelector:
    """Tasks wait for sockets as they do with the client's own selector, but the system is not asked who these are."""

    class Undescribed(socket.socket):
        """A socket that must not be described."""

        def __repr__(self) -> str:
            raise AssertionError("described")

    @pytest.fixture
    def selector(self) -> Iterator[Selector]:
        """A selector of our own."""
        selector = Selector()
        yield selector
        selector.close()

    def test_a_task_waits_time_and_again(self, pair: Pair, selector: Selector) -> None:
        """Each byte wakes the one that waits."""
        heard: list[bytes] = []
        with self.Undescribed(fileno=pair[0].detach()) as here:

            async def read() -> None:
                while len(heard) < 3:
                    await selector.wait_read(here)
                    heard.append(here.recv(1))

            selector.call_soon(read)
            for each in (b"a", b"b", b"c"):
                pair[1].sendall(each)
                self.poll_until(selector, lambda: heard[-1:] == [each])  # noqa: B023 - it is called at once

    def test_a_task_waits_to_write(self, pair: Pair, selector: Selector) -> None:
        """Alone, it is woken as well."""
        done: list[bool] = []

        async def write() -> None:
            await selector.wait_write(pair[0])
            done.append(True)

        selector.call_soon(write)
        self.poll_until(selector, lambda: done == [True])

    def test_two_tasks_wait_for_one_socket(self, pair: Pair, selector: Selector) -> None:
        """One to read, and one to write."""
        here, there = self.Undescribed(fileno=pair[0].detach()), pair[1]
        done: list[bytes] = []

        async def read() -> None:
            await selector.wait_read(here)
            done.append(here.recv(1))

        async def write() -> None:
            await selector.wait_write(here)
            done.append(b"written")

        with here:
            selector.call_soon(read)
            selector.poll(timeout_ms=0)
            selector.call_soon(write)
            self.poll_until(selector, lambda: done == [b"written"])
            there.sendall(b"a")
            self.poll_until(selector, lambda: done == [b"written", b"a"])

    @staticmethod
    def poll_until(selector: Selector, condition: Callable[[], bool]) -> None:
        """Go on until something holds."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline
            selector.poll(timeout_ms=100)


class TestReceiver:
    """Large responses gather in the system before anybody is woken."""

    @pytest.fixture
    def ends(self) -> Iterator[Pair]:
        """Two ends of a connection by TCP, the first of which does not wait."""
        with socket.create_server(("localhost", 0)) as server:
            here = socket.create_connection(server.getsockname())
            there, _ = server.accept()
        here.setblocking(False)
        with here, there:
            yield here, there

    @pytest.fixture
    def receiver(self, ends: Pair) -> tuple[_Receiver, SimpleNamespace]:
        """One on the first end, which has begun with a response of 1,000 bytes; and the client's parser."""
        parser = SimpleNamespace(_receiving=True, _rbuffer=_Frame(1000))
        protocol = SimpleNamespace(parser=parser)
        return _Receiver(SimpleNamespace(_sock=ends[0], get_protocol=lambda: protocol)), parser

    def test_the_rest_is_told_of_at_once(self, ends: Pair, receiver: tuple[_Receiver, SimpleNamespace]) -> None:
        """The socket is not ready before all of it is there."""
        (here, there), (receive, parser) = ends, receiver
        there.sendall(b"x" * 10)
        assert readable(here, PATIENCE)
        assert (b"", None) == receive()
        assert 990 == parser._rbuffer.missing

        there.sendall(b"x" * 989)
        assert not readable(here, 0.2)
        there.sendall(b"x")
        assert readable(here, PATIENCE)
        assert (b"x", None) == receive()
        assert 1 == parser._rbuffer.missing

    def test_what_follows_is_told_of_byte_by_byte(
        self, ends: Pair, receiver: tuple[_Receiver, SimpleNamespace]
    ) -> None:
        """Of the next response nothing is known yet."""
        (here, there), (receive, parser) = ends, receiver
        there.sendall(b"x" * 10)
        assert readable(here, PATIENCE)
        receive()
        there.sendall(b"x" * 990)
        assert readable(here, PATIENCE)
        parser._rbuffer.write(receive()[0])
        assert not parser._rbuffer.missing

        there.sendall(b"x")
        assert readable(here, PATIENCE)

    def test_the_end_is_told_at_once(self, ends: Pair, receiver: tuple[_Receiver, SimpleNamespace]) -> None:
        """However much was to come."""
        (here, there), (receive, _) = ends, receiver
        there.sendall(b"x")
        assert readable(here, PATIENCE)
        receive()
        there.close()

        assert readable(here, PATIENCE)
        assert isinstance(receive()[1], KafkaConnectionError)


class TestFrame:
    @given(
        pieces=st.lists(st.binary(max_size=30), max_size=6), reads=st.lists(st.integers(0, 40) | st.none(), max_size=8)
    )
    def test_it_is_what_the_client_has(self, pieces: list[bytes], reads: list[int | None]) -> None:
        """Whatever is put together and read, the client's own frame holds and returns the same."""
        size = sum(map(len, pieces))
        ours, theirs = _Frame(size), KafkaBytes(size)
        for piece in pieces:
            ours.write(piece)
            theirs.write(piece)
        assert theirs.tell() == ours.tell() == len(ours)
        ours.seek(0)
        theirs.seek(0)
        for count in reads:
            assert theirs.read(count) == ours.read(count)
            assert theirs.tell() == ours.tell()

    def test_many_records_are_not_copied_when_their_response_is_decoded(self) -> None:
        """They are a view of the frame; what is small is copied, and so keeps no frame."""
        many, few = bytes(MANY_RECORDS), b"few"
        topic = FetchResponse.FetchableTopicResponse
        partitions = [
            topic.PartitionData(
                partition_index=number,
                error_code=0,
                high_watermark=0,
                last_stable_offset=0,
                log_start_offset=0,
                aborted_transactions=None,
                preferred_read_replica=-1,
                records=records,
            )
            for number, records in enumerate([many, few, None])
        ]
        sent = FetchResponse(
            throttle_time_ms=0,
            error_code=0,
            session_id=0,
            responses=[topic(topic="audio.in", topic_id=None, partitions=partitions)],
            version=12,
        ).encode()
        frame = _Frame(len(sent))
        frame.write(sent)
        frame.seek(0)

        found = [each.records for each in FetchResponse[12].decode(frame).responses[0].partitions]

        assert [many, few, None] == found
        assert [memoryview, bytes, type(None)] == [type(each) for each in found]

    def test_what_is_large_and_no_records_is_decoded_as_ever(self) -> None:
        """As the share of a member that has very many partitions, which the client decodes once more."""
        share = ConsumerProtocolAssignment(
            assigned_partitions=[
                ConsumerProtocolAssignment.TopicPartition(topic="audio.in", partitions=list(range(MANY_RECORDS // 2)))
            ],
            user_data=None,
            version=1,
        )
        sent = SyncGroupResponse(
            throttle_time_ms=0,
            error_code=0,
            protocol_type="consumer",
            protocol_name="sticky",
            assignment=share.encode(),
            version=5,
        ).encode()
        frame = _Frame(len(sent))
        frame.write(sent)
        frame.seek(0)

        found = ConsumerProtocolAssignment.decode(SyncGroupResponse[5].decode(frame).assignment)

        assert MANY_RECORDS // 2 == len(found.assigned_partitions[0].partitions)

    def test_the_rest_is_not_copied(self) -> None:
        """What is decoded is a view, which is what frames of our own are for."""
        frame = _Frame(4)
        rest = frame.read()
        frame.seek(0)
        frame.write(b"late")

        assert b"late" == rest

    def test_the_client_uses_it(self) -> None:
        """It has no setting for it, and a new version may call its own by another name."""
        assert parser.KafkaBytes is _Frame
        assert isinstance(parser.KafkaProtocol()._header, _Frame)


HEADERS = st.lists(st.tuples(st.text(max_size=10), st.binary(max_size=200) | st.none()), max_size=4)
RECORDS = st.lists(
    st.tuples(
        st.integers(0, 2**41), st.binary(max_size=20) | st.none(), st.binary(max_size=20_000) | st.none(), HEADERS
    ),
    min_size=1,
    max_size=5,
)
FIELDS = attrgetter("offset", "timestamp", "timestamp_type", "key", "value", "headers", "size_in_bytes")


def written(kind: Any, records: list[Any], size: int = 1 << 20) -> tuple[bytes, list[Any]]:
    """The bytes of a batch that a builder of some kind has made, and what it has said of each record."""
    builder = kind(2, 0, is_transactional=True, producer_id=7, producer_epoch=1, base_sequence=3, batch_size=size)
    taken = [builder.append(offset, *record) for offset, record in enumerate(records)]
    said = [None if each is None else (each.offset, each.size, each.timestamp) for each in taken]
    return bytes(builder.build()), said


class TestBatchBuilder:
    @given(records=RECORDS, size=st.integers(61, 30_000))
    def test_it_writes_what_the_client_writes(self, records: list[Any], size: int) -> None:
        """The same bytes, and of each record whether there was room, its offset, size and timestamp."""
        assert written(DefaultRecordBatchBuilder, records, size) == written(_BatchBuilder, records, size)

    def test_long_names_are_not_kept(self) -> None:
        """Those of a rejected record are its sender's, and may be megabytes."""
        written(_BatchBuilder, [(0, b"key", b"value", [("content-type", b"audio/wav")])])
        kept = _known.cache_info().currsize
        written(_BatchBuilder, [(0, b"key", b"value", [("x" * 1000, b"")])])

        assert kept == _known.cache_info().currsize

    def test_a_record_without_a_timestamp(self) -> None:
        """It was sent now."""
        before = int(1000 * time.time())
        ((_, _, timestamp),) = written(_BatchBuilder, [(None, b"key", b"value", [])])[1]

        assert before <= timestamp <= 1000 * time.time() + 1

    def test_the_client_uses_it(self) -> None:
        """As for frames."""
        assert memory_records.DefaultRecordBatchBuilder is _BatchBuilder


class TestBatch:
    @given(records=RECORDS)
    def test_it_reads_what_the_client_reads(self, records: list[Any]) -> None:
        """Whatever a record holds, and also of a batch that says what it is."""
        data, _ = written(DefaultRecordBatchBuilder, records)
        ours, theirs = _Batch(memoryview(data)), DefaultRecordBatch(data)

        assert ours.validate_crc()
        assert list(map(FIELDS, theirs)) == list(map(FIELDS, ours))

    @given(records=RECORDS, where=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255))
    def test_damage(self, records: list[Any], where: float, bits: int) -> None:
        """It is found by the sum, and if nobody looks at that, reading ends as an error that the client knows."""
        data = bytearray(written(DefaultRecordBatchBuilder, records)[0])
        body = DefaultRecordBatch.HEADER_STRUCT.size
        data[body + int(where * (len(data) - body))] ^= bits
        batch = _Batch(memoryview(data))

        assert not batch.validate_crc()
        with contextlib.suppress(CorruptRecordError):
            assert len(records) == len(list(batch))

    def test_the_client_uses_it(self) -> None:
        """As for frames."""
        assert memory_records.DefaultRecordBatch is _Batch
