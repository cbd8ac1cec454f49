"""Where pictures of any number lie: a folder of files, tar shards in WebDataset's layout, or parquet files.

Contract of a `Source`: its shards are a fixed list, and scanning one gives its pictures in a fixed order, each with a
place from which `read` fetches its bytes again at any time, in any process. Nothing is ever unpickled or run. What
cannot be read is named, never silently left out.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from starflow.data.imagenet import synset_names
from starflow.data.records import INDEX, ImageError, Record, Skipped, Split, read_folder
from starflow.errors import UserError

SourceKind = Literal["folder", "tar", "parquet"]
Place = tuple[int | str, ...]
"""What a source needs to find a picture again: plain numbers and texts."""
CAPTION_KEYS = ("caption", "text", "prompt")
LABEL_KEYS = ("label", "class", "cls")
FILES_A_SHARD = 10_000
"""Of a folder, which has no shards of its own."""


@dataclass(frozen=True)
class Found:
    """One picture of a shard; `size` is (width, height) in pixels, upright, or None where nobody looked."""

    name: str
    caption: str
    label: str | None
    size: tuple[int, int] | None
    place: Place
    split: Split | None = None
    """None leaves it to the hash of the name."""


class Source(Protocol):
    """See the module's docstring; it pickles, for worker processes."""

    @property
    def shards(self) -> list[str]: ...

    def scan(self, shard: int, *, sizes: bool) -> Iterator[Found | Skipped]:
        """The pictures of a shard; with `sizes` those that are no pictures are skipped."""
        ...

    def read(self, place: Place) -> bytes:
        """A picture's file.

        Raises:
            ImageError: it is not there any more, or cannot be reached.
        """
        ...

    def class_names(self, labels: set[str]) -> dict[str, str]:
        """Readable names of labels, in the classes' order; empty where the labels are names themselves."""
        ...


def open_source(kind: SourceKind, path: str) -> Source:
    """The source of that kind.

    Raises:
        UserError: nothing there.
    """
    if kind == "tar":
        from starflow.data.tar_source import TarSource

        return TarSource(path)
    if kind == "parquet":
        from starflow.data.parquet_source import ParquetSource

        return ParquetSource(path)
    return FolderSource(path)


class FolderSource:
    """Files in a folder, as `starflow.data.records.read_folder` understands it; ImageNet's as they come.

    A place is the file's name relative to the folder.
    """

    def __init__(self, path: str) -> None:
        """Raises UserError: no such folder."""
        self.folder = Path(path).expanduser()
        if not path or not self.folder.is_dir():
            raise UserError(f"no folder of pictures at '{path}': set data.path to your pictures")

    def __reduce__(self) -> tuple[type[FolderSource], tuple[str]]:
        return FolderSource, (str(self.folder),)

    @cached_property
    def _records(self) -> list[Record]:
        return read_folder(self.folder)

    @property
    def shards(self) -> list[str]:
        return [f"files from {start}" for start in range(0, len(self._records), FILES_A_SHARD)]

    def scan(self, shard: int, *, sizes: bool) -> Iterator[Found | Skipped]:
        """See `Source.scan`; only headers are read, and only for sizes."""
        prepared = (self.folder / INDEX).is_file()
        for record in self._records[shard * FILES_A_SHARD : (shard + 1) * FILES_A_SHARD]:
            size = None
            if sizes:
                try:
                    size = picture_size(record.file, record.name)
                except ImageError as error:
                    yield Skipped(record.name, error.reason)
                    continue
            place = (record.file.relative_to(self.folder).as_posix(),)
            split = record.split if prepared else None
            yield Found(record.name, record.caption, record.label, size, place, split)

    def read(self, place: Place) -> bytes:
        path = self.folder / str(place[0])
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise ImageError(path, "no such file") from None
        except OSError as error:
            raise ImageError(path, str(error.strerror or error)) from None

    def class_names(self, labels: set[str]) -> dict[str, str]:
        return synset_names(self.folder, labels)


def picture_size(file: Path | bytes, name: str) -> tuple[int, int]:
    """(width, height) of a picture as it is shown, from its header alone.

    Raises:
        ImageError: no picture.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            # Of a PNG Pillow would decode everything to find its EXIF.
            turned = image.format in TURNABLE and image.getexif().get(ORIENTATION, 1) >= QUARTER_TURNS
            return (image.height, image.width) if turned else image.size
    except FileNotFoundError:
        raise ImageError(Path(name), "no such file") from None
    except UnidentifiedImageError:
        raise ImageError(Path(name), "no known image format") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ImageError(Path(name), " ".join(str(error).split()) or type(error).__name__) from None


ORIENTATION, QUARTER_TURNS = 0x0112, 5
"""The EXIF tag, and its first value that swaps width and height."""
TURNABLE = ("JPEG", "MPO", "TIFF", "WEBP")


def texts_of(fields: dict[str, Any]) -> tuple[str, str | None]:
    """Caption and label of what a file of JSON or a table's row says of a picture; a label alone is a caption too."""
    caption = next((fields[key] for key in CAPTION_KEYS if isinstance(fields.get(key), str)), None)
    label = next((str(fields[key]) for key in LABEL_KEYS if fields.get(key) not in (None, "")), None)
    return caption if caption is not None else (label or "").replace("_", " "), label


def parse_fields(data: bytes) -> dict[str, Any]:
    """A JSON object, or nothing where it is none."""
    try:
        values = json.loads(data)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
