"""Memory of a process that trains on a CPU."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

# mallopt's parameters, of malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next tensors; other C libraries are left as they are.

    By default it gives every block above 32 MiB back to the system, which then maps and zeroes the next one
    page by page: a tenth of a step's time, a quarter with a small model and a large vocabulary. The price is
    memory, 3 to 30 % more at a step's peak, since blocks of different sizes leave gaps (docs/performance.md).
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)
    mallopt(_M_TOP_PAD, 64 * 2**20)
