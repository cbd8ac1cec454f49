"""Sheets of pictures with captions, for a person to look at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from starflow.data.pictures import save_png
from starflow.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

GAP = 8
LINES = 2


def sheet(images: Sequence[Image], captions: Sequence[str], columns: int, side: int = 128) -> Image:
    """Pictures in rows of `columns`, each fitted into `side` x `side` pixels with its caption below.

    A caption takes up to two lines; what does not fit ends in an ellipsis. Small pictures are enlarged without
    smoothing, so that pixels stay visible.

    Raises:
        UserError: no pictures, not one caption a picture, or no columns.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not images or len(images) != len(captions) or columns < 1 or side < 1:
        raise UserError(
            f"{len(images)} pictures with {len(captions)} captions in {columns} columns of {side} pixels: "
            "expected at least one of each, and one caption a picture"
        )
    font = ImageFont.load_default(size=max(9, side // 11))
    line = math.ceil(font.getbbox("Ag")[3]) + 2
    width, height = side + GAP, side + LINES * line + GAP
    page = Image.new("RGB", (columns * width + GAP, math.ceil(len(images) / columns) * height + GAP), "white")
    pen = ImageDraw.Draw(page)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = GAP + index % columns * width, GAP + index // columns * height
        fitted = _fit(image, side)
        page.paste(fitted, (left + (side - fitted.width) // 2, top + (side - fitted.height) // 2))
        for row, text in enumerate(_wrap(caption, side, pen, font)):
            pen.text((left + side / 2, top + side + row * line), text, fill="black", font=font, anchor="ma")
    return page


def save_sheet(path: Path, images: Sequence[Image], captions: Sequence[str], columns: int, side: int = 128) -> None:
    """Write `sheet` as a PNG, whole or not at all.

    Raises:
        UserError: see `sheet`, or the file cannot be written.
    """
    save_png(sheet(images, captions, columns, side), path)


def _fit(image: Image, side: int) -> Image:
    from PIL.Image import Resampling

    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Resampling.NEAREST if scale > 1 else Resampling.LANCZOS)


def _wrap(caption: str, width: int, pen: ImageDraw, font: FreeTypeFont | ImageFont) -> list[str]:
    """The caption in at most LINES lines of `width` pixels; the last takes the rest, shortened."""
    lines: list[str] = []
    for word in caption.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and (len(lines) == LINES or pen.textlength(longer, font=font) <= width):
            lines[-1] = longer
        else:
            lines.append(word)
    return [_shorten(text, width, pen, font) for text in lines]


def _shorten(text: str, width: int, pen: ImageDraw, font: FreeTypeFont | ImageFont) -> str:
    if pen.textlength(text, font=font) <= width:
        return text
    while text and pen.textlength(f"{text}…", font=font) > width:
        text = text[:-1]
    return f"{text.rstrip()}…"
