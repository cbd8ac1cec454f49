"""Tar shards of images in WebDataset's layout, in a folder or by URL (http and https).

A sample is the members of one name up to its first dot, wherever they stand in a shard: `0001.jpg`, and with it
`0001.txt` (a caption), `0001.cls` (a class) or `0001.json` (see `caption_and_label`). `0001.depth.png` beside
`0001.jpg` is another field of the sample and no image of the set; where a sample has only such images, each of them is
one. Every shard is read once from end to end, to note where its images lie; after that an image is a range of bytes of
a file or of a URL. Other members are counted and left alone: nothing is unpickled or run, and `pipe:` is refused.
"""

from __future__ import annotations

import glob
import math
import re
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from starflow.data.images import IMAGE_SUFFIXES, ImageError, read_image_size
from starflow.data.sources.base import (
    HIDDEN_FOLDERS,
    Found,
    ImageLocation,
    ScannedImage,
    SkippedImage,
    UnusedFile,
    files_state,
    shard_names,
    unused_by_ending,
    walk_files,
)
from starflow.data.sources.captions import SIDECAR_SUFFIXES, caption_and_label, shown_name, sidecar_fields
from starflow.errors import UserError

TIMEOUT_SECONDS = 60.0

MAX_TRIES = 4

PARTIAL_CONTENT = 206
"""HTTP status of an answer that holds only the range of bytes that was asked for."""

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):", re.IGNORECASE)

MOST_NAMES = 1_000_000
"""Shards that a pattern may stand for."""

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
        UserError: a range that runs backwards, or over `MOST_NAMES` names in all.

    >>> expand_ranges("a-{08..10}.tar")
    ['a-08.tar', 'a-09.tar', 'a-10.tar']
    """
    ranges = _RANGE.findall(pattern)
    if any(len(end) > 18 for ends in ranges for end in ends) or (
        math.prod(max(1, int(last) - int(first) + 1) for first, last in ranges) > MOST_NAMES
    ):
        raise UserError(f"'{pattern}' stands for over {MOST_NAMES:,} shards: write smaller ranges")
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


PACKED_SUFFIXES = (".gz", ".tgz", ".zst", ".bz2", ".xz")


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
        packed = [shard for shard in self.shards if shard.lower().endswith(PACKED_SUFFIXES)]
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
            return [str(folder / name) for name in self._listing[0]]
        return [name for one in expand_ranges(str(folder)) for name in sorted(glob.glob(one))]  # noqa: PTH207  (absolute too)

    @cached_property
    def _listing(self) -> tuple[list[str], list[UnusedFile]]:
        """The shards of a folder, compressed ones too, and its other files."""
        if is_url(self.path) or not (folder := Path(self.path).expanduser()).is_dir():
            return [], []
        names, left = walk_files(folder)
        shards = [name for name in names if re.search(r"\.(tar(\.\w+)?|tgz)$", name, re.IGNORECASE)]
        return shards, [*left, *map(unused_by_ending, sorted(set(names).difference(shards)))]

    @cached_property
    def _short(self) -> list[str]:
        return shard_names(self.shards)

    def scan(self, shard: int, *, sizes: bool) -> Iterator[Found]:
        """See `Source.scan`. A shard that is cut short gives the images before the cut, and is named."""
        name, short = self.shards[shard], self._short[shard]
        found = _Shard(shard, short, sizes=sizes)
        failure = ""
        try:
            with open_url(name) if is_url(name) else Path(name).open("rb") as stream:
                found.read(_CheckedStream(stream))
        except Exception as error:  # noqa: BLE001  (damaged headers raise errors of any class)
            failure = " ".join(str(error).split())[:200] or type(error).__name__
        yield from found.images(cut=bool(failure))
        if failure:
            yield SkippedImage(short, failure)
        yield from found.left
        if shard == 0:
            yield from self._listing[1]

    def state(self) -> dict[str, Any]:
        """See `Source.state`; of URLs nothing is asked."""
        return {} if is_url(self.path) else files_state(Path(), [], self.shards)

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
    """A stream that knows how it ended: tarfile takes a cut in front of a header for the archive's end.

    So it does with a header that is damaged, and it does not look behind the first of archives that were joined.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._last = stream, b""
        self._position = self._data_end = 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._last = (self._last + data)[-tarfile.BLOCKSIZE :]
        if kept := len(data.rstrip(b"\0")):
            self._data_end = self._position + kept
        self._position += len(data)
        return data

    def check(self, end: int) -> None:
        """Check the bytes from `end` on, where the last header was looked for.

        Raises:
            tarfile.ReadError: the last block is not one of zeros, or other bytes than zeros follow.
        """
        while self.read(1 << 20):
            pass
        if self._last.strip(b"\0") or len(self._last) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("unexpected end of data")
        if self._data_end > end:
            raise tarfile.ReadError(f"no header at byte {end}, and what follows is not read")


@dataclass(slots=True)
class _Member:
    """An image among the members of a sample, without its bytes."""

    words: str
    """What its name has between the sample's name and the ending: "depth" of 1.depth.png, "" of 1.png."""
    suffix: str
    offset: int
    bytes: int
    size: tuple[int, int] | None
    reason: str
    """Why it is no image, or empty."""


