"""The drawings of people and emoji sets, and those of the Open Clip Art Library: their names, and which are left out.

Titles of clip art were given by thousands of people, in several languages and sometimes to whole batches at once: a
title is believed if it is short and all its words are English, else the file's name, else a keyword. English are the
words that the other packages use of their pictures (`vocabulary`), so no dictionary is needed.

Emoji are the four base styles with the people that "glyphs" leaves out, and four more styles. Everything is joined by
code point; the four more styles name their drawings in words, which are looked up in Unicode's and emojibase's names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from html import unescape
from importlib import resources
from pathlib import PurePosixPath
from typing import Any

from starflow.data.sets.glyphs.captions import Concept, code_of, code_of_text, icon_svg, read_drawings
from starflow.data.sets.glyphs.packages import Tarball
from starflow.data.sets.glyphs.prepare import NO_FLIP_SUBGROUPS, NO_FLIP_WORDS
from starflow.data.sets.glyphs2.drawings import Drawing, Raster, Svg
from starflow.data.sets.glyphs2.packages import DebianArchive
from starflow.data.sets.glyphs2.words import DROPPED, concept_key, corrected, dropped_word, plain_name, words_of

FOLDER = "usr/share/openclipart/svg"

MAX_WORDS = 4

LARGEST_BYTES = 1_500_000  # drawing a larger one takes many seconds

LEFT_OUT_FOLDERS = re.compile(
    r"^(shapes|logos|buttons|special|unsorted|decorations|geography|office/telephone$|education$|people/stickmen|"
    r"computer/(icons|buttons|folders|diagrams|network|games)|recreation/games/(cards|dice)|"
    r"signs_and_symbols/(flags|money|led|hazard|disability|map_symbols|awards)|signs_and_symbols$|"
    r"transportation/(roadsigns|aiga-symbols)|transportation/vehicles/hummers|people/clothing/pantyhose|"
    r"recreation/religion)"
)

# Penguins that are a brand's, barcodes, sailing rules with letters, traced photographs, and others that show no
# thing; found by looking at all of them.
LEFT_OUT_FILES = re.compile(
    r"tux|linux|mateya|boating_rules|sailing_(capsize|close|jibe|reach|running|tack|heel)|dead_frogs|mascot|amibe|"
    r"soft_blue_couch|cross_hand|^stamp_01|faces_lumen|houses_jon|lightning_jon_phillips|man_head_mikhail|happy_boy|"
    r"a_man_singing|grandpa|_stefan_bazelk|hikin|t-shirt_0[23]|bucket_michael|minute_hand|^mag[234]$|"
    r"magnifying_glass_tom|chevrolet|^(airplane|cattle|drawbridge|horse)$|portrait_of_a_woman"
)

# The GPL and share-alike licences; a licence field that is empty is the library's own, public domain.
_OTHER_LICENCE = re.compile(rb"licenses/(GPL|LGPL|by)", re.IGNORECASE)

_TITLE = re.compile(r"<dc:title[^>]*>([^<]*)</dc:title>")

_KEYWORD = re.compile(r"<rdf:li[^>]*>([^<]*)</rdf:li>")

# Titles that were given to a whole batch.
_BATCH = re.compile(
    r"clip ?art by|cliparts?$|collection|sallite|road signs|various|etiquette|iconset|illustration|general$|"
    r"connectors|-aj$|boating rules|menu",
    re.IGNORECASE,
)

# What the author added to the file's name.
_AUTHOR = re.compile(
    r"_(rollandin|archit|arch|jarno|nicu|ganson|benji|enrique|petri|kurt|tanguy|jean.?victor|gerald|jon_phillips|"
    r"etienne|massimo|fudriot|christoph|gabrielle|juliane|mimooh|zazou).*$"
)

_FILLERS = frozenset("of the a an and with in on at to from for by".split())

_NOISE = frozenset(
    "icon clipart clip art image picture drawing drawn vector svg new simple cartoon symbol sign contour outline color "
    "colour black white bw md sm lg version cc simplified refixed silhouette silhouet shape draw sketch toon copy "
    "architetto francesco rollandin stylized shaded generic basic border straight lines style fancy glossy theme "
    "symbolic powered alt another yet lightly highlights highlight busy whole ink inkpen random r".split()
)

# Words that say too little of a picture.
_TOO_GENERAL = frozenset(
    "animal animals people mammal insect food beverage dessert holiday internet office transport tool tools weapon "
    "weather science sport sports party music game games garden toy work team clothing human male female adult kid "
    "vehicle transportation religion education energy plant religion container travel vacation computer science base "
    "general part blue green air game digital profile points commercial compact study festive tropical vegetable "
    "unsorted hash building street picnic eat transport out signs post wall drop note notes records info".split()
)


@cache
def _words() -> tuple[frozenset[str], dict[str, str]]:
    """English words that no other package uses of a picture; and what foreign and misspelt words mean, "" nothing."""
    text = resources.files(__package__).joinpath("clip_art_words.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    translated: dict[str, str] = found["translated"]
    meanings = frozenset(word for name in translated.values() for word in name.split())
    return frozenset(found["english"]) | meanings, translated


def clip_art_drawings(archive: DebianArchive, vocabulary: frozenset[str]) -> Iterator[Drawing | tuple[str, str]]:
    """The pictures that are kept, or (path, why it is left out); a picture in two folders comes once."""
    seen: dict[bytes, str] = {}
    for path, data in archive.under(FOLDER, ".svg"):
        if data in seen:
            yield path, f"the same file as {seen[data]}"
            continue
        seen[data] = path
        folder = str(PurePosixPath(path).parent)
        text = data.decode("utf-8", errors="replace")
        stem = PurePosixPath(path).stem
        found = _name(text, stem, vocabulary)
        reason = _why_left_out(data, path, found)
        name = corrected(found, "clip-art") if found else None
        if corrected(stem, "clip-art files") != stem:
            name = corrected(stem, "clip-art files")
        if reason or name is None:
            yield path, reason or "unclear or wrong name"
            continue
        yield Drawing(
            name=f"clip-art/{path.removesuffix('.svg')}",
            caption=name,
            style="clip-art",
            concept=concept_key(name),
            kind=folder.rpartition("/")[2],
            art=Svg(text, crop=True),
            tags=_tags(text, name, vocabulary),
        )


def _why_left_out(data: bytes, path: str, name: str | None) -> str:
    folder, _, file = path.removesuffix(".svg").rpartition("/")
    if LEFT_OUT_FILES.search(file):
        return "unclear or wrong name"
    if LEFT_OUT_FOLDERS.search(folder):
        return f"folder {folder}"
    if _OTHER_LICENCE.search(data):
        return "licence"
    if len(data) > LARGEST_BYTES:
        return f"over {LARGEST_BYTES} bytes"
    if name is None:
        return "no English name"
    if b"<text" in data:
        return "text"
    word = dropped_word(name, DROPPED)
    return f"word '{word}'" if word else ""


def _name(text: str, stem: str, vocabulary: frozenset[str]) -> str | None:
    """What the picture shows, by its title, else its file's name, else its first keyword; or None."""
    title = unescape(unescape(next(iter(_TITLE.findall(text)), "")))
    keywords = [keyword for keyword in _KEYWORD.findall(text) if keyword.strip()]
    tried = ["" if _BATCH.search(title) else title, _AUTHOR.sub("", stem), *keywords[:1]]
    return next((name for name in (_english(one, vocabulary) for one in tried) if name), None)


