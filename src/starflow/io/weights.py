"""The weights of one network in a folder: one safetensors file, or shards with an index, and their checksums.

    model.safetensors                        where all fits one file, otherwise
    model-00001-of-00002.safetensors ...     and
    model.safetensors.index.json             {"metadata": {"total_size": bytes}, "weight_map": {tensor: shard}}
    checksums.json                           {file: {"bytes": count, "sha256": digest}}

Contract: reading compares the size of every file with what its own header and checksums.json say, and the tensors of
a shard with the index; whatever differs is named. Writing is shard by shard, so it needs the memory of one, and what
lay there before is taken away only when the new files are whole. Reading does not compare the sha256, which would read
every byte; `starflow info --verify` does. Folders of other libraries have the same shards and index, and no checksums.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from starflow.errors import UserError
from starflow.io import files

if TYPE_CHECKING:
    from torch import Tensor

STEM = "model"
"""How the names of weight files start."""

CHECKSUMS = "checksums.json"

SHARD_BYTES = 4 * 1024**3
"""Size that a shard stays under, where no single tensor is larger."""

FETCH_AGAIN = "fetch or write it again"

_CHUNK = 1 << 22

_LARGEST_HEADER = 100_000_000  # what safetensors itself allows


def single_file_name(stem: str = STEM) -> str:
    """Name of the file that holds all weights, where there are no shards."""
    return f"{stem}.safetensors"


def index_file_name(stem: str = STEM) -> str:
    """Name of the index, where there are shards."""
    return f"{stem}.safetensors.index.json"


def has_weights(folder: Path, stem: str = STEM) -> bool:
    """Whether the folder has a file of weights or an index, whole or not."""
    return (folder / single_file_name(stem)).is_file() or (folder / index_file_name(stem)).is_file()


@dataclass
class ShardWriter:
    """A context to which tensors are added one after another, and which writes them a shard at a time.

    Files appear when the context ends well; until then, and after an error, what lay there before is as it was.

    >>> import tempfile, torch
    >>> temporary = tempfile.TemporaryDirectory()
    >>> folder = Path(temporary.name)
    >>> with ShardWriter(folder, limit=16) as writer:
    ...     for name in ("a", "b"):
    ...         writer.add(name, torch.zeros(4))
    >>> [path.name for path in weight_files(folder)]
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    >>> temporary.cleanup()
    """

    folder: Path
    limit: int = SHARD_BYTES
    """Bytes that a shard stays under."""
    stem: str = STEM
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    _waiting: dict[str, Tensor] = field(default_factory=dict)
    _bytes: int = 0
    _written: list[tuple[Path, list[str]]] = field(default_factory=list)
    _total: int = 0

    def __enter__(self) -> Self:
        files.check_output_folder(self.folder)
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; it is on the disk once its shard is full, or when the context ends.

        Raises:
            UserError: the folder cannot be written, or the disk is full.
        """
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._bytes + size > self.limit:
            self._flush()
        shared = any(_same_memory(tensor, other) for other in self._waiting.values())
        self._waiting[name] = tensor.clone() if shared else tensor  # tied weights are written once for each name
        self._bytes += size
        self._total += size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._waiting or not self._written:
                    self._flush()
                self._put_in_place()
        finally:
            for path, _ in self._written:
                path.unlink(missing_ok=True)

    def _flush(self) -> None:
        path = self.folder / f".{self.stem}-{len(self._written) + 1:05d}.safetensors.tmp"
        self._written.append((path, list(self._waiting)))
        files.write_tensors(path, self._waiting, self.metadata)
        self._waiting, self._bytes = {}, 0

    def _put_in_place(self) -> None:
        """Give the finished files their names. A folder without checksums is readable, so they go first, come last."""
        count = len(self._written)
        names = [
            single_file_name(self.stem) if count == 1 else f"{self.stem}-{number + 1:05d}-of-{count:05d}.safetensors"
            for number in range(count)
        ]
        sums = {name: checksum_entry(path) for name, (path, _) in zip(names, self._written, strict=True)}
        index = self.folder / index_file_name(self.stem)
        (self.folder / CHECKSUMS).unlink(missing_ok=True)
        index.unlink(missing_ok=True)
        for name, (path, _) in zip(names, self._written, strict=True):
            path.replace(self.folder / name)
        if count > 1:
            where = {tensor: name for name, (_, held) in zip(names, self._written, strict=True) for tensor in held}
            files.write_json(index, {"metadata": {"total_size": self._total}, "weight_map": where})
        for old in [self.folder / single_file_name(self.stem), *self.folder.glob(f"{self.stem}-*-of-*.safetensors")]:
            if old.name not in names:
                old.unlink(missing_ok=True)
        files.write_json(self.folder / CHECKSUMS, sums)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    if one.device.type == "meta" or not one.numel() or not other.numel():
        return False
    return one.device == other.device and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def write(folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int = SHARD_BYTES) -> None:
    """Write pairs of name and tensor, which may be made one by one, as files of at most `limit` bytes and an index.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    with ShardWriter(folder, limit) as writer:
        for name, tensor in tensors:
            writer.add(name, tensor)


def read(folder: Path, stem: str = STEM) -> dict[str, Tensor]:
    """Every tensor of a folder, on the CPU; their files are mapped, so that memory is taken as they are used.

    Raises:
        UserError: a missing or damaged file, a file of another size, or a shard that holds other tensors than the
            index says; it is named.
    """
    check_sizes(folder)
    where = _weight_map(folder, stem)
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder, stem):
        found = files.read_tensors(path)
        if where is not None:
            _check_shard(path, set(found), {name for name, shard in where.items() if shard == path.name})
        tensors.update(found)
    return tensors


def weight_files(folder: Path, stem: str = STEM) -> list[Path]:
    """The files that hold the weights: those of the index, or the one.

    Raises:
        UserError: no index or file, a shard is missing, or the index is damaged.
    """
    where = _weight_map(folder, stem)
    if where is None:
        path = folder / single_file_name(stem)
        if not path.is_file():
            raise UserError(f"no such file: {path}; the model is not whole, {FETCH_AGAIN}")
        return [path]
    shards = [folder / name for name in sorted(set(where.values()))]
    missing = [path for path in shards if not path.is_file()]
    if missing:
        names = ", ".join(path.name for path in missing[:4]) + (", ..." if len(missing) > 4 else "")
        raise UserError(f"{folder} lacks {len(missing)} of {len(shards)} shards ({names}): {FETCH_AGAIN}")
    return shards


def check_sizes(folder: Path) -> None:
    """Compare every safetensors file of a folder with its own header and with checksums.json; no weight is read.

    Raises:
        UserError: a file is missing, or longer or shorter than it should be; it is named. A shard of an index is
            missing.
    """
    for index in folder.glob("*.safetensors.index.json"):
        weight_files(folder, index.name.removesuffix(".safetensors.index.json"))
    for path in sorted(folder.glob("*.safetensors")):
        _check_header(path)
    for name, known in checksums(folder).items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"no such file: {path}, which {CHECKSUMS} lists; {FETCH_AGAIN}")
        if path.stat().st_size != known.bytes:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes, {CHECKSUMS} says {known.bytes}: {FETCH_AGAIN}, or remove "
                f"{CHECKSUMS} if you changed it yourself"
            )


@dataclass(frozen=True)
class Checksum:
    """The size and digest that a file should have."""

    bytes: int
    sha256: str


def checksums(folder: Path) -> dict[str, Checksum]:
    """The checksums of the files of a folder by name, from checksums.json; empty where there is none.

    Raises:
        UserError: it is damaged.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        return {}
    values = files.read_json(path)
    try:
        found = {str(name): Checksum(int(one["bytes"]), str(one["sha256"])) for name, one in values.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} holds no checksums ({{file: {{bytes, sha256}}}}): {FETCH_AGAIN}") from None
    _check_names(path, found)
    return found


