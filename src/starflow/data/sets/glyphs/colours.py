"""Colours by name: flat backgrounds, what colour an image is, and turning its hue. Pixels are uint8 RGB(A)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

Pixels = NDArray[np.uint8]

Floats = NDArray[np.float64]

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "orange": (245, 140, 40),
    "yellow": (250, 215, 70),
    "green": (70, 165, 80),
    "light blue": (150, 205, 245),
    "blue": (45, 100, 215),
    "purple": (125, 70, 180),
    "pink": (250, 160, 195),
    "brown": (130, 85, 50),
    "gray": (150, 150, 150),
    "black": (15, 15, 15),
}

# Hue each named colour is turned to, degrees.
HUES = {"red": 2.0, "orange": 28.0, "yellow": 52.0, "green": 125.0, "blue": 218.0, "purple": 275.0, "pink": 328.0}

# Upper end of each name's hues, degrees.
_HUE_ENDS = (
    (14.0, "red"),
    (41.0, "orange"),
    (68.0, "yellow"),
    (168.0, "green"),
    (196.0, ""),
    (250.0, "blue"),
    (298.0, "purple"),
    (343.0, "pink"),
    (360.1, "red"),
)

# What a hue needs to bear its name, (saturation, value); duller red is skin or brick, duller yellow is
# khaki, duller pink is plum.
_LEAST = {"red": (0.55, 0.5), "orange": (0.6, 0.8), "yellow": (0.4, 0.75), "pink": (0.3, 0.6)}

_BROWN_BELOW = 0.72

_NAMES = ("", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")

HUE_REACH = 38.0
"""Degrees from a hue within which pixels belong to its part."""

HUE_MARGIN = 20.0
"""Degrees beyond the reach in which little may lie, or turning the part would tear a gradient."""

PART_SHARE = 0.3
"""Least share of the image that a main part takes."""

PART_OF_CHROMATIC = 0.45
"""Least share of the chromatic pixels that a main part takes."""

TORN_SHARE = 0.06
"""Largest share of the part that may lie in the margin."""

NAMED_SHARE = 0.75
"""Least share of a part's pixels that bear one name, for the part to bear it."""

MIN_BACKGROUND_DISTANCE = 0.16
"""Distance in OKLab below which an outline's pixel blends into a background."""

MAX_BLENDING_SHARE = 0.15
"""Largest share of the outline that may blend into a background."""


def oklab(rgb: NDArray[np.generic]) -> Floats:
    """Convert (..., 3) sRGB in 0..255 to (..., 3) OKLab, whose distances are roughly what the eye sees (Ottosson 2020).

    >>> oklab(np.array([255, 255, 255])).round(3)[0]  # lightness of white
    np.float64(1.0)
    """
    s = np.asarray(rgb, dtype=np.float64) / 255
    linear = np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)
    to_lms = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    lab: Floats = np.cbrt(linear @ to_lms.T) @ to_lab.T
    return lab


