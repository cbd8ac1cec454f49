"""Tar shards of images in WebDataset's layout, in a folder or by URL (http and https).

A sample is a run of members of one name up to its first dot: `0001.jpg`, and beside it `0001.txt` (a caption),
`0001.cls` (a class) or `0001.json` (keys caption, text or prompt; label, class or cls). Every shard is read once from
end to end, to note where its images lie; after that an image is a range of bytes of a file or of a URL. Other
members are left alone: nothing is unpickled or run, and `pipe:` is refused.
"""

from __future__ import annotations

import glob
import re
import tarfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from starflow.data.images import IMAGE_SUFFIXES, ImageError, read_image_size
from starflow.data.sources.base import ImageLocation, ScannedImage, SkippedImage, caption_and_label, parse_json_object
from starflow.errors import UserError

TIMEOUT_SECONDS = 60.0

MAX_TRIES = 4

PARTIAL_CONTENT = 206
"""HTTP status of an answer that holds only the range of bytes that was asked for."""

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):", re.IGNORECASE)

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def is_url(path: str) -> bool:
    """Whether a path is an http or https address.

    Raises:
        UserError: an address of another kind (`pipe:`, `s3:`, ...).

    >>> is_url("https://example.com/a.tar"), is_url("shards/a.tar")
    (True, False)
    """
    found = _SCHEME.match(path)
    if not found or (len(found[1]) == 1):  # a drive letter of Windows
        return False
    if found[1].lower() not in ("http", "https"):
        raise UserError(f"'{path}': {found[1]}: is not read, expected http: or https:, or files (mount or copy them)")
    return True


def expand_ranges(pattern: str) -> list[str]:
    """Write out the ranges of numbers in a pattern, as a shell does; several ranges multiply.

    Raises:
        UserError: a range that runs backwards.

    >>> expand_ranges("a-{08..10}.tar")
    ['a-08.tar', 'a-09.tar', 'a-10.tar']
    """
    found = _RANGE.search(pattern)
    if not found:
        return [pattern]
    first, last = int(found[1]), int(found[2])
    if first > last:
        raise UserError(f"'{pattern}': {found[0]} runs backwards; write the smaller number first")
    numbers = [str(number).zfill(len(found[1])) for number in range(first, last + 1)]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [name for number in numbers for name in expand_ranges(before + number + after)]


def open_url(url: str) -> IO[bytes]:
    """Open a file by URL as a stream from its start.

    Raises:
        OSError: it cannot be had.
    """
    stream: IO[bytes] = urlopen(Request(url), timeout=TIMEOUT_SECONDS)
    return stream


def read_range(url: str, start: int, size: int) -> bytes:
    """Fetch `size` bytes from `start` by URL, again where the network fails for a moment.

    Raises:
        OSError: it cannot be had, or the server gives no ranges.
    """
    request = Request(url, headers={"Range": f"bytes={start}-{start + size - 1}"})
    failure: OSError = OSError("no answer")
    for turn in range(MAX_TRIES):
        if turn:
            time.sleep(0.5 * 2 ** (turn - 1))
        try:
            with urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
                if answer.status != PARTIAL_CONTENT:
                    raise OSError(f"{url}: the server gives no ranges of bytes, so copy the file")
                data: bytes = answer.read()
        except HTTPError as error:
            if error.code < 500:
                raise OSError(f"{url}: {error}") from None
            failure = OSError(f"{url}: {error}")
        except (URLError, TimeoutError, ConnectionError) as error:
            failure = OSError(f"{url}: {error}")
        else:
            if len(data) == size:
                return data
            failure = OSError(f"{url}: {len(data)} bytes came of {size}")
    raise failure


_READ_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error)


class TarSource:
    """A `Source` over tar shards; a location is (shard, offset in it, length in bytes)."""

    def __init__(self, path: str) -> None:
        """Find the shards at `path`: a folder, a .tar, or a pattern with * or {000..099}; a URL too.

        Raises:
            UserError: no shards there, or compressed ones.
        """
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
        """See `Source.shards`."""
        if is_url(self.path):
            return expand_ranges(self.path)
        folder = Path(self.path).expanduser()
        if folder.is_dir():
            return [str(path) for path in sorted(folder.rglob("*.tar"))]
        return [name for one in expand_ranges(str(folder)) for name in sorted(glob.glob(one))]  # noqa: PTH207  (absolute too)

    def scan(self, shard: int, *, sizes: bool) -> Iterator[ScannedImage | SkippedImage]:
        """See `Source.scan`. A shard that is cut short gives the images before the cut, and is named."""
        name = self.shards[shard]
        short = PurePosixPath(name).name
        try:
            with open_url(name) if is_url(name) else Path(name).open("rb") as stream:
                for sample in _samples(_CheckedStream(stream)):
                    yield sample.to_image(shard, short, sizes=sizes)
        except _READ_ERRORS as error:
            yield SkippedImage(short, " ".join(str(error).split()) or type(error).__name__)

    def read(self, location: ImageLocation) -> bytes:
        """See `Source.read`."""
        name, offset, size = self.shards[int(location[0])], int(location[1]), int(location[2])
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
        """See `Source.class_names`; labels are taken as they are."""
        return {}


class _CheckedStream:
    """A stream that keeps its last block: tarfile takes a cut in front of a header for the archive's end."""

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
    """One image with its caption and label: a run of members of one name."""

    key: str
    fields: dict[str, Any] = field(default_factory=dict)
    image: bytes | None = None
    offset: int = 0

    def add(self, suffix: str, data: bytes, offset: int) -> None:
        if f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES:
            if self.image is None:
                self.image, self.offset = data, offset
        elif suffix == "txt":
            self.fields["caption"] = " ".join(data.decode("utf-8", "replace").split())
        elif suffix == "cls":
            self.fields["label"] = data.decode("utf-8", "replace").strip()
        elif suffix == "json":
            self.fields = {**parse_json_object(data), **self.fields}

    def to_image(self, shard: int, short: str, *, sizes: bool) -> ScannedImage | SkippedImage:
        name = f"{short}/{self.key}"
        if self.image is None:
            return SkippedImage(name, "the sample holds no picture")
        try:
            size = read_image_size(self.image, name) if sizes else None
        except ImageError as error:
            return SkippedImage(name, error.reason)
        caption, label = caption_and_label(self.fields)
        return ScannedImage(name, caption, label, size, (shard, self.offset, len(self.image)))


def _samples(stream: _CheckedStream) -> Iterator[_Sample]:
    """Read the samples of a shard in its order, each once; of a shard that is cut short not the one at the cut."""
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
