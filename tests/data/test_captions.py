from __future__ import annotations

import pytest

from starflow.data.captions import compose, recoloured, with_article


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
