"""From a connection of Kafka's to responses and records, and back: what the client does slowly there, or not at all.

It owns how bytes are waited for, received, kept, taken apart and put together, and why a connection was refused. It
knows nothing of clients, their settings, or what is asked.
"""

from __future__ import annotations

import selectors
import socket
import ssl
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

import numpy as np
from kafka import errors as kafka_errors
from kafka.net.manager import KafkaConnectionManager
from kafka.net.selector import NetworkSelector, Task
from kafka.protocol import parser
from kafka.protocol.consumer import FetchResponse
from kafka.record import memory_records
from kafka.record.default_records import (
    ControlRecord,
    DefaultRecord,
    DefaultRecordBatch,
    DefaultRecordBatchBuilder,
    DefaultRecordMetadata,
)
from kafka.record.util import decode_varint, encode_varint

RECEIVE_BYTES: Final = 16 << 10  # read at once of what is not known yet; a response goes straight into its frame
MANY_RECORDS: Final = 64 << 10  # bytes of a partition that are worth to keep the frame of their response for
GATHER_BYTES: Final = 512 << 10  # so much of a response may gather in the system before it is read

LETS_GATHER: Final = sys.platform == "linux"
"""Elsewhere a socket may never be told of once its buffer holds less than that and has no room for more."""

HUNG_UP: Final = "the broker has hung up"

BROKEN: Final = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)


class TlsError(kafka_errors.KafkaError):  # type: ignore[misc]  # the client ships no types
    """No connection came about, for TLS does not allow it."""


REFUSED: Final = (
    TlsError,
    kafka_errors.AuthorizationError,
    kafka_errors.SaslAuthenticationFailedError,
    kafka_errors.UnsupportedSaslMechanismError,
    kafka_errors.IllegalSaslStateError,
)


class Selector(NetworkSelector):  # type: ignore[misc]  # the client ships no types
    """A selector that is not asked for a socket that it does not know.

    The client registers a socket anew for each wait, and first asks for it. That it is not there is told with two
    descriptions of the socket, each of which asks the system for both of its addresses, under Python's lock.
    """

    def register_event(self, fileobj: Any, event: int, task: Any) -> None:
        """Have ``task`` go on when a file is ready for an event."""
        if not isinstance(task, Task) or fileobj.fileno() in iter(self._selector.get_map()):
            super().register_event(fileobj, event, task)
        else:
            self._selector.register(fileobj, event, (task, None) if event == selectors.EVENT_READ else (None, task))


class Connections(KafkaConnectionManager):  # type: ignore[misc]  # the client ships no types
    """Connections that fail at once where they are refused, and not only when the time to connect is over.

    The client means to do so by itself, but looks for the failure before it comes. And the server closes
    the connection with its answer, so that often both are there when the client looks.
    """

    async def _build_transport(self, *args: Any, **settings: Any) -> Any:
        transport = await super()._build_transport(*args, **settings)
        transport._sock_recv = _Receiver(transport)  # noqa: SLF001 - there is no other way in
        return transport

    async def _connect(self, node: Any, connection: Any, *args: Any, **settings: Any) -> None:
        def note(error: Exception) -> None:
            refused = _refused_by_tls(error)
            if refused is not None:
                error = TlsError(f"TLS with {node.host}:{node.port} failed: {refused}")
            if isinstance(error, REFUSED):
                self._auth_failures[node.node_id] = error

        await super()._connect(node, connection, *args, **settings)
        connection.init_future.add_errback(note)


class _Receiver:
    """Receives what comes in on one connection, and lets what is large gather before it says so.

    A response of megabytes comes in many pieces, and for each of them Python's lock was taken a dozen times: a fifth of
    what receiving costs. How much is still to come is known, and so the system is told to wake nobody for less
    (``SO_RCVLOWAT``). An end or an error is told at once all the same. With TLS it is not known how much of it the
    system still has.
    """

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._least = 1

    def __call__(self) -> tuple[bytes, Exception | None]:
        sock, frame = self._transport._sock, self._frame()  # noqa: SLF001 - there is no other way in
        received, error = _received(sock, frame)
        if LETS_GATHER and error is None and not isinstance(sock, ssl.SSLSocket):
            self._gather(sock, 0 if frame is None else frame.missing)
        return received, error

    def _gather(self, sock: Any, missing: int) -> None:
        """Let the system wait for ``missing`` bytes, or for as many as surely find room in its buffer."""
        least = 1
        if missing > 1:
            least = min(missing, GATHER_BYTES, sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 4)
        if least != self._least:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)
            self._least = least

    def _frame(self) -> _Frame | None:
        """Return the frame of a response that has begun."""
        parser = self._transport.get_protocol().parser
        frame: _Frame | None = parser._rbuffer if parser._receiving else None  # noqa: SLF001
        return frame


