"""How one picture becomes one training view: augmentation that the caption speaks of.

Contract: view `i` of a picture depends on (config.seed, record.name, i) alone. View 0 is plain: white background,
no augmentation. A held-out picture's plain view carries its style in the caption, as that is what tells it
from the same concept in training.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from starflow.data import captions
from starflow.data.colours import BACKGROUNDS, HUES, colour_name, fitting_backgrounds, main_hue, turn_hue
from starflow.data.records import Record
from starflow.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

Pixels = NDArray[np.uint8]
View = tuple[Pixels, str]

STYLE_SHARE = 0.5
TAGS_SHARE = 0.15
MAX_TAGS = 3
TINT_TRIALS = 4
WHITE = (255, 255, 255)
ANALYSIS_SIZE = 64
_TINTED_GROUPS = frozenset({"animals-nature", "food-drink", "activities", "objects", "travel-places"})
_UNTINTED_SUBGROUPS = frozenset({"place-geographic", "place-other", "place-map", "flag", "game"})


@dataclass(frozen=True)
class ViewConfig:
    """How pictures become training views.

    Attributes:
        size: side of a view, pixels.
        views: views of a training picture, the plain one included.
        heldout_views: views of a held-out picture.
        colour_backgrounds: share of the views, where the picture has an outline, on a flat named colour.
        hue: share of the views, where the picture is of one hue, whose colour is turned and named.
        scale_min: smallest scale drawn; the largest is 1.
        shift: largest shift, as a share of the side; never so far that the thing leaves the frame.
        flip: mirror half of the views, except of what is text-like.
        seed: of all draws.
    """

    size: int = 64
    views: int = 8
    heldout_views: int = 1
    colour_backgrounds: float = 0.25
    hue: float = 0.3
    scale_min: float = 0.85
    shift: float = 0.06
    flip: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.views < 1 or self.heldout_views < 1:
            raise UserError(
                f"size {self.size}, views {self.views}, heldout_views {self.heldout_views}: each must be at least 1"
            )
        if not 0.5 <= self.scale_min <= 1:
            raise UserError(f"scale_min is {self.scale_min}, expected 0.5 to 1")
        if not 0 <= self.shift <= 0.25:
            raise UserError(f"shift is {self.shift}, expected 0 to 0.25 of the side")
        if not (0 <= self.colour_backgrounds <= 1 and 0 <= self.hue <= 1):
            raise UserError(f"colour_backgrounds {self.colour_backgrounds} and hue {self.hue} must be shares, 0 to 1")


def resize_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square of a picture, resized with antialiasing to `size` pixels a side."""
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def on_background(image: Image.Image, colour: tuple[int, int, int] = WHITE) -> Image.Image:
    """An RGB picture: an RGBA one is laid on the colour."""
    from PIL import Image

    if image.mode != "RGBA":
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, (*colour, 255))
    return Image.alpha_composite(ground, image).convert("RGB")


def view_count(record: Record, config: ViewConfig) -> int:
    """How many views a picture gets."""
    return config.views if record.split == "train" else config.heldout_views


def draw_views(image: Image.Image, record: Record, config: ViewConfig) -> list[View]:
    """All views of one picture, each (size, size, 3) with its caption.

    Glyphs (records with a style) get every augmentation; other pictures are cropped to their central square
    and mirrored at most, and keep their caption.
    """
    indices = range(view_count(record, config))
    if "style" in record.meta:
        artist = _Artist(image.convert("RGBA"), record, config)
        return [artist.view(i) for i in indices]
    square = resize_crop(on_background(image), config.size)
    return [(_photo_view(square, record, config, i), record.caption) for i in indices]


