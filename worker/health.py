"""Health over HTTP: ``/livez`` is true while the loop advances, ``/readyz`` once it is assigned and restored.

Owns the `Pulse` that the loop gives, what follows from it, and the endpoint that says so. It must
not know what the loop does, nor a broker.

A rebalance or an outage is not death: the loop advances, by waiting. To be killed for it would not
bring the broker back. Death is a step of the loop that never ends.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET, AF_INET6
from socketserver import TCPServer
from threading import Thread
from typing import Any, Final, NamedTuple

from worker.errors import Fatal

STUCK: Final = 300.0
"""Seconds without a beat that mean a stuck loop, besides what a poll may wait. No step lasts so long in
its right mind: joining, restoring and committing are bounded to a minute or so each, and a batch
that takes five is one whose partitions Kafka has given to others."""

CLIENT_PATIENCE: Final = 5.0
"""Seconds that a client may take to ask or to listen; a probe that hangs must not keep a thread."""


class Health(NamedTuple):
    """An answer and the reason for it."""

    good: bool
    why: str


class Pulse:
    """What the loop did last, and whether it serves; given on one thread and read on others.

    Args:
        stuck_after: seconds without a beat after which the loop counts as stuck.
        clock: monotonic, in seconds.
    """

    def __init__(self, stuck_after: float = STUCK, clock: Callable[[], float] = time.monotonic) -> None:
        self._stuck_after = stuck_after
        self._clock = clock
        self._last = "started", clock()  # one object, so that a reader never sees half a beat
        self._unready: str | None = "nothing is assigned yet"

    def beat(self, step: str) -> None:
        """Say that a step of the loop has ended, and which."""
        self._last = step, self._clock()

    def ready(self) -> None:
        """Say that partitions are assigned and their states restored."""
        self._unready = None

    def unready(self, why: str) -> None:
        """Say that nothing can be served, and why."""
        self._unready = why

    def live(self) -> Health:
        """Say whether the loop advances."""
        step, at = self._last
        seconds = self._clock() - at
        if seconds > self._stuck_after:
            return Health(good=False, why=f"the loop is stuck: nothing for {seconds:.0f} s since it {step}")
        return Health(good=True, why=f"the loop {step} {seconds:.1f} s ago")

    def serving(self) -> Health:
        """Say whether the loop advances and has what it needs to serve."""
        live, unready = self.live(), self._unready
        return Health(good=False, why=unready) if live.good and unready is not None else live


@contextmanager
def endpoint(pulse: Pulse, host: str, port: int) -> Iterator[int]:
    """Answer GET and HEAD of ``/livez`` and ``/readyz`` on a thread of its own while the block lasts.

    Args:
        pulse: whose health it is.
        host: a name or an address; IPv6 without brackets.
        port: 0 takes any that is free.

    Returns:
        The port that is listened on.

    Raises:
        Fatal: the port is taken, or there is no such address here.
    """
    kind = _ServerOfSix if ":" in host else _Server
    try:
        server = kind((host, port), partial(_Handler, pulse))
    except OSError as error:
        raise Fatal(
            f"cannot answer on --health-host {host} --health-port {port}: {error}; "
            "name another port, 0 for any that is free, or an address of this machine"
        ) from error
    thread = Thread(target=server.serve_forever, name="health", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    """Quiet, and without a question to the DNS: the standard library's asks for a name that nobody reads."""

    address_family = AF_INET

    def server_bind(self) -> None:
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]  # str, int

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep a client that went away, or was too slow, out of the log."""


class _ServerOfSix(_Server):
    address_family = AF_INET6


class _Handler(BaseHTTPRequestHandler):
    timeout = CLIENT_PATIENCE
    server_version = "earshot"
    sys_version = ""

    def __init__(self, pulse: Pulse, *connection: Any) -> None:
        self._answers = {"/livez": pulse.live, "/readyz": pulse.serving}
        super().__init__(*connection)  # which handles the request

    def do_GET(self) -> None:
        """Answer 200 if all is well and 503 if not."""
        answer = self._answers.get(self.path.partition("?")[0])
        if answer is None:
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            good, why = answer()
            self._say(HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE, why)

    do_HEAD = do_GET  # noqa: N815 - the name that the standard library calls

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse whatever else is asked; nothing of the request comes back, and other methods find nothing here."""
        del message, explain
        status = HTTPStatus.NOT_FOUND if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code)
        self._say(status, "there are GET /livez and GET /readyz")

    def _say(self, status: HTTPStatus, why: str) -> None:
        body = json.dumps({"status": status.phrase, "why": why}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a probe asks every few seconds."""
