"""The icon sets: coloured icons (the sampling group "objects"), and line icons and silhouettes (the group "icons").

Every set has rules of its own: which of its categories show things, which suffixes its names carry, what its
names begin with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from starflow.data.sets.glyphs.captions import icon_svg
from starflow.data.sets.glyphs.packages import Tarball
from starflow.data.sets.glyphs2.drawings import STYLES, Drawing, Svg
from starflow.data.sets.glyphs2.words import (
    DROPPED,
    DROPPED_FROM_INTERFACES,
    concept_key,
    corrected,
    dropped_word,
    plain_name,
    words_of,
)

_NO_FLIP_WORDS = frozenset("left right clock watch card cards ticket calendar calculator keyboard book".split())


@dataclass(frozen=True, slots=True)
class IconSet:
    """What is kept of a set, and how its names are read.

    Attributes:
        left_out: categories (of its metadata.json) that show no things.
        prefixes: words that names begin with which say the category, not the thing.
        pattern: names that do not match it entirely are left out.
        flat: names that end in "-flat" belong to the style "<set>-flat".
        interface: the set is drawn for interfaces, so their words leave an icon out.
        sizes: names end in a size in pixels; the largest is kept.
        corrections: keys of `corrections.json` for its names, after the set's own.
    """

    left_out: frozenset[str] = frozenset()
    prefixes: tuple[str, ...] = ()
    pattern: str = r".*"
    flat: bool = False
    interface: bool = True
    sizes: bool = False
    corrections: tuple[str, ...] = ()


_STREAMLINE_LEFT_OUT = frozenset({"ArtificialIntelligence", "Phone", "Programming"})
_STREAMLINE = IconSet(_STREAMLINE_LEFT_OUT, flat=True, corrections=("streamline",))

_COLOUR_NAMES = {
    "2f88ff": "blue", "43ccf8": "light blue", "000000": "black", "4147d5": "blue", "d7e0ff": "light blue",
    "8fbffa": "light blue", "2859c5": "blue", "092f63": "dark blue", "bbd8ff": "light blue", "ffffff": "white",
}  # fmt: skip

ICON_SETS: dict[str, IconSet] = {
    "streamline-ultimate-color": IconSet(
        frozenset(
            "ArrowsDiagrams BusinessProducts Content Design Emails FilesFolders InternetNetworksServers Logos "
            "MoneyPaymentsFinance ProgramingAppsWebsites Users WorkOfficeCompanies".split()
        ),
        prefixes=tuple(
            "accounting adventure aircraft amusement-park animal-products archive astronomy athletics board-game "
            "body-care card-game dentistry drugs electronics farmers-market fitness fruit hair-dress "
            "instrument-classical instrument kitchenware lab make-up medical-instrument modern natural-disaster "
            "office party science-fiction science seafood space vegetables weather wind soft outdoors player "
            "photography-equipment safety style gaming public-service railroad tools movies gymnastics "
            "martial-arts products real-estate".split()
        ),
    ),
    "streamline-kameleon-color": IconSet(
        frozenset({"ComputerCoding", "InterfaceEssential", "MoneyBusiness", "Phone"}), pattern=r"(?!.*-duo$).*"
    ),
    "streamline-stickies-color": IconSet(
        frozenset({"BusinessMoney", "InterfaceEssential", "InternetWebsite"}), pattern=r"(?!.*-duo$).*"
    ),
    "flat-color-icons": IconSet(),
    "fluent-color": IconSet(sizes=True),
    "icon-park": IconSet(
        frozenset(
            "Abstract Arrows Base Brand Character Charts Communicate Components Connect Constellation Datas Edit "
            "Graphics Hands Money Operate Office Others".split()
        ),
        pattern=r"(?!.*-(key|key-one|[abcxyz])$|.*sd-|.*-zodiac$|game-.*|handle-.*|.*-eight$).*",
    ),
    "streamline-color": _STREAMLINE,
    "streamline-plump-color": _STREAMLINE,
    "streamline-flex-color": _STREAMLINE,
    "streamline-sharp-color": _STREAMLINE,
    "streamline-cyber-color": IconSet(
        frozenset({"ComputerDevicesProgramming", "DatabaseNetwork", "Phone"}), corrections=("streamline",)
    ),
    "game-icons": IconSet(
        pattern=r"(?!abstract-|card-(\d|ace|jack|queen|king)|.*-brick$|logic-gate|inverted-dice|perspective-dice|"
        r"dice-(six|twenty|eight)|battery-(\d|plus|minus)|level-|tarot-|.*-flag$|tally|d4$|d10$|d12$).*",
        interface=False,
    ),
}


def icon_drawings(name: str, package: Tarball) -> Iterator[Drawing | tuple[str, str]]:
    """The pictures that are kept of one set, or (name, why it is left out)."""
    rules = ICON_SETS[name]
    icons, metadata = package.json("icons.json"), package.json("metadata.json")
    kinds: dict[str, str] = {}
    for category, members in metadata.get("categories", {}).items():
        for member in members:
            kinds.setdefault(member, category)
    largest = _largest_sizes(icons["icons"]) if rules.sizes else {}
    for slug in sorted(icons["icons"]):
        stem = slug.removesuffix("-flat") if rules.flat else slug
        stem = stem if not rules.sizes else re.sub(r"-\d+$", "", slug)
        reason = _why_left_out(stem, kinds.get(slug, ""), rules)
        thing = corrected(_thing(stem, rules), name, *rules.corrections, "icons")
        if rules.sizes and largest[stem] != slug:
            reason = "a smaller size of the same"
        if reason or thing is None:
            yield slug, reason or "unclear or wrong name"
            continue
        style = f"{name}-flat" if rules.flat and slug != stem else name
        svg = icon_svg(icons, slug)
        assert svg is not None
        yield _drawing(slug, thing, style, kinds.get(slug, "icon"), svg)


def _drawing(slug: str, name: str, style: str, kind: str, svg: str) -> Drawing:
    look = STYLES[style]
    palette = _palette_of(svg, look.palette)
    extra = {}
    if palette:
        svg = svg.replace("currentColor", f"#{palette[0]}")
        extra = {"palette": ",".join(palette), "colour": _COLOUR_NAMES[palette[0]]}
    if palette and palette[0] != look.palette[0] and "filled" in look.phrase:
        extra["phrase"] = "line icon of"  # nothing of it is filled
    return Drawing(
        name=f"{style}/{slug}",
        caption=name,
        style=style,
        concept=concept_key(name),
        kind=kind,
        art=Svg(svg),
        flip=_NO_FLIP_WORDS.isdisjoint(words_of(name)),
        extra=extra,
    )


def _palette_of(svg: str, palette: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the set's colours that a drawing really has, white last; none if it has others as well."""
    drawn = {_long(found.lower()) for found in re.findall(r"#([0-9a-fA-F]{6}|[0-9a-fA-F]{3})\b", svg)}
    if not drawn <= set(palette):
        return ()
    present = [colour for colour in palette if colour in drawn or "currentColor" in svg]
    present.sort(key=lambda colour: colour == "ffffff")  # stable: white last
    return tuple(present)


def _long(colour: str) -> str:
    return "".join(digit * 2 for digit in colour) if len(colour) == 3 else colour


def _thing(stem: str, rules: IconSet) -> str:
    """The name of what an icon shows."""
    for prefix in rules.prefixes:
        if stem.startswith(f"{prefix}-") and not stem.removeprefix(f"{prefix}-").isdigit():
            stem = stem.removeprefix(f"{prefix}-")
            break
    return plain_name(stem)


def _why_left_out(stem: str, kind: str, rules: IconSet) -> str:
    if kind in rules.left_out:
        return f"category {kind}"
    if not re.fullmatch(rules.pattern, stem):
        return "the set's own pattern"
    word = dropped_word(stem, DROPPED_FROM_INTERFACES if rules.interface else DROPPED)
    return f"word '{word}'" if word else ""


def _largest_sizes(slugs: dict[str, object]) -> dict[str, str]:
    """For every name, its slug of the largest size."""
    largest: dict[str, str] = {}
    for slug in slugs:
        stem, _, size = slug.rpartition("-")
        if stem not in largest or int(size) > int(largest[stem].rpartition("-")[2]):
            largest[stem] = slug
    return largest
