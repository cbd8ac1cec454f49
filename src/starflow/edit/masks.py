"""Masks as people have them, and what they mean for a picture's latents.

Contract: a mask is bool (1, 1, H, W), True where the picture is to be painted anew.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from starflow.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

HALF = 128
"""Level from which on a grey counts as white, and an alpha as opaque."""


def read_mask(mask: Image, size: tuple[int, int], *, invert: bool = False) -> tuple[Tensor, str]:
    """The mask that a picture of any mode means, and one line that says how it was read.

    Where any of it is transparent, alpha 0 is repainted (OpenAI's convention), and otherwise white is (diffusers').

    Args:
        mask: of any size; scaled to `size` by the nearest pixel.
        size: (width, height) of the picture that it is for.
        invert: repaint the rest instead.

    Raises:
        UserError: nothing is repainted.
    """
    import numpy

    alpha = mask.convert("RGBA").getchannel("A")
    transparent = mask.has_transparency_data and int(numpy.array(alpha).min()) < HALF
    channel = alpha if transparent else mask.convert("L")
    said = "transparent" if transparent else "white"
    if channel.size != size:
        said += f", scaled from {channel.width}x{channel.height} to {size[0]}x{size[1]}"
        channel = channel.resize(size, resample=0)  # the nearest pixel
    levels = torch.from_numpy(numpy.array(channel))
    hole = (levels < HALF) if transparent else (levels >= HALF)
    if invert:
        hole, said = ~hole, f"inverted: all that is not {said}"
    if not bool(hole.any()):
        other = "transparent pixels (alpha 0)" if transparent else "white pixels, or pixels of alpha 0"
        raise UserError(f"the mask repaints nothing, expected {other} where to repaint: or invert it (--invert-mask)")
    return hole[
        None, None
    ], f"the mask repaints what is {said}, {100 * float(hole.float().mean()):.3g} % of the picture"


def parse_box(text: str) -> tuple[int, int, int, int]:
    """(x, y, width, height) of "x,y,w,h", in pixels from the upper left corner.

    Raises:
        UserError: another form.
    """
    found = re.fullmatch(r"\s*(\d{1,6})\s*,\s*(\d{1,6})\s*,\s*(\d{1,6})\s*,\s*(\d{1,6})\s*", text)
    if not found:
        raise UserError(f"--box is '{text}', expected x,y,width,height in pixels, e.g. 16,16,32,32")
    x, y, width, height = map(int, found.groups())
    return x, y, width, height


def box_mask(box: tuple[int, int, int, int], size: tuple[int, int]) -> Tensor:
    """The mask of a rectangle (x, y, width, height) in a picture of (width, height).

    Raises:
        UserError: no part of it lies in the picture.
    """
    x, y, width, height = box
    hole = torch.zeros(1, 1, size[1], size[0], dtype=torch.bool)
    hole[..., y : y + height, x : x + width] = True
    if not bool(hole.any()):
        raise UserError(f"the box {x},{y},{width},{height} is empty in a picture of {size[0]}x{size[1]}: move it there")
    return hole


def latent_mask(hole: Tensor, grid: tuple[int, int]) -> Tensor:
    """A mask of pixels (1, 1, H, W) as one of latents (1, 1, h, w): a cell's maximum, dilated by one cell.

    A latent says something of the pixels around its cell too, so that those next to the hole are not to be trusted.
    """
    cells = F.adaptive_max_pool2d(hole.float(), grid)
    return F.max_pool2d(cells, 3, stride=1, padding=1) > 0
