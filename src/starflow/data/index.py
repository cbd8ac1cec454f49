"""Pictures by number, however many: what encoding and training read, whatever they lie in.

Contract: number i is the same picture in every process of a run. `read` may be called from any thread or process, and
names what it cannot read; numbers of one bucket have one shape.

The index of a source: one line a picture, made once a run, and pictures by number from then on.

A folder:
- `part-XXXXX.jsonl`: the lines of a shard, while others are still missing; any process may write any of them.
- `pictures.jsonl`: the lines of all shards in their order: name, caption, label, place. Read through a map of the file.
- `kinds.safetensors`: of every line its aspect bucket and whether it is held out.
- `skipped.jsonl`: what was left out, by name, with the reason.
- `info.json`: written last, so its presence means that the index is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from starflow.data.buckets import Buckets, Size
from starflow.data.images import on_background
from starflow.data.sources.base import SourceKind
from starflow.data.sources.folder import FolderSource, order_classes
from starflow.data.views import TrainingViews

if TYPE_CHECKING:
    from PIL import Image

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from starflow.data.buckets import Aspect
from starflow.data.images import decode_image
from starflow.data.sources.base import SkippedImage, Source, ScannedImage, unit_hash
from starflow.errors import UserError
from starflow.io import files
from starflow.io.files import JsonLines


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """What is known of a picture without opening it; the caption says its ratio where a model sees several."""

    name: str
    caption: str
    label: str | None
    heldout: bool
    bucket: int


class ImageDataset(Protocol):
    """See the module's docstring."""

    buckets: Buckets
    in_memory: bool

    def __len__(self) -> int: ...

    def entry(self, number: int) -> ImageEntry: ...

    def numbers(self, bucket: int, *, heldout: bool) -> Tensor:
        """Numbers of a bucket's pictures of one split, ascending."""
        ...

    def read(self, number: int) -> Tensor:
        """uint8 (3, H, W) of the bucket's size.

        Raises:
            ImageError: it is no readable picture.
        """
        ...

    def like(self, number: int) -> Sequence[int]:
        """Pictures to take instead of one that cannot be read, the nearest first."""
        ...

    def classes(self) -> list[str]:
        """Class names in order."""
        ...


class ViewDataset:
    """Views in memory as pictures of one bucket."""

    in_memory = True

    def __init__(self, views: TrainingViews) -> None:
        self.views = views
        self.buckets = Buckets(views.images.shape[-1], 1)

    def __len__(self) -> int:
        return len(self.views)

    def entry(self, number: int) -> ImageEntry:
        views = self.views
        heldout = views.splits[number] == "heldout"
        return ImageEntry(views.names[number], views.captions[number], views.labels[number], heldout, 0)

    def numbers(self, bucket: int, *, heldout: bool) -> Tensor:
        return torch.tensor([i for i, split in enumerate(self.views.splits) if (split == "heldout") == heldout])

    def read(self, number: int) -> Tensor:
        return self.views.images[number]

    def like(self, number: int) -> Sequence[int]:
        return ()

    def classes(self) -> list[str]:
        return order_classes(label for label in self.views.labels if label)


def split_indices(pictures: ImageDataset, *, heldout: bool) -> list[Tensor]:
    """Numbers of one split, a tensor a bucket."""
    return [pictures.numbers(bucket, heldout=heldout) for bucket in range(len(pictures.buckets.aspects))]


def image_tensor(image: Image.Image, size: Size) -> Tensor:
    """A picture as uint8 (3, height, width): scaled until it covers the size, and its middle cut out."""
    from PIL import Image

    image = on_background(image)
    width, height = size
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
    box = (left, top, image.width - left, image.height - top)
    small = image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()


def open_source(kind: SourceKind, path: str) -> Source:
    """The source of that kind.

    Raises:
        UserError: nothing there.
    """
    if kind == "tar":
        from starflow.data.sources.tar import TarSource

        return TarSource(path)
    if kind == "parquet":
        from starflow.data.sources.parquet import ParquetSource

        return ParquetSource(path)
    return FolderSource(path)


@dataclass(frozen=True)
class IndexSettings:
    """What an index depends on beside its source."""

    aspects: tuple[Aspect, ...]
    heldout: float
    """Share of the pictures, by the hash of their names, that is never trained on."""


def is_complete(folder: Path) -> bool:
    """Whether a finished index lies in `folder`."""
    return (folder / "info.json").is_file()


def missing_parts(source: Source, folder: Path) -> list[int]:
    """Shards that are still to be scanned."""
    return [shard for shard in range(len(source.shards)) if not _part(folder, shard).is_file()]


def _part(folder: Path, shard: int) -> Path:
    return folder / f"part-{shard:05d}.jsonl"


