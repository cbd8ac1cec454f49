"""What the machine is asked for changes nothing that anyone can see but the speed, and the machine is asked."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from starflow.nn import cpu
from starflow.nn.cpu import (
    HUGE_PAGE_BYTES,
    HUGE_PAGE_THRESHOLD,
    MappedFile,
    cpu_lines,
    cpu_name,
    has_bfloat16,
    mapped_files,
    multiplies_bfloat16,
    on_huge_pages,
)
from starflow.train.settings import TrainSettings, network_dtype

ON_GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")

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

# Ten thousand small blocks below one that stays: glibc keeps what is freed of them until it is told to give it back.
RETURNING = """
from pathlib import Path
from starflow.nn.cpu import return_freed_memory
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])
blocks = [bytearray(10_000) for _ in range(10_000)]
last = bytearray(10_000)
del blocks
before = resident()
return_freed_memory()
print(before - resident())
"""


def output(*words: str) -> int:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run([sys.executable, "-c", *words], env=env, capture_output=True, text=True, check=True)
    return int(done.stdout)


@ON_GLIBC
def test_freed_memory_is_used_again_without_faults() -> None:
    faults = {mode: output(SCRIPT, mode, str(64 << 20)) for mode in ("default", "kept")}
    assert faults["kept"] < 100
    assert faults["default"] > 1000  # else there is nothing to gain, and this test proves nothing


@ON_GLIBC
def test_freed_memory_goes_back_when_asked() -> None:
    assert output(RETURNING) * mmap.PAGESIZE > 50_000_000


class Kernel:
    """Stands for the C library: notes the ranges that it is given advice about."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[int, int, int]] = []
        monkeypatch.setattr(cpu, "_libc_function", lambda name: self.madvise if name == "madvise" else None)

    def madvise(self, start: ctypes.c_void_p, size: ctypes.c_size_t, advice: int) -> int:
        self.calls.append((start.value or 0, size.value, advice))
        return 0


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(offset=st.integers(0, 3000), pages=st.integers(0, 6), more=st.integers(0, 5000))
def test_huge_pages_are_asked_for_within_the_tensor_alone(
    monkeypatch: pytest.MonkeyPatch, offset: int, pages: int, more: int
) -> None:
    """As many whole ones as it has; its values and its address stay."""
    kernel = Kernel(monkeypatch)
    tensor = torch.empty(offset + pages * HUGE_PAGE_BYTES + more, dtype=torch.uint8)[offset:]
    assert on_huge_pages(tensor) is tensor
    if tensor.nbytes < HUGE_PAGE_THRESHOLD:
        assert kernel.calls == []
        return
    ((start, size, advice),) = kernel.calls
    assert advice == 14
    assert start % HUGE_PAGE_BYTES == size % HUGE_PAGE_BYTES == 0
    assert tensor.data_ptr() <= start < start + size <= tensor.data_ptr() + tensor.nbytes
    assert tensor.nbytes - size < 2 * HUGE_PAGE_BYTES


def test_other_devices_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    elsewhere = torch.empty(HUGE_PAGE_THRESHOLD, device="meta")
    assert on_huge_pages(elsewhere) is elsewhere
    assert kernel.calls == []


@pytest.mark.skipif(sys.platform != "linux", reason="madvise of Linux")
def test_the_kernel_takes_the_advice() -> None:
    """It marks the memory; where it tells of no marks, there is nothing to see."""
    listing = Path("/proc/self/smaps")
    if "VmFlags" not in listing.read_text():
        pytest.skip("this kernel does not tell")
    tensor = on_huge_pages(torch.empty(4 * HUGE_PAGE_BYTES, dtype=torch.uint8)).fill_(7)
    middle, found = tensor.data_ptr() + tensor.nbytes // 2, False
    inside = False
    for line in listing.read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low <= middle < high
        if inside and first == "VmFlags:":
            found = "hg" in line.split()
    assert found
    assert bool((tensor == 7).all())


