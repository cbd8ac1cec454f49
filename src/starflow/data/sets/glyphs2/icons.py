"""The icon sets: coloured icons (the sampling group "objects"), and line icons and silhouettes (the group "icons").

Every set has rules of its own: which of its categories show things, which suffixes its names carry, what its names
begin with. An icon that is drawn in a few known colours can be shown in others: a pixel of such a picture is a mixture
of the icon's colours (its edges are antialiased). The shares are found by least squares and clipped to a mixture; then
the colours are exchanged. No other colour comes in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from starflow.data.sets.glyphs.captions import icon_svg
from starflow.data.sets.glyphs.colours import BACKGROUNDS, Pixels, oklab
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

if TYPE_CHECKING:
    from PIL import Image

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


Floats = NDArray[np.float64]

WHITE = (255, 255, 255)

ICON_COLOURS: dict[str, tuple[int, int, int]] = BACKGROUNDS | {"dark blue": (20, 50, 120), "dark green": (20, 95, 50)}

LEAST_DISTANCE = 0.25


def parse_palette(text: str) -> list[tuple[int, int, int]]:
    """The colours of a palette such as "2f88ff,ffffff".

    >>> parse_palette("2f88ff,ffffff")
    [(47, 136, 255), (255, 255, 255)]
    """
    return [(int(hexa[0:2], 16), int(hexa[2:4], 16), int(hexa[4:6], 16)) for hexa in text.split(",")]


def recolour(rgba: Pixels, palette: str, colour: str) -> Pixels:
    """The icon with its main colour, the palette's first, changed to a named one.

    The second colour, if it is a tint or a shade of the first (no white and no black), becomes the same tint or
    shade of the new one. All other colours stay.

    Args:
        rgba: (H, W, 4).
        palette: the colours the icon is drawn in, "2f88ff,43ccf8,000000,ffffff".
        colour: key of `ICON_COLOURS`, or "white".
    """
    old = np.array(parse_palette(palette), dtype=np.float64)
    new = old.copy()
    new[0] = _colour(colour)
    if len(old) > 1 and 0 < old[1].sum() < 3 * 255:
        new[1] = _tint_or_shade(old[0], old[1], new[0])
    shares = _shares(rgba[..., :3].reshape(-1, 3).astype(np.float64), old)
    changed = rgba.copy()
    changed[..., :3] = np.rint(shares @ new).clip(0, 255).astype(np.uint8).reshape(*rgba.shape[:2], 3)
    return changed


def recoloured(image: Image.Image, palette: str, colour: str) -> Image.Image:
    """The same of a picture: `recolour`."""
    from PIL import Image

    return Image.fromarray(recolour(np.asarray(image.convert("RGBA")), palette, colour))


def icon_colour(rng: np.random.Generator, palette: str, on_colour: bool) -> tuple[str, list[str]]:
    """A colour for an icon, and the names of the backgrounds it stands out from; none if it stays on white.

    The colour is told apart from the icon's other colours, such as a black outline, which no background hides.
    """
    kept = [np.array(colour) for colour in parse_palette(palette)[1:] if sum(colour) == 0]
    names = [*ICON_COLOURS, "white"] if on_colour else list(ICON_COLOURS)
    colour = str(rng.choice([name for name in names if _far(_colour(name), kept)]))
    if not on_colour:
        return colour, []
    shown = [_colour(colour), *kept]
    return colour, [name for name, ground in BACKGROUNDS.items() if _far(np.array(ground), shown)]


def _colour(name: str) -> Floats:
    return np.array(ICON_COLOURS.get(name, WHITE), dtype=np.float64)


def _far(colour: Floats, others: list[Floats]) -> bool:
    """Whether the eye tells a colour from the others."""
    return all(float(np.linalg.norm(oklab(colour) - oklab(other))) > LEAST_DISTANCE for other in others)


def _shares(pixels: Floats, colours: Floats) -> Floats:
    """(N, 3) pixels as mixtures of (K, 3) colours: (N, K), not negative, each row's sum 1."""
    if len(colours) == 1:
        return np.ones((len(pixels), 1))
    # The row of ones, weighed heavily, asks for the sum 1.
    heavy = 1e3
    system = np.vstack([colours.T, np.full(len(colours), heavy)])
    wanted = np.hstack([pixels, np.full((len(pixels), 1), heavy)])
    shares = np.clip(wanted @ np.linalg.pinv(system).T, 0, None)
    normed: Floats = shares / np.maximum(shares.sum(-1, keepdims=True), 1e-9)
    return normed


def _tint_or_shade(first: Floats, second: Floats, new: Floats) -> Floats:
    """To `new` what `second` is to `first`: as much lighter or darker."""
    weights = np.array([0.2126, 0.7152, 0.0722])
    light, other = float(first @ weights) / 255, float(second @ weights) / 255
    if other > light:
        share = (other - light) / max(1 - light, 1e-6)
        tint: Floats = new + (255 - new) * share
        return tint
    shade: Floats = new * (other / max(light, 1e-6))
    return shade
