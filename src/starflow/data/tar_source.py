"""Tar shards in WebDataset's layout, in a folder or by URL.

A sample is a run of members of one name up to its first dot: `0001.jpg`, and beside it `0001.txt` (a caption),
`0001.cls` (a class) or `0001.json` (keys caption, text or prompt; label, class or cls). Every shard is read once from
end to end, to note where its pictures lie; after that a picture is a range of bytes of a file or of a URL. Other
members are left alone: nothing is unpickled, and `pipe:` is refused.
"""

from __future__ import annotations

import glob
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any

from starflow.data.records import SUFFIXES, ImageError, Skipped
from starflow.data.remote import expand, is_url, open_url, read_range
from starflow.data.sources import Found, Place, parse_fields, picture_size, texts_of
from starflow.errors import UserError

_BROKEN = (tarfile.TarError, OSError, EOFError, zlib.error)


class TarSource:
    """See the module's docstring. `path` is a folder, a .tar, or a pattern with * or {000..099}; a URL too.

    A place is (shard, offset, bytes).
    """

    def __init__(self, path: str) -> None:
        """Raises UserError: no shards there, or compressed ones."""
        self.path = path
        if not self.shards:
            raise UserError(f"no .tar files at '{path}': set data.path to a folder, a pattern or a URL of tar shards")
        packed = [shard for shard in self.shards if shard.endswith((".gz", ".tgz", ".zst", ".bz2", ".xz"))]
        if packed:
            raise UserError(f"{packed[0]} is compressed, so that no picture can be found in it: unpack it to a .tar")

    def __reduce__(self) -> tuple[type[TarSource], tuple[str]]:
        return TarSource, (self.path,)

    @cached_property
    def shards(self) -> list[str]:
        if is_url(self.path):
            return expand(self.path)
        folder = Path(self.path).expanduser()
        if folder.is_dir():
            return [str(path) for path in sorted(folder.rglob("*.tar"))]
        return [name for one in expand(str(folder)) for name in sorted(glob.glob(one))]  # noqa: PTH207  (absolute too)

    def scan(self, shard: int, *, sizes: bool) -> Iterator[Found | Skipped]:
        """See `Source.scan`. A shard that is cut short gives the pictures before the cut, and is named."""
        name = self.shards[shard]
        short = PurePosixPath(name).name
        try:
            with open_url(name) if is_url(name) else Path(name).open("rb") as stream:
                for sample in _samples(_Tail(stream)):
                    yield sample.found(shard, short, sizes=sizes)
        except _BROKEN as error:
            yield Skipped(short, " ".join(str(error).split()) or type(error).__name__)

    def read(self, place: Place) -> bytes:
        name, offset, size = self.shards[int(place[0])], int(place[1]), int(place[2])
        try:
            if is_url(name):
                return read_range(name, offset, size)
            with Path(name).open("rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise ImageError(Path(name), str(error.strerror or error)) from None
        if len(data) < size:
            raise ImageError(Path(name), f"cut short at byte {offset + len(data)}")
        return data

    def class_names(self, labels: set[str]) -> dict[str, str]:
        return {}


class _Tail:
    """A stream that remembers how it ended: tarfile takes a cut in front of a header for the archive's end."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._last = stream, b""

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._last = (self._last + data)[-tarfile.BLOCKSIZE :]
        return data

    def check(self) -> None:
        """Raises tarfile.ReadError: the last block is not one of zeros."""
        while self.read(1 << 20):
            pass
        if self._last.strip(b"\0") or len(self._last) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("unexpected end of data")


@dataclass
class _Sample:
    """What one run of members holds."""

    key: str
    fields: dict[str, Any] = field(default_factory=dict)
    picture: bytes | None = None
    offset: int = 0

    def add(self, suffix: str, data: bytes, offset: int) -> None:
        if f".{suffix.rpartition('.')[2]}" in SUFFIXES:
            if self.picture is None:
                self.picture, self.offset = data, offset
        elif suffix == "txt":
            self.fields["caption"] = " ".join(data.decode("utf-8", "replace").split())
        elif suffix == "cls":
            self.fields["label"] = data.decode("utf-8", "replace").strip()
        elif suffix == "json":
            self.fields = {**parse_fields(data), **self.fields}

    def found(self, shard: int, short: str, *, sizes: bool) -> Found | Skipped:
        name = f"{short}/{self.key}"
        if self.picture is None:
            return Skipped(name, "the sample holds no picture")
        try:
            size = picture_size(self.picture, name) if sizes else None
        except ImageError as error:
            return Skipped(name, error.reason)
        caption, label = texts_of(self.fields)
        return Found(name, caption, label, size, (shard, self.offset, len(self.picture)))


def _samples(stream: _Tail) -> Iterator[_Sample]:
    """The samples of a shard in its order, each read once; of a shard that is cut short not the one at the cut."""
    sample: _Sample | None = None
    archive_stream: Any = stream
    with tarfile.open(fileobj=archive_stream, mode="r|") as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            stem, dot, suffix = path.name.partition(".")
            content = archive.extractfile(member) if member.isreg() and dot and stem else None
            if content is None:
                continue
            key = (path.parent / stem).as_posix()
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = _Sample(key)
            sample.add(suffix.lower(), content.read(), member.offset_data)
    stream.check()
    if sample is not None:
        yield sample
