"""The set "glyphs2": some 25,000 captioned pictures in many styles, from packages of npm and Debian.

`prepare_glyphs2` writes a folder that `records.read_folder` reads:

    images/<style>/...png   RGBA, alpha kept so that backgrounds are chosen later
    index.jsonl             one record a line; `meta` says style, concept, sampling group and why it is held out
    skipped.jsonl           everything of the packages that is not in the set, by name, with the reason
    summary.json            counts by style and by reason, versions and checksums, licences
    NOTICE                  all sources, for whatever is trained on it
    sheets/<style>-NN.png   contact sheets to look at, if asked for

Held out are (i) 5 % of the pairs of a concept and a family of styles ("pair"), and (ii) 3 % of the concepts in
all styles ("concept"). Fluent's 3D and flat drawings, all variants of an icon, and all skin tones and sexes of a role
in one style are one unit; of furniture, of which a concept has many models, all views of a model with its icon are.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from starflow.data.sets.glyphs.captions import Concept, read_concepts
from starflow.data.sets.glyphs.packages import Package, Tarball, open_package
from starflow.data.sets.glyphs2 import furniture, icons, illustrations
from starflow.data.sets.glyphs2.drawings import (
    STYLES,
    BadPicture,
    Drawing,
    draw,
    is_grey,
    is_whole,
    near_duplicates,
    thumbnail,
    write_sheets,
)
from starflow.data.sets.glyphs2.furniture import model_views
from starflow.data.sets.glyphs2.packages import REFUSED, DebianPackage, Packages, notice_text, open_debian
from starflow.data.sets.glyphs2.words import words_of
from starflow.data.sources.base import ImageRecord, SkippedImage, Split, unit_hash
from starflow.data.sources.folder import write_index
from starflow.errors import UserError
from starflow.io.files import check_output_folder, write_bytes, write_json, write_text

HELDOUT_PAIR_SHARE = 0.05
HELDOUT_CONCEPT_SHARE = 0.03


@dataclass(frozen=True, slots=True)
class Glyphs2Summary:
    """What `prepare_glyphs2` did.

    Attributes:
        pictures: pictures in the index, by style.
        groups: pictures in the index, by sampling group.
        concepts: different concepts.
        heldout: pictures held out, by kind.
        drawn: pictures drawn by this call; the others were there already.
        left_out: pictures of the packages that are not in the set, by reason.
        skipped: source pictures that could not be drawn.
    """

    pictures: dict[str, int]
    groups: dict[str, int]
    concepts: int
    heldout: dict[str, int]
    drawn: int
    left_out: dict[str, int]
    skipped: tuple[SkippedImage, ...]


def prepare_glyphs2(
    output: Path,
    folder: Path | None = None,
    *,
    size: int = 256,
    models: bool = True,
    held_out_style: str = "",
    sheets: int = 0,
    workers: int = 1,
    progress: bool = True,
    packages: Packages | None = None,
) -> Glyphs2Summary:
    """Build the set in `output`; pictures already there are kept, so a broken run continues.

    Args:
        output: folder to fill; made if missing. Fetched packages are kept in its `packages` folder.
        folder: folder that holds all packages as `npm pack` and `apt-get download` name them; None fetches them.
        size: side of the pictures, pixels.
        models: draw the views of the furniture's models, which needs VTK and takes most of the time.
        held_out_style: a style of which nothing is trained on, for a figure on a style never seen.
        sheets: contact sheets of each style at most, in the folder `sheets`.
        workers: processes that draw.
        progress: show a progress bar.
        packages: packages with the checksums they must have.

    Raises:
        UserError: a package cannot be had or has a wrong checksum, or `output` cannot be written.
    """
    packages = packages or Packages()
    if size < 8:
        raise UserError(f"size is {size} pixels, expected at least 8: 256 is the sources' own")
    if importlib.util.find_spec("resvg_py") is None:
        raise UserError(
            "drawing SVG needs the package resvg-py, which is not installed: pip install 'starflow[glyphs]'"
        )
    if held_out_style and held_out_style not in STYLES:
        raise UserError(f"no style is called '{held_out_style}', expected one of {', '.join(STYLES)}")
    check_output_folder(output)
    cache = output / "packages"
    catalogues = furniture.read_catalogues(open_debian(packages.furniture, folder, cache))
    found: Iterator[Drawing | tuple[str, str]] = _all_drawings(packages, catalogues, folder, cache)
    if models:
        views = model_views(catalogues, output / "images", size=size, workers=workers, progress=progress)
        found = chain(found, views)
    drawings, left_out = _sorted_out(found)
    records, skipped, drawn = _draw_all(output, drawings, size, workers, progress)
    if not records:
        raise UserError(f"none of {len(drawings)} pictures could be drawn")
    records = [_without_style(record, held_out_style) for record in records]
    write_index(output, records)
    rows = [{"name": name, "reason": reason} for name, reason in left_out] + [asdict(one) for one in skipped]
    write_text(output / "skipped.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    summary = _summarise(records, left_out, skipped, drawn)
    write_json(output / "summary.json", _summary_json(summary, packages, size))
    write_text(output / "NOTICE", notice_text(packages))
    write_sheets(records, output / "sheets", sheets_a_style=sheets)
    return summary


def split_of(concept: str, family: str) -> tuple[Split, str]:
    """(split, why held out: "concept", "pair" or "") of a concept in a family of styles, or of a model, by hash alone.

    >>> split_of("chair", "noto"), split_of("alien", "noto")
    (('train', ''), ('heldout', 'concept'))
    """
    if unit_hash(f"glyphs2 concept:{concept}") < HELDOUT_CONCEPT_SHARE:
        return "heldout", "concept"
    if unit_hash(f"glyphs2 pair:{concept}:{family}") < HELDOUT_PAIR_SHARE:
        return "heldout", "pair"
    return "train", ""


def _all_drawings(
    packages: Packages, catalogues: list[furniture.Catalogue], folder: Path | None, cache: Path
) -> Iterator[Drawing | tuple[str, str]]:
    """All pictures of all packages but the views of models, or (name, why it is left out)."""
    opened = {package: open_package(package, folder, cache) for package in packages.glyphs.all()}
    sources = packages.glyphs
    names_json = opened[sources.names].json("data-by-emoji.json")
    labels = opened[sources.labels]
    things = read_concepts(labels.json("en/data.json"), labels.json("meta/groups.json"), names_json, "things")
    people = illustrations.read_people(labels, names_json)
    render = opened[sources.render]
    styles = {"flat": opened[sources.flat], "noto": opened[sources.noto], "twemoji": opened[sources.twemoji]}
    yield from illustrations.base_drawings(things, render, styles, people=False)
    yield from illustrations.base_drawings(people, render, styles, people=True)
    names = illustrations.Names(labels, names_json)
    vocabulary = set(_words(things)) | set(_words(people))
    for name, package in packages.icons.items():
        tarball = open_package(package, folder, cache)
        found = list(_of_icon_set(name, tarball, things, names))
        vocabulary.update(word for one in found if isinstance(one, Drawing) for word in words_of(one.caption))
        yield from _prefixed(name, found)
    for catalogue in catalogues:
        found = list(furniture.icon_drawings(catalogue))
        vocabulary.update(word for one in found if isinstance(one, Drawing) for word in words_of(one.caption))
        yield from _prefixed("furniture", found)
    archive = open_debian(packages.clip_art, folder, cache)
    yield from _prefixed("clip-art", illustrations.clip_art_drawings(archive, frozenset(vocabulary)))


def _of_icon_set(
    name: str, tarball: Tarball, things: list[Concept], names: illustrations.Names
) -> Iterator[Drawing | tuple[str, str]]:
    if name in illustrations.NAMED_STYLES:
        return illustrations.named_drawings(things, names, name, tarball)
    return icons.icon_drawings(name, tarball)


def _words(concepts: Iterable[Concept]) -> Iterator[str]:
    for concept in concepts:
        for text in (concept.name, *concept.tags):
            yield from words_of(text)


def _prefixed(source: str, found: Iterable[Drawing | tuple[str, str]]) -> Iterator[Drawing | tuple[str, str]]:
    """The same, names of what is left out with their source before them."""
    for one in found:
        yield one if isinstance(one, Drawing) else (f"{source}/{one[0]}", one[1])


def _sorted_out(found: Iterable[Drawing | tuple[str, str]]) -> tuple[list[Drawing], list[tuple[str, str]]]:
    """The drawings, by name, and what is left out."""
    drawings: dict[str, Drawing] = {}
    left_out = []
    for one in found:
        if isinstance(one, tuple):
            left_out.append(one)
        elif one.name in drawings:
            left_out.append((one.name, "a picture of that name is there already"))
        else:
            drawings[one.name] = one
    return [drawings[name] for name in sorted(drawings)], left_out


def _record(folder: Path, drawing: Drawing, emoji_concepts: frozenset[str]) -> ImageRecord:
    style = STYLES[drawing.style]
    split, kind = split_of(drawing.concept, drawing.extra.get("model", style.family))
    meta = {
        "style": drawing.style,
        "phrase": style.phrase,
        "family": style.family,
        "sampling_group": style.group,
        "concept": drawing.concept,
        "group": drawing.extra.get("emoji_group", "objects" if style.group == "objects" else "icons"),
        "subgroup": drawing.kind,
        "tags": ",".join(drawing.tags),
        "flip": "yes" if drawing.flip else "no",
        # Plain prompts are to give emoji wherever there is one of that name.
        "say_style": "always" if style.group == "icons" or _is_second(drawing, emoji_concepts) else "sometimes",
    }
    if kind:
        meta["heldout_kind"] = kind
    meta |= {key: value for key, value in drawing.extra.items() if key != "emoji_group" and value}
    file = folder / "images" / f"{drawing.name}.png"
    return ImageRecord(file, drawing.caption, drawing.kind, split, drawing.name, meta)


def _without_style(record: ImageRecord, held_out_style: str) -> ImageRecord:
    """The same, held out if it is of that style."""
    if record.meta["style"] != held_out_style:
        return record
    return replace(record, split="heldout", meta=record.meta | {"heldout_kind": "style"})


def _is_second(drawing: Drawing, emoji_concepts: frozenset[str]) -> bool:
    return STYLES[drawing.style].group == "objects" and drawing.concept in emoji_concepts


def _draw_all(
    output: Path, drawings: list[Drawing], size: int, workers: int, progress: bool
) -> tuple[list[ImageRecord], list[SkippedImage], int]:
    """Draw what is missing; returns the records, what is left out after drawing, and how many were drawn."""
    from tqdm import tqdm

    emoji_concepts = frozenset(d.concept for d in drawings if STYLES[d.style].group == "emoji")
    records = [_record(output, drawing, emoji_concepts) for drawing in drawings]
    failed: dict[str, str] = {}
    thumbnails: dict[str, NDArray[np.uint8]] = {}
    drawn = 0
    with _mapper(workers) as mapper:
        tasks = [(record.file, drawing) for record, drawing in zip(records, drawings, strict=True)]
        results = mapper(partial(_draw_one, size=size), tasks)
        bar = tqdm(records, desc="glyphs2", unit="picture", disable=not progress)
        for record, result in zip(bar, results, strict=True):
            drawn += result.drawn
            if result.reason:
                failed[record.name] = result.reason
            elif result.thumbnail is not None:
                thumbnails[record.name] = result.thumbnail
                if record.meta["style"] == "clip-art" and is_grey(result.thumbnail):
                    record.meta["phrase"] = f"black and white {record.meta['phrase']}"
    failed |= _duplicates([record for record in records if record.name in thumbnails], thumbnails)
    skipped = [SkippedImage(name, reason) for name, reason in failed.items()]
    return [record for record in records if record.name not in failed], skipped, drawn


def _duplicates(records: list[ImageRecord], thumbnails: dict[str, NDArray[np.uint8]]) -> dict[str, str]:
    """The pictures that are nearly the same as another one of their family of styles, with the reason.

    Views of models, which are many, are compared with those of the same concept alone.
    """
    families: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in records:
        meta = record.meta
        families[meta["family"], meta["concept"] if meta["family"] == "furniture" else ""].append(record.name)
    found: dict[str, str] = {}
    for names in families.values():
        same = near_duplicates(np.stack([thumbnails[name] for name in names]))
        found |= {names[number]: f"nearly the same as {names[other]}" for number, other in same.items()}
    return found


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[..., Iterable[_Result]]]:
    if workers <= 1:
        yield map
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield partial(pool.imap, chunksize=32)


@dataclass(frozen=True, slots=True)
class _Result:
    """What became of one picture: why it could not be drawn, its thumbnail if near duplicates are looked for."""

    reason: str = ""
    thumbnail: NDArray[np.uint8] | None = None
    drawn: bool = False


def _draw_one(task: tuple[Path, Drawing], size: int) -> _Result:
    """Draw one picture to its file if it is not there; runs in a worker."""
    file, drawing = task
    compared = STYLES[drawing.style].group in ("objects", "icons")
    if is_whole(file, size):
        return _Result(thumbnail=thumbnail(file.read_bytes()) if compared else None)
    try:
        png = draw(drawing.art, size)
    except BadPicture as error:
        return _Result(str(error))
    write_bytes(file, png)
    return _Result(thumbnail=thumbnail(png) if compared else None, drawn=True)


def _summarise(
    records: list[ImageRecord], left_out: list[tuple[str, str]], skipped: list[SkippedImage], drawn: int
) -> Glyphs2Summary:
    reasons = Counter(f"{name.partition('/')[0]}: {_kind_of(reason)}" for name, reason in left_out)
    return Glyphs2Summary(
        pictures=dict(sorted(Counter(record.meta["style"] for record in records).items())),
        groups=dict(sorted(Counter(record.meta["sampling_group"] for record in records).items())),
        concepts=len({record.meta["concept"] for record in records}),
        heldout=dict(Counter(record.meta["heldout_kind"] for record in records if record.split == "heldout")),
        drawn=drawn,
        left_out=dict(reasons),
        skipped=tuple(skipped),
    )


def _kind_of(reason: str) -> str:
    """A reason without what it names: "word 'add'" is "word"."""
    return re.sub(r"^(category|word|folder|the same file) .*", r"\1", reason)


def _summary_json(summary: Glyphs2Summary, packages: Packages, size: int) -> dict[str, object]:
    found = asdict(summary)
    found["sources"] = [_source(package) for package in packages.all()]
    return found | {"size": size, "refused": REFUSED}


def _source(package: Package | DebianPackage) -> dict[str, str]:
    return asdict(package)
