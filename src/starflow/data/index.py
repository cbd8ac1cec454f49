"""The data set that training reads: images by number, whatever they lie in, and the index that numbers them.

Contract of an `ImageDataset`: image i is the same in every process of a run. `read` may be called from any thread or
process, and names what it cannot read; images of one aspect bucket have one shape.

The index of a source is a folder, made once a run, with one line an image:

- `part-XXXXX.jsonl`: the lines of a shard, while others are still missing; any process may write any of them.
- `pictures.jsonl`: the lines of all shards in their order: name, caption, label, location. Read through a map of the
  file.
- `kinds.safetensors`: of every line its aspect bucket and whether it is held out.
- `skipped.jsonl`: the images that were left out ("skipped") and what else was not used ("unused"), by name, with the
  reason; images that turn out to be unreadable later are added to it.
- `info.json`: the summary of the set; written last, so its presence means that the index is complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from starflow.data.buckets import Aspect, Buckets, Size
from starflow.data.images import ImageError, decode_image, image_errors, on_background
from starflow.data.sources.base import ScannedImage, SkippedImage, Source, SourceKind, UnusedFile, unit_hash
from starflow.data.sources.captions import SetSummary
from starflow.data.sources.folder import FolderSource, order_classes
from starflow.data.views import TrainingViews
from starflow.errors import UserError
from starflow.io import files
from starflow.io.files import JsonLines

if TYPE_CHECKING:
    from PIL import Image


class UnusableSetError(UserError):
    """A set that cannot be trained on as it lies there, however often it is read."""


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """What a data set says of an image without opening it.

    Attributes:
        name: unique id within the set.
        caption: its caption, which says the aspect ratio where a model sees several.
        label: class name, or None.
        heldout: whether it is never trained on.
        bucket: number of its shape in the data set's `Buckets`.
    """

    name: str
    caption: str
    label: str | None
    heldout: bool
    bucket: int


class ImageDataset(Protocol):
    """Captioned images by index, as training reads them; the module's docstring has the contract."""

    buckets: Buckets
    in_memory: bool

    def __len__(self) -> int: ...

    def entry(self, index: int) -> ImageEntry:
        """What is known of an image without opening it."""
        ...

    def indices(self, bucket: int, *, heldout: bool) -> Tensor:
        """Indices (N,) of a bucket's images of one split, ascending."""
        ...

    def read(self, index: int) -> Tensor:
        """Decode an image to uint8 (3, H, W) of its bucket's size.

        Raises:
            ImageError: it is no readable image.
        """
        ...

    def substitutes(self, index: int) -> Sequence[int]:
        """Indices of images to take instead of one that cannot be read, the nearest first."""
        ...

    def classes(self) -> list[str]:
        """Class names in order."""
        ...

    def add_skipped(self, skipped: Iterable[tuple[str, str]]) -> None:
        """Note images that turned out to be unreadable, by name with the reason, where the set keeps a list."""
        ...


class ViewDataset:
    """An `ImageDataset` over views in memory, which are all of one bucket."""

    in_memory = True

    def __init__(self, views: TrainingViews) -> None:
        self.views = views
        self.buckets = Buckets(views.images.shape[-1], 1)

    def __len__(self) -> int:
        return len(self.views)

    def entry(self, index: int) -> ImageEntry:
        """See `ImageDataset.entry`."""
        views = self.views
        heldout = views.splits[index] == "heldout"
        return ImageEntry(views.names[index], views.captions[index], views.labels[index], heldout, 0)

    def indices(self, bucket: int, *, heldout: bool) -> Tensor:
        """See `ImageDataset.indices`."""
        rows = [i for i, split in enumerate(self.views.splits) if (split == "heldout") == heldout]
        return torch.tensor(rows, dtype=torch.long, device="cpu")

    def read(self, index: int) -> Tensor:
        """See `ImageDataset.read`."""
        return self.views.images[index]

    def substitutes(self, index: int) -> Sequence[int]:
        """See `ImageDataset.substitutes`: none, as views in memory can all be read."""
        return ()

    def classes(self) -> list[str]:
        """See `ImageDataset.classes`."""
        return order_classes(label for label in self.views.labels if label)

    def add_skipped(self, skipped: Iterable[tuple[str, str]]) -> None:
        """See `ImageDataset.add_skipped`: views in memory can all be read."""


