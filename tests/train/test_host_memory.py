"""Freed memory is there for the next update, without the system's help."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from starflow.train.host_memory import LARGEST, keep_freed_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts the system's page faults")

BLOCKS = 20
PROGRAM = f"""
import ctypes, resource
from starflow.train.host_memory import keep_freed_memory
kept = WANTED and keep_freed_memory()
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
libc.malloc.argtypes = (ctypes.c_size_t,)
libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
def update():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc({LARGEST // 8}) for _ in range({BLOCKS})]
    for block in blocks:
        libc.memset(block, 1, {LARGEST // 8})
    for block in reversed(blocks):
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
update()
print(kept, update())
"""


def faults(*, keep: bool) -> int:
    program = PROGRAM.replace("WANTED", str(keep))
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert out[0] == str(keep)
    return int(out[1])


def test_what_an_update_frees_the_next_one_takes() -> None:
    if not keep_freed_memory():
        pytest.skip("another C library than glibc")
    pages = BLOCKS * LARGEST // 8 // resource.getpagesize()
    assert faults(keep=True) < pages / 20
    assert faults(keep=False) > pages / 2
