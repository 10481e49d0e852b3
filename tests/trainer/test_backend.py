"""A Dask cluster of two real processes: the same result as one process, and what is said when it cannot work."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import joblib
import msgspec
import numpy as np
import pytest
from distributed import LocalCluster
from joblib.parallel import get_active_backend

from tests.trainer.test_search import windows_of
from trainer import backend
from trainer.__main__ import main
from trainer.backend import cluster
from trainer.dataset import load
from trainer.extract import featurize
from trainer.grid import Grid
from trainer.results import Search
from trainer.search import search
from worker.bundle import load as load_bundle
from worker.errors import Fatal
from worker.features import FeatureSpec, Featurizer

SPEC = FeatureSpec()
GRID: Grid = {"n_estimators": [3, 5, 10, 20], "max_depth": [None, 2]}

ALONE = """
import sys
from distributed import LocalCluster
from joblib.parallel import get_active_backend
settings = {"processes": False, "protocol": "tcp://", "dashboard_address": ":0"}
with LocalCluster(n_workers=1, threads_per_worker=2, **settings) as one:
    print(one.scheduler_address, flush=True)
    sys.stdin.read()
"""
"""A scheduler and a worker of two threads in one process, which both die with it."""


@contextlib.contextmanager
def running(workers: int, *, processes: bool = True) -> Iterator[str]:
    """Run a scheduler and so many workers of one thread each, and yield the scheduler's address."""
    with LocalCluster(n_workers=workers, processes=processes, threads_per_worker=1, dashboard_address=":0") as started:  # type: ignore[no-untyped-call]
        yield started.scheduler_address


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """A cluster of two processes."""
    with running(2) as address:
        yield address


def timeless(found: Search) -> list[Any]:
    without = [msgspec.structs.replace(candidate, seconds=0.0) for candidate in found.candidates]
    return [without, found.best, found.held_out]


