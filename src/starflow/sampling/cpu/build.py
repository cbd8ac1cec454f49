"""What is made once a machine and kept: the compiled token loop, step.cpp, and the packed weights of models.

    python -m starflow.sampling.cpu.build        # before the first picture; `make` does it when it installs

The library is built with the user's own compiler. It lies in the user's cache folder under a name made of the source,
the flags, the compiler and the processor; it is written there whole. Nothing is loaded from a folder that others may
write to.

Packed integers, and all weights of a model over `MAPPED_BYTES`, are kept as files: the next process packs
nothing. A file is written whole, its name made of the values that it was packed from, the layout and the format. Those
of large models are mapped, so that the system may drop their pages; others are copied into memory, where large pages
make them faster to read. Weights that are being trained leave no file.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from starflow.errors import UserError
from starflow.flow.block import AutoregressiveBlock
from starflow.flow.memory import MAPPED_BYTES
from starflow.io import files
from starflow.nn.cpu import HUGE_PAGE_THRESHOLD, cpu_lines, mapped_files, on_huge_pages
from starflow.nn.quantize import WeightFormat
from starflow.sampling.cpu.pack import (
    BlockStruct,
    PackedBlock,
    PanelLayout,
    bytes_of,
    matrices_bytes,
    pack,
    parameter_versions,
    write_matrices,
)

SOURCE = Path(__file__).parent / "step.cpp"

COMPILERS = ("c++", "g++", "clang++")

TIMEOUT_SECONDS = 120

VERSION = 3

"""Version of the functions and structs that step.cpp shares with pack.py."""


class BuildError(Exception):
    """Why there is no library, in one line; sampling goes on without it."""


@dataclass(frozen=True)
class Library:
    """The loaded functions of step.cpp."""

    handle: ctypes.CDLL

    @property
    def panels(self) -> PanelLayout:
        """The layout in which it reads weights."""
        return PanelLayout(self.handle.starflow_panel())

    @property
    def multiplies_bfloat16(self) -> bool:
        """Whether the processor multiplies numbers in bfloat16, and the library lets it."""
        return bool(self.handle.starflow_bfloat16_products())

    def workspace(self, block: BlockStruct, count: int) -> int:
        """Floats that a call for `count` tokens needs."""
        return int(self.handle.starflow_workspace(ctypes.byref(block), count))

    def solve(self, block: BlockStruct, start: int, stop: int) -> None:
        """Solve the tokens start..stop-1 of a block, one after the other; other Python threads run meanwhile."""
        self.handle.starflow_solve(ctypes.byref(block), start, stop)

    def extend(self, block: BlockStruct, hidden: int, position: int, count: int) -> None:
        """Run all layers, in place, over hidden states (rows, count, width) at an address, from a cache position on."""
        self.handle.starflow_extend(ctypes.byref(block), hidden, position, count)

    def checksum(self, values: Tensor) -> int:
        """A number that depends on every value of a tensor."""
        values = values.detach().contiguous()
        return int(self.handle.starflow_mark(values.data_ptr(), bytes_of(values)))


@dataclass(frozen=True)
class BuildCommand:
    """How the library is built on this machine, and where it lies."""

    command: tuple[str, ...]
    target: str
    """The flag to compile for this very processor; where the compiler does not know it, it is left out."""
    path: Path

    @staticmethod
    def here() -> BuildCommand:
        """The command with CXX, or with the first of `COMPILERS` that is installed.

        Raises:
            BuildError: there is no compiler, or no cache folder that is the user's alone.
        """
        if sys.byteorder != "little":
            raise BuildError("the packed layout is for processors that store the low byte first")
        compiler = _compiler()
        machine = platform.machine().lower()
        target = "-mcpu=native" if machine in ("arm64", "aarch64") else "-march=native"
        command = (*compiler, "-O3", "-std=c++17", "-shared", "-fPIC", "-pthread")
        known = (SOURCE.read_text(), *command, target, _output_of(*compiler, "--version"), machine, _processor())
        key = hashlib.sha256("\0".join(known).encode()).hexdigest()[:20]
        return BuildCommand(command, target, cache_folder() / f"step-{key}.so")

    def built(self) -> bool:
        """Whether the library is there already."""
        return self.path.is_file()

    def build(self) -> Library:
        """Load the library; where it is missing or damaged it is compiled first, which takes some seconds.

        Raises:
            BuildError: the compiler fails, or its result does not load.
        """
        if self.built():
            try:
                return _load(self.path)
            except BuildError:
                self.path.unlink(missing_ok=True)
        self._compile()
        return _load(self.path)

    def _compile(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.path.parent) as name:
            made = Path(name) / self.path.name
            for flags in ((self.target,), ()):
                done = _run([*self.command, *flags, str(SOURCE), "-o", str(made)])
                if done.returncode == 0 and made.is_file():
                    made.replace(self.path)
                    return
        lines = done.stderr.strip().splitlines() or ["it gave no reason"]
        raise BuildError(f"{self.command[0]} failed: {lines[0]}")


def cache_folder() -> Path:
    """The user's own folder for caches; see `starflow.io.files.cache_folder`.

    Raises:
        BuildError: it cannot be made, or others may write to it.
    """
    try:
        return files.cache_folder()
    except UserError as error:
        raise BuildError(str(error)) from None


def _compiler() -> tuple[str, ...]:
    """The compiler's path, and the arguments that CXX may have after it ("ccache g++")."""
    given = shlex.split(os.environ.get("CXX", ""))
    found = next(filter(None, map(shutil.which, given[:1] or COMPILERS)), None)
    if found is None:
        raise BuildError(f"no C++ compiler ({' '.join(given) or ', '.join(COMPILERS)}): install one, or set CXX")
    return found, *given[1:]


