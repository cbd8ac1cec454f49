"""The emoji of the set: the four base styles with the people that "glyphs" leaves out, and four more styles.

Everything is joined by code point; the four more styles name their drawings in words, which are looked up in
Unicode's and emojibase's names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from starflow.data.sets.glyphs.captions import Concept, code_of, code_of_text, icon_svg, read_drawings
from starflow.data.sets.glyphs.packages import Tarball
from starflow.data.sets.glyphs.prepare import NO_FLIP_SUBGROUPS, NO_FLIP_WORDS
from starflow.data.sets.glyphs2.drawings import Drawing, Raster, Svg
from starflow.data.sets.glyphs2.words import concept_key, corrected, plain_name, words_of

NAMED_STYLES = ("noto-v1", "emojione", "fxemoji", "streamline-emojis")

_HAIR = {"red hair": "red hair", "curly hair": "curly hair", "white hair": "white hair", "blond hair": "blond hair"}
_SEXES = {
    "man": "man", "men": "man", "woman": "woman", "women": "woman", "person": "person", "people": "person",
    "boy": "boy", "girl": "girl", "child": "child",
}  # fmt: skip
_PEOPLE_TAGS_LIMIT = 6


class Names:
    """Looks a drawing's name up among all names that Unicode and emojibase give emoji; letters and digits count."""

    def __init__(self, labels: Tarball, names: Mapping[str, Mapping[str, Any]]) -> None:
        self._codes: dict[str, str] = {}
        entries = labels.json("en/data.json")
        for entry in entries:
            self._add(entry["label"], code_of(entry["hexcode"]))
        for emoji, named in names.items():
            self._add(str(named["name"]), code_of_text(emoji))
        for code, name in labels.json("meta/unicode-names.json").items():
            self._add(str(name), code_of(code))
        for shortcodes in ("github", "iamcal", "joypixels", "emojibase"):
            for code, given in labels.json(f"en/shortcodes/{shortcodes}.json").items():
                for name in [given] if isinstance(given, str) else given:
                    self._add(name, code_of(code))

    def _add(self, name: str, code: str) -> None:
        self._codes.setdefault(compact(name), code)

    def code(self, name: str) -> str | None:
        """The code of the emoji of that name, or of that name without a variant's number or a "face" at its end."""
        for tried in (name, plain_name(name), f"{plain_name(name)} face", plain_name(name).removesuffix(" face")):
            if compact(tried) in self._codes:
                return self._codes[compact(tried)]
        return None


def compact(name: str) -> str:
    """A name's letters and digits, in lower case."""
    return re.sub("[^a-z0-9]", "", name.lower())


def base_drawings(
    concepts: list[Concept], render: Tarball, styles: Mapping[str, Tarball], people: bool
) -> Iterator[Drawing]:
    """The base styles' pictures of these concepts; `people` says that the concepts are `read_people`'s."""
    arts: dict[str, dict[str, Svg | Raster]] = {"3d": {}}
    for name, data in render.under("assets"):
        stem, _, suffix = name.rpartition(".")
        if suffix == "webp":
            arts["3d"][code_of(stem)] = Raster(data)
    for style, package in styles.items():
        drawn = read_drawings(package.json("icons.json"), package.json("chars.json"))
        arts[style] = {code: Svg(text) for code, text in drawn.items()}
    for concept in concepts:
        for style, drawings in arts.items():
            if concept.code in drawings:
                yield _drawing(concept, style, concept.code, drawings[concept.code], people)


def named_drawings(
    concepts: list[Concept], names: Names, style: str, package: Tarball
) -> Iterator[Drawing | tuple[str, str]]:
    """One of the four more styles' pictures of these concepts, or (name, why it is left out)."""
    icons = package.json("icons.json")
    by_code = {concept.code: concept for concept in concepts}
    for slug in sorted(icons["icons"]):
        name = corrected(slug, style)
        code = names.code(name) if name else None
        if name is None:
            yield slug, "unclear or wrong name"
        elif code is None:
            yield slug, "no emoji of that name"
        elif code not in by_code:
            yield slug, "people, flag, symbol or variant"
        else:
            svg = icon_svg(icons, slug)
            assert svg is not None
            yield _drawing(by_code[code], style, slug, Svg(svg), people=False)


def read_people(labels: Tarball, names: Mapping[str, Mapping[str, Any]]) -> list[Concept]:
    """All people and parts of bodies, in every sex and skin tone; named as captions say it, sorted by code."""
    groups = labels.json("meta/groups.json")
    found = []
    for entry in labels.json("en/data.json"):
        if "group" not in entry or groups["groups"][str(entry["group"])] != "people-body":
            continue
        subgroup = groups["subgroups"][str(entry["subgroup"])]
        for one in [entry, *entry.get("skins", ())]:
            tags = tuple(entry.get("tags", ()))[:_PEOPLE_TAGS_LIMIT]
            code = code_of(one["hexcode"])
            found.append(Concept(code, people_caption(str(one["label"])), tags, "people-body", subgroup))
    return sorted(found, key=lambda concept: concept.code)


def people_caption(label: str) -> str:
    """Unicode's name of a person as a noun phrase.

    >>> people_caption("man farmer: light skin tone")
    'man farmer with light skin tone'
    >>> people_caption("family: man, woman, girl")
    'family of a man, a woman and a girl'
    >>> people_caption("woman: dark skin tone, curly hair"), people_caption("man: bald")
    ('woman with dark skin tone and curly hair', 'bald man')
    """
    head, _, rest = label.replace("\u2019", "'").partition(": ")
    parts = [part for part in rest.split(", ") if part]
    tones = [part for part in parts if part.endswith("skin tone")]
    looks = [_HAIR[part] for part in parts if part in _HAIR] + ["a beard" for part in parts if part == "beard"]
    members = [f"a {part}" for part in parts if part in _SEXES]
    if "bald" in parts:
        head = f"bald {head}"
    if members:
        head = f"{head} of {_listed(members)}"
    shown = [*dict.fromkeys(tones), *looks]
    return f"{head} with {_listed(shown)}" if shown else head


def people_role(caption: str) -> str:
    """What someone is or does, without sex and looks: what holding out goes by.

    >>> people_role("woman farmer with dark skin tone"), people_role("bald man"), people_role("waving hand")
    ('farmer', 'person', 'waving hand')
    """
    role = re.sub(r" with (.*(skin tone|hair|beard))+$", "", caption)
    role = re.sub(r"^bald ", "", role)
    role = re.sub(r" of a (man|woman|person|boy|girl|child)\b.*$", "", role)
    words = [word for word in role.split() if word not in _SEXES]
    return " ".join(words) or "person"


def _drawing(concept: Concept, style: str, key: str, art: Svg | Raster, people: bool) -> Drawing:
    words = frozenset(words_of(concept.name))
    extra = {"code": concept.code, "emoji_group": concept.group}
    if people:
        tones = re.findall(r"(?:medium-)?(?:light|dark|medium) skin tone", concept.name)
        extra |= {"sampling_group": "people", "role": people_role(concept.name), "skin_tone": ",".join(tones)}
        extra["sex"] = next((_SEXES[word] for word in words_of(concept.name) if word in _SEXES), "")
    return Drawing(
        name=f"{style}/{key}",
        caption=concept.name,
        style=style,
        concept=concept_key(people_role(concept.name) if people else concept.name),
        kind=concept.subgroup,
        art=art,
        tags=concept.tags,
        flip=concept.subgroup not in NO_FLIP_SUBGROUPS and NO_FLIP_WORDS.isdisjoint(words),
        extra=extra,
    )


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
