"""Earshot's commands as processes, as a user starts them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

BIN: Final = Path(sys.executable).parent


class Worker:
    """A running `earshot-worker run` and its log."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log

    def events(self, action: str) -> list[dict[str, Any]]:
        """Return what it has logged under ``action`` so far."""
        lines = self._log.read_text().splitlines()
        entries = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return [entry for entry in entries if entry["action"] == action]

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to drain, and return its exit status."""
        self.process.send_signal(how)
        return self.process.wait(timeout=30)


@contextmanager
def worker(log: Path, *arguments: str | Path) -> Iterator[Worker]:
    """Run a worker; what is left of it at the end is killed, and its log shown if the test fails."""
    with (
        log.open("wb") as errors,
        subprocess.Popen([BIN / "earshot-worker", "run", *arguments], stderr=errors) as process,
    ):
        try:
            yield Worker(process, log)
        except BaseException:
            print(f"{log}:\n{log.read_text()[-4000:]}")
            raise
        finally:
            process.kill()


def run(*command: str | Path, timeout: float = 120.0) -> str:
    """Run one of Earshot's commands, insist that it succeeds, and return what it printed."""
    done = subprocess.run(
        [BIN / command[0], *command[1:]], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"{command}: status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    """Return the first true value of ``condition``; fail if there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)  # between two looks, up to the deadline
    raise AssertionError(f"{what}: not within {seconds:.0f} s")
