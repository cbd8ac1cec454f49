"""Clip art: which title, file name or keyword is believed."""

from __future__ import annotations

import pytest

from starflow.data.sets.glyphs2.drawings import Drawing
from starflow.data.sets.glyphs2.illustrations import FOLDER, clip_art_drawings
from starflow.data.sets.glyphs2.packages import DebianArchive, open_debian
from tests.data.sets.glyphs2.conftest import SVG, FakePackages, debian

ENGLISH = frozenset("apple owl tree branch clock dog red two house".split())


def name_of(path: str, title: str, *keywords: str) -> str:
    """The caption of one drawing, or why it is left out."""
    body = f"<dc:title>{title}</dc:title>" + "".join(f"<rdf:li>{keyword}</rdf:li>" for keyword in keywords)
    data = debian({f"{FOLDER}/{path}.svg": SVG.format(body).encode()})
    found = next(clip_art_drawings(DebianArchive(data, "x.deb"), ENGLISH))
    return found.caption if isinstance(found, Drawing) else found[1]


@pytest.mark.parametrize(
    ("path", "title", "name"),
    [
        ("animals/x", "Owl on Branch", "owl on a branch"),
        ("animals/x", "Owl (B and W)", "owl"),
        ("animals/gufo_architetto_01", "Gufo civetta", "owl"),
        ("animals/owl_kurt_cagle_01", "Clipart by Nicu Buculei - clock12", "owl"),
        ("animals/owl2_mimooh_01", "", "owl"),
        ("food/x", "Red Apple 3", "red apple"),
        ("food/x", "Apple and the two red dog house tree", "no English name"),
        ("food/x", "Frobnicator", "no English name"),
        ("logos/x", "Apple", "folder logos"),
        ("animals/tux_01", "Owl", "unclear or wrong name"),
        ("tools/x", "Clock Arrow", "no English name"),
    ],
)
def test_names(path: str, title: str, name: str) -> None:
    assert name_of(path, title) == name


def test_a_keyword_helps_out_unless_it_says_too_little() -> None:
    assert name_of("animals/zzz", "Qwertz", "dog") == "dog"
    assert name_of("animals/zzz", "Qwertz", "animal", "dog") == "no English name"


def test_tags_are_other_english_words() -> None:
    body = "<dc:title>Owl</dc:title><rdf:li>tree</rdf:li><rdf:li>hash(0x8a)</rdf:li><rdf:li>red owl</rdf:li>"
    data = debian({f"{FOLDER}/animals/x.svg": SVG.format(body).encode()})
    found = next(clip_art_drawings(DebianArchive(data, "x.deb"), ENGLISH))
    assert isinstance(found, Drawing)
    assert found.tags == ("tree",)


def test_licences_text_and_copies_are_left_out(fake: FakePackages) -> None:
    archive = open_debian(fake.clip_art, fake.folder, fake.folder)
    reasons = dict(one for one in clip_art_drawings(archive, ENGLISH) if isinstance(one, tuple))
    assert reasons["food/gift_gpl.svg"] == "licence"
    assert reasons["food/apple_bw.svg"].startswith("the same file as food/apple_again.svg")
    text = debian({f"{FOLDER}/food/x.svg": SVG.format("<dc:title>Apple</dc:title><text>A</text>").encode()})
    assert next(clip_art_drawings(DebianArchive(text, "x.deb"), ENGLISH)) == ("food/x.svg", "text")
