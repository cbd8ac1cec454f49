"""Which emoji the glyph set shows, what they are called, and where each style keeps its drawing.

Everything is joined by `code`: the lower-case code points without U+FE0F, joined by "-".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Include = Literal["things", "all"]

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


def code_of(hexcode: str) -> str:
    """The join key of any spelling of a code point sequence (`1F1E6-FE0F`, `1f1e6_fe0f`)."""
    parts = (int(part, 16) for part in hexcode.replace("_", "-").split("-"))
    return "-".join(f"{point:04x}" for point in parts if point != VARIATION_SELECTOR)


def code_of_text(emoji: str) -> str:
    """The join key of an emoji character sequence."""
    return code_of("-".join(f"{ord(character):x}" for character in emoji))


def read_concepts(
    labels: Sequence[Mapping[str, Any]],
    groups: Mapping[str, Any],
    names: Mapping[str, Mapping[str, Any]],
    include: Include,
) -> list[Concept]:
    """The concepts of the set, sorted by code.

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
    """SVG documents of an iconify set, by code.

    Args:
        icons: its icons.json (`icons`, `aliases`, the set's `width` and `height`).
        chars: its chars.json, code points to icon name.
    """
    drawings = {}
    for hexcode, name in chars.items():
        svg = _svg(icons, name)
        if svg is not None:
            drawings[code_of(hexcode)] = svg
    return drawings


def _is_variant(code: str) -> bool:
    """Skin tones, clock faces, and the man and woman of what also exists as a person."""
    points = [int(part, 16) for part in code.split("-")]
    if any(point in SKIN_TONES for point in points) or points[0] in CLOCK_FACES:
        return True
    return JOINER in points and (points[0] in MAN_WOMAN or not GENDER_SIGNS.isdisjoint(points[1:]))


def _svg(icons: Mapping[str, Any], name: str) -> str | None:
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