def _received(sock: Any, frame: _Frame | None = None) -> tuple[bytes, Exception | None]:
    """Return what can be read now, or else why the connection has ended.

    What belongs to ``frame`` is read into it, but for its last byte: by that the client sees that it is complete.
    The client itself reads 4 KiB at a time, and joins all that has come, which may be many megabytes. And it throws
    away what came before the end of a connection: here that is handed on, and the end is met again.
    """
    pieces: list[bytes] = []
    try:
        while frame is not None and frame.missing > 1:
            frame.receive(sock)
        while sum(map(len, pieces)) < RECEIVE_BYTES or _has_more(sock):
            piece = sock.recv(RECEIVE_BYTES)
            if not piece:
                raise ConnectionError(HUNG_UP)
            pieces.append(piece)
    except (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        pass
    except Exception as error:  # noqa: BLE001 - whatever it is, the client tells whoever waits
        if not pieces:
            # Without its frames, one of which holds the response that was being received, and the error itself.
            return b"", kafka_errors.KafkaConnectionError(error.with_traceback(None))
    return b"".join(pieces), None


def _has_more(sock: Any) -> bool:
    """Return whether TLS has taken more from the connection already: who watches that would never tell."""
    return isinstance(sock, ssl.SSLSocket) and sock.pending() > 0


def _refused_by_tls(error: Exception) -> str | None:
    """Return why TLS has refused a connection, us or them; None if the connection broke in any other way."""
    for cause in (error.__context__, *error.args):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return cause.verify_message
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, BROKEN):
            return cause.reason or str(cause)
    return None


class _Frame:
    """The bytes of one response, as they are put together and taken apart.

    Those of the client are zeros first, and are copied three times before they are decoded, all of it under Python's
    lock: a worker that is behind spent a quarter of its time so.
    """

    def __init__(self, size: int) -> None:
        self._bytes = np.empty(size, np.uint8).data
        self._at = 0

    def __len__(self) -> int:
        return len(self._bytes)

    def tell(self) -> int:
        return self._at

    def seek(self, at: int) -> None:
        self._at = at

    @property
    def missing(self) -> int:
        """How many bytes are still to come."""
        return len(self._bytes) - self._at

    def receive(self, sock: Any) -> None:
        """Read what is there of all but the last byte.

        Raises:
            BlockingIOError, SSLWantReadError: nothing is there yet.
            OSError: the connection has ended.
        """
        count = sock.recv_into(self._bytes[self._at : -1])
        if not count:
            raise ConnectionError(HUNG_UP)
        self._at += count

    def write(self, data: bytes) -> None:
        self._bytes[self._at : self._at + len(data)] = data
        self._at += len(data)

    def read(self, size: int | None = None) -> bytes | memoryview:
        """Return so many bytes, or a view of all that are left: what is decoded of it is copied, or keeps the frame."""
        rest = self._bytes[self._at :]
        taken = rest if size is None else bytes(rest[:size])
        self._at += len(taken)
        return taken


def _taken(records: memoryview) -> bytes | memoryview:
    """Return the records of a partition in a response, as a view if they are many.

    Each of them is copied when it is read, and the client would copy all of them once more before.
    """
    return records if len(records) >= MANY_RECORDS else bytes(records)


def _taking(emit: Callable[..., None]) -> Callable[..., None]:
    """Have ``bytes`` take records in the code that the client writes to decode a fetch, and in nothing else."""

    def emit_taking(context: Any, *args: Any, **settings: Any) -> None:
        context.globs["bytes"] = _taken
        emit(context, *args, **settings)

    return emit_taking


