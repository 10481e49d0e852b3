"""Ten thousand damaged records: none is lost, none takes long or much, and nothing crashes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.system import fuzz

RECORDS = 10_000

MEMORY = 256 * 1024**2
"""More than the largest record that is accepted takes while it is decoded (184 MB), and less than two of them."""


@pytest.mark.timeout(240)
def test_every_record_ends_as_a_prediction_or_a_rejection(machine_bundle: Path) -> None:
    """Each has one answer that can be written and read, in less than a second and in bounded memory.

    In a process of its own, where the peak of the memory is not that of other tests, and where a
    decoder that crashes ends nothing else.
    """
    command = [sys.executable, "-m", "tests.system.fuzz", str(machine_bundle), "--records", str(RECORDS), "--seed", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (0, "") == (done.returncode, done.stderr[-4000:])
    figures = msgspec.json.decode(done.stdout)
    print(figures)
    assert RECORDS == figures["records"] == sum(figures["outcomes"].values())
    assert {"prediction", "undecodable", "non-finite", "too-long", "bad-header", "bad-rate"} <= figures[
        "outcomes"
    ].keys()
    assert figures["outcomes"]["prediction"] > RECORDS / 5, "most records were so damaged that no decoder was reached"
    assert figures["slowest_cpu_seconds"] < 1.0
    assert figures["peak_growth_bytes"] < MEMORY


def test_pages_are_repaired_as_ogg_wants_it() -> None:
    """What is not damaged gets the checksums that it has; otherwise no damage behind a page's header would be read."""
    pages = [value for value, _ in fuzz.sounds() if value.startswith(b"OggS")]

    assert 8 == len(pages)
    assert pages == [fuzz.with_ogg_checksums(value) for value in pages]
    assert pages[0] == fuzz.with_ogg_checksums(pages[0][:22] + bytes(4) + pages[0][26:])
