"""Memory of a process that trains on the CPU: freed blocks are kept, as every update wants the same ones again.

The C library gives large free blocks back to the system, which hands out zeroed pages at the next request: an update of
the 57 M parameter flow then spends 14 % of its time in the kernel. A GPU's memory has a cache of torch's own.
"""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Names of glibc's malloc.h: how much may lie free before it is given back, and how many blocks are mapped apart."""
NEVER = -1


def keep_freed_memory() -> bool:
    """Keep freed blocks of any size in the process from now on; False where the C library is another than glibc."""
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, NEVER))
