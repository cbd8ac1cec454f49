"""Reading and writing files: every file is written whole or not at all, and damaged ones are named.

Contract: every writer goes to a temporary name in the target's folder, is flushed to the disk and then renamed, so a
reader sees the old file or the new one and a full disk keeps the old one. Weights are safetensors; nothing is ever
unpickled.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starflow.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A context that yields a temporary path beside `path`, and renames it over `path` when the block ends well.

    Raises:
        UserError: the folder cannot be made or written, or the disk is full; `path` is untouched.

    >>> folder = tempfile.TemporaryDirectory()
    >>> path = Path(folder.name) / "note.txt"
    >>> with atomic_write(path) as temporary:
    ...     _ = temporary.write_text("all of it")
    ...     path.exists()
    False
    >>> path.read_text()
    'all of it'
    >>> folder.cleanup()
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # the system takes the umask off
        mode = temporary.stat().st_mode
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose a folder you can write to") from None
    try:
        yield temporary
        if temporary.stat().st_mode != mode:  # safetensors puts a file of its own there, which nobody else may read
            temporary.chmod(stat.S_IMODE(mode))
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; the old file, if any, is unchanged") from None
    finally:
        temporary.unlink(missing_ok=True)


def give_usual_modes(folder: Path) -> None:
    """Let who may read other new files read those of a folder too: safetensors writes for its own user alone."""
    for path in folder.glob("*.safetensors"):
        data = folder / f".{path.name}.{secrets.token_hex(6)}.tmp"
        os.close(os.open(data, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        path.chmod(stat.S_IMODE(data.stat().st_mode))
        data.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to `path`, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, values: Any) -> None:
    """Write JSON, indented, with a final newline."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def json_text(values: Any) -> str:
    """JSON for other programs, indented: a number that is not finite, which JSON does not have, becomes null.

    >>> json_text({"nats": float("nan"), "count": 2})
    '{\\n  "nats": null,\\n  "count": 2\\n}'
    """
    return json.dumps(_without_nan(values), indent=2, ensure_ascii=False, allow_nan=False)


def _without_nan(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {key: _without_nan(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_without_nan(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: no such file, unreadable, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {path} as JSON: {error}") from None


class JsonLines:
    """The JSON objects of a file with one on each line, by number, without reading the file as a whole.

    The file is mapped, and only where each line starts is kept: 8 bytes of memory per line. Pickles as its path.

    >>> folder = tempfile.TemporaryDirectory()
    >>> path = Path(folder.name) / "rows.jsonl"
    >>> write_text(path, '{"step": 1}\\n{"step": 2}\\n')
    >>> rows = JsonLines(path)
    >>> len(rows), rows[1]
    (2, {'step': 2})
    >>> folder.cleanup()
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Line `number` as an object.

        Raises:
            UserError: it is no JSON object.
        """
        start = int(self._ends[number - 1]) + 1 if number else 0
        try:
            line = json.loads(self._bytes[start : int(self._ends[number])])
        except ValueError:
            line = None
        if not isinstance(line, dict):
            raise UserError(f"{self.path}, line {number + 1} is damaged: delete the folder and make it again")
        return line

    def __reduce__(self) -> tuple[type[JsonLines], tuple[Path]]:
        return JsonLines, (self.path,)

    @cached_property
    def _bytes(self) -> mmap.mmap | bytes:
        if not self.path.stat().st_size:
            return b""  # nothing to map
        with self.path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """The byte offset of each line's newline."""
        import numpy as np

        step, found = 1 << 24, []
        for start in range(0, len(self._bytes), step):
            part = np.frombuffer(self._bytes[start : start + step], dtype=np.uint8)
            found.append(np.flatnonzero(part == ord("\n")) + start)
        return np.concatenate(found).astype(np.int64) if found else np.zeros(0, np.int64)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_write(path) as temporary:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(contiguous, temporary, metadata=dict(metadata or {}))
        except SafetensorError as error:  # its name for a full disk
            raise OSError(str(error)) from None


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a safetensors file, on the CPU.

    Raises:
        UserError: no such file, or a truncated or foreign file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): fetch or write it again") from None


@contextmanager
def folder_lock(folder: Path, name: str = ".lock") -> Iterator[None]:
    """A context that holds a folder's lock of that name; the system drops it with the process, however that ends.

    Raises:
        UserError: another process holds it.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # no such locks on Windows
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process writes to {folder}: wait until it ends, stop it, or choose another --output"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def check_output_folder(folder: Path) -> Path:
    """Make `folder` and prove that it can be written, before any long work; returns it.

    Raises:
        UserError: a file stands there, or no permission.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, expected a folder: choose another --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --output") from None
    return folder


def cache_folder() -> Path:
    """The folder STARFLOW_CACHE, or else `starflow` in the system's folder for caches, made for the user alone.

    Raises:
        UserError: it cannot be made, or others may write to it.
    """
    base = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    folder = Path(os.environ.get("STARFLOW_CACHE") or Path(base) / "starflow")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}") from None
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise UserError(f"{folder} may be written to by others: set STARFLOW_CACHE to a folder of your own")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written to: set STARFLOW_CACHE to another folder")
    return folder


def check_disk_space(folder: Path, needed: int, what: str) -> None:
    """Check that the disk of `folder` has room for `needed` bytes; `what` names them in the message.

    Raises:
        UserError: they do not fit.
    """
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"{what} takes {needed / 1e9:.1f} GB in {folder}, and {free / 1e9:.1f} GB are free there: "
            "make room, or choose another folder"
        )