def scan_shard(source: Source, shard: int, folder: Path, settings: IndexSettings) -> None:
    """Write one shard's part, whole or not at all."""
    buckets = Buckets(1, 1, settings.aspects)  # which ratio is nearest needs no sizes of ours
    lines = []
    for found in source.scan(shard, sizes=not buckets.single):
        if isinstance(found, SkippedImage):
            line: dict[str, Any] = {"skipped": found.name, "reason": found.reason}
        else:
            line = {"name": found.name, "caption": found.caption, "label": found.label, "at": found.place}
            line |= {"bucket": buckets.of(*found.size) if found.size else 0, "heldout": _is_heldout(found, settings)}
        lines.append(json.dumps(line, ensure_ascii=False))
    files.write_text(_part(folder, shard), "".join(f"{line}\n" for line in lines))


def _is_heldout(found: ScannedImage, settings: IndexSettings) -> bool:
    return found.split == "heldout" if found.split else unit_hash(found.name) < settings.heldout


def join_parts(source: Source, folder: Path) -> dict[str, Any]:
    """Join the parts of all shards, remove them, and return what info.json says.

    Of a set so small that chance held nothing out, the one picture with the smallest hash is held out.

    Raises:
        UserError: not two pictures in all shards.
    """
    kinds: dict[str, list[int]] = {"bucket": [], "heldout": []}
    least, skipped, labels = (2.0, 0), [], set()
    with files.atomic_write(folder / "pictures.jsonl") as path, path.open("w", encoding="utf-8") as out:
        for shard in range(len(source.shards)):
            for text in _part(folder, shard).read_text(encoding="utf-8").splitlines():
                line = json.loads(text)
                if "skipped" in line:
                    skipped.append(text)
                    continue
                least = min(least, (unit_hash(line["name"]), len(kinds["bucket"])))
                for kind, values in kinds.items():
                    values.append(int(line.pop(kind)))
                labels.add(line["label"] or "")
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
    count = len(kinds["bucket"])
    if count < 2:
        raise UserError(
            f"{count} pictures in {len(source.shards)} shards ({len(skipped)} unreadable), expected 2 or more"
        )
    if not any(kinds["heldout"]):
        kinds["heldout"][least[1]] = 1
    files.write_text(folder / "skipped.jsonl", "".join(f"{line}\n" for line in skipped))
    tensors = {kind: torch.tensor(values, dtype=torch.uint8) for kind, values in kinds.items()}
    files.write_tensors(folder / "kinds.safetensors", tensors)
    info: dict[str, Any] = {"pictures": count, "heldout": sum(kinds["heldout"]), "skipped": len(skipped)}
    info["class_names"] = source.class_names(labels - {""})
    files.write_json(folder / "info.json", info)
    for shard in range(len(source.shards)):
        _part(folder, shard).unlink()
    return info


class IndexedDataset:
    """`starflow.data.index.ImageDataset` over an index and its source."""

    in_memory = False

    def __init__(self, source: Source, folder: Path, buckets: Buckets) -> None:
        self.source, self.folder, self.buckets = source, folder, buckets

    def __len__(self) -> int:
        return len(self._kinds["bucket"])

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[Source, Path, Buckets]]:
        return IndexedDataset, (self.source, self.folder, self.buckets)

    @cached_property
    def _lines(self) -> JsonLines:
        return JsonLines(self.folder / "pictures.jsonl")

    @cached_property
    def _kinds(self) -> dict[str, Tensor]:
        return files.read_tensors(self.folder / "kinds.safetensors")

    @cached_property
    def _names(self) -> dict[str, str]:
        names: dict[str, str] = files.read_json(self.folder / "info.json")["class_names"]
        return names

    def entry(self, number: int) -> ImageEntry:
        """See `ImageDataset.entry`; ImageNet's synsets are called by their names."""
        line, bucket = self._lines[number], int(self._kinds["bucket"][number])
        label, caption = line["label"], line["caption"]
        if label in self._names:
            caption = self._names[label] if caption == label else caption
            label = self._names[label]
        told = self.buckets.caption(caption, bucket)
        return ImageEntry(line["name"], told, label, bool(self._kinds["heldout"][number]), bucket)

    def numbers(self, bucket: int, *, heldout: bool) -> Tensor:
        """See `ImageDataset.numbers`."""
        return ((self._kinds["bucket"] == bucket) & (self._kinds["heldout"] == int(heldout))).nonzero()[:, 0]

    def read(self, number: int) -> Tensor:
        """See `ImageDataset.read`."""
        line = self._lines[number]
        size = self.buckets.size(int(self._kinds["bucket"][number]))
        # Twice the size leaves the antialiased reduction to picture_tensor.
        image = decode_image(self.source.read(tuple(line["at"])), line["name"], side=2 * max(size))
        return image_tensor(image, size)

    def like(self, number: int) -> Sequence[int]:
        """See `ImageDataset.like`."""
        bucket, heldout = int(self._kinds["bucket"][number]), bool(self._kinds["heldout"][number])
        same = self.numbers(bucket, heldout=heldout)
        place = int(torch.searchsorted(same, number))
        after: list[int] = same.roll(-place - 1)[:64].tolist()
        return after

    def classes(self) -> list[str]:
        """See `ImageDataset.classes`."""
        from starflow.data.sources.folder import order_classes

        found = {self._lines[number]["label"] for number in range(len(self))}
        return [self._names.get(label, label) for label in order_classes(label for label in found if label)]
