"""Views: a function of seed, name and index alone; the caption says what the pixels show."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from starflow.config import from_dict, to_dict
from starflow.data.sets.glyphs.colours import BACKGROUNDS
from starflow.data.sources.base import ImageRecord, Split
from starflow.data.views import (
    TrainingViews,
    ViewConfig,
    _leave_interrupts_to_the_parent,
    _window_start,
    load_views,
    make_views,
    save_views,
)
from starflow.errors import UserError

MANY = ViewConfig(size=32, views=40, colour_backgrounds=0.5, hue=0.5)


def glyph(folder: Path, name: str, *, split: Split = "train", flip: str = "yes", arrow: bool = False) -> ImageRecord:
    """A red disc, or a red triangle that points right, with a margin, 64 px."""
    image = Image.new("RGBA", (64, 64))
    pen = ImageDraw.Draw(image)
    if arrow:
        pen.polygon([(8, 8), (56, 32), (8, 56)], fill=(220, 30, 40))
    else:
        pen.ellipse((8, 8, 55, 55), fill=(220, 30, 40))
    file = folder / f"{name}.png"
    image.save(file)
    meta = {"style": "flat", "group": "objects", "subgroup": "tool", "tags": "round,red,toy,game", "flip": flip}
    return ImageRecord(file, "red ball", "tool", split, f"flat/{name}", meta)


def draw(records: list[ImageRecord], config: ViewConfig = MANY, workers: int = 1) -> TrainingViews:
    views, skipped = make_views(records, config, progress=False, workers=workers)
    assert skipped == []
    return views


def test_plain_views(tmp_path: Path) -> None:
    views = draw([glyph(tmp_path, "a"), glyph(tmp_path, "b", split="heldout")])
    assert views.images.shape == (41, 3, 32, 32)
    assert views.images.dtype == torch.uint8
    assert views.captions[0] == "a red ball"
    assert views.captions[40] == "flat icon of a red ball", "a held-out picture is told apart by its style"
    assert views.splits == ["train"] * 40 + ["heldout"]
    assert views.names == ["flat/a"] * 40 + ["flat/b"]
    assert set(views.labels) == {"tool"}
    for plain in (views.images[0], views.images[40]):
        assert plain[:, 0, 0].tolist() == [255, 255, 255]
        assert plain[:, 16, 16].tolist() == [220, 30, 40]


def test_a_sampling_group_gets_its_own_number_of_views(tmp_path: Path) -> None:
    records = [glyph(tmp_path, name) for name in ("a", "b", "c")]
    records[0].meta["sampling_group"], records[1].meta["sampling_group"] = "emoji", "icons"
    views = draw(records, ViewConfig(size=16, views=2, group_views={"emoji": 5}))
    assert views.names == ["flat/a"] * 5 + ["flat/b"] * 2 + ["flat/c"] * 2
    with pytest.raises(UserError, match="names 'emojis', but the images are of emoji, icons"):
        draw(records, ViewConfig(size=16, group_views={"emojis": 5}))
    with pytest.raises(UserError, match="but the images are without groups"):
        draw(records[2:], ViewConfig(size=16, group_views={"emoji": 5}))
    with pytest.raises(UserError, match="group_views.emoji is 0, expected a whole number"):
        ViewConfig(group_views={"emoji": 0})


def test_views_depend_on_seed_name_and_index_alone(tmp_path: Path) -> None:
    a, b = glyph(tmp_path, "a"), glyph(tmp_path, "b")
    both, other = draw([a, b]), draw([b, a])
    assert both.captions == other.captions[40:] + other.captions[:40]
    assert torch.equal(both.images, torch.cat([other.images[40:], other.images[:40]]))
    fewer = draw([a], ViewConfig(size=32, views=10, colour_backgrounds=0.5, hue=0.5))
    assert torch.equal(fewer.images, both.images[:10])
    assert fewer.captions == both.captions[:10]
    assert both.captions[:40] != both.captions[40:], "the name enters"
    seeded = draw([a], ViewConfig(size=32, views=40, colour_backgrounds=0.5, hue=0.5, seed=1))
    assert seeded.captions != both.captions[:40], "the seed enters"


def test_workers_change_nothing(tmp_path: Path) -> None:
    records = [glyph(tmp_path, "a"), glyph(tmp_path, "b")]
    config = ViewConfig(size=16, views=3)
    alone, two = draw(records, config), draw(records, config, workers=2)
    assert torch.equal(alone.images, two.images)
    assert alone.captions == two.captions


def test_the_named_background_is_the_one_drawn(tmp_path: Path) -> None:
    views = draw([glyph(tmp_path, "a"), glyph(tmp_path, "b")])
    seen = set()
    for image, caption in zip(views.images, views.captions, strict=True):
        found = re.search(r" on an? (.+?) background", caption)
        colour = BACKGROUNDS[found[1]] if found else (255, 255, 255)
        assert tuple(image[:, 0, 0].tolist()) == colour
        assert "red ball on a red background" not in caption
        seen.add(found[1] if found else None)
    assert len(seen) > 5


def test_the_named_colour_is_the_one_seen(tmp_path: Path) -> None:
    strongest = {
        "red": [0],
        "green": [1],
        "blue": [2],
        "yellow": [0, 1],
        "orange": [0, 1],
        "purple": [2, 0],
        "pink": [0, 2],
    }
    views = draw([glyph(tmp_path, "a"), glyph(tmp_path, "b")])
    seen = set()
    for image, caption in zip(views.images, views.captions, strict=True):
        found = re.search(r"an? (\w+) ball", caption)
        assert found is not None, caption
        pixel = image[:, 16, 16].tolist()
        order = sorted(range(3), key=lambda channel: -pixel[channel])
        assert order[: len(strongest[found[1]])] == strongest[found[1]], (caption, pixel)
        seen.add(found[1])
        assert found[1] == "red" or "red" not in caption.split(", ")[1:], "a tag would contradict the name"
        assert not re.search(f"on an? [a-z ]*{found[1]} background", caption), "the ball would vanish"
    assert len(seen) >= 5


def test_nothing_leaves_the_frame(tmp_path: Path) -> None:
    record = glyph(tmp_path, "a")
    Image.new("RGBA", (64, 64), (220, 30, 40, 255)).save(record.file)
    config = ViewConfig(size=64, views=20, shift=0.25, hue=0.0, colour_backgrounds=0.0)
    for image in draw([record], config).images:
        covered = (image[1] < 140).float().sum().sqrt().item()
        assert covered > 0.84 * 64, "a full frame is only scaled"
        margins = (image[1] < 140).float()
        rows, columns = margins.amax(1).nonzero(), margins.amax(0).nonzero()
        assert abs(len(rows) - len(columns)) <= 1, "still the whole square"


def test_edges_have_no_dark_fringe(tmp_path: Path) -> None:
    record = glyph(tmp_path, "a")  # transparent black around the disc
    for image in draw([record], ViewConfig(size=24, views=12, hue=0.0, colour_backgrounds=0.0)).images:
        assert image[0].min() >= 215, "between red and white, red never falls"


def test_text_like_pictures_are_not_mirrored(tmp_path: Path) -> None:
    config = ViewConfig(size=32, views=24, hue=0.0, colour_backgrounds=0.0, shift=0.0)
    points_right = [
        [
            bool(image[1, :, :16].float().mean() < image[1, :, 16:].float().mean())
            for image in draw([record], config).images
        ]
        for record in (glyph(tmp_path, "a", arrow=True), glyph(tmp_path, "b", arrow=True, flip="no"))
    ]
    assert 4 < sum(points_right[0]) < 20
    assert all(points_right[1])


def test_styles_and_tags_take_their_shares(tmp_path: Path) -> None:
    views = draw([glyph(tmp_path, f"{i}") for i in range(5)])
    styled = np.mean([caption.startswith("flat icon of ") for caption in views.captions])
    tagged = np.mean([", " in caption for caption in views.captions])
    assert 0.4 < styled < 0.6
    assert 0.07 < tagged < 0.25


def test_photographs_keep_their_captions(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, 10:20] = (255, 0, 0)
    pixels[:, 20:30] = (0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    views = draw(
        [ImageRecord(tmp_path / "a.png", "half and half", None, "train", "a.png")], ViewConfig(size=20, views=12)
    )
    assert set(views.captions) == {"half and half"}
    assert views.images[0, :, 10, 2].tolist() == [255, 0, 0], "the central square, as it is"
    assert views.images[0, :, 10, 17].tolist() == [0, 0, 255]
    mirrored = [image[2, 10, 2].item() > 128 for image in views.images]
    assert 0 < sum(mirrored) < 12


def test_bad_pictures_are_skipped_by_name(tmp_path: Path) -> None:
    good, bad = glyph(tmp_path, "good"), glyph(tmp_path, "bad")
    missing = glyph(tmp_path, "missing")
    bad.file.write_bytes(bad.file.read_bytes()[:80])
    missing.file.unlink()
    views, skipped = make_views([bad, good, missing], ViewConfig(size=16, views=2), progress=False)
    assert [item.name for item in skipped] == ["flat/bad", "flat/missing"]
    assert "no such file" in skipped[1].reason
    assert views.names == ["flat/good"] * 2
    assert len(views) == len(views.images) == 2
    with pytest.raises(UserError, match="none of 1 pictures could be read, first reason: flat/bad"):
        make_views([bad], ViewConfig(), progress=False)


def test_a_picture_that_cannot_be_drawn_is_skipped_by_name(tmp_path: Path) -> None:
    good, odd = glyph(tmp_path, "a"), glyph(tmp_path, "b")
    del odd.meta["group"]
    views, skipped = make_views([odd, good], ViewConfig(size=16, views=2), progress=False)
    assert [(one.name, one.reason) for one in skipped] == [("flat/b", "'group'")]
    assert views.names == ["flat/a"] * 2


def test_saved_views_come_back(tmp_path: Path) -> None:
    views = draw([glyph(tmp_path, "a")], ViewConfig(size=16, views=4))
    save_views(tmp_path / "views.safetensors", views)
    loaded = load_views(tmp_path / "views.safetensors")
    assert torch.equal(loaded.images, views.images)
    assert (loaded.captions, loaded.labels) == (views.captions, views.labels)
    assert (loaded.names, loaded.splits) == (views.names, views.splits)


def test_views_that_do_not_belong_together(tmp_path: Path) -> None:
    path = tmp_path / "views.safetensors"
    save_views(path, draw([glyph(tmp_path, "a")], ViewConfig(size=16, views=4)))
    beside = path.with_suffix(".jsonl")
    beside.write_text(beside.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match=r"images of shape \(4, 3, 16, 16\).* 1 lines"):
        load_views(path)
    beside.unlink()
    with pytest.raises(UserError, match=r"cannot read .*views\.jsonl"):
        load_views(path)


@pytest.mark.parametrize(
    "values",
    [
        {"size": 0},
        {"views": 0},
        {"scale_min": 0.1},
        {"scale_min": 1.5},
        {"shift": 0.5},
        {"hue": 2.0},
        {"colour_backgrounds": -1.0},
    ],
)
def test_bad_settings(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(values))):
        from_dict(ViewConfig, values)


def test_config_round_trip() -> None:
    assert from_dict(ViewConfig, to_dict(MANY)) == MANY


@pytest.mark.parametrize(("group", "subgroup"), [("people-body", "hands"), ("objects", "game"), ("flags", "flag")])
def test_what_has_a_colour_of_its_own_is_not_tinted(tmp_path: Path, group: str, subgroup: str) -> None:
    record = glyph(tmp_path, "a")
    record.meta.update(group=group, subgroup=subgroup)
    views = draw([record], ViewConfig(size=32, views=20, hue=1.0, colour_backgrounds=0.0))
    assert all("a red ball" in caption for caption in views.captions)
    assert all(image[:, 16, 16].tolist() == [220, 30, 40] for image in views.images)


@given(
    window=st.floats(0.5, 2.0),
    shift=st.floats(-0.25, 0.25),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
)
@settings(max_examples=60, derandomize=True)
def test_a_window_covers_the_thing_and_moves_as_far_as_it_may(window: float, shift: float, ends: list[float]) -> None:
    low, high = ends
    start = _window_start(1.0, window, shift, low, high)
    if window < high - low:
        assert start == pytest.approx((1 - window) / 2), "it cannot cover it, so it stays in the middle"
        return
    assert start <= low + 1e-9
    assert start + window >= high - 1e-9
    asked = (1 - window) / 2 - shift
    if asked <= low and asked + window >= high:
        assert start == pytest.approx(asked)


def test_workers_leave_interrupts_to_the_parent() -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        _leave_interrupts_to_the_parent()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
