"""Aspect ratios: nine shapes of one area, and the words that tell a model which (STARFlow, arXiv 2506.06276)."""

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
    """Width over height."""
    across, down = map(int, aspect.split(":"))
    return across / down


def aspect_size(aspect: Aspect, side: int, multiple: int) -> Size:
    """(width, height) of about the area side x side, rounded to the multiple: sqrt(A R) and sqrt(A / R).

    Each side is at least one multiple.
    """
    root = math.sqrt(aspect_ratio(aspect))
    return max(1, round(side * root / multiple)) * multiple, max(1, round(side / root / multiple)) * multiple


def nearest_aspect(width: int, height: int, aspects: Sequence[Aspect]) -> Aspect:
    """The ratio nearest to that of a picture, in logarithms."""
    wanted = math.log(width / height)
    return min(aspects, key=lambda aspect: abs(math.log(aspect_ratio(aspect)) - wanted))


def caption_with_ratio(caption: str, aspect: Aspect) -> str:
    """A caption as a model of several ratios reads it."""
    return f"{caption}\n in a {aspect} aspect ratio.\n"


@dataclass(frozen=True)
class Buckets:
    """The shapes that a run's pictures are cropped to, by number; one square is the case without ratios."""

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
        """Pixels of a bucket's pictures."""
        return aspect_size(self.aspects[bucket], self.side, self.multiple)

    def of(self, width: int, height: int) -> int:
        """The bucket whose ratio is nearest to a picture's, in logarithms."""
        return self.aspects.index(nearest_aspect(width, height, self.aspects))

    def caption(self, caption: str, bucket: int) -> str:
        """The caption, with its ratio where a model sees several; an empty one stays the null condition."""
        return caption if self.single or not caption else caption_with_ratio(caption, self.aspects[bucket])