@pytest.mark.skipif(sys.platform != "linux", reason="madvise of Linux")
def test_dropped_pages_come_back_from_the_file(tmp_path: Path) -> None:
    """What was changed in a private mapping is gone with the pages; so they were dropped, and read again."""
    path, count = tmp_path / "numbers", 4 * mmap.PAGESIZE
    path.write_bytes(bytes(range(256)) * (count // 256))
    tensor = torch.from_file(str(path), shared=False, size=count, dtype=torch.uint8)
    original = tensor.clone()
    tensor.fill_(1)
    cpu.drop_file_pages(tensor)
    assert torch.equal(tensor, original)


def test_bfloat16_is_what_torchs_libraries_say_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in (False, True):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda answer=answer: answer)
        assert has_bfloat16(torch.device("cuda")) is answer
        monkeypatch.setattr(cpu, "_cpu_has_bfloat16", lambda answer=answer: answer)
        assert has_bfloat16(torch.device("cpu")) is answer
    assert has_bfloat16(torch.device("mps"))


def test_this_processor_has_bfloat16_if_its_vectors_are_wide() -> None:
    """On x86, torch's library multiplies in bfloat16 from AVX-512 on; torch's own capability says the same."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("other processors have other names for it")
    assert has_bfloat16(torch.device("cpu")) == (torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("flags\t: avx512f avx512_bf16", True), ("flags\t: avx2 avx512f", False), ("Features\t: asimd bf16", True)],
)
def test_a_processor_multiplies_bfloat16_if_it_has_the_instructions(
    flags: str, expected: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(f"{flags}\n")
    monkeypatch.setattr(cpu, "CPU_LISTING", tmp_path / "cpuinfo")
    assert multiplies_bfloat16(torch.device("cpu")) is expected
    low = torch.bfloat16 if expected else torch.float32
    assert network_dtype(TrainSettings(steps=1), torch.device("cpu")) == low
    assert network_dtype(TrainSettings(steps=1, precision="float32"), torch.device("cpu")) == torch.float32
    assert network_dtype(TrainSettings(steps=1, precision="bfloat16"), torch.device("cpu")) == torch.bfloat16
    monkeypatch.setattr(cpu, "CPU_LISTING", tmp_path / "nothing")
    assert not multiplies_bfloat16(torch.device("cpu"))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc of Linux")
def test_a_mapped_tensor_tells_its_file_and_place(tmp_path: Path) -> None:
    path, count = tmp_path / "some numbers", 4 * mmap.PAGESIZE
    path.write_bytes(bytes(count))
    tensor = torch.from_file(str(path), shared=False, size=count, dtype=torch.uint8)
    whole, part, other = mapped_files([tensor, tensor[mmap.PAGESIZE + 64 :], torch.zeros(4)])
    assert other is None
    assert whole == MappedFile(str(path), count, path.stat().st_mtime_ns, path.stat().st_ino, 0, 0)
    assert part == whole._replace(offset=mmap.PAGESIZE + 64)
    tensor[mmap.PAGESIZE] = 1
    assert mapped_files([tensor, tensor[-1:]]) == [
        whole._replace(written=mmap.PAGESIZE),
        whole._replace(offset=count - 1, written=mmap.PAGESIZE),
    ]
    path.unlink()
    assert mapped_files([tensor]) == [None], "what is gone has no name that another process could find"


def test_the_processors_name_and_flags_are_those_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    listing = tmp_path / "cpuinfo"
    listing.write_text("processor\t: 0\nmodel name\t: Some CPU: 3 GHz\nflags\t\t: b a\n" * 2)
    monkeypatch.setattr(cpu, "CPU_LISTING", listing)
    assert cpu_name() == "Some CPU: 3 GHz"
    assert cpu_lines("model name", "flags") == ["flags\t\t: b a", "model name\t: Some CPU: 3 GHz"]
    monkeypatch.setattr(cpu, "CPU_LISTING", tmp_path / "absent")
    assert cpu_lines("flags") == []
    assert cpu_name() in (platform.processor(), platform.machine())
