"""A deadline on calls that may never come back, such as those of a client that waits without one.

A thread cannot be ended from outside, so a call that misses its deadline is left behind on the
thread of its own that every call gets. Whoever calls must be able to go on without it: it may
still end, late, and then what it brings is thrown away. It knows nothing of what it watches.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, Final, TypeVar

from worker.errors import Fatal

HUNG_LIMIT: Final = 16
"""Calls that may hang at the same time. Each keeps a thread and what its client holds; an outage
leaves one behind at the most, so that so many mean a client that leaks and no longer a cluster that fails."""

T = TypeVar("T")


class Watchdog:
    """Makes calls on threads of their own, and counts those that hang."""

    def __init__(self) -> None:
        self._hung: set[threading.Thread] = set()

    def call(self, seconds: float, call: Callable[[], T], *, discard: Callable[[T], Any] | None = None) -> T:
        """Return what ``call`` returns, or raise what it raises, if it does so within ``seconds``.

        Args:
            seconds: From now.
            call: It takes no arguments, and is made on another thread.
            discard: Gets what ``call`` returns too late, to free what that holds.

        Raises:
            TimeoutError: ``call`` has not come back.
            Fatal: neither has it, nor have many before it.
        """
        return self.start(seconds, call, discard=discard)()

    def start(
        self, seconds: float, call: Callable[[], T], *, discard: Callable[[T], Any] | None = None
    ) -> Callable[[], T]:
        """Make a call as `call` does, and return at once; what is returned waits for it, as `call` would have.

        A call that hangs is counted when somebody has waited for it.
        """
        outcome: Future[T] = Future()

        def run() -> None:
            try:
                outcome.set_result(call())
            except BaseException as error:  # noqa: BLE001 - whatever it is, the caller shall have it
                outcome.set_exception(error)

        thread = threading.Thread(target=run, name="watched", daemon=True)  # or it could keep the process from ending
        deadline = time.monotonic() + seconds
        thread.start()

        def result() -> T:
            wait([outcome], max(0.0, deadline - time.monotonic()))
            if outcome.done():
                return outcome.result()
            if discard is not None:
                outcome.add_done_callback(_discarding(discard))
            self._hung = {each for each in (*self._hung, thread) if each.is_alive()}  # it may be asked for twice
            if len(self._hung) > HUNG_LIMIT:
                raise Fatal(f"{len(self._hung)} calls have not come back, the last one for {seconds:.0f} s: start anew")
            raise TimeoutError(f"it has not come back for {seconds:.0f} s, and is left behind")

        return result


def _discarding(discard: Callable[[T], Any]) -> Callable[[Future[T]], None]:
    def late(outcome: Future[T]) -> None:
        with contextlib.suppress(Exception):
            discard(outcome.result())

    return late
