"""A Dask cluster of two real processes: the same result as one process, and what is said when it cannot work."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import msgspec
import numpy as np
import pytest
from distributed import LocalCluster

from trainer import backend
from trainer.backend import cluster
from trainer.dataset import load
from trainer.extract import featurize
from trainer.grid import Grid
from trainer.results import Search
from trainer.search import search
from worker.errors import Fatal
from worker.features import FeatureSpec, Featurizer

SPEC = FeatureSpec()


@contextlib.contextmanager
def processes(count: int) -> Iterator[str]:
    """Run a scheduler and so many workers of one thread each, and yield the scheduler's address."""
    with LocalCluster(n_workers=count, processes=True, threads_per_worker=1, dashboard_address=":0") as started:  # type: ignore[no-untyped-call]
        yield started.scheduler_address


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """A cluster of two processes."""
    with processes(2) as address:
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

    @pytest.mark.parametrize(("label", "strategy"), [("label", "grid"), ("label", "halving"), ("rpm", "random")])
    def test_the_same_search(self, scheduler: str, machines: Path, label: str, strategy: Any) -> None:
        """Every score, their order and what is held out are those of one process; each fit is heard of once."""
        windows = featurize(load(machines, label=label), Featurizer(SPEC))
        grid: Grid = {"n_estimators": [3, 9], "max_depth": [3, 6], "kind": ["random-forest", "extra-trees"]}
        told: list[tuple[int, int]] = []
        with cluster(scheduler, machines):
            spread = search(
                windows,
                grid,
                strategy=strategy,
                candidates=4,
                on_progress=lambda _stage, done, fits: told.append((done, fits)),
            )
        assert timeless(search(windows, grid, strategy=strategy, candidates=4, jobs=1)) == timeless(spread)
        assert told == sorted(set(told))
        assert len(told) > 2
        assert told[-1][0] == told[-1][1] == told[0][1], "though the last events may come after the results"

    def test_it_is_where_the_work_is_done(self, scheduler: str) -> None:
        """Within the block, and only there, tasks run in other processes."""

        def identities() -> set[int]:
            return set(joblib.Parallel(n_jobs=2, prefer="threads")(joblib.delayed(_process)() for _ in range(8)))

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
            processes(0) as alone,
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

    def test_an_error_of_the_work_is_its_own(self, scheduler: str) -> None:
        """What goes wrong in the block is not taken for the cluster's fault."""
        with pytest.raises(Fatal, match=r"^mine$"), cluster(scheduler):
            raise Fatal("mine")


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _process() -> int:
    import os  # noqa: PLC0415  # it is run elsewhere

    return os.getpid()