def fitting_backgrounds(rgba: Pixels) -> list[str]:
    """Names of the backgrounds that the image's own outline stands out from.

    Args:
        rgba: (H, W, 4).

    Returns:
        Empty if the image covers its whole frame, so that a background would not be seen.
    """
    opaque = rgba[..., 3] > 127
    if opaque.mean() > 0.85 or not opaque.any():
        return []
    padded = np.pad(opaque, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    outline = oklab(rgba[opaque & ~inside][:, :3])
    fitting = []
    for name, colour in BACKGROUNDS.items():
        near = np.linalg.norm(outline - oklab(np.array(colour)), axis=-1) < MIN_BACKGROUND_DISTANCE
        if near.mean() <= MAX_BLENDING_SHARE:
            fitting.append(name)
    return fitting


def main_hue(rgba: Pixels) -> float | None:
    """Find the hue, degrees, of an image's main part, or None if no part stands out by its hue.

    The part is what lies within `HUE_REACH` of the strongest hue: the body of a car without its windows, a
    rose without its leaves. It must be a good share of the image, and little may lie just beyond
    its reach, or turning the part alone would tear a gradient.

    Args:
        rgba: (H, W, 4).
    """
    hue, saturation, value, weight = _hsv(rgba)
    chromatic = weight * _is_chromatic(saturation, value)
    if chromatic.sum() == 0:
        return None
    strength = chromatic * saturation * value
    counts = np.bincount((hue // 6).astype(int).ravel(), weights=strength.ravel(), minlength=60)
    smooth = sum(np.roll(counts, shift) for shift in range(-3, 4))  # windows of 42 degrees
    peak = 6.0 * int(np.argmax(smooth)) + 3
    part = strength * (_distance(hue, peak) < HUE_REACH)
    mean = float(np.rad2deg(np.angle(np.sum(part * np.exp(1j * np.deg2rad(hue)))))) % 360
    distance = _distance(hue, mean)
    inside = chromatic[distance < HUE_REACH].sum()
    beyond = chromatic[(distance >= HUE_REACH) & (distance < HUE_REACH + HUE_MARGIN)].sum()
    large = inside >= PART_SHARE * weight.sum() and inside >= PART_OF_CHROMATIC * chromatic.sum()
    return mean if large and beyond <= TORN_SHARE * inside else None


def colour_name(rgba: Pixels, near: float) -> str | None:
    """Name the colour (`red` ... `brown`) of most chromatic pixels around a hue; None if they are mixed.

    >>> colour_name(np.full((4, 4, 4), (220, 30, 40, 255), dtype=np.uint8), near=HUES["red"])
    'red'

    Args:
        rgba: (H, W, 4).
        near: hue, degrees; only pixels within `HUE_REACH` of it count.
    """
    hue, saturation, value, weight = _hsv(rgba)
    weight = weight * (_is_chromatic(saturation, value) & (_distance(hue, near) < HUE_REACH))
    if weight.sum() == 0:
        return None
    names = _name_pixels(hue, saturation, value)
    shares = np.bincount(names.ravel(), weights=weight.ravel(), minlength=len(_NAMES)) / weight.sum()
    best = int(shares.argmax())
    return _NAMES[best] if best > 0 and shares[best] >= NAMED_SHARE else None


def turn_hue(image: Image.Image, source: float, target: float) -> Image.Image:
    """Turn the hues around `source` of an RGBA image by `target` - `source` degrees; all else stays."""
    from PIL import Image

    rgba = np.array(image)
    hsv = np.array(image.convert("RGB").convert("HSV"))
    around = _distance(hsv[..., 0] * (360 / 256), source) < HUE_REACH + HUE_MARGIN / 2
    steps = round((target - source) * 256 / 360)
    hsv[..., 0] = (hsv[..., 0].astype(int) + steps) % 256
    turned = np.asarray(Image.frombytes("HSV", image.size, hsv.tobytes()).convert("RGB"))
    rgba[..., :3] = np.where(around[..., None], turned, rgba[..., :3])
    return Image.fromarray(rgba)


def _is_chromatic(saturation: Floats, value: Floats) -> NDArray[np.bool_]:
    return (saturation > 0.3) & (value > 0.25)


def _distance(hue: Floats, other: float) -> Floats:
    """Degrees between hues, around the circle."""
    around: Floats = np.abs((hue - other + 180) % 360 - 180)
    return around


def _name_pixels(hue: Floats, saturation: Floats, value: Floats) -> NDArray[np.int64]:
    """Index into `_NAMES` of every pixel; 0 where no name fits well."""
    ends = np.array([end for end, _ in _HUE_ENDS])
    by_hue = np.array([_NAMES.index(name) for _, name in _HUE_ENDS])
    index = by_hue[np.searchsorted(ends, hue, side="right")]
    brown = (index == _NAMES.index("orange")) & (value < _BROWN_BELOW)
    for name, (least_saturation, least_value) in _LEAST.items():
        dull = (saturation < least_saturation) | (value < least_value)
        index = np.where((index == _NAMES.index(name)) & dull, 0, index)
    return np.where(brown, _NAMES.index("brown"), index)


def _hsv(rgba: Pixels) -> tuple[Floats, Floats, Floats, Floats]:
    """Hue in degrees, saturation and value in 0..1, and alpha in 0..1 as the weight; each (H, W)."""
    rgb = rgba[..., :3].astype(np.float64) / 255
    value, low = rgb.max(-1), rgb.min(-1)
    chroma = value - low
    safe = np.where(chroma == 0, 1, chroma)
    r, g, b = np.moveaxis(rgb, -1, 0)
    sector = np.where(value == r, ((g - b) / safe) % 6, np.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))
    hue = np.where(chroma == 0, 0.0, 60 * sector) % 360
    return hue, chroma / np.where(value == 0, 1, value), value, rgba[..., 3].astype(np.float64) / 255
