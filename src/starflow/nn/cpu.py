"""Low-level facts about the machine that tensors are computed on: bfloat16 arithmetic, huge pages, the C allocator.

Contract: nothing here changes a value. Functions about memory are hints to the system: they do their work on Linux (the
allocator's on glibc) and nothing elsewhere, and say nothing about it.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform
import sys
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# <malloc.h> of glibc and <sys/mman.h> of Linux.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
MADV_DONTNEED, MADV_HUGEPAGE = 4, 14

NEVER_TRIM = -1

HUGE_PAGE_BYTES = 2**21

HUGE_PAGE_THRESHOLD = 4 * 2**20
"""Bytes of a tensor from which on huge pages are worth asking for."""

CPU_LISTING = Path("/proc/cpuinfo")

BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Instructions that multiply bfloat16 numbers, as Linux calls them."""

MAPPINGS = Path("/proc/self/smaps")


def has_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are at least as fast as in float32 on a device, as far as torch's libraries say.

    False on x86 processors without AVX-512, which only emulate them: there a product of 1,152 tokens and width 3072
    takes 6.8 times as long as in float32. Devices that torch cannot ask are taken to have them.

    >>> has_bfloat16(torch.device("meta"))
    True
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return device.type != "cpu" or _cpu_has_bfloat16()


@functools.cache
def _cpu_has_bfloat16() -> bool:
    ask_onednn = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return ask_onednn is None or bool(ask_onednn())


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions that multiply bfloat16 numbers, and so products faster than those in float32.

    Of a CPU those of AVX512-BF16, AMX and their like on ARM, as Linux lists them.

    >>> multiplies_bfloat16(torch.device("meta"))
    False
    """
    if device.type == "cuda":
        return has_bfloat16(device)
    flags = {flag for line in cpu_lines("flags", "Features") for flag in line.split()}
    return device.type == "cpu" and bool(flags & BFLOAT16_FLAGS)


def cpu_name() -> str:
    """The processor's model name, such as "AMD EPYC"; its architecture where the system tells no more.

    >>> cpu_name() != ""
    True
    """
    names = cpu_lines("model name")
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def cpu_lines(*fields: str) -> list[str]:
    """The distinct lines of /proc/cpuinfo that start with one of `fields`, sorted; none where there is no such file."""
    lines = CPU_LISTING.read_text().splitlines() if CPU_LISTING.is_file() else []
    return sorted({line for line in lines if line.startswith(fields)})


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for the rest of the process; False where there is no glibc.

    By default every large tensor goes back to the kernel when it is freed, and the next one comes as fresh pages, each
    a page fault. Measured on one CPU core: an update of TAESD's decoder on four 96-px crops takes 1.52 s by default and
    1.28 s without, one of a 57 M parameter flow 2.83 s and 2.42 s. For whatever trains on a CPU.
    """
    mallopt = _libc_function("mallopt")
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER_TRIM))


def return_freed_memory() -> None:
    """Give the memory that glibc keeps of freed tensors back to the system, so that using it again shows as new."""
    trim = _libc_function("malloc_trim")
    if trim is not None:
        trim(0)


def on_huge_pages(tensor: Tensor) -> Tensor:
    """The tensor itself, once its memory has been asked for in huge pages of 2 MiB.

    It must come before the first write to that memory. Tensors below `HUGE_PAGE_THRESHOLD` and on other devices stay
    as they are.

    >>> tensor = torch.empty(4)
    >>> on_huge_pages(tensor) is tensor
    True
    """
    if tensor.device.type == "cpu" and tensor.nbytes >= HUGE_PAGE_THRESHOLD:
        _advise(tensor, HUGE_PAGE_BYTES, MADV_HUGEPAGE)
    return tensor


class MappedFile(NamedTuple):
    """The place in a file that a tensor's values are mapped from, and whether they still are those of the file."""

    path: str
    size: int
    changed_ns: int
    inode: int
    offset: int
    written: int
    """Bytes of the whole mapping that this process has written to, and so has copies of."""


def mapped_files(tensors: Sequence[Tensor]) -> list[MappedFile | None]:
    """Where tensors are mapped from; None for memory that no file is behind, and where the system does not tell.

    >>> mapped_files([torch.zeros(4)])
    [None]
    """
    ranges = _mappings()
    starts = [one.start for one in ranges]
    if not ranges:
        return [None] * len(tensors)
    return [
        _mapped_file(tensor.data_ptr(), ranges[max(0, bisect(starts, tensor.data_ptr()) - 1)]) for tensor in tensors
    ]


@dataclass
class _Mapping:
    """A range of this process's addresses."""

    start: int
    stop: int
    offset: int
    """In its file."""
    path: str
    written: int = 0


def _mappings() -> list[_Mapping]:
    """All of them, in their order; none where the system does not tell."""
    found: list[_Mapping] = []
    for line in MAPPINGS.read_text().splitlines() if MAPPINGS.is_file() else []:
        first, *fields = line.split(maxsplit=5)
        if first in ("Anonymous:", "Swap:"):
            found[-1].written += 1024 * int(fields[0])
        elif not first.endswith(":"):
            start, stop = (int(one, 16) for one in first.split("-"))
            found.append(_Mapping(start, stop, int(fields[1], 16), fields[4] if len(fields) == 5 else ""))
    return found


def _mapped_file(address: int, mapping: _Mapping) -> MappedFile | None:
    if not (mapping.start <= address < mapping.stop and mapping.path and Path(mapping.path).is_file()):
        return None
    known, offset = Path(mapping.path).stat(), address - mapping.start + mapping.offset
    return MappedFile(mapping.path, known.st_size, known.st_mtime_ns, known.st_ino, offset, mapping.written)


def drop_file_pages(tensor: Tensor) -> None:
    """Let go of the memory behind a tensor that is mapped from a file; what is read again comes from the file.

    Only for tensors that nobody has written to: changes would be lost.
    """
    _advise(tensor, mmap.PAGESIZE, MADV_DONTNEED)


def _advise(tensor: Tensor, page: int, advice: int) -> None:
    """Tell the kernel about the whole pages of a tensor's memory."""
    madvise = _libc_function("madvise")
    start = -(-tensor.data_ptr() // page) * page
    stop = (tensor.data_ptr() + tensor.nbytes) // page * page
    if madvise is not None and stop > start:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)


def _libc_function(name: str) -> Callable[..., int] | None:
    """A function of the C library on Linux, or None."""
    if sys.platform != "linux":
        return None
    found: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)
    return found
