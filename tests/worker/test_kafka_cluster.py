"""What is read from a socket, whatever has come by then: here on a real pair of sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from kafka.errors import KafkaConnectionError

from worker import kafka_cluster
from worker.kafka_cluster import _received

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

    def test_all_that_has_come(self, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also more than is read at once."""
        monkeypatch.setattr(kafka_cluster, "RECEIVE_BYTES", 1000)
        here, there = pair
        there.sendall(bytes(range(250)) * 10)

        assert (bytes(range(250)) * 10, None) == _received(here)

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
