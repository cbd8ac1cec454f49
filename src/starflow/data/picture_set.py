"""Pictures by number, however many: what encoding and training read, whatever they lie in.

Contract: number i is the same picture in every process of a run. `read` may be called from any thread or process, and
names what it cannot read; numbers of one bucket have one shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from starflow.data.augment import on_background
from starflow.data.buckets import Buckets, Size
from starflow.data.imagenet import order_classes
from starflow.data.views import Views

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of a picture without opening it; the caption says its ratio where a model sees several."""

    name: str
    caption: str
    label: str | None
    heldout: bool
    bucket: int


class Pictures(Protocol):
    """See the module's docstring."""

    buckets: Buckets
    in_memory: bool

    def __len__(self) -> int: ...

    def entry(self, number: int) -> Entry: ...

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


class ViewPictures:
    """Views in memory as pictures of one bucket."""

    in_memory = True

    def __init__(self, views: Views) -> None:
        self.views = views
        self.buckets = Buckets(views.images.shape[-1], 1)

    def __len__(self) -> int:
        return len(self.views)

    def entry(self, number: int) -> Entry:
        views = self.views
        heldout = views.splits[number] == "heldout"
        return Entry(views.names[number], views.captions[number], views.labels[number], heldout, 0)

    def numbers(self, bucket: int, *, heldout: bool) -> Tensor:
        return torch.tensor([i for i, split in enumerate(self.views.splits) if (split == "heldout") == heldout])

    def read(self, number: int) -> Tensor:
        return self.views.images[number]

    def like(self, number: int) -> Sequence[int]:
        return ()

    def classes(self) -> list[str]:
        return order_classes(label for label in self.views.labels if label)


def all_numbers(pictures: Pictures, *, heldout: bool) -> list[Tensor]:
    """Numbers of one split, a tensor a bucket."""
    return [pictures.numbers(bucket, heldout=heldout) for bucket in range(len(pictures.buckets.aspects))]


def picture_tensor(image: Image.Image, size: Size) -> Tensor:
    """A picture as uint8 (3, height, width): scaled until it covers the size, and its middle cut out."""
    from PIL import Image

    image = on_background(image)
    width, height = size
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
    box = (left, top, image.width - left, image.height - top)
    small = image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()
