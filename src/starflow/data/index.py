"""The index of a source: one line a picture, made once a run, and pictures by number from then on.

A folder:
- `part-XXXXX.jsonl`: the lines of a shard, while others are still missing; any process may write any of them.
- `pictures.jsonl`: the lines of all shards in their order: name, caption, label, place. Read through a map of the file.
- `kinds.safetensors`: of every line its aspect bucket and whether it is held out.
- `skipped.jsonl`: what was left out, by name, with the reason.
- `info.json`: written last, so its presence means that the index is whole.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starflow import files
from starflow.data.buckets import Aspect, Buckets
from starflow.data.lines import Lines
from starflow.data.picture_set import Entry, picture_tensor
from starflow.data.records import Skipped, decode_image, unit_hash
from starflow.data.sources import Found, Source
from starflow.errors import UserError


@dataclass(frozen=True)
class IndexSettings:
    """What an index depends on beside its source."""

    aspects: tuple[Aspect, ...]
    heldout: float
    """Share of the pictures, by the hash of their names, that is never trained on."""


def is_whole(folder: Path) -> bool:
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
        if isinstance(found, Skipped):
            line: dict[str, Any] = {"skipped": found.name, "reason": found.reason}
        else:
            line = {"name": found.name, "caption": found.caption, "label": found.label, "at": found.place}
            line |= {"bucket": buckets.of(*found.size) if found.size else 0, "heldout": _is_heldout(found, settings)}
        lines.append(json.dumps(line, ensure_ascii=False))
    files.write_text(_part(folder, shard), "".join(f"{line}\n" for line in lines))


def _is_heldout(found: Found, settings: IndexSettings) -> bool:
    return found.split == "heldout" if found.split else unit_hash(found.name) < settings.heldout


def join_parts(source: Source, folder: Path) -> dict[str, Any]:
    """Join the parts of all shards, remove them, and return what info.json says.

    Of a set so small that chance held nothing out, the one picture with the smallest hash is held out.

    Raises:
        UserError: not two pictures in all shards.
    """
    kinds: dict[str, list[int]] = {"bucket": [], "heldout": []}
    least, skipped, labels = (2.0, 0), [], set()
    with files.atomic(folder / "pictures.jsonl") as path, path.open("w", encoding="utf-8") as out:
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


class IndexedPictures:
    """`starflow.data.picture_set.Pictures` over an index and its source."""

    in_memory = False

    def __init__(self, source: Source, folder: Path, buckets: Buckets) -> None:
        self.source, self.folder, self.buckets = source, folder, buckets

    def __len__(self) -> int:
        return len(self._kinds["bucket"])

    def __reduce__(self) -> tuple[type[IndexedPictures], tuple[Source, Path, Buckets]]:
        return IndexedPictures, (self.source, self.folder, self.buckets)

    @cached_property
    def _lines(self) -> Lines:
        return Lines(self.folder / "pictures.jsonl")

    @cached_property
    def _kinds(self) -> dict[str, Tensor]:
        return files.read_tensors(self.folder / "kinds.safetensors")

    @cached_property
    def _names(self) -> dict[str, str]:
        names: dict[str, str] = files.read_json(self.folder / "info.json")["class_names"]
        return names

    def entry(self, number: int) -> Entry:
        """See `Pictures.entry`; ImageNet's synsets are called by their names."""
        line, bucket = self._lines[number], int(self._kinds["bucket"][number])
        label, caption = line["label"], line["caption"]
        if label in self._names:
            caption = self._names[label] if caption == label else caption
            label = self._names[label]
        told = self.buckets.caption(caption, bucket)
        return Entry(line["name"], told, label, bool(self._kinds["heldout"][number]), bucket)

    def numbers(self, bucket: int, *, heldout: bool) -> Tensor:
        """See `Pictures.numbers`."""
        return ((self._kinds["bucket"] == bucket) & (self._kinds["heldout"] == int(heldout))).nonzero()[:, 0]

    def read(self, number: int) -> Tensor:
        """See `Pictures.read`."""
        line = self._lines[number]
        image = decode_image(self.source.read(tuple(line["at"])), line["name"])
        return picture_tensor(image, self.buckets.size(int(self._kinds["bucket"][number])))

    def like(self, number: int) -> Sequence[int]:
        """See `Pictures.like`."""
        bucket, heldout = int(self._kinds["bucket"][number]), bool(self._kinds["heldout"][number])
        same = self.numbers(bucket, heldout=heldout)
        place = int(torch.searchsorted(same, number))
        after: list[int] = same.roll(-place - 1)[:64].tolist()
        return after

    def classes(self) -> list[str]:
        """See `Pictures.classes`."""
        from starflow.data.imagenet import order_classes

        found = {self._lines[number]["label"] for number in range(len(self))}
        return [self._names.get(label, label) for label in order_classes(label for label in found if label)]
