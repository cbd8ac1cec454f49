"""Large pages for large tensors of a processor's memory, where the system has them.

Contract: a wish and no more; values and sizes are the same with and without. It must come before the first write.
"""

from __future__ import annotations

import ctypes
import sys

from torch import Tensor

LARGE = 4 * 2**20
"""Bytes from which it is worth asking."""
PAGE = 2**21
MADV_HUGEPAGE = 14


def on_large_pages(tensor: Tensor) -> Tensor:
    """The tensor itself, once its memory has been asked for in large pages."""
    if tensor.device.type == "cpu" and tensor.nbytes >= LARGE and sys.platform == "linux":
        start = -(-tensor.data_ptr() // PAGE) * PAGE
        stop = (tensor.data_ptr() + tensor.nbytes) // PAGE * PAGE
        if stop > start:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_HUGEPAGE)
    return tensor
