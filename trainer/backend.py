"""Where the work is done: on the cores of this machine, or on the workers of a Dask cluster.

This module owns how a cluster is reached, what must be true of its workers, and how it is heard from
them how far they are. It must not know what the work is: everything heavy goes through joblib, and
joblib is told here where to run it.

A worker opens the clips itself, by the paths they have here, so the data must lie under the same path
on every machine: sending the sound through the scheduler would make that the bottleneck. It is looked
after once, before anything is submitted, and so are the versions of what computes the numbers: with
those equal a cluster gives what one process gives, to the bit.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import joblib
from joblib.parallel import get_active_backend

from worker.bundle import VERSIONED
from worker.errors import Fatal

PATIENCE: Final = 10.0
"""Seconds to wait for a scheduler to answer, and then for its first worker: both are running, or they are not."""


@contextmanager
def cluster(scheduler: str, data: Path | None = None, patience: float = PATIENCE) -> Iterator[None]:
    """Let joblib work on the Dask cluster of ``scheduler`` (as in ``tcp://10.0.0.1:8786``) until the block ends.

    Args:
        scheduler: the address; how it is encrypted is up to Dask's own configuration.
        data: a file or folder that all workers must find.
        patience: seconds to wait for the scheduler, and again for a worker.

    Raises:
        Fatal: Dask is not installed, nobody answers, there is no worker, one of them is of other versions
            than this process or does not see ``data``, or the cluster is lost on the way.
    """
    try:
        distributed: Any = import_module("distributed")  # an extra: most trainers have no cluster
    except ImportError as error:
        raise Fatal(f"a Dask cluster needs the package distributed: install earshot[dask] ({error})") from error
    try:
        client = distributed.Client(scheduler, timeout=patience, set_as_default=False)
    except (OSError, ValueError) as error:  # ValueError: no address at all; TimeoutError is an OSError
        raise Fatal(
            f"no Dask scheduler answers at {scheduler!r} within {patience:g} s: {error}; expected an address such as "
            "tcp://10.0.0.1:8786, where `dask scheduler` runs"
        ) from error
    with client, _quiet():
        try:
            client.wait_for_workers(1, timeout=patience)
        except TimeoutError as error:
            raise Fatal(
                f"the Dask scheduler at {scheduler} has no worker after {patience:g} s; start some, on machines "
                f"that have earshot[dask] installed: dask worker {scheduler}"
            ) from error
        try:
            _check(client, data)
            with joblib.parallel_config(backend="dask", client=client):
                yield
        except (distributed.KilledWorker, distributed.comm.CommClosedError, CancelledError) as error:
            what = " ".join(str(error).split())  # some of these have several lines
            raise Fatal(f"the Dask cluster at {scheduler} was lost: {what}; start it again, and then this") from error


def on_cluster() -> bool:
    """Return whether joblib works on a Dask cluster now, whoever told it to."""
    return _client() is not None


@contextmanager
def counted(tasks: int, on_done: Callable[[int], None]) -> Iterator[Callable[[], None]]:
    """Yield what each of so many tasks calls when it is done, wherever it is; ``on_done`` hears here how many have."""
    count = _Count(tasks, on_done)
    client = _client()
    if client is None:
        yield count
        return
    topic = f"earshot-{uuid4().hex}"
    client.subscribe_topic(topic, lambda _event: count())
    try:
        yield _Event(topic, count)
    finally:
        client.unsubscribe_topic(topic)
    count.finish()  # events travel on their own, and the last ones may come after the results


def _client() -> Any:
    return getattr(get_active_backend()[0], "client", None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the client of Dask from logging the tracebacks of what is told in one line here."""
    log = logging.getLogger("distributed.client")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


class _Count:
    """Counts calls from any thread up to a number, and tells each count once, in order."""

    def __init__(self, tasks: int, on_done: Callable[[int], None]) -> None:
        self._tasks = tasks
        self._on_done = on_done
        self._done = 0
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            if self._done < self._tasks:
                self._done += 1
                self._on_done(self._done)

    def finish(self) -> None:
        with self._lock:
            if self._done < self._tasks:
                self._done = self._tasks
                self._on_done(self._done)


class _Event:
    """Counts a task that is done here; what is sent to a Dask worker leaves the count behind, and sends word to it."""

    def __init__(self, topic: str, count: _Count | None = None) -> None:
        self._topic = topic
        self._count = count

    def __reduce__(self) -> tuple[type[_Event], tuple[str]]:
        return type(self), (self._topic,)

    def __call__(self) -> None:
        if self._count is not None:
            self._count()  # joblib does the work of a cluster of one core here
        else:
            import_module("distributed").get_worker().log_event(self._topic, None)


def _check(client: Any, data: Path | None) -> None:
    """Refuse workers that would compute other numbers, or do not see the data."""
    here = _versions()
    try:
        found = client.run(_versions)
    except ImportError as error:
        raise Fatal(f"a Dask worker cannot run Earshot: {error}; install the same earshot[dask] there") from error
    for worker, versions in found.items():
        for name, stated in versions.items():
            if stated != here[name]:
                raise Fatal(
                    f"the Dask worker {worker} has {name} {stated}, and this process {here[name]}: the numbers would "
                    "depend on who computes them; install the same versions"
                )
    if data is None:
        return
    for worker, exists in client.run(data.resolve().exists).items():
        if not exists:
            raise Fatal(
                f"the Dask worker {worker} does not see {data.resolve()}: workers read the clips themselves, so the "
                "data must lie under the same path on every machine"
            )


def _versions() -> dict[str, str]:
    return {name: version(name) for name in VERSIONED}