class IndexedDataset:
    """An `ImageDataset` over a complete index and the source that it was made from."""

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

    def entry(self, index: int) -> ImageEntry:
        """See `ImageDataset.entry`; ImageNet's synsets are called by their names."""
        line, bucket = self._lines[index], int(self._kinds["bucket"][index])
        label, caption = line["label"], line["caption"]
        if label in self._names:
            caption = self._names[label] if caption == label else caption
            label = self._names[label]
        caption = self.buckets.caption(caption, bucket)
        return ImageEntry(line["name"], caption, label, bool(self._kinds["heldout"][index]), bucket)

    def indices(self, bucket: int, *, heldout: bool) -> Tensor:
        """See `ImageDataset.indices`."""
        return ((self._kinds["bucket"] == bucket) & (self._kinds["heldout"] == int(heldout))).nonzero()[:, 0]

    def read(self, index: int) -> Tensor:
        """See `ImageDataset.read`."""
        line = self._lines[index]
        size = self.buckets.size(int(self._kinds["bucket"][index]))
        # Twice the size leaves the antialiased reduction to image_tensor.
        with image_errors(Path(line["name"])):
            image = decode_image(self.source.read(tuple(line["at"])), line["name"], side=2 * max(size))
            return image_tensor(image, size)

    def substitutes(self, index: int) -> Sequence[int]:
        """See `ImageDataset.substitutes`: up to 64 that follow it in its bucket and split, around the end."""
        bucket, heldout = int(self._kinds["bucket"][index]), bool(self._kinds["heldout"][index])
        same = self.indices(bucket, heldout=heldout)
        place = int(torch.searchsorted(same, index))
        after: list[int] = same.roll(-place - 1)[:64].tolist()
        return after

    def classes(self) -> list[str]:
        """See `ImageDataset.classes`."""
        found = {self._lines[index]["label"] for index in range(len(self))}
        return [self._names.get(label, label) for label in order_classes(label for label in found if label)]

    def add_skipped(self, skipped: Iterable[tuple[str, str]]) -> None:
        """See `ImageDataset.add_skipped`: they are added to the index's `skipped.jsonl`, each once."""
        skipped = list(skipped)
        if not skipped:
            return
        path = self.folder / "skipped.jsonl"
        listed = JsonLines(path)
        known = {listed[number].get("skipped") for number in range(len(listed))}
        new = {name: reason for name, reason in skipped if name not in known}
        lines = (json.dumps({"skipped": name, "reason": reason}, ensure_ascii=False) for name, reason in new.items())
        with path.open("a", encoding="utf-8") as file:  # short lines at the end: several processes may add theirs
            file.write("".join(f"{line}\n" for line in lines))


@dataclass(frozen=True)
class IndexSettings:
    """What an index depends on beside its source."""

    aspects: tuple[Aspect, ...]
    heldout: float
    """Share of the images, by the hash of their names, that is never trained on."""


