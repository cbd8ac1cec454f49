"""Drawing: SVG and pixels to one kind of PNG; near duplicates."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from starflow.data.sets.glyphs2.drawings import (
    MARGIN,
    STYLES,
    BadPicture,
    DrawnFile,
    Raster,
    Svg,
    draw,
    is_grey,
    is_whole,
    near_duplicates,
    thumbnail,
)

BAR = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100"><path fill="#00f" d="M{} {}h{}v{}h-{}z"/></svg>'


def opened(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))


def box_of(png: bytes) -> tuple[int, int, int, int]:
    found = opened(png).getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox()
    assert found is not None
    return found


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(10, 40), st.integers(10, 40))
def test_a_cropped_drawing_fills_the_square_up_to_its_margin(x: int, y: int, width: int, height: int) -> None:
    png = draw(Svg(BAR.format(x, y, width, height, width), crop=True), 64)
    assert opened(png).size == (64, 64)
    left, top, right, bottom = box_of(png)
    room = 64 * (1 - 2 * MARGIN)
    assert max(right - left, bottom - top) == pytest.approx(room, abs=2)
    assert abs(left - (64 - right)) <= 2, "in the middle"
    assert abs(top - (64 - bottom)) <= 2
    assert (right - left) / (bottom - top) == pytest.approx(width / height, rel=0.15)


def test_a_drawing_that_is_not_cropped_keeps_its_place() -> None:
    assert box_of(draw(Svg(BAR.format(0, 0, 50, 50, 50)), 64)) == (0, 0, 32, 32)


def test_pixels_of_any_size_become_a_square() -> None:
    picture = Image.new("RGBA", (30, 10), "red")
    data = io.BytesIO()
    picture.save(data, format="PNG")
    png = draw(Raster(data.getvalue()), 60)
    assert box_of(png) == (0, 20, 60, 40)


@pytest.mark.parametrize(
    ("art", "reason"),
    [
        (Svg("<svg"), "."),
        (Svg('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"/>'), "nothing is visible"),
        (Raster(b"no picture"), "cannot identify"),
        (DrawnFile(), "its file is gone"),
    ],
)
def test_what_cannot_be_drawn_says_why(art: Svg | Raster | DrawnFile, reason: str) -> None:
    with pytest.raises(BadPicture, match=reason):
        draw(art, 32)


def test_whole_is_a_png_of_that_size(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    assert not is_whole(path, 32)
    path.write_bytes(draw(Svg(BAR.format(0, 0, 50, 50, 50)), 32))
    assert is_whole(path, 32)
    assert not is_whole(path, 64)
    path.write_bytes(b"no PNG")
    assert not is_whole(path, 32)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12))
def test_near_duplicates_are_found_and_no_others(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, size=(count, 768), dtype=np.uint8)
    copies = np.clip(pictures.astype(int) + rng.integers(-3, 4, size=pictures.shape), 0, 255).astype(np.uint8)
    found = near_duplicates(np.concatenate([pictures, copies]))
    assert found == {count + number: number for number in range(count)}


def test_a_third_copy_is_a_copy_of_the_first() -> None:
    assert near_duplicates(np.zeros((3, 768), dtype=np.uint8)) == {1: 0, 2: 0}


def test_grey_is_told_from_colour() -> None:
    assert is_grey(thumbnail(draw(Svg(BAR.format(10, 10, 50, 50, 50).replace("#00f", "#777")), 32)))
    assert not is_grey(thumbnail(draw(Svg(BAR.format(10, 10, 50, 50, 50)), 32)))


def test_fluents_two_styles_are_one_family_and_icons_have_palettes() -> None:
    assert STYLES["3d"].family == STYLES["flat"].family
    assert STYLES["model"].family == STYLES["furniture"].family
    for name, style in STYLES.items():
        assert style.phrase.endswith(" of"), name
        assert bool(style.palette) == (style.group == "icons"), name
