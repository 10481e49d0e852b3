"""Workers of the chaos test under supervision, as an operator would keep them: what was killed is started again.

A worker may be killed, and may give up on a broker that stays away; it must not end in any other
way. This module knows how a worker is started, watched and stopped, and nothing of what it serves.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.system.processes import BIN
from worker.__main__ import EXIT_GAVE_UP

STOP: Final = 60.0
"""Seconds for a worker to finish its batch and leave."""


class MemberFailed(Exception):
    """A worker ended by itself, or did not obey."""


class Member:
    """A worker under supervision: it is started again when it was killed."""

    def __init__(self, name: str, folder: Path, *arguments: str | Path) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._command = [BIN / "earshot-worker", "run", "--instance", name, *arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self._before = 0  # bytes in the log when it was started last

    @property
    def ready(self) -> bool:
        """Whether it has loaded its model since it was started last; from then on it obeys signals, too."""
        return self._has_said(b'"started"')

    @property
    def serving(self) -> bool:
        """Whether it has been given partitions since it was started last."""
        return self.alive and self._has_said(b'"assigned"')

    @property
    def alive(self) -> bool:
        """Whether it is meant to run."""
        return self._process is not None

    def start(self) -> None:
        with self.log.open("ab") as errors:
            self._before = errors.tell()
            self._process = subprocess.Popen(self._command, stderr=errors)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None

    def look_after(self) -> None:
        """Start it again if it has given up on the broker; it must not end for any other reason."""
        if self._process is None or (status := self._process.poll()) is None:
            return
        if status != EXIT_GAVE_UP:
            raise MemberFailed(f"{self.name} ended by itself with status {status}:\n{self.log.read_text()[-4000:]}")
        tell(f"{self.name} gave up on the broker, and is started again")
        self.start()

    def stop(self) -> None:
        """Ask it to drain, and insist that it does."""
        self.look_after()
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(STOP)
        if status != 0:
            raise MemberFailed(f"{self.name} did not drain, status {status}:\n{self.log.read_text()[-4000:]}")

    def _has_said(self, action: bytes) -> bool:
        return action in self.log.read_bytes()[self._before :]


@contextmanager
def members(group: list[Member]) -> Iterator[list[Member]]:
    """Start workers; what is left of them at the end is killed, and their logs are shown if it fails."""
    try:
        for each in group:
            each.start()
        yield group
    except BaseException:
        for each in group:
            tell(f"{each.log}:\n{each.log.read_text()[-2000:]}")
        raise
    finally:
        for each in group:
            each.kill()


def tell(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)
