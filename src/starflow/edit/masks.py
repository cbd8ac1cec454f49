"""Masks as people have them, what they mean for latents, and the crop of a picture that the model sees round the hole.

Contract: a mask is bool (1, 1, H, W), True where the picture is to be painted anew. Outside the mask a picture comes
back bit for bit, and what it holds under the mask reaches nothing.

Shapes: pictures (1, 3, H, W) in [-1, 1]; masks (1, 1, H, W) of bool, True to be painted anew.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from starflow.data.buckets import Size, ratio_change
from starflow.data.images import from_pil, to_uint8
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
    hole = torch.zeros(1, 1, size[1], size[0], dtype=torch.bool, device="cpu")
    hole[..., y : y + height, x : x + width] = True
    if not bool(hole.any()):
        raise UserError(f"the box {x},{y},{width},{height} is empty in a picture of {size[0]}x{size[1]}: move it there")
    return hole


def touched_cells(hole: Tensor, grid: tuple[int, int]) -> Tensor:
    """A mask of pixels (1, 1, H, W) as one of latents (1, 1, h, w): the cells that hold a pixel of it."""
    return F.adaptive_max_pool2d(hole.float(), grid) > 0


def latent_mask(hole: Tensor, grid: tuple[int, int]) -> Tensor:
    """As `touched_cells`, dilated by one cell.

    A latent says something of the pixels around its cell too, so that those next to the hole are not to be trusted.
    """
    return F.max_pool2d(touched_cells(hole, grid).float(), 3, stride=1, padding=1) > 0


def drawn_mask(hole: Tensor, grid: tuple[int, int]) -> Tensor:
    """As `latent_mask`, but `touched_cells` of a thin hole, in which no cell lies whole.

    Most of what the latents beside a thin hole say of their own cells and of the hole's surroundings is known.
    """
    whole = ~touched_cells(~hole, grid)
    return latent_mask(hole, grid) if bool(whole.any()) else touched_cells(hole, grid)


def is_wide(hole: Tensor) -> bool:
    """Whether any cell of a hole in latents (1, 1, h, w) has none but cells of the hole around it.

    Beyond the edge nothing is to be filled. Inside a picture a hole of `latent_mask` is wide where a cell lies whole in
    it, and one of `drawn_mask` that is not dilated is thin.

    >>> hole = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    >>> hole[..., 2:4, :] = True
    >>> is_wide(hole), is_wide(latent_mask(hole, (8, 8)))
    (False, True)
    """
    return not bool(F.max_pool2d(F.pad((~hole).float(), (1, 1, 1, 1), value=1.0), 3, stride=1).all())


CONTEXT = 2
"""Sides of the hole that the model sees, at least."""


@dataclass(frozen=True)
class Crop:
    """A rectangle of a picture, in pixels."""

    left: int
    top: int
    width: int
    height: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """As Pillow has it: left, upper, right, lower."""
        return self.left, self.top, self.left + self.width, self.top + self.height

    def of(self, tensor: Tensor) -> Tensor:
        """That part of (..., H, W)."""
        return tensor[..., self.top : self.top + self.height, self.left : self.left + self.width]


def crop_round(hole: Tensor, size: Size) -> Crop:
    """The part round a hole in the ratio of `size`, at least as large, and twice as large as the hole.

    Where the picture does not reach that far it is smaller, and then has another ratio.
    """
    height, width = hole.shape[-2:]
    rows, columns = (hole[0, 0].any(axis).nonzero().flatten() for axis in (1, 0))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    scale = max(1.0, CONTEXT * (right - left) / size[0], CONTEXT * (bottom - top) / size[1])
    wide, high = min(round(scale * size[0]), width), min(round(scale * size[1]), height)
    middle_x, middle_y = (left + right - wide) // 2, (top + bottom - high) // 2
    return Crop(min(max(middle_x, 0), width - wide), min(max(middle_y, 0), height - high), wide, high)


@dataclass(frozen=True)
class Scene:
    """A picture, a mask, and what of them the model sees."""

    picture: Image
    hole: Tensor
    """(1, 1, H, W), of the whole picture."""
    crop: Crop
    seen: Tensor
    """(1, 3, height, width) of a size that the model knows, the crop; its hole is filled smoothly from around, or as it
    was where that is kept."""
    latent_hole: Tensor
    """(1, 1, h, w) of bool, see `latent_mask`."""
    drawn_hole: Tensor
    """(1, 1, h, w) of bool, see `drawn_mask`."""

    @staticmethod
    def of(picture: Image, hole: Tensor, sizes: Sequence[Size], factor: int, *, keep: bool = False) -> Scene:
        """What a model sees of a picture: a crop, at the one of its sizes that changes the crop's ratio least.

        Args:
            picture: of any size.
            hole: (1, 1, H, W), of the whole picture.
            sizes: that the model was trained at, the first one preferred.
            factor: pixels that a latent pixel stands for along a side.
            keep: whether it sees what is in the hole too.
        """
        crop, size = min(((crop_round(hole, one), one) for one in sizes), key=lambda pair: _distortion(*pair))
        part, shape = crop.of(hole), (size[1], size[0])
        small = F.adaptive_max_pool2d(part.float(), shape) > 0
        if keep:
            seen = resized(crop.of(from_pil(picture)), shape)
        else:
            seen = spread_known(resized(spread_known(crop.of(from_pil(picture)), ~part), shape), ~small)
        grid = shape[0] // factor, shape[1] // factor
        return Scene(picture, hole, crop, seen, latent_mask(small, grid), drawn_mask(small, grid))

    @property
    def said(self) -> str:
        """What the model sees, in one line; empty where that is the whole picture as it is."""
        (high, wide), crop = self.seen.shape[-2:], self.crop
        if (crop.width, crop.height) == (wide, high) == self.picture.size:
            return ""
        width, height = self.picture.size
        return (
            f"the picture is {width}x{height}; the model sees its {crop.width}x{crop.height} at "
            f"{crop.left},{crop.top}, as {wide}x{high}"
        )

    def paste(self, filled: Tensor, feather: int) -> Image:
        """The picture with its hole painted from `filled` (1, 3, height, width), at its own size.

        What the decoder makes of the known pixels differs from them a little; next to the hole's edge, over `feather`
        pixels inside it, that difference is taken off, less and less, so that no edge shows.
        """
        from PIL import Image

        part = self.crop.of(self.hole)
        made = resized(filled.cpu(), (self.crop.height, self.crop.width))
        gap = spread_known(self.crop.of(from_pil(self.picture)) - made, ~part)
        made = made + gap * nearness(~part, feather)
        painted = Image.fromarray(to_uint8(made)[0].permute(1, 2, 0).numpy(), "RGB")
        mode = "RGBA" if self.picture.has_transparency_data else "RGB"
        whole = self.picture.convert(mode)
        stencil = Image.fromarray(part[0, 0].numpy().astype("uint8") * 255, "L")
        whole.paste(painted.convert(mode), self.crop.box[:2], stencil)
        return whole


def _distortion(crop: Crop, size: Size) -> int:
    """How far a crop's ratio is from that of the size at which it is seen, in whole percent."""
    return round(100 * ratio_change((crop.width, crop.height), size))


def resized(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures at (height, width), as they are where that is their size."""
    if pictures.shape[-2:] == size:
        return pictures
    return F.interpolate(pictures, size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)


def spread_known(values: Tensor, known: Tensor) -> Tensor:
    """Values (1, C, H, W), those that are not known replaced by means of known ones around them, near ones first."""
    filled, missing, radius = torch.where(known, values, 0), ~known, 1
    if not bool(known.any()):
        return filled
    total, weight = filled, known.to(values.dtype)
    while bool(missing.any()):
        kernel = 2 * radius + 1
        sums, counts = (F.avg_pool2d(one, kernel, stride=1, padding=radius) for one in (total, weight))
        reached = missing & (counts > 0.5 / kernel**2)
        filled = torch.where(reached, sums / counts.clamp_min(1e-9), filled)
        missing, radius = missing & ~reached, 2 * radius
    return filled


def nearness(known: Tensor, feather: int) -> Tensor:
    """1 on known pixels, falling to 0 over `feather` pixels beyond them, (1, 1, H, W)."""
    reached = known.float()
    total = reached
    for _ in range(feather):
        reached = F.max_pool2d(reached, 3, stride=1, padding=1)
        total = total + reached
    return total / (feather + 1)
