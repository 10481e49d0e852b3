"""Memory: what a busy process gives back to the system.

It must not know what the memory is for.
"""

from __future__ import annotations

import ctypes
from typing import Final

M_MMAP_THRESHOLD: Final = -3  # of glibc's malloc.h

LARGE: Final = 3 << 20
"""Bytes from which a block is large: what a fetch brings of a busy partition is, and no scratch of a transform."""


def return_large_blocks() -> None:
    """Let each large block be memory of its own, which goes back to the system as soon as it is freed.

    glibc does so by itself, but only until the first one is freed: then it takes blocks of that size
    from a heap, where a small one that lies behind them keeps all of it. A worker that is always behind
    takes and frees 16 MiB several times a second, and grew for as long as it was watched. Other C
    libraries, which have no such setting, are left as they are.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, LARGE)
