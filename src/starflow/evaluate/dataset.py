"""The images that a model is measured on, and the rows of them that each process computes.

An evaluation set has plain images of both splits, and what each of them shows. Under torchrun its rows are cut into as
many runs as there are processes: each computes its own, all get them all, in order, and a measure is that of one
process. Without a process group there is one process.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from starflow.data.buckets import Size
from starflow.data.images import ImageError, from_pil, on_background, open_image, to_float, to_uint8
from starflow.data.sets.small import is_fashion_mnist, read_digits, read_fashion_mnist
from starflow.data.sources.base import HELDOUT_SHARE, INDEX_FILE, ImageRecord, unit_hash
from starflow.data.sources.folder import read_folder
from starflow.data.views import TrainingViews, ViewConfig, make_views
from starflow.errors import UserError
from starflow.pipeline.pipeline import StarFlowPipeline

BATCH = 64
"""Images that are measured at once."""

FASHION_MNIST, DIGITS = "fashion-mnist", "digits"
"""Names of sets that are packages rather than folders."""

HeldoutConcepts = Literal["all", "known", "new"]
"""Held-out images that are measured: all, those of concepts that training images show, or those of others."""


@dataclass(frozen=True)
class EvaluationSet:
    """Plain images of both splits, uint8, without augmentation."""

    train: TrainingViews
    heldout: TrainingViews
    concepts: dict[str, str] = field(default_factory=dict)
    """What an image shows, by its name, where its captions say more than that."""
    groups: dict[str, str] = field(default_factory=dict)
    """By an image's name, the key that concepts of one meaning share ("apple": red apple, apples), if it has one."""
    units: dict[str, str] = field(default_factory=dict)
    """By an image's name, what it shares with the images that are held out with it, if there are any."""

    @staticmethod
    def of_records(records: Sequence[ImageRecord], size: int | Size) -> EvaluationSet:
        """The images of a folder's records, at `size` pixels a side, or (width, height).

        Raises:
            UserError: a split is empty.
        """
        splits = {split: [record for record in records if record.split == split] for split in ("train", "heldout")}
        for split, some in splits.items():
            if not some:
                raise UserError(f"no {split} pictures among {len(records)}: both splits are needed")
        train, heldout = (_plain_views(some, size) for some in splits.values())
        concepts = {record.name: record.caption.lower() for record in records}
        groups = {record.name: record.meta["concept"] for record in records if "concept" in record.meta}
        units = {
            record.name: f"{record.meta['concept']} {record.meta['family']}"
            for record in records
            if {"concept", "family"} <= record.meta.keys()
        }
        return EvaluationSet(train, heldout, concepts, groups, units)

    def concepts_of(self, views: TrainingViews) -> list[str]:
        """The concept that each view shows: its record's caption without style or colour, or else its own."""
        pairs = zip(views.names, views.captions, strict=True)
        return [self.concepts.get(name, caption.lower()) for name, caption in pairs]

    def groups_of(self, views: TrainingViews) -> list[str]:
        """The key of each view's concept, or the concept itself where the set has none."""
        concepts = self.concepts_of(views)
        return [self.groups.get(name, concept) for name, concept in zip(views.names, concepts, strict=True)]

    def narrowed(self, concepts: HeldoutConcepts = "all", seen: Collection[str] = ()) -> EvaluationSet:
        """The same set with fewer held-out images.

        Args:
            concepts: which are kept: of concepts that training images show ("known"), of others ("new"), or "all".
            seen: names of images that the model was trained on before; they, and what was held out with them, go.

        Raises:
            UserError: none is left.
        """
        known = set(self.groups_of(self.train))
        gone = {self.units.get(name, name) for name in seen}
        rows = [
            row
            for row, (name, group) in enumerate(zip(self.heldout.names, self.groups_of(self.heldout), strict=True))
            if self.units.get(name, name) not in gone
            and (concepts == "all" or (group in known) == (concepts == "known"))
        ]
        if not rows:
            raise UserError(
                f"of {len(self.heldout)} held-out pictures none is left: held-out concepts are '{concepts}', and the "
                f"model has seen {len(seen)} pictures of another set"
            )
        return dataclasses.replace(self, heldout=select_rows(self.heldout, rows))


def open_evaluation_set(source: str, size: int | Size, heldout: float = HELDOUT_SHARE) -> EvaluationSet:
    """The set of that name: "fashion-mnist", a folder with its four files, or any folder of pictures.

    Args:
        source: name or folder.
        size: side in pixels that a folder's pictures are brought to, or (width, height).
        heldout: share of a plain folder's pictures that is held out, as the model's training held them out
            (`PipelineConfig.heldout`); a prepared folder has its own.

    Raises:
        UserError: no such folder, a split is empty, or Fashion-MNIST for a model of another size.
    """
    folder = Path(source).expanduser()
    if source != FASHION_MNIST and not (folder.is_dir() and is_fashion_mnist(folder)):
        records = read_folder(folder, _notify)
        if not (folder / INDEX_FILE).is_file():
            records = _held_out_by_hash(records, heldout)
        return EvaluationSet.of_records(records, size)
    views = read_fashion_mnist(None if source == FASHION_MNIST else folder)
    _check_side(views, size, source)
    train = views.splits.index("heldout")
    return EvaluationSet(select_rows(views, range(train)), select_rows(views, range(train, len(views))))


def training_names(folder: str) -> list[str]:
    """Names of a prepared set's training images; none for "".

    Raises:
        UserError: no prepared set there, whose names alone mean the same picture in another set.
    """
    path = Path(folder).expanduser()
    if not folder:
        return []
    if not (path / INDEX_FILE).is_file():
        raise UserError(f"'{folder}' has no {INDEX_FILE}: name a folder that prepare-data wrote")
    return [record.name for record in read_folder(path, _notify) if record.split == "train"]


