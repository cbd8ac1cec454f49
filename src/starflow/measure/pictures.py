"""The pictures that a model is measured on: both splits, plain, and what each of them shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from starflow.data.fashion_mnist import is_fashion_mnist, read_digits, read_fashion_mnist
from starflow.data.pictures import to_unit
from starflow.data.records import Record, read_folder
from starflow.data.views import ViewConfig, Views, make_views
from starflow.errors import UserError
from starflow.pipeline import StarFlowPipeline

BATCH = 64
FASHION_MNIST, DIGITS = "fashion-mnist", "digits"


@dataclass(frozen=True)
class Pictures:
    """Plain pictures of both splits, uint8."""

    train: Views
    heldout: Views
    concepts: dict[str, str] = field(default_factory=dict)
    """By a picture's name, where its captions say more than the thing."""

    @staticmethod
    def of_records(records: Sequence[Record], size: int) -> Pictures:
        """Raises UserError: a split is empty."""
        views = ViewConfig(size=size, views=1, heldout_views=1)
        splits = {split: [record for record in records if record.split == split] for split in ("train", "heldout")}
        for split, some in splits.items():
            if not some:
                raise UserError(f"no {split} pictures among {len(records)}: both splits are needed")
        train, heldout = (make_views(some, views, progress=False)[0] for some in splits.values())
        return Pictures(train, heldout, {record.name: record.caption.lower() for record in records})

    def shown(self, views: Views) -> list[str]:
        """The concept of each view: its record's caption without style or colour, or else its own."""
        pairs = zip(views.names, views.captions, strict=True)
        return [self.concepts.get(name, caption.lower()) for name, caption in pairs]


def open_pictures(source: str, size: int) -> Pictures:
    """The set of that name: "fashion-mnist", a folder with its four files, or any folder of pictures.

    Args:
        source: name or folder.
        size: side in pixels that a folder's pictures are brought to.

    Raises:
        UserError: no such folder, a split is empty, or Fashion-MNIST for a model of another size.
    """
    folder = Path(source).expanduser()
    if source != FASHION_MNIST and not (folder.is_dir() and is_fashion_mnist(folder)):
        return Pictures.of_records(read_folder(folder), size)
    views = read_fashion_mnist(None if source == FASHION_MNIST else folder)
    _check_side(views, size, source)
    train = views.splits.index("heldout")
    return Pictures(part(views, range(train)), part(views, range(train, len(views))))


def open_foreign(source: str, size: int) -> Tensor:
    """Pictures (N, 3, size, size) uint8 that do not belong: "digits" (MNIST), or any set, both splits of it.

    Raises:
        UserError: see `open_pictures`; or digits for a model of another size.
    """
    if source == DIGITS:
        digits = read_digits()
        _check_side(digits, size, source)
        return digits.images
    pictures = open_pictures(source, size)
    return torch.cat([pictures.heldout.images, pictures.train.images])


def part(views: Views, rows: Sequence[int]) -> Views:
    """Some rows of a set."""
    index = list(rows)
    return Views(
        images=views.images[index],
        captions=[views.captions[row] for row in index],
        labels=[views.labels[row] for row in index],
        names=[views.names[row] for row in index],
        splits=[views.splits[row] for row in index],
    )


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` rows, evenly over the set; `most` 0 is all."""
    if not most or most >= count:
        return list(range(count))
    return [row * count // most for row in range(most)]


def prompts_of(pipeline: StarFlowPipeline, views: Views, rows: Sequence[int]) -> list[str]:
    """What the pipeline is told about these pictures: captions, class names or nothing."""
    if pipeline.conditioner is None:
        return [""] * len(rows)
    by_class = pipeline.conditioner.spec.kind == "class"
    return [(views.labels[row] or "") if by_class else views.captions[row] for row in rows]


def batches(images: Tensor, device: torch.device) -> Iterator[Tensor]:
    """uint8 pictures as batches in [-1, 1], the last one as short as it comes."""
    for start in range(0, len(images), BATCH):
        yield to_unit(images[start : start + BATCH]).to(device)


def concept_of(prompt: str, known: set[str]) -> str:
    """The longest known concept whose words stand in the prompt one after the other; "" where there is none."""
    words = f" {' '.join(prompt.lower().replace(',', ' ').split())} "
    return max((concept for concept in known if f" {concept} " in words), key=len, default="")


def _check_side(views: Views, size: int, source: str) -> None:
    side = views.images.shape[-1]
    if side != size:
        raise UserError(f"{source} is of {side} px, the model of {size}: take a model trained at that size")
