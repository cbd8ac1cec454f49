"""Aspect buckets: nine shapes of one area, and the words that tell a model which (STARFlow, arXiv 2506.06276)."""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from starflow.errors import UserError

Aspect = Literal["21:9", "16:9", "3:2", "5:4", "1:1", "4:5", "2:3", "9:16", "9:21"]
"""width : height, widest first."""
ASPECTS: tuple[Aspect, ...] = typing.get_args(Aspect)
Size = tuple[int, int]
"""(width, height) in pixels."""


def aspect_ratio(aspect: Aspect) -> float:
    """Width over height.

    >>> aspect_ratio("3:2")
    1.5
    """
    across, down = map(int, aspect.split(":"))
    return across / down


def aspect_size(aspect: Aspect, side: int, multiple: int) -> Size:
    """Width and height in pixels of about the area A = side x side, sqrt(A R) and sqrt(A / R) for the ratio R.

    Both are rounded to the multiple, and at least one multiple.

    >>> aspect_size("1:1", 256, 16), aspect_size("16:9", 256, 16)
    ((256, 256), (336, 192))
    """
    root = math.sqrt(aspect_ratio(aspect))
    return max(1, round(side * root / multiple)) * multiple, max(1, round(side / root / multiple)) * multiple


def sizes_of(aspects: Sequence[Aspect], side: int, multiple: int) -> list[Size]:
    """The sizes of some ratios at one area, each once: the square first, where it is among them.

    >>> sizes_of(("16:9", "1:1"), 256, 8)
    [(256, 256), (344, 192)]
    """
    square_first = sorted(aspects, key=lambda aspect: aspect != "1:1")
    return list(dict.fromkeys(aspect_size(aspect, side, multiple) for aspect in square_first))


def ratio_change(size: Size, other: Size) -> float:
    """How far the ratios of two sizes are apart, in logarithms; 0 where they are equal.

    >>> round(ratio_change((200, 100), (100, 100)), 3)
    0.693
    """
    return abs(math.log(size[0] * other[1] / (size[1] * other[0])))


def nearest_aspect(width: int, height: int, aspects: Sequence[Aspect]) -> Aspect:
    """Find the ratio that is nearest to that of an image, in logarithms.

    >>> nearest_aspect(1920, 1080, ASPECTS), nearest_aspect(1080, 1920, ASPECTS)
    ('16:9', '9:16')
    """
    wanted = math.log(width / height)
    return min(aspects, key=lambda aspect: abs(math.log(aspect_ratio(aspect)) - wanted))


def caption_with_ratio(caption: str, aspect: Aspect) -> str:
    """Add the ratio to a caption, in the words that a model of several ratios reads."""
    return f"{caption}\n in a {aspect} aspect ratio.\n"


@dataclass(frozen=True)
class Buckets:
    """The shapes that a run's images are cropped to, by number; one square is the case without ratios.

    >>> buckets = Buckets(side=256, multiple=16, aspects=ASPECTS)
    >>> buckets.size(buckets.nearest(1920, 1080))
    (336, 192)
    """

    side: int
    """Square root of the area, pixels."""
    multiple: int
    """What both sides are multiples of: the autoencoder's factor times the flow's patch."""
    aspects: tuple[Aspect, ...] = ("1:1",)

    def __post_init__(self) -> None:
        if self.multiple < 1 or self.side < self.multiple or (self.single and self.side % self.multiple):
            raise UserError(
                f"pictures of side {self.side} for an autoencoder and patches of {self.multiple} pixels: "
                f"choose a multiple of {self.multiple}"
            )

    @property
    def single(self) -> bool:
        """Whether there is one shape only."""
        return len(self.aspects) == 1

    def size(self, bucket: int) -> Size:
        """Width and height in pixels of a bucket's images."""
        return aspect_size(self.aspects[bucket], self.side, self.multiple)

    def nearest(self, width: int, height: int) -> int:
        """Number of the bucket whose ratio is nearest to an image's, in logarithms."""
        return self.aspects.index(nearest_aspect(width, height, self.aspects))

    def caption(self, caption: str, bucket: int) -> str:
        """Add the bucket's ratio to a caption where a model sees several; an empty one stays the null condition."""
        return caption if self.single or not caption else caption_with_ratio(caption, self.aspects[bucket])