def open_source(kind: SourceKind, path: str) -> Source:
    """Open the source of that kind at `path`.

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


def is_complete(folder: Path) -> bool:
    """Whether a finished index lies in `folder`."""
    return (folder / "info.json").is_file()


def missing_parts(source: Source, folder: Path) -> list[int]:
    """List the shards that are still to be scanned."""
    return [shard for shard in range(len(source.shards)) if not _part(folder, shard).is_file()]


def scan_shard(source: Source, shard: int, folder: Path, settings: IndexSettings) -> None:
    """Scan one shard and write its part of the index, whole or not at all."""
    buckets = Buckets(1, 1, settings.aspects)  # which ratio is nearest needs no sizes of ours
    lines = []
    for found in source.scan(shard, sizes=not buckets.single):
        if isinstance(found, SkippedImage):
            kind = "unused" if isinstance(found, UnusedFile) else "skipped"
            line: dict[str, Any] = {kind: found.name, "reason": found.reason}
        else:
            line = {"name": found.name, "caption": found.caption, "label": found.label, "at": found.location}
            line |= {"bucket": buckets.nearest(*found.size) if found.size else 0}
            line |= {"heldout": _is_heldout(found, settings)}
            line |= {"note": found.note} if found.note else {}
        lines.append(json.dumps(line))  # ASCII: a location may have bytes that are no UTF-8
    files.write_text(_part(folder, shard), "".join(f"{line}\n" for line in lines))


def join_parts(source: Source, folder: Path, reads: str = "none") -> dict[str, Any]:
    """Join the parts of all shards into the index, remove them, and return what info.json says.

    Where chance held nothing out that can be read, the one image with the smallest hash is held out.

    Args:
        source: of the images.
        folder: of the index.
        reads: what a model is told of an image: "class" or "none", else its caption.

    Raises:
        UnusableSetError: not two images in all shards, or not one of them has what the model reads. The parts are
            removed, so that what is put right is read again.
    """
    try:
        info = _join(source, folder, reads)
    except UnusableSetError:
        _remove_parts(source, folder)
        raise
    _remove_parts(source, folder)
    return info


def _remove_parts(source: Source, folder: Path) -> None:
    for shard in range(len(source.shards)):
        _part(folder, shard).unlink(missing_ok=True)


def _join(source: Source, folder: Path, reads: str) -> dict[str, Any]:
    kinds: dict[str, list[int]] = {"bucket": [], "heldout": []}
    summary, skipped = SetSummary(), []
    with files.atomic_write(folder / "pictures.jsonl") as path, path.open("w", encoding="utf-8") as out:
        for shard in range(len(source.shards)):
            for text in _part(folder, shard).read_text(encoding="utf-8").splitlines():
                line = json.loads(text)
                summary.add(line)
                if "at" not in line:
                    skipped.append(json.dumps(line, ensure_ascii=False))
                    continue
                for kind, values in kinds.items():
                    values.append(int(line.pop(kind)))
                line.pop("note", None)
                out.write(json.dumps(line) + "\n")
    if summary.pictures < 2:
        raise UnusableSetError(
            f"{summary.pictures} pictures in {len(source.shards)} shards ({summary.skipped} unreadable), "
            f"expected 2 or more{summary.first_reason}"
        )
    if reads == "class" and not summary.labels:
        raise UnusableSetError(
            f"conditioning.kind is class, and none of {summary.pictures} pictures has a class (captions go before the "
            "names of sub-folders): give the captions a label each, take them away, or set conditioning.kind to text"
        )
    if reads not in ("class", "none") and not summary.captioned:
        raise UnusableSetError(
            f"conditioning.kind is {reads}, and none of {summary.pictures} pictures has a caption: add captions "
            "(captions.csv, or a .txt beside each picture), or set conditioning.kind to none"
        )
    _hold_one_out(source, JsonLines(folder / "pictures.jsonl"), kinds["heldout"])
    files.write_text(folder / "skipped.jsonl", "".join(f"{line}\n" for line in skipped))
    tensors = {kind: torch.tensor(values, dtype=torch.uint8, device="cpu") for kind, values in kinds.items()}
    files.write_tensors(folder / "kinds.safetensors", tensors)
    info: dict[str, Any] = {**summary.to_json(), "heldout": sum(kinds["heldout"]), "state": source.state()}
    info["class_names"] = source.class_names(set(summary.labels))
    files.write_json(folder / "info.json", info)
    return info


def changes_since(source: Source, folder: Path) -> str:
    """Say what has changed in a source since its finished index was made; empty for nothing, or if it cannot tell."""
    then, now = files.read_json(folder / "info.json").get("state"), source.state()
    if not then or not now or then == now:
        return ""
    return (
        f"pictures or captions have changed since {folder} was made (then {then['images']} pictures and "
        f"{then['texts']} other files, now {now['images']} and {now['texts']})"
    )


def _hold_one_out(source: Source, lines: JsonLines, heldout: list[int]) -> None:
    """Hold the image with the smallest hash out that can be read, unless there is one that can."""

    def readable(number: int) -> bool:
        try:
            decode_image(source.read(tuple(lines[number]["at"])), lines[number]["name"])
        except ImageError:
            return False
        return True

    if any(held and readable(number) for number, held in enumerate(heldout)):
        return
    others = sorted((unit_hash(lines[number]["name"]), number) for number, held in enumerate(heldout) if not held)
    found = next((number for _, number in others if readable(number)), None)
    if found is not None and len(others) > 1:
        heldout[found] = 1


def split_indices(images: ImageDataset, *, heldout: bool) -> list[Tensor]:
    """Indices of the images of one split, a tensor (N,) a bucket."""
    return [images.indices(bucket, heldout=heldout) for bucket in range(len(images.buckets.aspects))]


def image_tensor(image: Image.Image, size: Size) -> Tensor:
    """Turn an image into uint8 (3, height, width): scaled until it covers the size, and its middle cut out.

    >>> from PIL import Image
    >>> image_tensor(Image.new("RGB", (90, 40), "red"), (16, 8)).shape
    torch.Size([3, 8, 16])
    """
    from PIL import Image

    image = on_background(image)
    width, height = size
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
    # Rounding may put an edge that is the image's own 1e-14 outside of it, which Pillow refuses.
    left, top = max(left, 0.0), max(top, 0.0)
    box = (left, top, min(image.width - left, image.width), min(image.height - top, image.height))
    small = image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()


def _part(folder: Path, shard: int) -> Path:
    return folder / f"part-{shard:05d}.jsonl"


def _is_heldout(found: ScannedImage, settings: IndexSettings) -> bool:
    return found.split == "heldout" if found.split else unit_hash(found.name) < settings.heldout
