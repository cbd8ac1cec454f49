"""Training views of the set's records: icons in named colours, models from named sides."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from starflow.data.sets.glyphs.colours import BACKGROUNDS
from starflow.data.sets.glyphs2.icons import ICON_COLOURS
from starflow.data.sources.base import ImageRecord
from starflow.data.views import View, ViewConfig, draw_views

CONFIG = ViewConfig(size=32, views=60, colour_backgrounds=0.5, hue=0.5)


def record(folder: Path, **meta: str) -> tuple[Image.Image, ImageRecord]:
    image = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(image).ellipse((8, 8, 55, 55), fill="#" + meta.get("palette", "c02020").split(",")[0])
    whole = {"style": "x", "group": "icons", "subgroup": "tool", "tags": "toy", "flip": "yes"} | meta
    return image, ImageRecord(folder / "a.png", "ball", "tool", "train", "x/a", whole)


def drawn(folder: Path, **meta: str) -> list[View]:
    return draw_views(*record(folder, **meta), CONFIG)


def test_an_icons_caption_names_the_colours_that_are_seen(tmp_path: Path) -> None:
    meta = {"phrase": "silhouette of", "palette": "000000", "colour": "black", "say_style": "always"}
    views = drawn(tmp_path, **meta)
    assert views[0][1] == "black silhouette of a ball"
    colours = set()
    for pixels, caption in views[1:]:
        found = re.fullmatch(r"(.+?) silhouette of a ball(?: on an? (.+?) background)?(?:, toy)?", caption)
        assert found, caption
        centre, corner = pixels[16, 16].astype(int), pixels[0, 0].astype(int)
        assert np.abs(centre - ICON_COLOURS.get(found[1], (255, 255, 255))).max() <= 2
        assert np.abs(corner - (BACKGROUNDS[found[2]] if found[2] else (255, 255, 255))).max() <= 2
        colours.add(found[1])
    assert len(colours) > 8


@pytest.mark.parametrize(("say_style", "share"), [("always", 1.0), ("sometimes", 0.5)])
def test_a_style_is_always_or_sometimes_said(tmp_path: Path, say_style: str, share: float) -> None:
    views = drawn(tmp_path, phrase="clip art of", say_style=say_style)
    said = [caption.startswith("clip art of a") for _, caption in views]
    assert said[0] == (say_style == "always")
    assert np.mean(said[1:]) == pytest.approx(share, abs=0.2)


def test_a_side_is_said_unless_it_is_usual(tmp_path: Path) -> None:
    views = drawn(tmp_path, phrase="3D model of", view="from the left")
    assert all(", from the left" in caption for _, caption in views)
    usual = drawn(tmp_path, phrase="3D model of", view="from above", say_view="sometimes")
    said = [", from above" in caption for _, caption in usual]
    assert said[0], "the plain view says it"
    assert 0.25 < np.mean(said[1:]) < 0.75


def test_a_record_of_the_set_glyphs_is_drawn_as_before(tmp_path: Path) -> None:
    image, old = record(tmp_path, style="noto", group="objects")
    captions = [caption for _, caption in draw_views(image, old, CONFIG)]
    assert captions[0] == "a ball"
    assert any(caption.startswith("Noto emoji of a") for caption in captions)
