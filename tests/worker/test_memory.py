"""What a process gives back: measured in processes of their own, since the setting is for good."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from worker.memory import return_large_blocks

def resident():
    with open("/proc/self/status", encoding="ascii") as status:
        return int(status.read().split("VmRSS:")[1].split()[0]) >> 10

if sys.argv[1] == "set":
    return_large_blocks()
del [bytearray(30 << 20)][0]  # glibc learns from it what is not large, if it may
before, blocks, small = resident(), [], []
for _ in range(16):
    blocks.append(b"x" * (16 << 20))
    small.append([b"x" * 400 for _ in range(1000)])  # lies behind it on a heap, and stays
blocks.clear()
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's, and Linux says how much is resident")
@pytest.mark.parametrize(("setting", "least", "most"), [("set", 0, 32), ("unset", 64, 512)])
def test_large_blocks_are_given_back(setting: str, least: int, most: int) -> None:
    """Sixteen blocks of 16 MiB are gone when they are freed; without the setting, small ones behind them keep them."""
    told = subprocess.run([sys.executable, "-c", PROGRAM, setting], capture_output=True, text=True, check=True)

    assert least <= int(told.stdout) <= most
