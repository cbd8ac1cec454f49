"""Pictures as tensors, PIL images and PNG files.

Tensors are (B, 3, H, W), red first: uint8 in 0..255 on disk and in caches, float in [-1, 1] for networks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from starflow.errors import UserError
from starflow.io.files import atomic_write

if TYPE_CHECKING:
    from PIL.Image import Image

import io
import struct
import zlib
from typing import TYPE_CHECKING


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) in 0..255 -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


def dequantise(images: Tensor, draw: Tensor) -> Tensor:
    """Pictures whose 8-bit levels are spread evenly: (level + draw) / 128 - 1, in [-1, 1).

    Args:
        images: float in [-1, 1], levels of `to_float`; rounded back to the level where float16 has moved them.
        draw: of the same shape, uniform in [0, 1). With it, log P(levels) >= mean of log p(result) - D log 128.
    """
    return (((images.float() + 1) * 127.5).round() + draw) / 128 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float (B, 3, H, W) in [-1, 1] -> uint8 in 0..255 on the CPU, clamped and rounded."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def to_pil(images: Tensor) -> list[Image]:
    """Float (B, 3, H, W) in [-1, 1] -> B RGB images."""
    from PIL import Image

    return [Image.fromarray(picture.permute(1, 2, 0).numpy(), "RGB") for picture in to_uint8(images)]


def from_pil(image: Image) -> Tensor:
    """An image -> (1, 3, H, W) in [-1, 1]; transparency is laid on white."""
    import numpy
    from PIL import Image

    if image.mode in ("RGBA", "LA", "P", "PA"):
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    pixels = torch.from_numpy(numpy.array(image.convert("RGB")))
    return to_float(pixels.permute(2, 0, 1)[None])


def make_grid(images: Tensor, columns: int, gap: int = 2) -> Image:
    """(B, 3, H, W) in [-1, 1] -> one picture, `columns` a row, on white."""
    from PIL import Image

    pictures = to_pil(images)
    width, height = pictures[0].size
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * (width + gap), index // columns * (height + gap)))
    return sheet


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write `make_grid` as a PNG, whole or not at all."""
    save_png(make_grid(images, columns), path)


def save_png(image: Image, path: Path, text: Mapping[str, str] | None = None) -> None:
    """Write a PNG with `text` in its text chunks, whole or not at all."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


class ImageError(UserError):
    """A picture that cannot be decoded; `path` names it, `reason` says why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is not a readable image ({reason}): replace it or remove it")
        self.path = path
        self.reason = reason


def open_image(path: Path) -> Image:
    """Decode a picture, upright, as RGB, or RGBA if it has transparency.

    Raises:
        ImageError: missing, truncated, corrupt, or no image at all.
    """
    return _decode(path, path)


def decode_image(data: bytes, name: str, side: int = 0) -> Image:
    """The same of a file that is in memory; `name` is for messages.

    A JPEG may come reduced by 2, 4 or 8, which is several times as fast, but never below `side` pixels a side; 0 is
    never reduced.
    """
    return _decode(io.BytesIO(data), Path(name), side)


def _decode(file: Path | io.BytesIO, path: Path, side: int = 0) -> Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    # What Pillow's decoders raise on broken files.
    broken = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
    try:
        with Image.open(file) as opened:
            if side:
                opened.draft(None, (side, side))
            opened.load()
            image = ImageOps.exif_transpose(opened)
        return _as_colour(image)
    except FileNotFoundError:
        raise ImageError(path, "no such file") from None
    except UnidentifiedImageError:
        raise ImageError(path, "no known image format") from None
    except broken as error:
        raise ImageError(path, " ".join(str(error).split()) or type(error).__name__) from None


def _as_colour(image: Image) -> Image:
    if image.mode.startswith("I"):  # 16-bit greys; convert() alone would clip them to white
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def read_image_size(file: Path | bytes, name: str) -> tuple[int, int]:
    """(width, height) of a picture as it is shown, from its header alone.

    Raises:
        ImageError: no picture.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            # Of a PNG Pillow would decode everything to find its EXIF.
            turned = image.format in ROTATABLE_FORMATS and image.getexif().get(ORIENTATION, 1) >= QUARTER_TURNS
            return (image.height, image.width) if turned else image.size
    except FileNotFoundError:
        raise ImageError(Path(name), "no such file") from None
    except UnidentifiedImageError:
        raise ImageError(Path(name), "no known image format") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ImageError(Path(name), " ".join(str(error).split()) or type(error).__name__) from None


ORIENTATION, QUARTER_TURNS = 0x0112, 5
"""The EXIF tag, and its first value that swaps width and height."""

ROTATABLE_FORMATS = ("JPEG", "MPO", "TIFF", "WEBP")


WHITE = (255, 255, 255)


def resize_crop(image: Image, size: int) -> Image:
    """The central square of a picture, resized with antialiasing to `size` pixels a side."""
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def on_background(image: Image, colour: tuple[int, int, int] = WHITE) -> Image:
    """An RGB picture: an RGBA one is laid on the colour."""
    from PIL import Image

    if image.mode != "RGBA":
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, (*colour, 255))
    return Image.alpha_composite(ground, image).convert("RGB")
