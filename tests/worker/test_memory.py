"""What a process gives back: measured in processes of their own, since the setting is for good."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from worker.memory import keep_memory_small

def resident():
    with open("/proc/self/status", encoding="ascii") as status:
        return int(status.read().split("VmRSS:")[1].split()[0]) >> 10

if sys.argv[1] == "set":
    keep_memory_small()
del [bytearray(30 << 20)][0]  # glibc learns from it what is not large, if it may
before, blocks, small = resident(), [], []
for _ in range(16):
    blocks.append(b"x" * (16 << 20))
    small += [bytearray(600) for _ in range(100)]  # lie behind it on a heap, and stay
blocks.clear()
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
@pytest.mark.parametrize(("setting", "least", "most"), [("set", 0, 32), ("unset", 64, 512)])
def test_large_blocks_are_given_back(setting: str, least: int, most: int) -> None:
    """Sixteen blocks of 16 MiB are gone when they are freed; without the setting, small ones behind them keep them."""
    command = [sys.executable, "-c", PROGRAM, setting]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)

    assert least <= int(told.stdout) <= most
