"""Captions of the glyph set: articles, styles, colours. Pure functions of text."""

from __future__ import annotations

import re

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
_BARE = frozenset(
    "arts bacon badminton bowling bread broccoli butter camping candy cooking coral custard dango dna falafel fire "
    "flatbread fog garlic hockey ice lacrosse liquid luggage mate meat milk money oden pong popcorn "
    "rice sake salt soap spaghetti sushi tennis thread wood yarn zzz".split()
)

_PROPER = {
    "kaaba": "the Kaaba",
    "milky way": "the Milky Way",
    "mount fuji": "Mount Fuji",
    "statue of liberty": "the Statue of Liberty",
    "sun": "the sun",
    "tokyo tower": "the Tokyo Tower",
}

_VOWEL_SOUND = re.compile(r"(?:[aeio]|u(?!n[ip]|s[ei]|k)|hour|heir|honest|x-ray|8|11|18)", re.IGNORECASE)
_CONSONANT_SOUND = re.compile(r"(?:eu|ewe|one\b|one-|once)", re.IGNORECASE)


def with_article(name: str) -> str:
    """`name` with "a" or "an", or with none if it is a plural, a mass or a proper name.

    >>> with_article("red apple"), with_article("orange"), with_article("grapes"), with_article("unicorn")
    ('a red apple', 'an orange', 'grapes', 'a unicorn')
    """
    if name.lower() in _PROPER:
        return _PROPER[name.lower()]
    if _takes_none(name):
        return name
    vowel = _VOWEL_SOUND.match(name) and not _CONSONANT_SOUND.match(name)
    return f"{'an' if vowel else 'a'} {name}"


def recoloured(name: str, colour: str) -> str:
    """`name` in another colour: a colour word in it is replaced, otherwise the colour goes first.

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
    """One caption: style, article, name (recoloured), background, tags.

    >>> compose("red apple", style="3d", background="blue", tags=("fruit", "food"))
    '3D render of a red apple on a blue background, fruit, food'
    """
    caption = with_article(recoloured(name, colour) if colour else name)
    if style is not None:
        caption = f"{STYLE_PREFIXES[style]} {caption}"
    if background is not None:
        caption = f"{caption} on {with_article(background)} background"
    return ", ".join([caption, *tags])


def _takes_none(name: str) -> bool:
    words = name.lower().split()
    end = next((i for i, word in enumerate(words) if i > 0 and word in _AFTER_HEAD), len(words))
    head = words[end - 1]
    if head in _BARE:
        return True
    return head.endswith("s") and head not in _SINGULAR and not head.endswith(("'s", "ss"))