@dataclass(slots=True)
class _Sample:
    """Members of one name up to its first dot: images, and the texts that describe them by their words and endings."""

    key: str
    images: list[_Member] = field(default_factory=list)
    texts: dict[tuple[str, str], bytes] = field(default_factory=dict)

    def has(self, words: str, suffix: str) -> bool:
        return (words, suffix) in self.texts or any((one.words, one.suffix) == (words, suffix) for one in self.images)

    def member(self, words: str, suffix: str) -> str:
        """The name of a member."""
        return f"{self.key}.{words}{suffix}" if words else f"{self.key}{suffix}"

    def chosen(self) -> list[_Member]:
        """The images of the set among those of the sample."""
        plain = [one for one in self.images if not one.words][:1]
        described = {words for words, _ in self.texts if words}
        return [one for one in self.images if one in plain or one.words in described] if plain else self.images


class _Shard:
    """What one pass over a shard finds."""

    def __init__(self, number: int, short: str, *, sizes: bool) -> None:
        self.number, self.short, self.sizes = number, short, sizes
        self.samples: dict[str, list[_Sample]] = {}
        self.left: list[Found] = []
        self.last: _Sample | None = None

    def read(self, stream: _CheckedStream) -> None:
        """Read all members; whatever damaged headers raise ends it."""
        archive_stream: Any = stream
        with tarfile.open(fileobj=archive_stream, mode="r|") as archive:
            for member in archive:
                if not member.isdir():
                    self._take(archive, member)
        stream.check(archive.offset)

    def _take(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        path = PurePosixPath(member.name)
        stem, dot, ending = path.name.partition(".")
        words, _, last = ending.rpartition(".")
        suffix = f".{last.lower()}"
        if any(part.startswith(".") or part in HIDDEN_FOLDERS for part in path.parts if part not in (".", "..")):
            self._leave(member.name, "hidden files")
        elif not dot or (suffix not in IMAGE_SUFFIXES and suffix not in SIDECAR_SUFFIXES):
            self.left.append(unused_by_ending(f"{self.short}/{member.name}"))
        elif not member.isreg() or member.issparse():
            self.left.append(SkippedImage(self._shown(member.name), "a link or sparse member of the archive"))
        else:
            content = archive.extractfile(member)
            assert content is not None
            sample = self.last = self._sample((path.parent / stem).as_posix(), words, suffix)
            data = content.read()
            if suffix in SIDECAR_SUFFIXES:
                sample.texts[words, suffix] = data
            else:
                sample.images.append(self._image(words, suffix, data, member.offset_data))

    def _sample(self, key: str, words: str, suffix: str) -> _Sample:
        """The first sample of that name that has no such member yet: a name that comes again is another sample."""
        several = self.samples.setdefault(key, [])
        sample = next((one for one in several if not one.has(words, suffix)), None)
        if sample is None:
            sample = _Sample(key if not several else f"{key} ({len(several) + 1})")
            several.append(sample)
        return sample

    def _image(self, words: str, suffix: str, data: bytes, offset: int) -> _Member:
        size, reason = None, ""
        if self.sizes:
            try:
                size = read_image_size(data, self.short)
            except ImageError as error:
                reason = error.reason
        return _Member(words, suffix, offset, len(data), size, reason)

    def images(self, *, cut: bool) -> Iterator[Found]:
        """The samples' images; of a shard that is cut short the last sample may lack a part, and is skipped."""
        for sample in (one for several in self.samples.values() for one in several):
            chosen = sample.chosen()
            taken: set[tuple[str, str]] = set()
            for image in chosen:
                name = sample.key if not image.words or len(chosen) == 1 else f"{sample.key}.{image.words}"
                if cut and sample is self.last:
                    yield SkippedImage(self._shown(name), "its shard is cut short here")
                elif image.reason:
                    yield SkippedImage(self._shown(name), image.reason)
                else:
                    yield self._describe(sample, image, self._shown(name), taken)
            for image in sample.images:
                if image not in chosen:
                    self._leave(sample.member(image.words, image.suffix), "further images of a sample")
            for words, suffix in sample.texts:
                if chosen and (words, suffix) not in taken and not (cut and sample is self.last):
                    self._leave(sample.member(words, suffix), "captions that no image takes")
            if not chosen:
                yield SkippedImage(self._shown(sample.key), "the sample holds no picture")

    def _describe(self, sample: _Sample, image: _Member, name: str, taken: set[tuple[str, str]]) -> ScannedImage:
        """An image with its own texts, or else with those of the sample."""
        own = image.words if any(words == image.words for words, _ in sample.texts) else ""
        texts = {suffix: data for (words, suffix), data in sample.texts.items() if words == own}
        taken.update((own, suffix) for suffix in texts)
        fields, note = sidecar_fields(texts)
        caption, label, other = caption_and_label(fields)
        location = (self.number, image.offset, image.bytes)
        return ScannedImage(name, caption, label, image.size, location, note=note or other)

    def _leave(self, name: str, reason: str) -> None:
        self.left.append(UnusedFile(self._shown(name), reason))

    def _shown(self, name: str) -> str:
        return f"{self.short}/{shown_name(name)}"
