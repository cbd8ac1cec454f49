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
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

Split = Literal["train", "heldout"]

SourceKind = Literal["folder", "tar", "parquet"]

ImageLocation = tuple[int | str, ...]
"""What a source needs to find an image again: plain numbers and texts, so that JSON can hold it."""

INDEX_FILE = "index.jsonl"
"""The index of a prepared folder, one `ImageRecord` a line."""

HELDOUT_SHARE = 0.05
"""Share of a data set that is never trained on, where the data set itself does not say."""

CAPTION_KEYS = ("caption", "text", "prompt")

LABEL_KEYS = ("label", "class", "cls")


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
    """

    name: str
    caption: str
    label: str | None
    size: tuple[int, int] | None
    location: ImageLocation
    split: Split | None = None


class Source(Protocol):
    """A place that holds captioned images in shards (see the module's docstring); it pickles, for worker processes."""

    @property
    def shards(self) -> list[str]:
        """Names of the shards, for messages; their order is fixed."""
        ...

    def scan(self, shard: int, *, sizes: bool) -> Iterator[ScannedImage | SkippedImage]:
        """Yield the images of a shard in their order; with `sizes`, files that are no images are skipped by name."""
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


def caption_and_label(fields: dict[str, Any]) -> tuple[str, str | None]:
    """Find the caption and label in a JSON object or a table's row; a label alone is a caption too.

    >>> caption_and_label({"text": "a cat on a sofa", "cls": 3})
    ('a cat on a sofa', '3')
    >>> caption_and_label({"label": "polar_bear"})
    ('polar bear', 'polar_bear')
    """
    caption = next((fields[key] for key in CAPTION_KEYS if isinstance(fields.get(key), str)), None)
    label = next((str(fields[key]) for key in LABEL_KEYS if fields.get(key) not in (None, "")), None)
    return caption if caption is not None else (label or "").replace("_", " "), label


def parse_json_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object; an empty dictionary where the bytes are none."""
    try:
        values = json.loads(data)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
