"""Where pictures of any number lie: a folder of files, tar shards in WebDataset's layout, or parquet files.

Contract of a `Source`: its shards are a fixed list, and scanning one gives its pictures in a fixed order, each with a
place from which `read` fetches its bytes again at any time, in any process. Nothing is ever unpickled or run. What
cannot be read is named, never silently left out.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    pass

from collections.abc import Iterator
from typing import Protocol

Split = Literal["train", "heldout"]

INDEX = "index.jsonl"

HELDOUT_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One captioned picture.

    Attributes:
        file: where the picture lies.
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
    """A picture that was left out, by name, with the reason."""

    name: str
    reason: str


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone (first 52 bits of its sha256)."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:13], 16) / 16**13


SourceKind = Literal["folder", "tar", "parquet"]

ImageLocation = tuple[int | str, ...]
"""What a source needs to find a picture again: plain numbers and texts."""

CAPTION_KEYS = ("caption", "text", "prompt")

LABEL_KEYS = ("label", "class", "cls")


@dataclass(frozen=True)
class SourceImage:
    """One picture of a shard; `size` is (width, height) in pixels, upright, or None where nobody looked."""

    name: str
    caption: str
    label: str | None
    size: tuple[int, int] | None
    place: ImageLocation
    split: Split | None = None
    """None leaves it to the hash of the name."""


class Source(Protocol):
    """See the module's docstring; it pickles, for worker processes."""

    @property
    def shards(self) -> list[str]: ...

    def scan(self, shard: int, *, sizes: bool) -> Iterator[SourceImage | SkippedImage]:
        """The pictures of a shard; with `sizes` those that are no pictures are skipped."""
        ...

    def read(self, place: ImageLocation) -> bytes:
        """A picture's file.

        Raises:
            ImageError: it is not there any more, or cannot be reached.
        """
        ...

    def class_names(self, labels: set[str]) -> dict[str, str]:
        """Readable names of labels, in the classes' order; empty where the labels are names themselves."""
        ...


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
