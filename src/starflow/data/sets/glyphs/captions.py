"""Captions of the glyph set, and the emoji that it shows: their names, and where each style keeps its drawing.

All functions are pure. An emoji's `code` joins the packages: its lower-case code points without U+FE0F, with "-"
between them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Include = Literal["things", "all"]
"""Which emoji enter the set: "things" leaves out people and symbols."""

STYLE_PREFIXES = {
    "3d": "3D render of",
    "flat": "flat icon of",
    "noto": "Noto emoji of",
    "twemoji": "Twemoji of",
}

COLOUR_WORDS = frozenset("red orange yellow green blue purple pink brown black white gray grey golden silver".split())

# Words that end the noun phrase's head: "slice OF pizza", "face WITH tongue".
_AFTER_HEAD = frozenset(
    "of with without on in behind from for over at to under showing under and holding savoring blowing kissing "
    "screaming shaking exhaling vomiting rolling fluttering increasing decreasing raised tilted".split()
)

# Heads that end in "s" and are singular.
_SINGULAR = frozenset(
    "abacus atlas bias boss bus cactus chess christmas gas hibiscus hippopotamus iris lens lotus minibus octopus "
    "rhinoceros trolleybus virus walrus".split()
)

# Plurals without an "s", masses, activities and names: they take no article.
_NO_ARTICLE = frozenset(
    "acid algae armor arts bacon badminton beer blood bowling bread broccoli butter camping candy cheese children "
    "clothing coffee cooking coral corn custard dango dna dust falafel feet fire fishing flatbread flour fog furniture "
    "garlic grass hockey honey ice jewelry lacrosse lava lightning liquid luggage mail mate meat men milk money music "
    "oden parchment people pong popcorn rain rice sake salt slime snow soap spaghetti sugar sushi tea teeth tennis "
    "thread water wheat women wood wool yarn zzz".split()
)

_PROPER_NAMES = {
    "kaaba": "the Kaaba",
    "milky way": "the Milky Way",
    "mount fuji": "Mount Fuji",
    "statue of liberty": "the Statue of Liberty",
    "sun": "the sun",
    "tokyo tower": "the Tokyo Tower",
}

_VOWEL_SOUND = re.compile(r"(?:[aeio]|u(?!n[ip]|s[ei]|k)|hour|heir|honest|x-ray|8|11|18)", re.IGNORECASE)

_CONSONANT_SOUND = re.compile(r"(?:eu|ewe|one\b|one-|once)", re.IGNORECASE)

VARIATION_SELECTOR = 0xFE0F

SKIN_TONES = range(0x1F3FB, 0x1F400)

CLOCK_FACES = range(0x1F550, 0x1F568)

MAN_WOMAN = frozenset({0x1F468, 0x1F469})

GENDER_SIGNS = frozenset({0x2640, 0x2642})

JOINER = 0x200D

FLAG_SUBGROUPS = frozenset({"country-flag", "subdivision-flag"})

PEOPLE_AND_SYMBOLS = frozenset({"people-body", "symbols"})

# Names that are no noun phrase, so that "a ..." reads as English, and a few that nobody would type.
RENAMED = {
    "automobile": "car",
    "oncoming automobile": "oncoming car",
    "hourglass done": "finished hourglass",
    "hourglass not done": "running hourglass",
    "rolling on the floor laughing": "face rolling on the floor laughing",
    "star-struck": "star-struck face",
    "locked": "closed padlock",
    "unlocked": "open padlock",
    "locked with pen": "padlock with pen",
    "locked with key": "padlock with key",
    "dizzy": "dizzy star",
    "construction": "construction barrier",
    "building construction": "building under construction",
    "collision": "explosion",
    "cooking": "frying pan with egg",
    "foggy": "foggy bridge",
    "camping": "camping tent",
    "tennis": "tennis ball and racket",
    "dashing away": "dash of smoke",
    "high voltage": "high voltage lightning bolt",
}


@dataclass(frozen=True, slots=True)
class Concept:
    """One emoji: its code, its name as captions say it, and how Unicode and emojibase sort it."""

    code: str
    name: str
    tags: tuple[str, ...]
    group: str
    subgroup: str


def with_article(name: str) -> str:
    """Put "a" or "an" before a name, or nothing if it is a plural, a mass or a proper name.

    >>> with_article("red apple"), with_article("orange"), with_article("grapes"), with_article("unicorn")
    ('a red apple', 'an orange', 'grapes', 'a unicorn')
    """
    if name.lower() in _PROPER_NAMES:
        return _PROPER_NAMES[name.lower()]
    if _takes_no_article(name):
        return name
    vowel = _VOWEL_SOUND.match(name) and not _CONSONANT_SOUND.match(name)
    return f"{'an' if vowel else 'a'} {name}"


def recoloured(name: str, colour: str) -> str:
    """Name a thing in another colour: a colour word in its name is replaced, otherwise the colour goes first.

    >>> recoloured("red apple", "green"), recoloured("automobile", "blue")
    ('green apple', 'blue automobile')
    """
    words = name.split()
    for i, word in enumerate(words):
        if word.lower() in COLOUR_WORDS:
            return " ".join([*words[:i], colour, *words[i + 1 :]])
    return f"{colour} {name}"


def compose(
    name: str,
    *,
    style: str | None = None,
    colour: str | None = None,
    background: str | None = None,
    tags: tuple[str, ...] = (),
) -> str:
    """Compose one caption: style, article, name (recoloured), background, tags.

    `style` is a key of `STYLE_PREFIXES`, or a phrase of its own such as "clip art of".

    >>> compose("red apple", style="3d", background="blue", tags=("fruit", "food"))
    '3D render of a red apple on a blue background, fruit, food'
    """
    caption = with_article(recoloured(name, colour) if colour else name)
    if style is not None:
        caption = f"{STYLE_PREFIXES.get(style, style)} {caption}"
    if background is not None:
        caption = f"{caption} on {with_article(background)} background"
    return ", ".join([caption, *tags])


def code_of(hexcode: str) -> str:
    """Code of an emoji from any spelling of its code points.

    >>> code_of("1F3CE-FE0F"), code_of("1f468_200d_1f33e")
    ('1f3ce', '1f468-200d-1f33e')
    """
    parts = (int(part, 16) for part in hexcode.replace("_", "-").split("-"))
    return "-".join(f"{point:04x}" for point in parts if point != VARIATION_SELECTOR)


def code_of_text(emoji: str) -> str:
    """Code of an emoji from its characters.

    >>> code_of_text("\N{RED APPLE}")
    '1f34e'
    """
    return code_of("-".join(f"{ord(character):x}" for character in emoji))


def read_concepts(
    labels: Sequence[Mapping[str, Any]],
    groups: Mapping[str, Any],
    names: Mapping[str, Mapping[str, Any]],
    include: Include,
) -> list[Concept]:
    """Read the concepts of the set, sorted by code.

    Args:
        labels: emojibase's en/data.json.
        groups: emojibase's meta/groups.json.
        names: unicode-emoji-json's data-by-emoji.json.
        include: "things" leaves out people and symbols.
    """
    named = {code_of_text(emoji): str(entry["name"]) for emoji, entry in names.items()}
    concepts = []
    for entry in labels:
        code = code_of(entry["hexcode"])
        if "group" not in entry or code not in named or _is_variant(code):
            continue
        group = groups["groups"][str(entry["group"])]
        subgroup = groups["subgroups"][str(entry["subgroup"])]
        if subgroup in FLAG_SUBGROUPS or (include == "things" and group in PEOPLE_AND_SYMBOLS):
            continue
        name = named[code].replace("\u2019", "'")
        name = RENAMED.get(name, name)
        tags = tuple(tag for tag in entry.get("tags", ()) if tag != name)
        concepts.append(Concept(code, name, tags, group, subgroup))
    return sorted(concepts, key=lambda concept: concept.code)


def read_drawings(icons: Mapping[str, Any], chars: Mapping[str, str]) -> dict[str, str]:
    """Read the SVG documents of an iconify set, by code.

    Args:
        icons: its icons.json (`icons`, `aliases`, the set's `width` and `height`).
        chars: its chars.json, code points to icon name.
    """
    drawings = {}
    for hexcode, name in chars.items():
        svg = icon_svg(icons, name)
        if svg is not None:
            drawings[code_of(hexcode)] = svg
    return drawings


def _takes_no_article(name: str) -> bool:
    words = name.lower().split()
    end = next((i for i, word in enumerate(words) if i > 0 and word in _AFTER_HEAD), len(words))
    head = words[end - 1]
    if head in _NO_ARTICLE:
        return True
    return head.endswith("s") and head not in _SINGULAR and not head.endswith(("'s", "ss"))


def _is_variant(code: str) -> bool:
    """Whether it is a skin tone, a clock face, or the man or woman of what also exists as a person."""
    points = [int(part, 16) for part in code.split("-")]
    if any(point in SKIN_TONES for point in points) or points[0] in CLOCK_FACES:
        return True
    return JOINER in points and (points[0] in MAN_WOMAN or not GENDER_SIGNS.isdisjoint(points[1:]))


def icon_svg(icons: Mapping[str, Any], name: str) -> str | None:
    """Build the SVG document of an icon, through its aliases; None where there is no such icon."""
    aliases = icons.get("aliases", {})
    mirrored = False
    seen = set()
    while name in aliases and name not in seen:
        seen.add(name)
        mirrored ^= bool(aliases[name].get("hFlip", False))
        name = aliases[name]["parent"]
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    body = icon["body"]
    if mirrored:
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{body}</svg>'
    )
