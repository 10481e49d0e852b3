"""Members of one consumer group as processes of one command: started, watched, started again, drained.

Owns the processes, their signals and their log; it must not know what a member serves. Each member
is a fork of the supervisor, which has neither threads nor large libraries, and so stays small.

What a member says on standard error comes through a pipe and is passed on line by line, so that
no line stands inside another. A member whose supervisor is gone drains by itself.
"""

from __future__ import annotations

import os
import selectors
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Event, Thread
from typing import Final, NoReturn

from worker.errors import Fatal
from worker.telemetry import Log

FIRST_PAUSE: Final = 1.0
"""Seconds before a member that was killed is started again; the pause doubles with each quick failure."""

LONGEST_PAUSE: Final = 30.0
"""Seconds between two starts at the most."""

SETTLED: Final = 60.0
"""Seconds after which the end of a member is no quick failure: it had started, joined and served."""

QUICK_FAILURES: Final = 5
"""Quick failures of one member in a row after which all members end."""

DRAIN: Final = 120.0
"""Seconds for a batch in hand to be committed, since a broker's calls are bounded to about one minute; then SIGKILL."""

TICK: Final = 0.1
"""Seconds between two looks at signals and processes."""

KILLED: Final = 130
"""The exit status of a member that was told to end at once."""

ONE_THREAD: Final = dict.fromkeys(
    (
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "BLIS_NUM_THREADS",
        "VECLIB_MAXIMUM_THREADS",
        "NUMBA_NUM_THREADS",
    ),
    "1",
)
"""For the environment of a member: with one process for each core, more threads would only fight for it."""


class _Member:
    """One process and what is left to say of its log; ``pid`` is None while there is no process."""

    def __init__(self, name: str, serve: Callable[[], int]) -> None:
        self.name = name
        self.serve = serve
        self.pid: int | None = None
        self.log = -1  # the end of its pipe that is read
        self.unfinished = b""  # of a line
        self.started = 0.0
        self.due: float | None = 0.0  # when it is to be started, None if not
        self.failures = 0  # quick ones in a row


def supervise(members: Mapping[str, Callable[[], int]], stop: Event, log: Log) -> int:
    """Run ``members`` until ``stop`` is set or one of them ends for good, and return the exit status.

    Each is a function that runs in a process of its own, and returns its exit status once it has
    drained; there ``stop`` is set by SIGTERM and SIGINT. One that is killed, or ends without being
    asked to, is started again. One that ends with a status of its own has said why: starting it
    again would not help, so all others are drained and its status is the command's.

    Raises:
        Fatal: one member has failed quickly too often.
    """
    return _Supervisor([_Member(name, serve) for name, serve in members.items()], stop, log).run()