def write_checksums(folder: Path) -> None:
    """Write checksums.json for the safetensors files that another library has put into a folder.

    Raises:
        UserError: the folder cannot be written.
    """
    files.write_json(
        folder / CHECKSUMS, {path.name: checksum_entry(path) for path in sorted(folder.glob("*.safetensors"))}
    )


def checksum_entry(path: Path) -> dict[str, Any]:
    """A file's entry in checksums.json."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def sha256_of(path: Path, read: Callable[[int], None] = lambda _: None) -> str:
    """The sha256 of a file in hexadecimal; `read` is called with the size of every chunk that was read."""
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
        read(len(chunk))
    return digest.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _weight_map(folder: Path, stem: str) -> dict[str, str] | None:
    path = folder / index_file_name(stem)
    if not path.is_file():
        return None
    values = files.read_json(path)
    where = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise UserError(f"{path} holds no 'weight_map' of tensors to shards: {FETCH_AGAIN}")
    _check_names(path, where.values())
    return where


def _check_names(path: Path, names: Iterable[str]) -> None:
    """Check that every name is that of a file beside `path`, which lists it."""
    for name in names:
        if name in ("", ".", "..") or Path(name).name != name or os.sep in name:
            raise UserError(f"{path} names '{name}', expected a file in the same folder: {FETCH_AGAIN}")


def _check_shard(path: Path, found: set[str], expected: set[str]) -> None:
    if found == expected:
        return
    missing, more = sorted(expected - found), sorted(found - expected)
    what = [
        f"{len(names)} {kind} ({names[0]}, ...)" for kind, names in (("missing", missing), ("extra", more)) if names
    ]
    raise UserError(f"{path} does not hold the tensors that the index says, {' and '.join(what)}: {FETCH_AGAIN}")


def _check_header(path: Path) -> None:
    """Compare a safetensors file's length with what its header describes.

    Raises:
        UserError: they differ, or there is no such header.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise ValueError("its header is cut")
            header = json.loads(file.read(length))
            ends = [one["data_offsets"][1] for name, one in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}): {FETCH_AGAIN}") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise UserError(
            f"{path} is not a whole safetensors file ({size} bytes, its header describes {expected}): {FETCH_AGAIN}"
        )
