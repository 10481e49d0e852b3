"""What every test may ask for: the real recordings that the repository does not ship."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def missing(what: str) -> None:
    """Skip the test for want of ``what``; under CI nothing is skipped, so fail instead."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI=true and {what}")
    pytest.skip(what)


def _recordings(name: str) -> Path:
    folder = SHARED_DATA / name
    if not folder.is_dir():
        missing(f"there are no real recordings at {folder}")
    return folder


@pytest.fixture(scope="session")
def esc10() -> Path:
    """ESC-10: 400 environmental sounds of 5 s with official folds (``meta.csv``, ``audio/``)."""
    return _recordings("esc10")


@pytest.fixture(scope="session")
def notes() -> Path:
    """Single notes of six instruments, with ``midi_pitch`` as a regression target (``meta.csv``, ``audio/``)."""
    return _recordings("notes")
