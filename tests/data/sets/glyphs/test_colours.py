"""Colour names agree with what is seen, on synthetic pictures whose colours are known."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from starflow.data.sets.glyphs.colours import (
    BACKGROUNDS,
    HUES,
    Pixels,
    colour_name,
    fitting_backgrounds,
    main_hue,
    oklab,
    turn_hue,
)


def disc(colour: tuple[int, int, int], half: tuple[int, int, int] | None = None) -> Pixels:
    """A disc on transparent ground; its lower quarter in another colour."""
    y, x = np.mgrid[:64, :64]
    pixels = np.zeros((64, 64, 4), dtype=np.uint8)
    inside = (x - 32) ** 2 + (y - 32) ** 2 < 24**2
    pixels[inside] = (*colour, 255)
    if half is not None:
        pixels[inside & (y > 44)] = (*half, 255)
    return pixels


def test_oklab_of_known_colours() -> None:
    # The published values of white, black and sRGB red (Ottosson 2020).
    np.testing.assert_allclose(oklab(np.array([255, 255, 255])), [1, 0, 0], atol=1e-3)
    np.testing.assert_allclose(oklab(np.array([0, 0, 0])), [0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(oklab(np.array([255, 0, 0])), [0.628, 0.225, 0.126], atol=1e-3)


@pytest.mark.parametrize("name", sorted(set(BACKGROUNDS) - {"light blue", "gray", "black"}))
def test_named_backgrounds_are_what_they_are_called(name: str) -> None:
    pixels = disc(BACKGROUNDS[name])
    hue = main_hue(pixels)
    assert hue is not None
    assert colour_name(pixels, hue) == name


@pytest.mark.parametrize("source", [(220, 30, 40), (30, 90, 220), (40, 200, 60)])
@pytest.mark.parametrize("name", ["red", "yellow", "green", "blue", "purple", "pink"])
def test_a_turned_hue_bears_its_name(source: tuple[int, int, int], name: str) -> None:
    picture = Image.fromarray(disc(source))
    hue = main_hue(np.asarray(picture))
    assert hue is not None
    turned = turn_hue(picture, hue, HUES[name])
    assert colour_name(np.asarray(turned), HUES[name]) == name
    assert turned.getchannel("A").tobytes() == picture.getchannel("A").tobytes()


def test_only_the_main_part_turns() -> None:
    picture = Image.fromarray(disc((220, 30, 40), half=(40, 200, 60)))
    hue = main_hue(np.asarray(picture))
    assert hue is not None
    turned = np.asarray(turn_hue(picture, hue, HUES["blue"]))
    np.testing.assert_array_equal(turned[50, 32], (40, 200, 60, 255))
    assert turned[20, 32, 2] > turned[20, 32, 0]


def test_pictures_without_one_hue() -> None:
    assert main_hue(disc((128, 128, 128))) is None
    assert main_hue(np.zeros((8, 8, 4), dtype=np.uint8)) is None
    wheel = np.zeros((64, 64, 4), dtype=np.uint8)
    hues = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
    full = np.full_like(hues, 255)
    wheel[..., :3] = np.asarray(
        Image.frombytes("HSV", (64, 64), np.dstack([hues, full, full]).tobytes()).convert("RGB")
    )
    wheel[..., 3] = 255
    assert main_hue(wheel) is None


def test_dull_colours_bear_no_bright_name() -> None:
    assert colour_name(disc((150, 120, 50)), 42) is None, "khaki is not yellow"
    assert colour_name(disc((130, 80, 40)), 27) == "brown"
    assert colour_name(disc((245, 140, 40)), 29) == "orange"


def test_backgrounds_stand_out() -> None:
    fitting = fitting_backgrounds(disc(BACKGROUNDS["blue"]))
    assert "blue" not in fitting
    assert {"yellow", "red", "black"} <= set(fitting)
    assert "black" not in fitting_backgrounds(disc((20, 20, 20)))


def test_no_background_behind_a_full_frame_or_nothing() -> None:
    assert fitting_backgrounds(np.full((64, 64, 4), 255, dtype=np.uint8)) == []
    assert fitting_backgrounds(np.zeros((64, 64, 4), dtype=np.uint8)) == []
