"""Heat maps: the scale's ends and middle, cells without smoothing, and what the file says of itself.

Sheets: every picture in its place, every caption below its picture and within its width.
"""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from starflow.errors import UserError
from starflow.evaluate.render import (
    CAPTION_LINES,
    GAP,
    _wrap,
    contact_sheet,
    heat_colours,
    heatmap,
    save_contact_sheet,
    save_heatmap,
)


def test_low_is_blue_and_high_is_red() -> None:
    made = heat_colours(torch.tensor([[0.0, 1.0, 2.0, 9.0, torch.nan]]), 0.0, 2.0)[:, 0].T
    low, middle, high, beyond, missing = made
    assert low[2] > low[0]
    assert high[0] > high[2]
    assert middle.min() > 0.9
    assert torch.equal(high, beyond)
    assert torch.equal(missing, torch.full((3,), -1.0))


def test_cells_keep_their_edges(tmp_path: Path) -> None:
    save_heatmap(tmp_path / "m.png", torch.tensor([[0.0, 1.0]]), (8, 4), 0.0, 1.0, "bits/dim")
    with Image.open(tmp_path / "m.png") as made:
        assert made.size == (8, 4)
        assert len(made.getcolors() or []) == 2
        assert made.getpixel((3, 0)) != made.getpixel((4, 0))
        assert made.text == {"low": "0 bits/dim", "high": "1 bits/dim"}  # type: ignore[attr-defined]


def test_equal_values_and_no_plane() -> None:
    assert heatmap(torch.ones(2, 2), (4, 4), 1.0, 1.0).size == (4, 4)
    with pytest.raises(UserError, match=r"\(3,\)"):
        heatmap(torch.ones(3), (4, 4), 0.0, 1.0)


COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]


def flat(heat_colours: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("RGB", size, heat_colours)


def test_pictures_stand_in_rows() -> None:
    page = contact_sheet([flat(heat_colours) for heat_colours in COLOURS], ["a", "b", "c"], columns=2, side=40)
    height = (page.height - GAP) // 2
    assert page.width == 2 * (40 + GAP) + GAP
    for index, expected in enumerate(COLOURS):
        left, top = GAP + index % 2 * (40 + GAP), GAP + index // 2 * height
        assert page.getpixel((left, top)) == page.getpixel((left + 39, top + 39)) == expected
    assert page.getpixel((page.width - GAP - 1, page.height - GAP - 20)) == (255, 255, 255)  # the fourth place is empty


def test_other_shapes_are_fitted_in_the_middle() -> None:
    page = contact_sheet([flat((200, 0, 0), (80, 20))], [""], columns=1, side=40)
    inside = numpy.all(numpy.asarray(page) == (200, 0, 0), axis=-1)
    rows, columns = numpy.nonzero(inside)
    assert (rows.min() - GAP, rows.max() - GAP) == (15, 24)
    assert (columns.min() - GAP, columns.max() - GAP) == (0, 39)


def test_small_pictures_are_enlarged_without_smoothing() -> None:
    picture = flat((0, 0, 0), (2, 1))
    picture.putpixel((1, 0), (255, 255, 255))
    page = contact_sheet([picture], [""], columns=1, side=40)
    row = numpy.asarray(page)[GAP + 20, GAP : GAP + 40, 0]
    assert row.tolist() == [0] * 20 + [255] * 20


def dark_columns(caption: str) -> int:
    page = contact_sheet([flat((255, 255, 255))], [caption], columns=1, side=60)
    return int((numpy.asarray(page).min(axis=(0, 2)) < 128).sum())


def test_captions_are_drawn_within_their_width() -> None:
    assert dark_columns("") == 0
    assert 0 < dark_columns("i") < dark_columns("an apple") <= 60
    page = contact_sheet(
        [flat((255, 255, 255))] * 2, ["a very long caption that goes on and on and on", ""], columns=2, side=60
    )
    assert numpy.asarray(page)[:, GAP + 60 :].min() == 255, "nothing is written under the second picture"


@pytest.mark.parametrize(
    ("caption", "lines", "cut"),
    [
        ("apple", 1, False),
        ("a red apple on a table", 2, False),
        ("a red apple on a table and a green tree behind it", 2, True),
        ("incomprehensibilities-incomprehensibilities", 1, True),
        ("", 0, False),
    ],
)
def test_wrapping(caption: str, lines: int, cut: bool) -> None:
    font = ImageFont.load_default(size=11)
    pen = ImageDraw.Draw(flat((0, 0, 0)))
    found = _wrap(caption, 90, pen, font)
    assert len(found) == lines <= CAPTION_LINES
    assert all(pen.textlength(line, font=font) <= 90 for line in found)
    assert bool(found and found[-1].endswith("…")) == cut
    if not cut:
        assert " ".join(found) == caption


def test_what_cannot_be_laid_out_is_refused() -> None:
    with pytest.raises(UserError, match="1 pictures with 2 captions"):
        contact_sheet([flat((0, 0, 0))], ["a", "b"], columns=1)
    with pytest.raises(UserError, match="0 pictures"):
        contact_sheet([], [], columns=1)


def test_saved_as_png(tmp_path: Path) -> None:
    save_contact_sheet(tmp_path / "sheet.png", [flat(COLOURS[0])], ["ünïcode – 日本"], columns=1, side=40)
    with Image.open(tmp_path / "sheet.png") as page:
        assert page.format == "PNG"
