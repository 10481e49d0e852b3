"""Memory: what a busy process gives back to the system.

It must not know what the memory is for.
"""

from __future__ import annotations

import ctypes
from typing import Final

# Of glibc's malloc.h.
M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
M_ARENA_MAX: Final = -8

LARGE: Final = 3 << 20
"""Bytes from which a block is large: a full response to a fetch is, and no scratch of a transform, whose place is used
again."""


def keep_memory_small() -> None:
    """Let glibc give large blocks back as soon as they are freed, and keep one heap for all threads.

    By itself it takes large blocks from a heap once it has seen one freed, and then a small block that
    lies behind them keeps all of it; and it has up to eight heaps for each processor, of which every
    thread finds another one. A worker that is always behind takes and frees megabytes many times a second,
    on threads that come and go, and grew for as long as it was watched. Under Python's lock one heap is
    enough. Other C libraries, which have no such settings, are left as they are.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_ARENA_MAX, 1)
        set_option(M_MMAP_THRESHOLD, LARGE)
        # Who sets the one has to set the other: at its default, a heap would shrink and grow at each transform.
        set_option(M_TRIM_THRESHOLD, 2 * LARGE)
