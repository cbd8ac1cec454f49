"""Build step.cpp with the user's own compiler, once a machine, and load the library.

    python -m starflow.sampling.cpu.build        # before the first picture; `make` does it when it installs

Contract: the library lies in the user's cache folder under a name made of the source, the flags, the compiler and the
processor; it is written there whole. Nothing is loaded from a folder that others may write to.
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
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from starflow.errors import UserError
from starflow.io import files
from starflow.nn.cpu import cpu_lines
from starflow.sampling.cpu.pack import BlockStruct, PanelLayout, bytes_of

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
