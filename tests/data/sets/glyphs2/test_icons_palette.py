"""Recolouring: a mixture of the old colours becomes the same mixture of the new ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from starflow.data.sets.glyphs.colours import BACKGROUNDS, oklab
from starflow.data.sets.glyphs2.drawings import STYLES
from starflow.data.sets.glyphs2.icons import (
    ICON_COLOURS,
    LEAST_DISTANCE,
    icon_colour,
    parse_palette,
    recolour,
    recoloured,
)

PALETTES = sorted({",".join(style.palette) for style in STYLES.values() if style.palette})
COLOURS = st.sampled_from(sorted(ICON_COLOURS))


def pixel(colour: tuple[float, float, float]) -> np.ndarray:
    return np.array([[[*(round(level) for level in colour), 255]]], dtype=np.uint8)


@settings(deadline=None)
@given(st.sampled_from(PALETTES), COLOURS)
def test_the_main_colour_becomes_the_named_one(palette: str, colour: str) -> None:
    changed = recolour(pixel(parse_palette(palette)[0]), palette, colour)
    assert np.abs(changed[0, 0, :3].astype(int) - ICON_COLOURS[colour]).max() <= 2
    assert changed[0, 0, 3] == 255


@settings(deadline=None)
@given(st.sampled_from([p for p in PALETTES if "ffffff" in p]), COLOURS)
def test_white_and_black_stay(palette: str, colour: str) -> None:
    for kept in parse_palette(palette)[1:]:
        if sum(kept) in (0, 3 * 255):
            changed = recolour(pixel(kept), palette, colour)
            assert np.abs(changed[0, 0, :3].astype(int) - kept).max() <= 3


@settings(deadline=None)
@given(COLOURS, st.floats(0, 1))
def test_an_antialiased_edge_is_the_same_mixture(colour: str, share: float) -> None:
    palette = "2f88ff,000000,ffffff"
    first, black, _ = (np.array(one, dtype=float) for one in parse_palette(palette))
    changed = recolour(pixel(tuple(share * first + (1 - share) * black)), palette, colour)
    wanted = share * np.array(ICON_COLOURS[colour])
    assert np.abs(changed[0, 0, :3] - wanted).max() <= 4


@settings(deadline=None)
@given(st.lists(st.integers(0, 255), min_size=3, max_size=3), COLOURS)
def test_any_pixel_stays_within_the_new_colours(levels: list[int], colour: str) -> None:
    changed = recolour(pixel((levels[0], levels[1], levels[2])), "2f88ff,000000,ffffff", colour)
    assert changed.min() >= 0
    assert changed.shape == (1, 1, 4)


def test_a_silhouette_keeps_its_shape() -> None:
    image = Image.new("RGBA", (8, 8))
    image.paste((0, 0, 0, 255), (2, 2, 6, 6))
    changed = recoloured(image, "000000", "red")
    assert changed.getpixel((3, 3)) == (*ICON_COLOURS["red"], 255)
    np.testing.assert_array_equal(np.asarray(changed)[..., 3], np.asarray(image)[..., 3])


def test_the_second_colour_becomes_a_tint_or_a_shade() -> None:
    tint = recolour(pixel((0xD7, 0xE0, 0xFF)), "4147d5,d7e0ff", "red")[0, 0, :3].astype(int)
    assert tint[0] > tint[1] > 150, "a pale red"
    shade = recolour(pixel((0x28, 0x59, 0xC5)), "8fbffa,2859c5,ffffff", "red")[0, 0, :3].astype(int)
    assert ICON_COLOURS["red"][0] > shade[0] > 3 * shade[1], "a dark red"


@settings(deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(PALETTES), st.booleans())
def test_colours_are_told_apart_from_outline_and_ground(seed: int, palette: str, on_colour: bool) -> None:
    colour, grounds = icon_colour(np.random.default_rng(seed), palette, on_colour)
    assert (colour, grounds) == icon_colour(np.random.default_rng(seed), palette, on_colour)
    own = np.array(ICON_COLOURS.get(colour, (255, 255, 255)))
    assert on_colour or (grounds == [] and colour != "white")
    assert not on_colour or grounds
    others = [np.array(BACKGROUNDS[ground]) for ground in grounds]
    others += [np.zeros(3) for kept in parse_palette(palette)[1:] if sum(kept) == 0]
    for other in others:
        assert np.linalg.norm(oklab(own) - oklab(other)) > LEAST_DISTANCE


def test_an_outline_is_not_lost_on_black() -> None:
    for seed in range(200):
        _, grounds = icon_colour(np.random.default_rng(seed), "2f88ff,43ccf8,000000,ffffff", True)
        assert "black" not in grounds


@pytest.mark.parametrize("palette", PALETTES)
def test_palettes_are_colours(palette: str) -> None:
    for colour in parse_palette(palette):
        assert all(0 <= level <= 255 for level in colour)
