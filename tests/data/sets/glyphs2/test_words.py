"""Names: what is left out by them, what they become, what concept they join to."""

from __future__ import annotations

import json
from importlib import resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starflow.data.sets.glyphs.captions import COLOUR_WORDS
from starflow.data.sets.glyphs2.drawings import STYLES
from starflow.data.sets.glyphs2.words import (
    DROPPED,
    DROPPED_FROM_INTERFACES,
    concept_key,
    corrected,
    dropped_word,
    plain_name,
    words_of,
)

NOUNS = st.sampled_from("apple car dragon shield lamp cherry knife box glass bus sofa horse".split())
WORDS = st.lists(NOUNS, min_size=1, max_size=4, unique=True)


@settings(deadline=None)
@given(st.data(), WORDS)
def test_order_colours_and_articles_do_not_make_another_concept(data: st.DataObject, words: list[str]) -> None:
    shuffled = data.draw(st.permutations([*words, "red", "dark", "a"]))
    assert concept_key(" ".join(words)) == concept_key(" ".join(shuffled))


@settings(deadline=None)
@given(WORDS)
def test_a_concept_is_its_own_concept(words: list[str]) -> None:
    key = concept_key("-".join(words))
    assert concept_key(key) == key
    assert set(key.split()) == set(words)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("red apple", "green apples"),
        ("cherries", "cherry"),
        ("knives", "knife"),
        ("boxes", "box"),
        ("couch and lamp", "lamp with a sofa"),
        ("nurse's cap", "nurse cap"),
    ],
)
def test_the_same_thing_is_one_concept(one: str, other: str) -> None:
    assert concept_key(one) == concept_key(other)


@pytest.mark.parametrize("name", ["glass", "bus", "glasses", "scissors", "cactus"])
def test_a_singular_in_s_keeps_it(name: str) -> None:
    assert concept_key(name) == name


def test_a_name_of_nothing_but_colours_is_a_concept() -> None:
    assert concept_key("red") == "red"
    assert COLOUR_WORDS.isdisjoint({"apple"})


@pytest.mark.parametrize(
    "name", "gmail tinder play-station super-mario batman pokeball wall-e ford-focus steve-jobs star-wars-r2".split()
)
def test_brands_and_characters_are_left_out(name: str) -> None:
    assert dropped_word(name) is not None


@pytest.mark.parametrize("name", "letter-b digit-one aries arrow-left bitcoin euro-coin pie-chart suicide".split())
def test_text_signs_money_and_the_unwanted_are_left_out(name: str) -> None:
    assert dropped_word(name) is not None


def test_interface_words_matter_for_interface_sets_alone() -> None:
    for name in ("cut-lemon", "love-letter-box", "log-cabin", "download-cat"):
        assert (dropped_word(name, DROPPED_FROM_INTERFACES) is not None) >= (dropped_word(name, DROPPED) is not None)
    assert dropped_word("cut-lemon") is None
    assert dropped_word("cut-lemon", DROPPED_FROM_INTERFACES) == "cut"


@settings(deadline=None)
@given(WORDS, st.sampled_from(["", "-1", "-12", "-two", "-alt", "-alternate-3"]))
def test_a_variants_number_goes(words: list[str], ending: str) -> None:
    assert plain_name("-".join(words) + ending) == " ".join(words)


@settings(deadline=None)
@given(st.text(max_size=30))
def test_words_are_lower_case_letters_and_digits(text: str) -> None:
    for word in words_of(text):
        assert word
        assert set(word) <= set("abcdefghijklmnopqrstuvwxyz0123456789'")


def test_corrections_are_used_in_the_order_of_the_sources() -> None:
    assert corrected("fork knife", "icon-park", "streamline") == "fork and knife"
    assert corrected("apple", "streamline-color", "streamline") is None
    assert corrected("apple", "streamline") == "apple"
    assert corrected("smiley angry", "icons") == "angry smiley face"


def test_every_correction_corrects_and_belongs_to_a_source() -> None:
    text = resources.files("starflow.data.sets.glyphs2").joinpath("corrections.json").read_text(encoding="utf-8")
    sources: dict[str, dict[str, str | None]] = json.loads(text)
    known = {*STYLES, "icons", "streamline", "clip-art files", "furniture files"}
    assert set(sources) <= known
    for names in sources.values():
        for name, better in names.items():
            assert better is None or (better.strip() == better != name and better)