class _Supervisor:
    def __init__(self, members: Sequence[_Member], stop: Event, log: Log) -> None:
        self._members = members
        self._stop = stop
        self._log = log
        self._selector = selectors.DefaultSelector()
        self._lifeline = os.pipe()  # nothing is ever written: it ends when the supervisor does
        self._status = 0
        self._gave_up: Fatal | None = None
        self._deadline: float | None = None  # to be drained by, once that has begun

    def run(self) -> int:
        try:
            self._watch()
        except Exception:  # such as a log whose reader has gone; the members must not outlive who watches them
            with _unheard():
                self._stop.set()
                self._watch()
            raise
        if self._gave_up is not None:
            raise self._gave_up
        self._log.info("drained", status=self._status)
        return self._status

    def _watch(self) -> None:
        """Start the members and look after them until none is left."""
        while any(member.pid is not None or member.due is not None for member in self._members):
            now = time.monotonic()
            if self._stop.is_set():
                self._drain(now)
            for member in self._members:
                if member.pid is None and member.due is not None and member.due <= now:
                    self._start(member, now)
            for key, _ in self._selector.select(TICK):
                self._pass_on(key.data)
            for member in self._members:
                self._look_after(member)

    def _start(self, member: _Member, now: float) -> None:
        member.started, member.due = now, None
        pipe: tuple[int, ...] = ()
        try:
            pipe = os.pipe()
            member.pid = os.fork()
        except OSError as error:  # no room for one more process or file, which may pass
            for end in pipe:
                os.close(end)
            self._start_again(member, {"error": str(error)}, now)
            return
        ours, theirs = pipe
        if member.pid == 0:
            os.dup2(theirs, 2)
            self._be(member)
        os.close(theirs)
        member.log = ours
        self._selector.register(ours, selectors.EVENT_READ, member)
        self._log.info("member.started", member=member.name, pid=member.pid)

    def _be(self, member: _Member) -> NoReturn:
        """Be the member; the process that was the supervisor's ends here."""
        status = 1
        try:
            for end in (self._lifeline[1], *(each.log for each in self._members if each.log >= 0)):
                os.close(end)
            os.setpgid(0, 0)  # Ctrl-C is for the supervisor, which asks each member once
            os.environ.update(ONE_THREAD)
            # More than one signal is not more urgent: an init system may tell every process, and the supervisor does.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: self._stop.set())
            Thread(target=self._mind_the_supervisor, name="lifeline", daemon=True).start()
            status = member.serve()
        except BaseException:  # noqa: BLE001 - whatever it is, this process ends here and says why
            traceback.print_exc()
        finally:
            os._exit(status)

    def _mind_the_supervisor(self) -> None:
        """Wait for the supervisor's end; drain then, and end at once if it had asked for that already."""
        os.read(self._lifeline[0], 1)
        if not self._stop.is_set():
            self._stop.set()
            time.sleep(DRAIN)
        os._exit(KILLED)

    def _pass_on(self, member: _Member) -> bool:
        """Write the whole lines that a member has said; return False once there is nothing more to come."""
        said = os.read(member.log, 65_536)
        *lines, member.unfinished = (member.unfinished + said).split(b"\n")
        if not said and member.unfinished:
            lines, member.unfinished = [member.unfinished], b""
        text = b"".join(line + b"\n" for line in lines)
        while text:
            text = text[os.write(2, text) :]
        return bool(said)

    def _look_after(self, member: _Member) -> None:
        """See whether a member has ended, and what follows from that."""
        if member.pid is None:
            return
        pid, waited = os.waitpid(member.pid, os.WNOHANG)
        if pid == 0:
            return
        member.pid = None
        try:
            while self._pass_on(member):
                pass
        finally:
            self._selector.unregister(member.log)
            os.close(member.log)
            member.log = -1
        status, now = os.waitstatus_to_exitcode(waited), time.monotonic()
        asked = self._stop.is_set()
        (self._log.info if asked and status == 0 else self._log.warning)(
            "member.ended", member=member.name, **_how(status)
        )
        if asked:
            self._status = self._status or (KILLED if status < 0 else status)
        elif status > 0 and status != KILLED:
            self._status = status
            self._stop.set()
        else:
            self._start_again(member, _how(status), now)

    def _start_again(self, member: _Member, how: Mapping[str, int | str], now: float) -> None:
        """Have a member started again after a pause, or give up."""
        member.failures = 0 if now - member.started >= SETTLED else member.failures + 1
        if member.failures >= QUICK_FAILURES:
            ((kind, what),) = how.items()
            self._gave_up = Fatal(
                f"{member.name} has ended {member.failures} times in a row within {SETTLED:.0f} s of its start, the"
                f" last time with {kind} {what}: look for what kills it (memory?), or run fewer --processes"
            )
            self._stop.set()
            return
        pause = min(FIRST_PAUSE * 2 ** max(member.failures - 1, 0), LONGEST_PAUSE)
        member.due = now + pause
        self._log.warning(
            "member.starts_again", member=member.name, failures=member.failures, pause_seconds=pause, **how
        )

    def _drain(self, now: float) -> None:
        """Ask every member once to finish, and kill those that have not done so in time."""
        if self._deadline is None:
            self._deadline = now + DRAIN
            self._signal(signal.SIGTERM)
        elif now > self._deadline:
            self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        for member in self._members:
            member.due = None
            if member.pid is not None:
                os.kill(member.pid, number)


@contextmanager
def _unheard() -> Iterator[None]:
    """Drop what is said on standard error meanwhile: nothing that is done must fail because nobody listens."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _how(status: int) -> dict[str, int | str]:
    """Return how a process has ended, by a status or a signal."""
    return {"signal": signal.strsignal(-status) or -status} if status < 0 else {"status": status}