class _Batch(DefaultRecordBatch):  # type: ignore[misc]  # the client ships no types
    """Records as they came, each of which is copied when it is read, and not before unless they are compressed.

    The client copies them twice more. And it cannot get past a record that has a header whose name is not UTF-8, by
    any offset before it or behind; other clients can write that, and here the name has escapes for such bytes.
    """

    def __init__(self, buffer: memoryview) -> None:
        self._buffer: Any = buffer
        self._header_data: Any = self.HEADER_STRUCT.unpack_from(buffer)
        self._pos: int = self.HEADER_STRUCT.size
        self._num_records = self._header_data[12]
        self._next_record_index = 0
        self._decompressed = False

    def _read_msg(self, *_defaults: Any) -> Any:
        buffer = self._buffer
        length, begin = decode_varint(buffer, self._pos)
        later, at = decode_varint(buffer, begin + 1)  # behind the attributes, of which a record has none
        behind, at = decode_varint(buffer, at)
        key, at = _bytes(buffer, at)
        value, at = _bytes(buffer, at)
        count, at = decode_varint(buffer, at)
        if count < 0:
            raise kafka_errors.CorruptRecordError(f"a record has {count} headers")
        headers = []
        for _ in range(count):
            name, at = _bytes(buffer, at)
            if name is None:
                raise kafka_errors.CorruptRecordError("a header has no name")
            content, at = _bytes(buffer, at)
            headers.append((name.decode("utf-8", "backslashreplace"), content))
        if at - begin != length:
            raise kafka_errors.CorruptRecordError(f"a record of {length} bytes has {at - begin}")
        self._pos = at
        stamped = self.timestamp_type == self.LOG_APPEND_TIME
        return (ControlRecord if self.is_control_batch else DefaultRecord)(
            length,
            self.base_offset + behind,
            self.max_timestamp if stamped else self.first_timestamp + later,
            self.timestamp_type,
            key,
            value,
            headers,
        )


def _bytes(buffer: Any, at: int) -> tuple[bytes | None, int]:
    """Return bytes that stand behind their length, or None if that is negative; and where they end."""
    size, at = decode_varint(buffer, at)
    return (None, at) if size < 0 else (bytes(buffer[at : at + size]), at + size)


class _BatchBuilder(DefaultRecordBatchBuilder):  # type: ignore[misc]  # the client ships no types
    """Records that are put together from parts which mostly are known: lengths, and the names of headers.

    The client writes a record byte by byte.
    """

    def append(self, offset: int, timestamp: int | None, key: Any, value: Any, headers: Any) -> Any:
        """Add a record if there is room for it, or it is the first one; return None if there is not."""
        if timestamp is None:
            timestamp = round(1000 * time.time())
        first, latest = (self._first_timestamp, self._max_timestamp) if self._num_records else (timestamp, timestamp)
        parts = [b"\0", _varint(timestamp - first), _varint(offset), *_sized(key), *_sized(value)]
        parts.append(_varint(len(headers)))
        for name, content in headers:
            parts.append(_name(name))
            parts += _sized(content)
        size = sum(map(len, parts))
        record = b"".join((_varint(size), *parts))
        if self._num_records and len(self._buffer) + len(record) > self._batch_size:
            return None
        self._first_timestamp: Any = first
        self._max_timestamp: Any = max(latest, timestamp)
        self._last_offset: Any = offset
        self._num_records += 1
        self._buffer += record
        return DefaultRecordMetadata(offset, len(record), timestamp)


def _sized(data: bytes | None) -> tuple[bytes, bytes]:
    """Return bytes, and before them how many they are; of none that is -1."""
    return (_varint(-1), b"") if data is None else (_varint(len(data)), data)


@lru_cache(maxsize=4096)
def _varint(number: int) -> bytes:
    """Return a number as a record has it: in as few bytes as it needs."""
    encoded = bytearray()
    encode_varint(number, encoded.append)
    return bytes(encoded)


def _name(name: str) -> bytes:
    """Return the name of a header as a record has it; of those that others chose, only short ones are kept."""
    return _known(name) if len(name) <= 64 else b"".join(_sized(name.encode()))


@lru_cache(maxsize=256)
def _known(name: str) -> bytes:
    return b"".join(_sized(name.encode()))


# The client has no settings for them.
parser.KafkaBytes = _Frame
_records: Final[Any] = FetchResponse.FetchableTopicResponse.PartitionData.fields["records"]
_records.emit_decode_from = _taking(_records.emit_decode_from)
memory_records.DefaultRecordBatch = _Batch
memory_records.DefaultRecordBatchBuilder = _BatchBuilder