def _held_out_by_hash(records: Sequence[ImageRecord], share: float) -> list[ImageRecord]:
    """The records with the split that a training makes (`starflow.data.index`): by hash, and at least one held out."""
    hashes = [unit_hash(record.name) for record in records]
    chosen = {number for number, value in enumerate(hashes) if value < share}
    if not any(_readable(records[number]) for number in chosen):
        others = sorted(set(range(len(records))) - chosen, key=hashes.__getitem__)
        chosen |= set([number for number in others if _readable(records[number])][:1])
    return [
        dataclasses.replace(record, split="heldout" if number in chosen else "train")
        for number, record in enumerate(records)
    ]


def _readable(record: ImageRecord) -> bool:
    try:
        open_image(record.file)
    except ImageError:
        return False
    return True


def _plain_views(records: Sequence[ImageRecord], size: int | Size) -> TrainingViews:
    """Every image once, cut to the size around its middle, with its caption."""
    side = size if isinstance(size, int) else max(size)
    square = isinstance(size, int) or size[0] == size[1]
    if square:
        return make_views(records, ViewConfig(size=side, views=1, heldout_views=1), progress=False)[0]
    from PIL import Image, ImageOps

    assert not isinstance(size, int)
    pictures, kept = [], []
    for record in records:
        try:
            image = ImageOps.fit(on_background(open_image(record.file)), size, Image.Resampling.LANCZOS)
            pictures.append(to_uint8(from_pil(image)))
            kept.append(record)
        except ImageError as error:
            _notify(f"skipped {record.name}: {error.reason}")
    if not kept:
        raise UserError(f"none of {len(records)} pictures could be read")
    return TrainingViews(
        images=torch.cat(pictures),
        captions=[record.caption for record in kept],
        labels=[record.label for record in kept],
        names=[record.name for record in kept],
        splits=[record.split for record in kept],
    )


def _notify(line: str) -> None:
    """Print what reading a set came to, once for all processes."""
    if is_first():
        tqdm.write(line, file=sys.stderr)


def open_outliers(source: str, size: int | Size) -> Tensor:
    """Images (N, 3, H, W) uint8 of another kind than the model's: "digits" (MNIST), or both splits of any set.

    Raises:
        UserError: see `open_evaluation_set`; or digits for a model of another size.
    """
    if source == DIGITS:
        digits = read_digits()
        _check_side(digits, size, source)
        return digits.images
    pictures = open_evaluation_set(source, size)
    return torch.cat([pictures.heldout.images, pictures.train.images])


def select_rows(views: TrainingViews, rows: Sequence[int]) -> TrainingViews:
    """The given rows of a set, in their order."""
    index = list(rows)
    return TrainingViews(
        images=views.images[index],
        captions=[views.captions[row] for row in index],
        labels=[views.labels[row] for row in index],
        names=[views.names[row] for row in index],
        splits=[views.splits[row] for row in index],
    )


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` of `count` rows, evenly over the set; `most` 0 is all.

    >>> evenly_spaced(10, 3)
    [0, 3, 6]
    """
    if not most or most >= count:
        return list(range(count))
    return [row * count // most for row in range(most)]


def prompts_of(pipeline: StarFlowPipeline, views: TrainingViews, rows: Sequence[int]) -> list[str]:
    """The prompts of these images as the model reads them: captions, class names or nothing."""
    if pipeline.conditioner is None:
        return [""] * len(rows)
    by_class = pipeline.conditioner.spec.kind == "class"
    return [(views.labels[row] or "") if by_class else views.captions[row] for row in rows]


def image_batches(images: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Images (N, 3, H, W) uint8 as batches in [-1, 1] on `device`; the last batch may be shorter."""
    for start in range(0, len(images), BATCH):
        yield to_float(images[start : start + BATCH]).to(device)


def concept_of(prompt: str, known: set[str]) -> str:
    """The longest known concept whose words stand in the prompt one after the other; "" where there is none.

    >>> concept_of("a cat face, smiling", {"cat", "cat face", "dog"})
    'cat face'
    """
    words = f" {' '.join(prompt.lower().replace(',', ' ').split())} "
    return max((concept for concept in known if f" {concept} " in words), key=len, default="")


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return _world()[0] == 0


def own_rows(count: int) -> range:
    """The rows of `count` that this process computes."""
    rank, size = _world()
    share = -(-count // size)
    return range(min(count, rank * share), min(count, (rank + 1) * share))


def gather_rows(rows: Tensor, count: int) -> Tensor:
    """All `count` rows in order, in every process, of each process's own (n, ...), on `rows`' device.

    Shards of unequal length are padded for the exchange and cut again: no row is dropped or counted twice.
    """
    import torch.distributed as dist

    _, size = _world()
    assert len(rows) == len(own_rows(count)), f"{len(rows)} rows, expected {len(own_rows(count))} of {count}"
    if size == 1:
        return rows
    # gloo exchanges memory of the CPU, nccl that of the GPU.
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    padded = torch.zeros(-(-count // size), *rows.shape[1:], dtype=rows.dtype, device=device)
    padded[: len(rows)] = rows.to(device)
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded)
    return torch.cat(parts)[:count].to(rows.device)  # only the last shards are short, so their padding ends the list


def _world() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def _check_side(views: TrainingViews, size: int | Size, source: str) -> None:
    side = views.images.shape[-1]
    if size not in (side, (side, side)):
        sides = {size} if isinstance(size, int) else set(size)
        wanted = "x".join(map(str, sides if len(sides) == 1 else size))  # type: ignore[arg-type]
        raise UserError(f"{source} is of {side} px, the model of {wanted}: take a model trained at that size")
