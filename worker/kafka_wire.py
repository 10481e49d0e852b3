"""From a connection of Kafka's to responses and records: what the client does slowly there, or not at all.

It owns how bytes are received, kept and taken apart, and why a connection was refused. It knows nothing of
clients, their settings, or what is asked.
"""

from __future__ import annotations

import ssl
from typing import Any, Final

import numpy as np
from kafka import errors as kafka_errors
from kafka.net.manager import KafkaConnectionManager
from kafka.protocol import parser
from kafka.record import memory_records
from kafka.record.default_records import DefaultRecordBatch

RECEIVE_BYTES: Final = 256 << 10  # read from a socket at once

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


class Connections(KafkaConnectionManager):  # type: ignore[misc]  # the client ships no types
    """Connections that fail at once where they are refused, and not only when the time to connect is over.

    The client means to do so by itself, but looks for the failure before it comes. And the server closes
    the connection with its answer, so that often both are there when the client looks.
    """

    async def _build_transport(self, *args: Any, **settings: Any) -> Any:
        transport = await super()._build_transport(*args, **settings)
        transport._sock_recv = lambda: _received(transport._sock)  # noqa: SLF001 - there is no other way in
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


def _received(sock: Any) -> tuple[bytes, Exception | None]:
    """Return what can be read now, or else why the connection has ended.

    The client itself reads 4 KiB at a time, and joins all that has come, which may be many megabytes. And it throws
    away what came before the end of a connection: here that is handed on, and the end is met again.
    """
    pieces: list[bytes] = []
    try:
        while sum(map(len, pieces)) < RECEIVE_BYTES or _has_more(sock):
            piece = sock.recv(RECEIVE_BYTES)
            if not piece:
                raise ConnectionError("the broker has hung up")
            pieces.append(piece)
    except (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        pass
    except Exception as error:  # noqa: BLE001 - whatever it is, the client tells whoever waits
        if not pieces:
            return b"", kafka_errors.KafkaConnectionError(error)
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

    Those of the client are zeros first, and are copied twice before they are decoded, all of it under Python's lock:
    a worker that is behind spent a quarter of its time so.
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

    def write(self, data: bytes) -> None:
        self._bytes[self._at : self._at + len(data)] = data
        self._at += len(data)

    def read(self, size: int | None = None) -> bytes | memoryview:
        """Return so many bytes, or a view of all that are left: what is decoded of them is copied in any case."""
        rest = self._bytes[self._at :]
        taken = rest if size is None else bytes(rest[:size])
        self._at += len(taken)
        return taken


parser.KafkaBytes = _Frame  # the client has no setting for it


class _Lenient(bytearray):
    """Bytes that become text whatever they are: those that are not UTF-8 as escapes."""

    def __getitem__(self, index: Any) -> Any:
        """Return a number, or a part that is as lenient."""
        part = super().__getitem__(index)
        return _Lenient(part) if isinstance(index, slice) else part

    def decode(self, encoding: str = "utf-8", _errors: str = "strict") -> str:
        """Return the text without ever raising."""
        return super().decode(encoding, "backslashreplace")


class _Batch(DefaultRecordBatch):  # type: ignore[misc]  # the client ships no types
    """Records of which one may have a header whose name is not UTF-8: other clients can write that.

    The client's own cannot be got past, by any offset before it or behind.
    """

    def _read_msg(self, *args: Any) -> Any:
        try:
            return super()._read_msg(*args)
        except UnicodeDecodeError:  # nothing of the record has been taken yet
            self._buffer: Any = _Lenient(self._buffer)
            return super()._read_msg(*args)


memory_records.DefaultRecordBatch = _Batch  # the client has no setting for it
