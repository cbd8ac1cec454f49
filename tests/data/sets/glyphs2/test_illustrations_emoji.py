"""Emoji: people's captions and roles, and the names that four styles give their drawings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starflow.data.sets.glyphs.captions import Concept, read_concepts
from starflow.data.sets.glyphs.packages import Tarball, open_package
from starflow.data.sets.glyphs2.drawings import Drawing
from starflow.data.sets.glyphs2.illustrations import Names, named_drawings, people_caption, people_role, read_people
from tests.data.conftest import LABELS, tarball
from tests.data.sets.glyphs2.conftest import PEOPLE, FakePackages

ROLES = st.sampled_from(["farmer", "astronaut", "walking", "in tuxedo", "wearing turban"])
SEXES = st.sampled_from(["man", "woman", "person"])
TONES = st.sampled_from(["light", "medium-light", "medium", "medium-dark", "dark"])


@settings(deadline=None)
@given(SEXES, ROLES, TONES)
def test_a_role_is_the_same_for_all_sexes_and_tones(sex: str, role: str, tone: str) -> None:
    caption = people_caption(f"{sex} {role}: {tone} skin tone")
    assert caption == f"{sex} {role} with {tone} skin tone"
    assert people_role(caption) == people_role(people_caption(f"man {role}")) == role


@settings(deadline=None)
@given(TONES, TONES)
def test_two_tones_are_both_said_and_one_once(first: str, second: str) -> None:
    caption = people_caption(f"handshake: {first} skin tone, {second} skin tone")
    both = f"{first} skin tone" if first == second else f"{first} skin tone and {second} skin tone"
    assert caption == f"handshake with {both}"
    assert people_role(caption) == "handshake"


@pytest.mark.parametrize(
    ("label", "caption", "role"),
    [
        ("man: dark skin tone, beard", "man with dark skin tone and a beard", "person"),
        ("woman: bald", "bald woman", "person"),
        ("person: blond hair", "person with blond hair", "person"),
        ("family: woman, girl, boy", "family of a woman, a girl and a boy", "family"),
        ("kiss: person, person, light skin tone, dark skin tone", None, "kiss"),
        ("woman’s hat", "woman's hat", "woman's hat"),
        ("person in bed", "person in bed", "in bed"),
    ],
)
def test_labels_as_unicode_writes_them(label: str, caption: str | None, role: str) -> None:
    found = people_caption(label)
    assert caption is None or found == caption
    assert people_role(found) == role


def names_of(fake: FakePackages) -> tuple[Names, list[Concept]]:
    opened = {p: open_package(p, fake.folder, fake.folder) for p in (fake.sources.labels, fake.sources.names)}
    labels, named = opened[fake.sources.labels], opened[fake.sources.names].json("data-by-emoji.json")
    things = read_concepts(labels.json("en/data.json"), labels.json("meta/groups.json"), named, "things")
    return Names(labels, named), things


def test_names_are_found_by_letters_with_or_without_a_face_and_a_number(fake: FakePackages) -> None:
    names, _ = names_of(fake)
    assert names.code("redapple") == names.code("red-apple-2") == names.code("Red Apple face") == "1f34e"
    assert names.code("no such thing") is None


def test_named_drawings_say_what_they_leave_out(fake: FakePackages) -> None:
    names, things = names_of(fake)
    package = open_package(fake.icons["noto-v1"], fake.folder, fake.folder)
    found = list(named_drawings(things, names, "noto-v1", package))
    drawings = [one for one in found if isinstance(one, Drawing)]
    assert [(d.name, d.caption, d.concept, d.kind) for d in drawings] == [
        ("noto-v1/red-apple", "red apple", "apple", "food-fruit")
    ]
    assert [one for one in found if not isinstance(one, Drawing)] == [
        ("letter-a", "no emoji of that name"),
        ("man-farmer", "people, flag, symbol or variant"),
    ]


def test_a_corrected_name_is_looked_up_or_left_out(fake: FakePackages) -> None:
    names, things = names_of(fake)
    package = open_package(fake.icons["fxemoji"], fake.folder, fake.folder)
    found = list(named_drawings(things, names, "fxemoji", package))
    assert ("pout", "unclear or wrong name") in found, "corrections.json leaves it out"
    assert [one.caption for one in found if isinstance(one, Drawing)] == ["car"]


def test_people_come_in_all_tones() -> None:
    data = tarball(
        {"en/data.json": [*LABELS, *PEOPLE], "meta/groups.json": {"groups": {"1": "people-body"}} | SUBGROUPS}
    )
    with pytest.raises(KeyError):
        read_people(Tarball(tarball({"en/data.json": PEOPLE, "meta/groups.json": {"groups": {}}}), "x.tgz"), {})
    people = read_people(Tarball(data, "x.tgz"), {})
    assert {one.name for one in people} == {
        "waving hand",
        "waving hand with light skin tone",
        "man farmer",
        "man farmer with dark skin tone",
    }


SUBGROUPS = {"subgroups": {"20": "hands"}, "groups": {"1": "people-body", "4": "f", "5": "t", "8": "s", "9": "fl"}}
