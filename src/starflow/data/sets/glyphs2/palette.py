"""Icons drawn in a few known colours: how much of each colour a pixel holds, and the same icon in other colours.

A pixel of such a picture is a mixture of the icon's colours (its edges are antialiased). The shares are found by
least squares and clipped to a mixture; then the colours are exchanged. No other colour comes in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from starflow.data.sets.glyphs.colours import BACKGROUNDS, Pixels, oklab

if TYPE_CHECKING:
    from PIL import Image

Floats = NDArray[np.float64]

WHITE = (255, 255, 255)
ICON_COLOURS: dict[str, tuple[int, int, int]] = BACKGROUNDS | {"dark blue": (20, 50, 120), "dark green": (20, 95, 50)}
LEAST_DISTANCE = 0.25


def parse_palette(text: str) -> list[tuple[int, int, int]]:
    """The colours of a palette such as "2f88ff,ffffff".

    >>> parse_palette("2f88ff,ffffff")
    [(47, 136, 255), (255, 255, 255)]
    """
    return [(int(hexa[0:2], 16), int(hexa[2:4], 16), int(hexa[4:6], 16)) for hexa in text.split(",")]


def recolour(rgba: Pixels, palette: str, colour: str) -> Pixels:
    """The icon with its main colour, the palette's first, changed to a named one.

    The second colour, if it is a tint or a shade of the first (no white and no black), becomes the same tint or
    shade of the new one. All other colours stay.

    Args:
        rgba: (H, W, 4).
        palette: the colours the icon is drawn in, "2f88ff,43ccf8,000000,ffffff".
        colour: key of `ICON_COLOURS`, or "white".
    """
    old = np.array(parse_palette(palette), dtype=np.float64)
    new = old.copy()
    new[0] = _colour(colour)
    if len(old) > 1 and 0 < old[1].sum() < 3 * 255:
        new[1] = _tint_or_shade(old[0], old[1], new[0])
    shares = _shares(rgba[..., :3].reshape(-1, 3).astype(np.float64), old)
    changed = rgba.copy()
    changed[..., :3] = np.rint(shares @ new).clip(0, 255).astype(np.uint8).reshape(*rgba.shape[:2], 3)
    return changed


def recoloured(image: Image.Image, palette: str, colour: str) -> Image.Image:
    """The same of a picture: `recolour`."""
    from PIL import Image

    return Image.fromarray(recolour(np.asarray(image.convert("RGBA")), palette, colour))


def icon_colour(rng: np.random.Generator, palette: str, on_colour: bool) -> tuple[str, list[str]]:
    """A colour for an icon, and the names of the backgrounds it stands out from; none if it stays on white.

    The colour is told apart from the icon's other colours, such as a black outline, which no background hides.
    """
    kept = [np.array(colour) for colour in parse_palette(palette)[1:] if sum(colour) == 0]
    names = [*ICON_COLOURS, "white"] if on_colour else list(ICON_COLOURS)
    colour = str(rng.choice([name for name in names if _far(_colour(name), kept)]))
    if not on_colour:
        return colour, []
    shown = [_colour(colour), *kept]
    return colour, [name for name, ground in BACKGROUNDS.items() if _far(np.array(ground), shown)]


def _colour(name: str) -> Floats:
    return np.array(ICON_COLOURS.get(name, WHITE), dtype=np.float64)


def _far(colour: Floats, others: list[Floats]) -> bool:
    """Whether the eye tells a colour from the others."""
    return all(float(np.linalg.norm(oklab(colour) - oklab(other))) > LEAST_DISTANCE for other in others)


def _shares(pixels: Floats, colours: Floats) -> Floats:
    """(N, 3) pixels as mixtures of (K, 3) colours: (N, K), not negative, each row's sum 1."""
    if len(colours) == 1:
        return np.ones((len(pixels), 1))
    # The row of ones, weighed heavily, asks for the sum 1.
    heavy = 1e3
    system = np.vstack([colours.T, np.full(len(colours), heavy)])
    wanted = np.hstack([pixels, np.full((len(pixels), 1), heavy)])
    shares = np.clip(wanted @ np.linalg.pinv(system).T, 0, None)
    normed: Floats = shares / np.maximum(shares.sum(-1, keepdims=True), 1e-9)
    return normed


def _tint_or_shade(first: Floats, second: Floats, new: Floats) -> Floats:
    """To `new` what `second` is to `first`: as much lighter or darker."""
    weights = np.array([0.2126, 0.7152, 0.0722])
    light, other = float(first @ weights) / 255, float(second @ weights) / 255
    if other > light:
        share = (other - light) / max(1 - light, 1e-6)
        tint: Floats = new + (255 - new) * share
        return tint
    shade: Floats = new * (other / max(light, 1e-6))
    return shade
