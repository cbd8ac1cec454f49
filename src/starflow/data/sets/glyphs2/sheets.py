"""Contact sheets of a prepared set: 64 pictures a sheet with their captions, to look for wrong ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from starflow.data.images import ImageError, on_background, open_image
from starflow.data.sets.glyphs import captions
from starflow.data.sources.base import ImageRecord, unit_hash
from starflow.io.files import write_bytes

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
