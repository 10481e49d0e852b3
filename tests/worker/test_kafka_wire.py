"""What is read from a socket, here on real pairs of them, and the bytes of a response."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka.errors import KafkaConnectionError
from kafka.protocol import parser
from kafka.protocol.frame import KafkaBytes

from worker import kafka_wire
from worker.kafka_wire import _Frame, _received

Pair = tuple[socket.socket, socket.socket]


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

    def test_a_connection_that_broke(self, pair: Pair) -> None:
        """The reason is told."""
        here, _ = pair
        here.close()

        received, error = _received(here)

        assert b"" == received
        assert "Bad file descriptor" in str(error)


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
