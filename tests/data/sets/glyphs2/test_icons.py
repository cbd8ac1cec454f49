"""Icon sets: what is kept of each, in which style and colours, and why the rest is left out."""

from __future__ import annotations

import pytest

from starflow.data.sets.glyphs.packages import open_package
from starflow.data.sets.glyphs2.drawings import Drawing, Svg
from starflow.data.sets.glyphs2.icons import ICON_SETS, icon_drawings
from tests.data.sets.glyphs2.conftest import SQUARE, FakePackages


def found_in(fake: FakePackages, name: str) -> tuple[dict[str, Drawing], dict[str, str]]:
    found = list(icon_drawings(name, open_package(fake.icons[name], fake.folder, fake.folder)))
    drawings = {one.name.partition("/")[2]: one for one in found if isinstance(one, Drawing)}
    return drawings, {one[0]: one[1] for one in found if not isinstance(one, Drawing)}


def test_a_filled_icon_and_one_that_is_all_outline(fake: FakePackages) -> None:
    drawings, left_out = found_in(fake, "icon-park")
    shield, ring = drawings["shield-one"], drawings["ring-two"]
    assert (shield.caption, shield.extra) == ("shield", {"palette": "2f88ff,000000", "colour": "blue"})
    assert (ring.caption, ring.extra) == ("ring", {"palette": "000000", "colour": "black", "phrase": "line icon of"})
    assert left_out == {"add-file": "word 'add'", "google": "category Brand"}


def test_flat_variants_are_a_style_of_the_same_family(fake: FakePackages) -> None:
    drawings, _ = found_in(fake, "streamline-color")
    assert {one.style for one in drawings.values()} == {"streamline-color", "streamline-color-flat"}
    assert drawings["anvil"].concept == drawings["anvil-flat"].concept == "anvil"
    assert drawings["anvil"].extra == {"palette": "4147d5,d7e0ff", "colour": "blue"}
    assert drawings["anvil-flat"].extra == {"palette": "8fbffa,2859c5", "colour": "light blue"}


def test_an_icon_with_other_colours_keeps_them(fake: FakePackages) -> None:
    assert found_in(fake, "streamline-color")[0]["banjo"].extra == {}


def test_of_several_sizes_the_largest_is_kept(fake: FakePackages) -> None:
    drawings, left_out = found_in(fake, "fluent-color")
    assert list(drawings) == ["trophy-48"]
    assert drawings["trophy-48"].caption == "trophy"
    assert left_out == {"trophy-16": "a smaller size of the same", "arrow-square-24": "word 'arrow'"}


def test_a_silhouette_is_drawn_in_its_palettes_colour(fake: FakePackages) -> None:
    drawings, left_out = found_in(fake, "game-icons")
    art = drawings["dragon"].art
    assert isinstance(art, Svg)
    assert "currentColor" not in art.text
    assert 'fill="#000000"' in art.text
    assert drawings["dragon"].extra == {"palette": "000000", "colour": "black"}
    assert left_out == {"abstract-001": "the set's own pattern"}


@pytest.mark.parametrize("name", ["streamline-ultimate-color", "streamline-kameleon-color"])
def test_a_correction_may_rename_and_leave_out(fake: FakePackages, name: str) -> None:
    body = SQUARE.format("#d02020")
    fake.put_icons(name, {"fruit-banana": body, "gas-e": body, "nuclear-mushroom": body, "bomb-duo": body})
    drawings, left_out = found_in(fake, name)
    if name == "streamline-ultimate-color":
        assert drawings["fruit-banana"].caption == "banana", "the category goes"
        assert left_out["gas-e"] == "unclear or wrong name"
    else:
        assert drawings["nuclear-mushroom"].caption == "mushroom cloud"
        assert left_out["bomb-duo"] == "the set's own pattern", "only the coloured half is kept"


def test_every_rule_belongs_to_a_package(fake: FakePackages) -> None:
    from starflow.data.sets.glyphs2.illustrations import NAMED_STYLES
    from starflow.data.sets.glyphs2.packages import ICON_PACKAGES

    assert set(ICON_SETS) | set(NAMED_STYLES) == set(ICON_PACKAGES)
