"""The contract of a source of captioned images, and the records that describe its images.

Contract of a `Source`: its shards are a fixed list, and scanning a shard gives its images in a fixed order, each with
a location from which `read` fetches its bytes again at any time, in any process. Nothing is ever unpickled or run.
What cannot be read is named, never silently left out.

An image has one record at each step of its way, and none of them holds pixels:

1. `ImageRecord` is a file of a folder with what the folder says of it; data sets are prepared as lists of these.
2. `ScannedImage` is what scanning any source finds, a file, a member of a tar or a row of a table.
3. `starflow.data.index.ImageEntry` is what training knows of image number i of the finished index.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal, Protocol

from starflow.data.sources.captions import shown_name

Split = Literal["train", "heldout"]

SourceKind = Literal["folder", "tar", "parquet"]

ImageLocation = tuple[int | str, ...]
"""What a source needs to find an image again: plain numbers and texts, so that JSON can hold it."""

INDEX_FILE = "index.jsonl"
"""The index of a prepared folder, one `ImageRecord` a line."""

HELDOUT_SHARE = 0.05
"""Share of a data set that is never trained on, where the data set itself does not say."""

HIDDEN_FOLDERS = frozenset({"__MACOSX", "@eaDir"})
"""Folders of systems' own that hold copies of pictures; so do those that begin with a dot."""


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One captioned image file of a folder.

    Attributes:
        file: where the image lies.
        caption: main caption, e.g. `"red apple"`; empty for none.
        label: class name, or None.
        split: training or held out.
        name: unique id within the set.
        meta: free text fields; the glyph set writes style, code, group, subgroup, tags, flip, heldout_kind.
    """

    file: Path
    caption: str
    label: str | None
    split: Split
    name: str
    meta: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SkippedImage:
    """An image that was left out, by name, with the reason."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class UnusedFile(SkippedImage):
    """What lies in a source, is no image of it and was not used either; the reason is a noun phrase to be counted."""


@dataclass(frozen=True)
class ScannedImage:
    """One image that a scan of a source found.

    Attributes:
        name: unique id within the source.
        caption: its caption; empty for none.
        label: class name, or None.
        size: (width, height) in pixels, upright, or None where the scan did not look.
        location: what `Source.read` needs to find it again.
        split: None leaves the choice to the hash of the name.
        note: what of its description could not be read, or empty; see `Description.note`.
    """

    name: str
    caption: str
    label: str | None
    size: tuple[int, int] | None
    location: ImageLocation
    split: Split | None = None
    note: str = ""


Found = ScannedImage | SkippedImage
"""What a scan yields; all of a source is in it once, as an image, skipped or unused."""


class Source(Protocol):
    """A place that holds captioned images in shards (see the module's docstring); it pickles, for worker processes."""

    @property
    def shards(self) -> list[str]:
        """Names of the shards, for messages; their order is fixed."""
        ...

    def scan(self, shard: int, *, sizes: bool) -> Iterator[Found]:
        """Yield the images of a shard in their order; with `sizes`, files that are no images are skipped by name."""
        ...

    def state(self) -> dict[str, Any]:
        """Describe what lies there now, so that a later change can be noticed; empty where that cannot be told."""
        ...

    def read(self, location: ImageLocation) -> bytes:
        """Fetch an image's encoded bytes.

        Raises:
            ImageError: it is not there any more, or cannot be reached.
        """
        ...

    def class_names(self, labels: set[str]) -> dict[str, str]:
        """Give labels readable names, in the classes' order; empty where the labels are names themselves."""
        ...


def unit_hash(text: str) -> float:
    """Hash a text to a number in [0, 1) that depends on it alone (the first 52 bits of its sha256).

    >>> round(unit_hash("a.png"), 6), unit_hash("a.png") < HELDOUT_SHARE
    (0.496202, False)
    """
    return int(hashlib.sha256(text.encode()).hexdigest()[:13], 16) / 16**13


def walk_files(folder: Path) -> tuple[list[str], list[UnusedFile]]:
    """List the regular files below a folder by relative name, sorted, and what is left out with the reason.

    Links to folders are followed, but no folder is read twice. Hidden files and those of hidden folders are left out.
    """
    files: list[str] = []
    left: list[UnusedFile] = []
    seen: set[tuple[int, int]] = set()
    real, linked = deque([("", False)]), deque[tuple[str, bool]]()
    while real or linked:
        prefix, hidden = (real or linked).popleft()  # links last: a folder is known by its own name first
        path = os.path.join(folder, prefix)  # noqa: PTH118  (a million files)
        try:
            status = os.stat(path)  # noqa: PTH116
            if (status.st_dev, status.st_ino) in seen:
                left.append(UnusedFile(shown_name(prefix), "folders that were read already by another name"))
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    name = prefix + entry.name
                    covered = hidden or entry.name.startswith(".") or entry.name in HIDDEN_FOLDERS
                    if entry.is_dir():
                        (linked if entry.is_symlink() else real).append((f"{name}/", covered))
                    elif covered:
                        left.append(UnusedFile(shown_name(name), "hidden files"))
                    elif entry.is_file():
                        files.append(name)
                    else:
                        reason = "links to nothing" if entry.is_symlink() else "entries that are no regular files"
                        left.append(UnusedFile(shown_name(name), reason))
        except OSError as error:
            left.append(UnusedFile(shown_name(prefix) or "./", f"folders that cannot be read ({error.strerror})"))
    return sorted(files), sorted(left, key=lambda one: one.name)


def unused_by_ending(name: str) -> UnusedFile:
    """Name a file that is left out because of its ending.

    >>> unused_by_ending("a/b.HEIC")
    UnusedFile(name='a/b.HEIC', reason='files ending in .heic')
    """
    suffix = PurePath(name).suffix.lower()
    return UnusedFile(
        shown_name(name), f"files ending in {shown_name(suffix)}" if suffix else "files without an ending"
    )


def shard_names(paths: Sequence[str]) -> list[str]:
    """Short names of shards: the files' own, with their folders where two files have the same.

    >>> shard_names(["set/a/0.tar", "set/b/0.tar"]), shard_names(["set/a/0.tar", "set/b/1.tar"])
    (['a/0.tar', 'b/0.tar'], ['0.tar', '1.tar'])
    """
    parts = [path.split("/") for path in paths]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if max(Counter(names).values(), default=1) == 1:
            break
    return [shown_name(name) for name in names]


def files_state(root: Path, images: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
    """Describe files by number and digest: images by name and size, texts by the time of their last change too."""
    digest = hashlib.sha256()
    for names, timed in ((images, False), (texts, True)):
        for name in names:
            try:
                status = os.stat(root / name)  # noqa: PTH116
                facts = [status.st_size, status.st_mtime_ns if timed else 0]
            except OSError:
                facts = []
            digest.update(f"{shown_name(name)}\0{facts}\0".encode())
    return {"images": len(images), "texts": len(texts), "digest": digest.hexdigest()}
