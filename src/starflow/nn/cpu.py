"""How the C library gives memory back.

Large pages for large tensors of a processor's memory, where the system has them.

Contract: a wish and no more; values and sizes are the same with and without. It must come before the first write.
"""

from __future__ import annotations

import ctypes
import functools
import sys

import torch
from torch import Tensor

# <malloc.h> of glibc.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

NEVER_TRIM = -1


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for the rest of the process; False where there is no glibc.

    By default every large tensor goes back to the kernel when it is freed, and the next one comes as fresh pages, each
    a page fault. Measured on one CPU core: an update of TAESD's decoder on four 96-px crops takes 1.52 s by default and
    1.28 s without, one of a 57 M parameter flow 2.83 s and 2.42 s. For whatever trains on a CPU.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER_TRIM))


HUGE_PAGE_THRESHOLD = 4 * 2**20
"""Bytes from which it is worth asking."""

HUGE_PAGE_BYTES = 2**21

MADV_HUGEPAGE = 14


def on_huge_pages(tensor: Tensor) -> Tensor:
    """The tensor itself, once its memory has been asked for in large pages."""
    if tensor.device.type == "cpu" and tensor.nbytes >= HUGE_PAGE_THRESHOLD and sys.platform == "linux":
        start = -(-tensor.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        stop = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        if stop > start:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_HUGEPAGE)
    return tensor


@functools.cache
def has_bfloat16() -> bool:
    """Whether this processor has products in bfloat16, as far as torch's own library for them says."""
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return asked is None or bool(asked())
