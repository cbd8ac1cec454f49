"""One picture of the set before it is drawn: what is said of it, and what it is drawn from.

Contract: `draw` gives the same PNG wherever and in whatever order it is called.

A set that is drawn can be looked at on contact sheets: 64 pictures a sheet with their captions, to find wrong ones.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from starflow.data.images import ImageError, on_background, open_image
from starflow.data.sets.glyphs import captions
from starflow.data.sources.base import ImageRecord, unit_hash
from starflow.io.files import write_bytes

Group = Literal["emoji", "people", "objects", "icons"]

MARGIN = 0.04

LARGEST_SIDE = 4096

THUMBNAIL = 16

LEAST_CHROMA = 16

NEAR = 5.0
"""Pictures are nearly the same if their thumbnails differ by less (root mean square, in levels of 0..255)."""


@dataclass(frozen=True, slots=True)
class Style:
    """How the pictures of one source look, and how captions say it.

    Attributes:
        phrase: begins a caption: "3D render of"; the icons' colour goes before it.
        group: the sampling group: "emoji" (the base set and four more styles), "people", "objects" (things from
            furniture catalogues, clip art and coloured icons) or "icons" (line icons and silhouettes in one colour).
        family: styles of one family draw a concept so alike that they are held out together.
        palette: the colours, as in "2f88ff", that the source uses for main colour, second colour, outline and
            ground; a view may exchange the first two. Empty where it must not.
    """

    phrase: str
    group: Group
    family: str
    palette: tuple[str, ...] = ()


STYLES: dict[str, Style] = {
    "3d": Style("3D render of", "emoji", "fluent"),
    "flat": Style("flat icon of", "emoji", "fluent"),
    "noto": Style("Noto emoji of", "emoji", "noto"),
    "twemoji": Style("Twemoji of", "emoji", "twemoji"),
    "noto-v1": Style("blob emoji of", "emoji", "noto-v1"),
    "emojione": Style("EmojiTwo emoji of", "emoji", "emojione"),
    "fxemoji": Style("Firefox emoji of", "emoji", "fxemoji"),
    "streamline-emojis": Style("outlined emoji of", "emoji", "streamline-emojis"),
    "furniture": Style("3D model of", "objects", "furniture"),
    "model": Style("3D model of", "objects", "furniture"),
    "clip-art": Style("clip art of", "objects", "clip-art"),
    "streamline-ultimate-color": Style("outlined drawing of", "objects", "streamline-ultimate-color"),
    "streamline-kameleon-color": Style("round badge of", "objects", "streamline-kameleon-color"),
    "streamline-stickies-color": Style("sticker of", "objects", "streamline-stickies-color"),
    "flat-color-icons": Style("flat drawing of", "objects", "flat-color-icons"),
    "fluent-color": Style("glossy icon of", "objects", "fluent-color"),
    "icon-park": Style("filled line icon of", "icons", "icon-park", ("2f88ff", "43ccf8", "000000", "ffffff")),
    "streamline-color": Style("line icon of", "icons", "streamline-color", ("4147d5", "d7e0ff", "ffffff")),
    "streamline-color-flat": Style("two-tone icon of", "icons", "streamline-color", ("8fbffa", "2859c5", "ffffff")),
    "streamline-plump-color": Style(
        "plump line icon of", "icons", "streamline-plump-color", ("2859c5", "8fbffa", "ffffff")
    ),
    "streamline-plump-color-flat": Style(
        "plump two-tone icon of", "icons", "streamline-plump-color", ("8fbffa", "2859c5", "ffffff")
    ),
    "streamline-flex-color": Style(
        "rounded line icon of", "icons", "streamline-flex-color", ("4147d5", "d7e0ff", "ffffff")
    ),
    "streamline-flex-color-flat": Style(
        "rounded two-tone icon of", "icons", "streamline-flex-color", ("8fbffa", "2859c5", "ffffff")
    ),
    "streamline-sharp-color": Style(
        "sharp line icon of", "icons", "streamline-sharp-color", ("4147d5", "d7e0ff", "ffffff")
    ),
    "streamline-sharp-color-flat": Style(
        "sharp two-tone icon of", "icons", "streamline-sharp-color", ("8fbffa", "2859c5", "ffffff")
    ),
    "streamline-cyber-color": Style(
        "angular line icon of", "icons", "streamline-cyber-color", ("092f63", "bbd8ff", "ffffff")
    ),
    "game-icons": Style("silhouette of", "icons", "game-icons", ("000000",)),
}


@dataclass(frozen=True, slots=True)
class Svg:
    """A drawing as SVG; `crop` cuts its empty margin off and puts it in the middle of a square."""

    text: str
    crop: bool = False


@dataclass(frozen=True, slots=True)
class Raster:
    """A drawing that is pixels already (PNG or WebP)."""

    data: bytes
    crop: bool = False


@dataclass(frozen=True, slots=True)
class DrawnFile:
    """A drawing whose file is there already: a view of a model, see `model_views`."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """What one picture shows, and what it is drawn from.

    Attributes:
        name: unique id within the set, "style/key"; the file's path below `images` as well.
        caption: what it shows, without article and style: "red apple".
        style: key of `STYLES`.
        concept: what it shows, for joining over sources and holding out; see `words.concept_key`.
        kind: the source's own category, e.g. "food-fruit".
        art: what `draw` draws.
        tags: other words for it.
        flip: whether its mirror image is as good.
        extra: more fields for the record's `meta`.
    """

    name: str
    caption: str
    style: str
    concept: str
    kind: str
    art: Svg | Raster | DrawnFile
    tags: tuple[str, ...] = ()
    flip: bool = True
    extra: dict[str, str] = field(default_factory=dict)


class BadPicture(Exception):
    """A source picture that cannot be decoded or drawn, or that shows nothing."""


def draw(art: Svg | Raster | DrawnFile, size: int) -> bytes:
    """The picture as an RGBA PNG of `size` pixels a side.

    Raises:
        BadPicture: it cannot be drawn, or is empty.
    """
    if isinstance(art, DrawnFile):
        raise BadPicture("its file is gone: prepare the set again")
    image, box = _visible(art.data if isinstance(art, Raster) else _render(art.text, size))
    if art.crop and isinstance(art, Svg):  # again, so large that what is cropped need not be enlarged
        share = max(box[2] - box[0], box[3] - box[1]) / max(image.size)
        image, box = _visible(_render(art.text, min(round(size / share) + 1, LARGEST_SIDE)))
    if art.crop:
        image = image.crop(box)
    png = io.BytesIO()
    square(image, size, MARGIN if art.crop else 0.0).save(png, format="PNG", compress_level=3)
    return png.getvalue()


def is_whole(path: Path, size: int) -> bool:
    """Whether a PNG of this size lies there; it was written whole or not at all, so its header is enough."""
    try:
        with path.open("rb") as file:
            head = file.read(24)
    except OSError:
        return False
    return head[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(head[16:20], "big") == size


def thumbnail(png: bytes) -> NDArray[np.uint8]:
    """A picture on white at 16 x 16 pixels, (768,), by which near duplicates are found."""
    small = _decode(png).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    ground = Image.new("RGBA", small.size, "white")
    return np.asarray(Image.alpha_composite(ground, small).convert("RGB")).reshape(-1)


def is_grey(small: NDArray[np.uint8]) -> bool:
    """Whether a thumbnail shows no colours."""
    channels = small.reshape(-1, 3).astype(int)
    return bool((channels.max(-1) - channels.min(-1)).max() < LEAST_CHROMA)


def near_duplicates(thumbnails: NDArray[np.uint8]) -> dict[int, int]:
    """For every picture that is nearly the same as an earlier one that stays: the earlier one's number.

    Args:
        thumbnails: (N, 768), as `thumbnail` gives them.
    """
    pixels = thumbnails.astype(np.float32)
    squares = (pixels**2).sum(-1)
    found: dict[int, int] = {}
    for number in range(1, len(pixels)):
        distances = squares[:number] + squares[number] - 2 * pixels[:number] @ pixels[number]
        near = np.flatnonzero(distances < NEAR**2 * pixels.shape[1])
        kept = next((int(other) for other in near if int(other) not in found), None)
        if kept is not None:
            found[number] = kept
    return found


def _visible(data: bytes) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """A picture, and the box of what can be seen of it.

    Raises:
        BadPicture: it cannot be decoded, or nothing can be seen.
    """
    image = _decode(data)
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()
    if box is None:
        raise BadPicture("nothing is visible")
    return image, box


def _render(svg: str, side: int) -> bytes:
    import resvg_py

    try:
        # System fonts would make the result depend on the machine; units such as cm are refused without dpi.
        data = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, dpi=96, skip_system_fonts=True)
    except ValueError as error:
        raise BadPicture(" ".join(str(error).split())[:200]) from None
    return bytes(data)


def _decode(data: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data)) as opened:
            return opened.convert("RGBA")
    except (OSError, ValueError, SyntaxError) as error:
        raise BadPicture(str(error)) from None


def square(image: Image.Image, size: int, margin: float) -> Image.Image:
    """The picture scaled to fit a transparent square with a margin (share of the side), in its middle."""
    if image.size == (size, size) and not margin:
        return image
    room = size * (1 - 2 * margin)
    scale = room / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas = Image.new("RGBA", (size, size))
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    canvas.paste(resized, ((size - width) // 2, (size - height) // 2))
    return canvas


ACROSS, DOWN = 8, 8

SIDE = 112

LINES = 3

LINE_HEIGHT = 11

CELL = (SIDE + 8, SIDE + 6 + LINES * LINE_HEIGHT)


def write_sheets(records: list[ImageRecord], folder: Path, *, sheets_a_style: int = 2) -> list[Path]:
    """Write PNG files `<style>-<number>.png`: pictures of a style drawn at random (but the same every time).

    Args:
        records: of a prepared set.
        folder: to fill.
        sheets_a_style: at most so many sheets for each style.
    """
    by_style: dict[str, list[ImageRecord]] = defaultdict(list)
    for record in records:
        by_style[f"{record.meta['style']}-{record.meta['sampling_group']}"].append(record)
    written = []
    for style, found in sorted(by_style.items()):
        shuffled = sorted(found, key=lambda record: unit_hash(f"sheet:{record.name}"))
        for number, part in enumerate(_parts(shuffled, ACROSS * DOWN)):
            if number == sheets_a_style:
                break
            path = folder / f"{style}-{number:02d}.png"
            write_bytes(path, _png(sheet([(_picture(record), plain_caption(record)) for record in part])))
            written.append(path)
    return written


def plain_caption(record: ImageRecord) -> str:
    """What a picture's plain view says of it, its style included."""
    meta = record.meta
    phrase = meta.get("phrase", meta["style"])
    style = f"{meta['colour']} {phrase}" if meta.get("colour") else phrase
    return captions.compose(record.caption, style=style, tags=(meta["view"],) if meta.get("view") else ())


