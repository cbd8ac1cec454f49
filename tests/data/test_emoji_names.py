"""Which emoji enter the set, and how the sources are joined."""

from __future__ import annotations

import pytest
from tests.data.conftest import GROUPS, LABELS, icon_set

from starflow.data.emoji_names import Concept, code_of, code_of_text, read_concepts, read_drawings

EMOJI = {"".join(chr(int(part, 16)) for part in str(e["hexcode"]).split("-")): {"name": e["label"]} for e in LABELS}


def test_every_spelling_has_one_code() -> None:
    assert code_of("1F3CE-FE0F") == code_of("1f3ce") == code_of_text("\N{RACING CAR}\ufe0f") == "1f3ce"
    assert code_of("0023-fe0f-20e3") == code_of("23_20E3") == "0023-20e3"


def test_things_only() -> None:
    concepts = read_concepts(LABELS, GROUPS, EMOJI, "things")
    assert [concept.name for concept in concepts] == ["grapes", "red apple", "racing car", "car"]
    assert concepts[1] == Concept("1f34e", "red apple", ("fruit", "red"), "food-drink", "food-fruit")
    assert concepts[3].tags == ("vehicle",), "the name itself is no tag"


def test_all_adds_people_and_symbols_without_variants() -> None:
    names = {concept.name for concept in read_concepts(LABELS, GROUPS, EMOJI, "all")}
    assert names == {"grapes", "red apple", "racing car", "car", "waving hand", "right arrow"}


@pytest.mark.parametrize(
    ("hexcode", "kept"),
    [
        ("1F468", True),  # a man by himself is a concept
        ("1F468-200D-1F33E", False),
        ("1F469-200D-1F33E", False),
        ("1F9D1-200D-1F33E", True),  # the farmer of no stated gender
        ("1F3C3-200D-2642-FE0F", False),
        ("2764-FE0F-200D-1F525", True),  # a heart on fire
        ("1F44B-1F3FF", False),
        ("1F567", False),  # the last clock face
        ("1F568", True),
    ],
)
def test_variants_are_dropped(hexcode: str, kept: bool) -> None:
    label = {"hexcode": hexcode, "label": "x", "tags": [], "group": 4, "subgroup": 42}
    emoji = {"".join(chr(int(part, 16)) for part in hexcode.split("-")): {"name": "x"}}
    assert bool(read_concepts([label], GROUPS, emoji, "all")) == kept


def test_drawings_follow_aliases_and_mirrors() -> None:
    icons, chars = icon_set()
    drawings = read_drawings(icons, chars)
    assert set(drawings) == {"1f34e", "1f697", "1f3ce", "27a1"}, "a name without an icon has no drawing"
    assert 'viewBox="0 0 32 32"' in drawings["1f3ce"]
    assert "scale(-1 1)" in drawings["1f697"]
    assert "scale(-1 1)" not in drawings["1f3ce"]


def test_an_icon_may_have_its_own_frame() -> None:
    icons = {"width": 32, "height": 32, "icons": {"a": {"body": "<g/>", "left": 4, "top": 2, "width": 8, "height": 10}}}
    assert 'viewBox="4 2 8 10"' in read_drawings(icons, {"1f34e": "a"})["1f34e"]


def test_aliases_in_a_circle_have_no_drawing() -> None:
    icons = {"icons": {}, "aliases": {"a": {"parent": "b"}, "b": {"parent": "a"}}}
    assert read_drawings(icons, {"1f34e": "a"}) == {}