def _english(text: str, vocabulary: frozenset[str]) -> str | None:
    """The words of a title if they are few, English and not too general; without numbers and words like "clip art".

    >>> _english("Gufo civetta", frozenset()), _english("Ice Cream Cone (2 Scoop)", frozenset({"ice", "cream", "cone"}))
    ('owl', 'ice cream cone')
    """
    english, translated = _words()
    words: list[str] = []
    for word in words_of(re.sub(r"\([^)]*\)", " ", text)):
        word = re.sub(r"(?<=[a-z]{2})\d+$", "", word)
        if word not in _NOISE and not re.fullmatch(r"\d+|[b-z]|v\d+|ii|amp", word):
            words += translated.get(word, word).split()
    words = list(dict.fromkeys(words))
    while words and words[-1] in _FILLERS:
        words.pop()
    while words and words[0] in _FILLERS:
        words.pop(0)
    if not words or len(words) > MAX_WORDS or (len(words) == 1 and words[0] in _TOO_GENERAL):
        return None
    known = vocabulary | _FILLERS | english
    return " ".join(words) if all(word in known for word in words) and any(len(word) > 2 for word in words) else None


def _tags(text: str, name: str, vocabulary: frozenset[str]) -> tuple[str, ...]:
    tags = (_english(keyword, vocabulary) for keyword in _KEYWORD.findall(text))
    known = set(name.split())
    return tuple(dict.fromkeys(tag for tag in tags if tag and not known & set(tag.split()) and tag != "hash"))[:5]


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