def sheet(entries: list[tuple[Image.Image, str]]) -> Image.Image:
    """Pictures in rows of eight, each with its caption below, in at most three lines."""
    rows = -(-len(entries) // ACROSS)
    canvas = Image.new("RGB", (ACROSS * CELL[0], rows * CELL[1]), "white")
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=9)
    for number, (picture, caption) in enumerate(entries):
        left, top = (number % ACROSS) * CELL[0] + 4, (number // ACROSS) * CELL[1] + 2
        canvas.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, top))
        pen.rectangle((left - 1, top - 1, left + SIDE, top + SIDE), outline=(225, 225, 225))
        for line, text in enumerate(_wrapped(caption, font, SIDE + 4)[:LINES]):
            pen.text((left, top + SIDE + 1 + line * LINE_HEIGHT), text, fill="black", font=font)
    return canvas


def _picture(record: ImageRecord) -> Image.Image:
    try:
        return on_background(open_image(record.file))
    except ImageError:
        return Image.fromarray(np.full((SIDE, SIDE, 3), 128, dtype=np.uint8))


def _parts(records: list[ImageRecord], size: int) -> Iterator[list[ImageRecord]]:
    for start in range(0, len(records), size):
        yield records[start : start + size]


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The text in lines that are no wider than `width` pixels; a longer word has a line of its own."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _png(image: Image.Image) -> bytes:
    import io

    data = io.BytesIO()
    image.save(data, format="PNG", optimize=False)
    return data.getvalue()
