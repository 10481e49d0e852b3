"""The deadline on calls that may never come back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from worker import watchdog
from worker.errors import Fatal
from worker.watchdog import Watchdog

PATIENCE = 10.0  # seconds to wait for what must come


@pytest.fixture
def hang() -> Iterator[Callable[[], str]]:
    """A call that comes back when the test has ended."""
    over = threading.Event()

    def hang() -> str:
        over.wait(PATIENCE)
        return "late"

    yield hang
    over.set()


def test_a_call_that_comes_back_is_an_ordinary_call() -> None:
    """Its result is returned."""
    assert Watchdog().call(PATIENCE, lambda: "result") == "result"


@pytest.mark.parametrize("error", [ValueError("no"), TimeoutError("its own"), KeyboardInterrupt()])
def test_what_a_call_raises_is_raised(error: BaseException) -> None:
    """The same exception, also one that looks like a missed deadline."""

    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        Watchdog().call(PATIENCE, fail)

    assert error is caught.value


def test_a_call_that_hangs_is_left_behind(hang: Callable[[], str]) -> None:
    """The caller goes on when the deadline has passed, and can call again."""
    watchdog = Watchdog()
    started = time.monotonic()

    with pytest.raises(TimeoutError, match=r"for 0 s, and is left behind"):
        watchdog.call(0.1, hang)

    assert time.monotonic() - started < PATIENCE / 2
    assert watchdog.call(PATIENCE, lambda: "next") == "next"


def test_what_comes_too_late_is_discarded() -> None:
    """A connection that was made after all can be closed."""
    over = threading.Event()
    discarded = threading.Event()
    brought: list[str] = []

    def late() -> str:
        over.wait(PATIENCE)
        return "a connection"

    def discard(connection: str) -> None:
        brought.append(connection)
        discarded.set()

    with pytest.raises(TimeoutError):
        Watchdog().call(0.05, late, discard=discard)
    assert [] == brought
    over.set()

    assert discarded.wait(PATIENCE)
    assert ["a connection"] == brought


def test_hanging_calls_do_not_pile_up_without_end(hang: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """When more than a few hang, only a new process helps."""
    monkeypatch.setattr(watchdog, "HUNG_LIMIT", 2)
    dog = Watchdog()
    for _ in range(2):
        with pytest.raises(TimeoutError):
            dog.call(0.01, hang)

    with pytest.raises(Fatal, match="3 calls have not come back"):
        dog.call(0.01, hang)


def test_calls_that_came_back_late_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage once a month leaves nothing that adds up."""
    monkeypatch.setattr(watchdog, "HUNG_LIMIT", 2)
    dog = Watchdog()
    for _ in range(5):
        over, ended = threading.Event(), threading.Event()

        def late(over: threading.Event = over) -> str:
            over.wait(PATIENCE)
            return "late"

        def discard(_: str, ended: threading.Event = ended) -> None:
            ended.set()

        with pytest.raises(TimeoutError):
            dog.call(0.01, late, discard=discard)
        over.set()
        assert ended.wait(PATIENCE)
        for thread in dog._hung:
            thread.join(PATIENCE)