def _rng(config: ViewConfig, name: str, index: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{config.seed}:{name}:{index}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def _photo_view(square: Image.Image, record: Record, config: ViewConfig, index: int) -> Pixels:
    from PIL import ImageOps

    flips = config.flip and index > 0 and _rng(config, record.name, index).random() < 0.5
    return np.asarray(ImageOps.mirror(square) if flips else square)


class _Artist:
    """Draws the views of one glyph; holds what they share: its colours and its extent."""

    def __init__(self, image: Image.Image, record: Record, config: ViewConfig) -> None:
        self.image, self.record, self.config = image, record, config
        self.small = image.resize((ANALYSIS_SIZE, ANALYSIS_SIZE))
        pixels = np.asarray(self.small)
        self.backgrounds = fitting_backgrounds(pixels)
        self.hue = main_hue(pixels) if self._may_be_tinted() else None
        self.extent = image.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox() or (0, 0, *image.size)

    def _may_be_tinted(self) -> bool:
        meta = self.record.meta
        return meta["group"] in _TINTED_GROUPS and meta["subgroup"] not in _UNTINTED_SUBGROUPS

    def view(self, index: int) -> View:
        """Pixels (size, size, 3) and the caption of one view."""
        style = self.record.meta["style"]
        if index == 0:
            named = style if self.record.split == "heldout" else None
            pixels = self._place(self.image, WHITE, scale=1.0, shift=(0.0, 0.0), mirrored=False)
            return pixels, captions.compose(self.record.caption, style=named)
        rng = _rng(self.config, self.record.name, index)
        styled, tagged, ground, tint, mirror, scale = rng.random(6)
        shift = rng.uniform(-1, 1, size=2) * self.config.shift
        image, colour = self._tint(rng) if tint < self.config.hue else (self.image, None)
        background = self._background(rng, colour) if ground < self.config.colour_backgrounds else None
        pixels = self._place(
            image,
            BACKGROUNDS[background] if background else WHITE,
            scale=1 - (1 - self.config.scale_min) * scale,
            shift=(shift[0], shift[1]),
            mirrored=self.config.flip and mirror < 0.5 and self.record.meta["flip"] == "yes",
        )
        caption = captions.compose(
            self.record.caption,
            style=style if styled < STYLE_SHARE else None,
            colour=colour,
            background=background,
            tags=self._tags(rng, colour) if tagged < TAGS_SHARE else (),
        )
        return pixels, caption

    def _tint(self, rng: np.random.Generator) -> tuple[Image.Image, str | None]:
        """The picture in a colour drawn at random, its own included; unchanged if none would show."""
        if self.hue is None:
            return self.image, None
        for name in rng.permutation(list(HUES))[:TINT_TRIALS]:
            shown = colour_name(np.asarray(turn_hue(self.small, self.hue, HUES[name])), HUES[name])
            if shown is not None:
                return turn_hue(self.image, self.hue, HUES[name]), shown
        return self.image, None

    def _background(self, rng: np.random.Generator, colour: str | None) -> str | None:
        fitting = [name for name in self.backgrounds if colour is None or colour not in name]
        return str(rng.choice(fitting)) if fitting else None

    def _tags(self, rng: np.random.Generator, colour: str | None) -> tuple[str, ...]:
        tags = [tag for tag in self.record.meta["tags"].split(",") if tag]
        if colour is not None:
            tags = [tag for tag in tags if captions.COLOUR_WORDS.isdisjoint(tag.split())]
        chosen = sorted(rng.permutation(len(tags))[:MAX_TAGS])
        return tuple(tags[i] for i in chosen)

    def _place(
        self,
        image: Image.Image,
        colour: tuple[int, int, int],
        *,
        scale: float,
        shift: tuple[float, float],
        mirrored: bool,
    ) -> Pixels:
        """Scale about the centre, shift (shares of the side, clamped to keep the thing inside), lay on `colour`."""
        from PIL import Image, ImageOps

        side = image.width
        window = side / scale
        left = _window_start(side, window, shift[0] * window, self.extent[0], self.extent[2])
        top = _window_start(side, window, shift[1] * window, self.extent[1], self.extent[3])
        pad = int(np.ceil(max(0.0, -left, -top, left + window - side, top + window - side))) + 1
        canvas = Image.new("RGBA", (side + 2 * pad, side + 2 * pad))
        canvas.paste(image, (pad, pad))
        box = (left + pad, top + pad, left + pad + window, top + pad + window)
        size = self.config.size
        small = on_background(canvas.resize((size, size), Image.Resampling.LANCZOS, box=box), colour)
        return np.asarray(ImageOps.mirror(small) if mirrored else small)


def _window_start(side: float, window: float, shift: float, low: float, high: float) -> float:
    """Where a window of that width starts so that it is shifted as asked and still covers low..high."""
    centred = (side - window) / 2
    first, last = high - window, low
    if first > last:
        return centred
    return min(max(centred - shift, first), last)
