"""What every test may ask for: the real recordings that the repository does not ship, and a real Kafka."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests import apache_kafka
from trainer.dataset import load
from trainer.simulate import simulate
from trainer.training import fit
from worker.features import FeatureSpec

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LOCAL_KAFKA = ("localhost", 19092)  # where `docker compose up` publishes its broker


def missing(what: str) -> NoReturn:
    """Skip the test for want of ``what``; under CI nothing is skipped, so fail instead."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI=true and {what}")
    pytest.skip(what)


def _recordings(name: str) -> Path:
    folder = SHARED_DATA / name
    if not folder.is_dir():
        missing(f"there are no real recordings at {folder}")
    return folder


@pytest.fixture(autouse=True, scope="session")
def _no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep features away from what was computed before, also in the commands that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def esc10() -> Path:
    """ESC-10: 400 environmental sounds of 5 s with official folds (``meta.csv``, ``audio/``)."""
    return _recordings("esc10")


@pytest.fixture(scope="session")
def notes() -> Path:
    """Single notes of six instruments, with ``midi_pitch`` as a regression target (``meta.csv``, ``audio/``)."""
    return _recordings("notes")


@pytest.fixture(scope="session")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small simulated data set: 72 clips of two seconds, six classes, six machines."""
    folder = tmp_path_factory.mktemp("machines")
    simulate(folder, seed=0, clips=72, seconds=2.0)
    return folder


@pytest.fixture(scope="session")
def machine_bundle(machines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier of the simulated machines."""
    bundle = tmp_path_factory.mktemp("bundles") / "machines"
    fit(load(machines), bundle, name="machines", spec=FeatureSpec(), trees=20)
    return bundle


@pytest.fixture(scope="session")
def rpm_bundle(machines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small regressor of the simulated machines' speed."""
    bundle = tmp_path_factory.mktemp("bundles") / "rpm"
    fit(load(machines, label="rpm"), bundle, name="rpm", spec=FeatureSpec(), trees=20)
    return bundle


@pytest.fixture(scope="session")
def kafka_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The ``host:port`` of a real broker: EARSHOT_TEST_KAFKA, one that runs here, or Apache Kafka started for this."""
    address = os.environ.get("EARSHOT_TEST_KAFKA") or _listening(*LOCAL_KAFKA)
    if address:
        yield address
        return
    try:
        jars = apache_kafka.fetch()
    except apache_kafka.Unavailable as why:
        missing(str(why))
    with apache_kafka.ApacheKafka(jars, tmp_path_factory.mktemp("kafka")) as kafka:
        yield kafka.address


def _listening(host: str, port: int) -> str | None:
    try:
        socket.create_connection((host, port), timeout=1.0).close()
    except OSError:
        return None
    return f"{host}:{port}"