def _processor() -> str:
    """A description of what -march=native depends on."""
    return "\n".join(cpu_lines("model name", "flags", "Features", "CPU part")) or platform.processor()


def _output_of(*command: str) -> str:
    return _run(list(command)).stdout


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} does not run: {error}") from None


def _load(path: Path) -> Library:
    try:
        return Library(_declare_functions(ctypes.CDLL(str(path))))
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} does not load: {str(error).splitlines()[0]}") from None


def _declare_functions(handle: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the arguments of its functions declared.

    Raises:
        AttributeError: it lacks one of the functions.
        AssertionError: it is of another version.
    """
    block, number, address = ctypes.POINTER(BlockStruct), ctypes.c_int32, ctypes.c_void_p
    signatures = {
        "version": (number, ()),
        "panel": (number, ()),
        "bfloat16_products": (number, ()),
        "workspace": (ctypes.c_int64, (block, number)),
        "solve": (None, (block, number, number)),
        "extend": (None, (block, address, number, number)),
        "gelu": (None, (address, address, number, number)),
        "mark": (ctypes.c_uint64, (address, ctypes.c_int64)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(handle, f"starflow_{name}")
        function.restype, function.argtypes = result, arguments
    assert handle.starflow_version() == VERSION
    return handle


def main() -> None:
    """Build the library where it is missing, and say where it lies, or in one line why there is none."""
    try:
        command = BuildCommand.here()
        command.build()
        said = f"compiled token loop: {command.path}"
    except BuildError as error:
        said = f"no compiled token loop, so sampling will be slower: {error}"
    sys.stdout.write(f"{said}\n")


if __name__ == "__main__":
    main()


PACKED_BYTES_LIMIT = 4 * 2**30

"""Most bytes of packed weights outside of files; of a larger model only those of the block at work are kept."""

SAMPLED_VALUES = 64

"""Values of a parameter that tell whether it was written to, where something that is mapped with it was."""

KEPT_SECONDS = 30 * 24 * 3600

"""Files of packed weights that nobody used for so long are removed when another one is written."""


@dataclass
class PackedWeights:
    """The packed weights of each block of one model; several threads may ask for them at once."""

    model_bytes: int = 0
    """Of the model's parameters; over `MAPPED_BYTES`, packed weights are mapped from files."""
    blocks: weakref.WeakKeyDictionary[AutoregressiveBlock, dict[WeightFormat, PackedBlock]] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    """Of each block by format: its own, and those of guesses."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __reduce__(self) -> tuple[type[PackedWeights], tuple[int]]:
        """Make copies of a model pack weights for themselves."""
        return PackedWeights, (self.model_bytes,)

    @property
    def bytes(self) -> int:
        """Memory that all of them take."""
        return sum(packed.bytes for every in list(self.blocks.values()) for packed in every.values())

    def of_block(self, block: AutoregressiveBlock, form: WeightFormat, library: Library) -> PackedBlock:
        """A block's packed weights in a format; packed anew where its parameters have changed."""
        with self._lock:
            every = self.blocks.setdefault(block, {})
            found = every.get(form)
            if found is None or found.versions != parameter_versions(block):
                every.pop(form, None)
                checksums = _checksums(block, library, large=self._large)  # before anything is copied, as the versions
                file = self._file(block, form, checksums, library.panels)
                if file is None:
                    self._make_room(block)
                mapped = file is not None and self._large
                found = pack(block, library.panels, form, (lambda one: one) if mapped else _on_huge_pages, file)
                found = every[form] = replace(found, checksums=checksums, mapped=mapped)
            return found

    @property
    def _large(self) -> bool:
        return self.model_bytes > MAPPED_BYTES

    def _file(
        self, block: AutoregressiveBlock, form: WeightFormat, checksums: tuple[int, ...], panels: PanelLayout
    ) -> Path | None:
        """The file of a block's packed matrices, which is written where it is missing; None for one that has none.

        Weights that are being trained are not worth a file.
        """
        trained = block.training and any(one.requires_grad for one in block.parameters())
        if trained or not (self._large or form in ("int8", "int4")):
            return None
        known = repr((VERSION, panels, form, block.spec, checksums))
        try:
            file = cache_folder() / f"packed-{hashlib.sha256(known.encode()).hexdigest()[:20]}.bin"
            if not (file.is_file() and file.stat().st_size == matrices_bytes(block, panels, form)):
                _remove_old(file.parent)
                with files.atomic_write(file) as temporary:
                    write_matrices(temporary, block, panels, form)
            os.utime(file)  # it was used today
        except (BuildError, UserError, OSError) as error:
            warnings.warn(f"packed weights stay in memory: {error}")
            return None
        return file

    def _make_room(self, block: AutoregressiveBlock) -> None:
        """Drop the other blocks' packed weights if all together are large: packing again costs little."""
        others = [packed for every in self.blocks.values() for packed in every.values() if not packed.mapped]
        if sum(map(bytes_of, block.parameters())) + sum(one.bytes for one in others) > PACKED_BYTES_LIMIT:
            for other in [other for other in self.blocks if other is not block]:
                del self.blocks[other]

    def drop_changed(self, library: Library) -> None:
        """Drop packed weights whose parameters have been written to since.

        Of parameters that are mapped from a file, as those of a large model are, only some values are looked at, and
        only where anything in that mapping was written to.
        """
        with self._lock:
            for block, every in list(self.blocks.items()):
                checksums = _checksums(block, library, large=self._large)
                if any(packed.checksums != checksums for packed in every.values()):
                    del self.blocks[block]


def _checksums(block: AutoregressiveBlock, library: Library, *, large: bool) -> tuple[int, ...]:
    """Of each parameter a number that depends on all values, or on the file behind them.

    A file is not read for it, whose pages would take memory: where nobody has written to a mapping, its name and date
    tell enough, and elsewhere some values are looked at.
    """
    parameters = list(block.parameters())
    if not all(map(is_plain_parameter, parameters)):
        return (-1,)
    origins = mapped_files(parameters) if large else [None] * len(parameters)
    found = []
    for parameter, origin in zip(parameters, origins, strict=True):
        if origin is None:
            found.append(library.checksum(parameter.detach().flatten()))
            continue
        step = max(1, parameter.numel() // SAMPLED_VALUES)
        values = library.checksum(parameter.detach().flatten()[::step]) if origin.written else 0
        found.append(zlib.crc32(repr((origin._replace(written=0), values)).encode()))
    return tuple(found)


def is_plain_parameter(parameter: Tensor) -> bool:
    """Whether its values are plain numbers in the memory of a CPU."""
    return type(parameter) is nn.Parameter and parameter.device.type == "cpu"


def _remove_old(folder: Path) -> None:
    """Remove the packed weights that nobody used for long."""
    for file in folder.glob("packed-*.bin"):
        if file.stat().st_mtime < time.time() - KEPT_SECONDS:
            file.unlink(missing_ok=True)


def _on_huge_pages(tensor: Tensor) -> Tensor:
    """A copy in memory that is asked for in huge pages: the panels are read as one long stream."""
    if tensor.nbytes < HUGE_PAGE_THRESHOLD:
        return tensor
    return on_huge_pages(torch.empty_like(tensor)).copy_(tensor)