class TestCluster:
    def test_the_same_features(self, scheduler: str, machines: Path) -> None:
        """Extraction on two processes gives the bits that one gives, and the progress is told."""
        dataset, told = load(machines), []
        with cluster(scheduler, machines):
            spread = featurize(dataset, Featurizer(SPEC), on_progress=lambda *progress: told.append(progress))
        alone = featurize(dataset, Featurizer(SPEC), jobs=1)
        np.testing.assert_array_equal(alone.features, spread.features)
        np.testing.assert_array_equal(alone.owner, spread.owner)
        assert ("listening to the clips", 72, 72) == told[-1]

    @pytest.mark.parametrize(("label", "strategy"), [("label", "halving"), ("rpm", "grid")])
    def test_the_same_search(self, scheduler: str, machines: Path, label: str, strategy: Any) -> None:
        """Every score, their order and what is held out are those of one process; each fit is heard of once."""
        windows = featurize(load(machines, label=label), Featurizer(SPEC))
        grid: Grid = {"n_estimators": [3, 9], "kind": ["random-forest", "extra-trees"]}
        told: list[tuple[int, int]] = []
        with cluster(scheduler, machines):
            spread = search(
                windows,
                grid,
                strategy=strategy,
                candidates=3,
                on_progress=lambda _stage, done, fits: told.append((done, fits)),
            )
        assert timeless(search(windows, grid, strategy=strategy, candidates=3, jobs=1)) == timeless(spread)
        assert told == sorted(set(told))
        assert len(told) > 2
        assert told[-1][0] == told[-1][1] == told[0][1], "though the last events may come after the results"

    def test_the_same_bundle(
        self, scheduler: str, machines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """`tune` on the cluster writes the bytes that it writes here, and says the same but for the seconds."""
        options = ["--param", "n_estimators=3,9", "--param", "kind=random-forest,extra-trees", "--name", "same"]
        options += ["--json", "--no-cache", "--no-report", "--window-hop-seconds", "1"]
        places = {"here": ["--jobs", "1"], "there": ["--backend", "dask", "--scheduler", scheduler]}
        told = {}
        for name, place in places.items():
            assert 0 == main(["tune", str(machines), "--out", str(tmp_path / name), *options, *place])
            told[name] = msgspec.convert(msgspec.json.decode(capsys.readouterr().out)["search"], Search)
        assert timeless(told["here"]) == timeless(told["there"])
        here, there = (load_bundle(tmp_path / name) for name in places)
        assert here.manifest.files == there.manifest.files
        assert here.id.hash == there.id.hash

    def test_a_worker_dies(self, scheduler: str) -> None:
        """Its tasks are done by another one, with the same result."""
        windows = windows_of([str(n % 3) for n in range(60)], task="classification")
        with cluster(scheduler):
            client = get_active_backend()[0].client
            victim = min(client.run(os.getpid).values())
            spread = search(windows, GRID, on_progress=lambda _stage, done, _fits: kill(victim) if done == 3 else None)
            client.wait_for_workers(2, timeout=60)
        assert timeless(search(windows, GRID)) == timeless(spread)
        assert not Path(f"/proc/{victim}").exists()

    def test_of_a_single_core(self) -> None:
        """Joblib leaves it idle and works here; each fit is counted all the same."""
        windows = windows_of([str(n % 3) for n in range(60)], task="classification")
        told: list[int] = []
        with running(1, processes=False) as alone, cluster(alone):
            spread = search(windows, GRID, on_progress=lambda _stage, done, _fits: told.append(done))
        assert timeless(search(windows, GRID)) == timeless(spread)
        assert list(range(41)) == told

    def test_it_is_where_the_work_is_done(self, scheduler: str) -> None:
        """Within the block, and only there, tasks run in other processes."""

        def identities() -> set[int]:
            return set(joblib.Parallel(n_jobs=2, prefer="threads")(joblib.delayed(os.getpid)() for _ in range(8)))

        here = identities()
        with cluster(scheduler):
            there = identities()
        assert 1 == len(here)
        assert 0 < len(there) <= 2
        assert not here & there
        assert here == identities()


class TestTrouble:
    """Each is one sentence that says what to do, and comes soon."""

    @pytest.mark.parametrize(
        "address", ["tcp://127.0.0.1:{closed}", "127.0.0.1:{closed}", "nonsense://x", "", "host:port"]
    )
    def test_nobody_answers(self, address: str) -> None:
        """A scheduler that is not there, and what is no address at all."""
        scheduler = address.format(closed=closed_port())
        with (
            pytest.raises(Fatal, match=r"no Dask scheduler answers at .* expected an address"),
            cluster(scheduler, patience=0.5),
        ):
            pytest.fail("there is nothing to work on")

    def test_no_worker(self) -> None:
        """A scheduler alone cannot work."""
        with (
            running(0) as alone,
            pytest.raises(Fatal, match=f"has no worker after 0.5 s; start some.* dask worker {alone}"),
            cluster(alone, patience=0.5),
        ):
            pytest.fail("there is nobody to work")

    def test_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Dask is an extra."""
        monkeypatch.setitem(sys.modules, "distributed", None)
        with pytest.raises(Fatal, match=r"install earshot\[dask\]"), cluster("tcp://127.0.0.1:8786"):
            pytest.fail("there is no Dask")

    def test_workers_of_other_versions(self, scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """They might compute other numbers, and a forest of theirs could not be served here."""
        here = backend._versions()
        monkeypatch.setattr(backend, "version", lambda name: "0.1" if name == "numpy" else here[name])
        expected = rf"worker tcp://.* has numpy {here['numpy']}, and this process 0\.1: .* install the same"
        with pytest.raises(Fatal, match=expected), cluster(scheduler):
            pytest.fail("these differ")

    def test_workers_that_do_not_see_the_data(self, scheduler: str, tmp_path: Path) -> None:
        """The clips are read where they are listened to."""
        with (
            pytest.raises(Fatal, match=r"does not see .*clips: .* the same path on every machine"),
            cluster(scheduler, tmp_path / "clips"),
        ):
            pytest.fail("there is nothing to hear")

    def test_the_cluster_is_lost(self, capfd: pytest.CaptureFixture[str]) -> None:
        """Killed while it works: that is said, without a traceback of Dask's."""
        windows = windows_of([str(n % 3) for n in range(60)], task="classification")
        with (
            subprocess.Popen([sys.executable, "-c", ALONE], stdin=PIPE, stdout=PIPE, text=True) as alone,
            pytest.raises(Fatal, match=r"the Dask cluster at tcp://.* was lost: .*; start it again"),
            cluster(address_of(alone), patience=60.0),
        ):
            search(windows, GRID, on_progress=lambda _stage, done, _fits: alone.kill() if done == 3 else None)
        assert "Traceback" not in capfd.readouterr().err

    def test_an_error_of_the_work_is_its_own(self, scheduler: str) -> None:
        """What goes wrong in the block is not taken for the cluster's fault."""
        with pytest.raises(Fatal, match=r"^mine$"), cluster(scheduler):
            raise Fatal("mine")


def address_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
