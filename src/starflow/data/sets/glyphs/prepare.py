"""The preparation of the glyph set: about 4,000 captioned images in four styles, from packages of the npm registry.

`prepare_glyphs` writes a folder that `starflow.data.sources.folder.read_folder` reads:

    images/<style>/<code>.png   RGBA, as rendered, alpha kept so that backgrounds are chosen later
    index.jsonl                 one record a line
    summary.json                counts, what was skipped, source versions and checksums, licences
    NOTICE                      the four picture sources and the two name sources, for whatever is trained on it

Concepts are joined over the packages by code point. 5 % of the images are held out by the hash of
(concept, style), and in addition all four styles of 3.5 % of the concepts (some 40).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from starflow.data.sets.glyphs.captions import Concept, Include, code_of, read_concepts, read_drawings
from starflow.data.sets.glyphs.packages import (
    GLYPH_PACKAGES,
    GlyphPackages,
    Package,
    Tarball,
    notice_text,
    open_package,
)
from starflow.data.sources.base import HELDOUT_SHARE, ImageRecord, SkippedImage, Split, unit_hash
from starflow.data.sources.folder import write_index
from starflow.errors import UserError
from starflow.io.files import check_output_folder, write_bytes, write_json, write_text

STYLES = ("3d", "flat", "noto", "twemoji")

HELDOUT_CONCEPT_SHARE = 0.035
"""Share of the concepts of which no style is trained on."""

# Mirrored, these would show wrong letters, digits or directions.
NO_FLIP_SUBGROUPS = frozenset(
    "alphanum arrow av-symbol award-medal book-paper computer currency emotion flag game keycap mail math money "
    "music musical-instrument office other-symbol phone place-building place-map punctuation religion "
    "time transport-sign warning zodiac".split()
)

NO_FLIP_WORDS = frozenset("left right leftwards rightwards waxing waning first last sign".split())

Renderer = Callable[[], bytes]
"""Gives the PNG of one image."""


@dataclass(frozen=True, slots=True)
class GlyphSummary:
    """What `prepare_glyphs` did.

    Attributes:
        concepts: concepts with at least one image.
        pictures: images in the index, by style.
        heldout: images held out.
        rendered: images drawn by this call; the others were there already.
        skipped: images of the packages that could not be decoded or drawn.
    """

    concepts: int
    pictures: dict[str, int]
    heldout: int
    rendered: int
    skipped: tuple[SkippedImage, ...]


def prepare_glyphs(
    output: Path,
    tarballs: Path | None = None,
    *,
    size: int = 256,
    include: Include = "things",
    progress: bool = True,
    sources: GlyphPackages = GLYPH_PACKAGES,
) -> GlyphSummary:
    """Build the set in `output`; images already there are kept, so a broken run continues.

    Args:
        output: folder to fill; made if missing. Fetched tarballs are kept in its `tarballs` folder.
        tarballs: folder that holds all six tarballs as `npm pack` names them; None fetches them.
        size: side of the images, pixels.
        include: "things" leaves out people and symbols (they are a third of Unicode's emoji).
        progress: show a progress bar.
        sources: packages with the checksums they must have.

    Raises:
        UserError: a package cannot be had or has a wrong checksum, or `output` cannot be written.
    """
    if size < 8:
        raise UserError(f"size is {size} pixels, expected at least 8: 256 is the sources' own")
    if importlib.util.find_spec("resvg_py") is None:
        raise UserError(
            "drawing SVG needs the package resvg-py, which is not installed: pip install 'starflow[glyphs]'"
        )
    check_output_folder(output)
    cache = output / "tarballs"
    opened = {package: open_package(package, tarballs, cache) for package in sources.all()}
    concepts = read_concepts(
        opened[sources.labels].json("en/data.json"),
        opened[sources.labels].json("meta/groups.json"),
        opened[sources.names].json("data-by-emoji.json"),
        include,
    )
    renderers = _renderers(sources, opened, size)
    records, skipped, rendered = _draw_all(output, concepts, renderers, size, progress)
    if not records:
        raise UserError(f"none of {len(concepts)} concepts could be drawn, first reason: {_first_reason(skipped)}")
    write_index(output, records)
    summary = _summarise(records, skipped, rendered)
    write_json(output / "summary.json", _summary_json(summary, sources, size, include))
    write_text(output / "NOTICE", notice_text(sources))
    return summary


def split_of(concept: Concept, style: str) -> tuple[Split, str]:
    """Choose the split of one image by hash alone, with the reason why it is held out: "concept", "pair" or "".

    >>> split_of(Concept("1f34e", "red apple", (), "food-drink", "food-fruit"), "3d")
    ('train', '')
    """
    if unit_hash(f"concept:{concept.code}") < HELDOUT_CONCEPT_SHARE:
        return "heldout", "concept"
    if unit_hash(f"pair:{concept.code}:{style}") < HELDOUT_SHARE:
        return "heldout", "pair"
    return "train", ""


def _record(folder: Path, concept: Concept, style: str) -> ImageRecord:
    split, kind = split_of(concept, style)
    flips = concept.subgroup not in NO_FLIP_SUBGROUPS and NO_FLIP_WORDS.isdisjoint(concept.name.lower().split())
    meta = {
        "style": style,
        "code": concept.code,
        "group": concept.group,
        "subgroup": concept.subgroup,
        "tags": ",".join(concept.tags),
        "flip": "yes" if flips else "no",
    }
    if kind:
        meta["heldout_kind"] = kind
    file = folder / "images" / style / f"{concept.code}.png"
    return ImageRecord(file, concept.name, concept.subgroup, split, f"{style}/{concept.code}", meta)


def _draw_all(
    output: Path, concepts: Iterable[Concept], renderers: dict[str, dict[str, Renderer]], size: int, progress: bool
) -> tuple[list[ImageRecord], list[SkippedImage], int]:
    """Draw what is missing; return the records, what was skipped, and how many were drawn."""
    from tqdm import tqdm

    wanted = [
        (_record(output, c, style), renderers[style][c.code])
        for c in concepts
        for style in STYLES
        if c.code in renderers[style]
    ]
    records, skipped, rendered = [], [], 0
    for record, draw in tqdm(wanted, desc="glyphs", unit="picture", disable=not progress):
        if not _is_whole(record.file, size):
            try:
                write_bytes(record.file, draw())
            except _BadImage as error:
                skipped.append(SkippedImage(record.name, str(error)))
                continue
            rendered += 1
        records.append(record)
    return records, skipped, rendered


class _BadImage(Exception):
    """An image of a package that cannot be decoded or drawn."""


def _renderers(sources: GlyphPackages, opened: dict[Package, Tarball], size: int) -> dict[str, dict[str, Renderer]]:
    """Collect for every style and code the function that gives the PNG."""
    rendered: dict[str, Renderer] = {}
    for name, data in opened[sources.render].under("assets"):
        stem, _, suffix = name.rpartition(".")
        if suffix == "webp":
            rendered[code_of(stem)] = lambda data=data: _png_from_raster(data, size)  # type: ignore[misc]
    renderers = {"3d": rendered}
    for style, package in (("flat", sources.flat), ("noto", sources.noto), ("twemoji", sources.twemoji)):
        drawings = read_drawings(opened[package].json("icons.json"), opened[package].json("chars.json"))
        renderers[style] = {
            code: lambda svg=svg: _png_from_svg(svg, size)  # type: ignore[misc]
            for code, svg in drawings.items()
        }
    return renderers


def _png_from_raster(data: bytes, size: int) -> bytes:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("RGBA")
    except (OSError, ValueError, SyntaxError) as error:
        raise _BadImage(str(error)) from None
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    png = io.BytesIO()
    image.save(png, format="PNG")
    return png.getvalue()


def _png_from_svg(svg: str, size: int) -> bytes:
    import resvg_py

    try:
        # System fonts would make the result depend on the machine; the sets draw letters as paths.
        data = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    except ValueError as error:
        raise _BadImage(str(error)) from None
    return _png_from_raster(bytes(data), size)


def _is_whole(path: Path, size: int) -> bool:
    """Whether a PNG of this size lies there; written atomically, so its header is enough."""
    try:
        with path.open("rb") as file:
            head = file.read(24)
    except OSError:
        return False
    return head[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(head[16:20], "big") == size


def _first_reason(skipped: list[SkippedImage]) -> str:
    return f"{skipped[0].name}: {skipped[0].reason}" if skipped else "no style draws any of them"


def _summarise(records: list[ImageRecord], skipped: list[SkippedImage], rendered: int) -> GlyphSummary:
    return GlyphSummary(
        concepts=len({record.meta["code"] for record in records}),
        pictures={style: sum(record.meta["style"] == style for record in records) for style in STYLES},
        heldout=sum(record.split == "heldout" for record in records),
        rendered=rendered,
        skipped=tuple(skipped),
    )


def _summary_json(summary: GlyphSummary, sources: GlyphPackages, size: int, include: Include) -> dict[str, object]:
    return {
        "concepts": summary.concepts,
        "pictures": summary.pictures,
        "heldout": summary.heldout,
        "skipped": [dataclasses.asdict(item) for item in summary.skipped],
        "size": size,
        "include": include,
        "sources": [dataclasses.asdict(package) for package in sources.all()],
    }
