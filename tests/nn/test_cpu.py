"""Kept memory is memory without page faults.

Asking for large pages changes nothing that anyone can see but the speed.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from starflow.nn.cpu import HUGE_PAGE_THRESHOLD, on_huge_pages

# Ten blocks of 64 MiB, one after the other: 16,384 pages each.
SCRIPT = """
import resource, sys
from starflow.nn.cpu import keep_freed_memory
assert sys.argv[1] == "default" or keep_freed_memory()
block = int(sys.argv[2]) * b"x"
del block
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    block = int(sys.argv[2]) * b"x"
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_used_again_without_faults() -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    faults = {}
    for mode in ("default", "kept"):
        words = [sys.executable, "-c", SCRIPT, mode, str(64 << 20)]
        faults[mode] = int(subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout)
    assert faults["kept"] < 100
    assert faults["default"] > 1000  # else there is nothing to gain, and this test proves nothing


def test_the_tensor_itself_comes_back_as_it_was() -> None:
    for count in (0, 3, HUGE_PAGE_THRESHOLD // 4, HUGE_PAGE_THRESHOLD):
        tensor = torch.arange(count, dtype=torch.float32)
        assert on_huge_pages(tensor) is tensor
        assert torch.equal(tensor, torch.arange(count, dtype=torch.float32))
    elsewhere = torch.empty(HUGE_PAGE_THRESHOLD, device="meta")
    assert on_huge_pages(elsewhere) is elsewhere
