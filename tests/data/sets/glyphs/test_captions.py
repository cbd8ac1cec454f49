"""Captions read as English; which emoji enter the set, and how the packages are joined."""

from __future__ import annotations

import pytest

from starflow.data.sets.glyphs.captions import (
    Concept,
    code_of,
    code_of_text,
    compose,
    read_concepts,
    read_drawings,
    recoloured,
    with_article,
)
from tests.data.conftest import GROUPS, LABELS, icon_set


@pytest.mark.parametrize(
    "expected",
    "a red apple|an orange|an umbrella|a unicorn|a ukulele|an hourglass|a one-piece swimsuit|a ewe|an x-ray|an e-mail|"
    "grapes|glasses|french fries|cherries|two hearts|musical notes|paw prints|"
    "a bus|a compass|an octopus|a dress|a wine glass|a chess pawn|a T-Rex|a woman's boot|woman's clothes|"
    "a grinning face with smiling eyes|a face with tears of joy|a card file box|a nest with eggs|"
    "a bouquet of roses|clinking beer mugs|crossed swords|linked paperclips|"
    "bread|cooked rice|a rice ball|a glass of milk|ice|ice hockey|an ice cream|fire|a fire engine|"
    "a heart on fire|the Milky Way|the Statue of Liberty|Mount Fuji|a 1st place medal|an 8 ball".split("|"),
)
def test_articles(expected: str) -> None:
    name = expected.split(" ", 1)[1] if expected.split()[0] in ("a", "an", "the") else expected
    assert with_article(name) == expected


@pytest.mark.parametrize(
    ("name", "colour", "expected"),
    [
        ("red apple", "green", "green apple"),
        ("car", "blue", "blue car"),
        ("orange book", "pink", "pink book"),
        ("mahjong red dragon", "green", "mahjong green dragon"),
        ("blueberries", "red", "red blueberries"),
    ],
)
def test_a_colour_word_is_replaced_or_goes_first(name: str, colour: str, expected: str) -> None:
    assert recoloured(name, colour) == expected


def test_composition() -> None:
    assert compose("red apple") == "a red apple"
    assert compose("red apple", style="3d") == "3D render of a red apple"
    assert compose("grapes", style="flat") == "flat icon of grapes"
    assert compose("egg", style="noto", colour="blue") == "Noto emoji of a blue egg"
    assert compose("blue book", colour="orange") == "an orange book"
    caption = compose("car", style="twemoji", colour="orange", background="orange", tags=("vehicle", "drive"))
    assert caption == "Twemoji of an orange car on an orange background, vehicle, drive"


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
