"""Masks are read as people have them, and wrong ones are told in a line."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from starflow.edit.masks import box_mask, drawn_mask, is_wide, latent_mask, parse_box, read_mask, touched_cells
from starflow.errors import UserError


def spot(mode: str, inside: object, outside: object, size: tuple[int, int] = (8, 6)) -> Image.Image:
    image = Image.new(mode, size, outside)  # type: ignore[arg-type]
    image.paste(inside, (2, 1, 5, 4))  # type: ignore[arg-type]
    return image


MASKS = [
    spot("L", 255, 0),
    spot("1", 1, 0),
    spot("RGB", (255, 255, 255), (0, 0, 0)),
    spot("RGBA", (255, 255, 255, 255), (0, 0, 0, 255)),
    spot("RGBA", (9, 9, 9, 0), (255, 255, 255, 255)),
    spot("LA", (0, 0), (255, 255)),
]


@pytest.mark.parametrize("mask", MASKS, ids=["grey", "bits", "colour", "opaque", "alpha", "grey and alpha"])
def test_white_or_alpha_0_is_repainted_and_said(mask: Image.Image) -> None:
    hole, said = read_mask(mask, (8, 6))
    expected = torch.zeros(1, 1, 6, 8, dtype=torch.bool)
    expected[..., 1:4, 2:5] = True
    assert torch.equal(hole, expected)
    assert ("transparent" if mask is MASKS[4] or mask is MASKS[5] else "white") in said
    inverted, told = read_mask(mask, (8, 6), invert=True)
    assert torch.equal(inverted, ~hole)
    assert "inverted" in told


def test_a_mask_of_another_size_is_scaled_and_that_is_said() -> None:
    hole, said = read_mask(MASKS[0], (16, 12))
    assert "scaled from 8x6 to 16x12" in said
    assert int(hole.sum()) == 4 * 9
    assert bool(hole[..., 2:8, 4:10].all())


def test_a_mask_that_repaints_nothing_is_refused_with_the_way_out() -> None:
    with pytest.raises(UserError, match=r"repaints nothing, expected white .*--invert-mask"):
        read_mask(Image.new("L", (8, 6)), (8, 6))
    full, _ = read_mask(Image.new("L", (8, 6)), (8, 6), invert=True)
    assert bool(full.all())


def test_boxes_are_rectangles_inside_the_picture() -> None:
    assert parse_box(" 2, 1,3,3") == (2, 1, 3, 3)
    assert torch.equal(box_mask((2, 1, 3, 3), (8, 6)), read_mask(MASKS[0], (8, 6))[0])
    assert int(box_mask((6, 4, 9, 9), (8, 6)).sum()) == 4
    for wrong in ("1,2,3", "a,b,c,d", "-1,0,2,2", ""):
        with pytest.raises(UserError, match="expected x,y,width,height"):
            parse_box(wrong)
    for outside in ((8, 0, 2, 2), (0, 0, 0, 3)):
        with pytest.raises(UserError, match="is empty in a picture of 8x6"):
            box_mask(outside, (8, 6))


@given(st.integers(0, 31), st.integers(0, 31))
def test_one_pixel_takes_its_cell_and_those_around(x: int, y: int) -> None:
    hole = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    hole[..., y, x] = True
    cells = latent_mask(hole, (8, 8))[0, 0]
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    assert torch.equal(cells, ((rows - y // 4).abs() <= 1) & ((columns - x // 4).abs() <= 1))


@given(st.integers(4, 20), st.integers(4, 20), st.integers(1, 8), st.integers(1, 8))
def test_inside_a_picture_a_hole_is_wide_where_a_cell_lies_whole_in_it(x: int, y: int, wide: int, high: int) -> None:
    """So that holes which `drawn_mask` dilates are wide, and others thin."""
    hole = box_mask((x, y, wide, high), (32, 32))
    whole = any(bool(cell.all()) for row in hole[0, 0].split(4) for cell in row.split(4, 1))
    assert is_wide(drawn_mask(hole, (8, 8))) == whole
    assert is_wide(drawn_mask(hole, (8, 8))) == bool((drawn_mask(hole, (8, 8)) != touched_cells(hole, (8, 8))).any())
