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

from starflow.files import atomic

if TYPE_CHECKING:
    from PIL.Image import Image


def to_unit(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) in 0..255 -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


def dequantise(images: Tensor, draw: Tensor) -> Tensor:
    """Pictures whose 8-bit levels are spread evenly: (level + draw) / 128 - 1, in [-1, 1).

    Args:
        images: float in [-1, 1], levels of `to_unit`; rounded back to the level where float16 has moved them.
        draw: of the same shape, uniform in [0, 1). With it, log P(levels) >= mean of log p(result) - D log 128.
    """
    return (((images.float() + 1) * 127.5).round() + draw) / 128 - 1


def to_bytes(images: Tensor) -> Tensor:
    """Float (B, 3, H, W) in [-1, 1] -> uint8 in 0..255 on the CPU, clamped and rounded."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def to_pil(images: Tensor) -> list[Image]:
    """Float (B, 3, H, W) in [-1, 1] -> B RGB images."""
    from PIL import Image

    return [Image.fromarray(picture.permute(1, 2, 0).numpy(), "RGB") for picture in to_bytes(images)]


def from_pil(image: Image) -> Tensor:
    """An image -> (1, 3, H, W) in [-1, 1]; transparency is laid on white."""
    import numpy
    from PIL import Image

    if image.mode in ("RGBA", "LA", "P", "PA"):
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    pixels = torch.from_numpy(numpy.array(image.convert("RGB")))
    return to_unit(pixels.permute(2, 0, 1)[None])


def grid(images: Tensor, columns: int, gap: int = 2) -> Image:
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
    """Write `grid` as a PNG, whole or not at all."""
    save_png(grid(images, columns), path)


def save_png(image: Image, path: Path, text: Mapping[str, str] | None = None) -> None:
    """Write a PNG with `text` in its text chunks, whole or not at all."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    with atomic(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
