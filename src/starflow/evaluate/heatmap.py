"""A picture of numbers: blue is low, white the middle, red high."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from starflow.data.pictures import save_png, to_pil
from starflow.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

# Positions and colours in [-1, 1]: a blue, white, red scale that stays readable in grey.
STOPS = (0.0, 0.5, 1.0)
COLOURS = ((-0.74, -0.42, 0.24), (0.96, 0.96, 0.96), (0.4, -0.8, -0.66))


def colour(values: Tensor, low: float, high: float) -> Tensor:
    """(h, w) to a picture (3, h, w) in [-1, 1]; values outside low .. high take the end's colour, NaN is black."""
    place = ((values.double() - low) / (high - low if high > low else 1.0)).clamp(0, 1)
    points = torch.tensor(COLOURS, dtype=torch.float64)
    upper = place > STOPS[1]
    share = torch.where(upper, (place - STOPS[1]) / STOPS[1], place / STOPS[1])[..., None]
    found = torch.where(
        upper[..., None], points[1] + share * (points[2] - points[1]), points[0] + share * (points[1] - points[0])
    )
    return found.nan_to_num(-1.0).permute(2, 0, 1).float()


def heatmap(values: Tensor, size: tuple[int, int], low: float, high: float) -> Image:
    """(h, w) numbers as an RGB picture of `size` (width, height), cells without smoothing.

    Raises:
        UserError: not a plane of numbers.
    """
    from PIL.Image import Resampling

    if values.ndim != 2 or not values.numel():
        raise UserError(f"a heat map needs values (h, w), got shape {tuple(values.shape)}")
    return to_pil(colour(values, low, high)[None])[0].resize(size, Resampling.NEAREST)


def save_heatmap(path: Path, values: Tensor, size: tuple[int, int], low: float, high: float, unit: str) -> None:
    """Write `heatmap` as a PNG whose text says what the ends of its scale are."""
    text = {"low": f"{low:.6g} {unit}", "high": f"{high:.6g} {unit}"}
    save_png(heatmap(values, size, low, high), path, text)
