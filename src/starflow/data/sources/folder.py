"""Images in a folder: a prepared set with its index, or any folder of image files; ImageNet's folders as they come.

A plain folder's captions come from a table in it or in the sub-folder where the image lies, or from files beside the
image, or, where nothing else describes any image, from the names of the sub-folders, which are the classes then.

Contract: an `ImageRecord` names one image file and never holds its pixels, so that a corrupt, truncated or missing file
is told apart where it is opened (`starflow.data.images.open_image`). Records come in the index's order, or in the
sorted order of relative names: never in the file system's.

ImageNet's folders are called by synset ids (n01440764/...). Their readable names are not shipped here: the file
`LOC_synset_mapping.txt` comes with the images, `words.txt` with the development kit. Where one of them lies near the
images, classes are called by its names, otherwise by their ids.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from starflow.data.images import IMAGE_SUFFIXES, ImageError, read_image_size
from starflow.data.sources.base import (
    HELDOUT_SHARE,
    INDEX_FILE,
    Found,
    ImageLocation,
    ImageRecord,
    ScannedImage,
    SkippedImage,
    Split,
    UnusedFile,
    files_state,
    unit_hash,
    unused_by_ending,
    walk_files,
)
from starflow.data.sources.captions import (
    SIDECAR_SUFFIXES,
    TABLE_NAMES,
    Description,
    SetSummary,
    TableRow,
    caption_and_label,
    describe_set,
    has_description,
    json_lines,
    read_table,
    shown_name,
    sidecar_fields,
)
from starflow.errors import UserError
from starflow.io.files import write_text

SYNSET_FILES = ("LOC_synset_mapping.txt", "synset_words.txt", "words.txt")

NO_IMAGE = "captions that no image takes"

FILES_PER_SHARD = 10_000
"""How many files count as one shard of a folder, which has no shards of its own."""

LONGEST_NUMBER = 18
"""Digits of a class's number; longer ones are names."""

_PARENTS_SEARCHED = 4
"""The mapping of synsets lies beside ILSVRC/, the images in ILSVRC/Data/CLS-LOC/train."""

_SYNSET = re.compile(r"n\d{8}")

_SYNSET_LINE = re.compile(r"(n\d{8})\s+(\S.*)")


class FolderSource:
    """A `Source` over the files of a folder, as `read_folder` understands them.

    A location is the file's name relative to the folder, and a shard is a run of `FILES_PER_SHARD` files.
    """

    def __init__(self, path: str) -> None:
        """Raises UserError: no such folder."""
        self.folder = Path(path).expanduser()
        if not path or not self.folder.is_dir():
            raise UserError(f"no folder of pictures at '{path}': set data.path to your pictures")

    def __reduce__(self) -> tuple[type[FolderSource], tuple[str]]:
        return FolderSource, (str(self.folder),)

    @cached_property
    def _listing(self) -> FolderListing:
        return list_folder(self.folder)

    @property
    def shards(self) -> list[str]:
        """See `Source.shards`."""
        return [f"files from {start}" for start in range(0, len(self._listing.records), FILES_PER_SHARD)]

    def scan(self, shard: int, *, sizes: bool) -> Iterator[Found]:
        """See `Source.scan`; only headers are read, and only for sizes."""
        listing = self._listing
        for record in listing.records[shard * FILES_PER_SHARD : (shard + 1) * FILES_PER_SHARD]:
            size = None
            if sizes:
                try:
                    size = read_image_size(record.file, record.name)
                except ImageError as error:
                    yield SkippedImage(record.name, error.reason)
                    continue
            location = (record.file.relative_to(self.folder).as_posix(),)
            split = record.split if listing.prepared else None
            note = listing.notes.get(record.name, "")
            yield ScannedImage(record.name, record.caption, record.label, size, location, split, note)
        if shard == 0:
            yield from listing.left

    def state(self) -> dict[str, Any]:
        """See `Source.state`."""
        listing = self._listing
        return files_state(
            self.folder, [str(one.file.relative_to(self.folder)) for one in listing.records], listing.texts
        )

    def read(self, location: ImageLocation) -> bytes:
        """See `Source.read`."""
        path = self.folder / str(location[0])
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise ImageError(path, "no such file") from None
        except OSError as error:
            raise ImageError(path, str(error.strerror or error)) from None

    def class_names(self, labels: set[str]) -> dict[str, str]:
        """See `Source.class_names` and `synset_names`."""
        return synset_names(self.folder, labels)


@dataclass
class FolderListing:
    """What lies in a folder: the records of its images, and all that is none of them."""

    records: list[ImageRecord]
    prepared: bool = False
    """Whether `index.jsonl` lists the images, with their split."""
    left: list[SkippedImage] = field(default_factory=list)
    """Images that cannot be used, and files and rows that are not used."""
    notes: dict[str, str] = field(default_factory=dict)
    """By an image's name, what of its description could not be read."""
    texts: list[str] = field(default_factory=list)
    """Relative names of the files that captions and labels come from."""

    def summary(self) -> list[str]:
        """Say what the folder came to, as `describe_set` does."""
        counts = SetSummary()
        for record in self.records:
            note = self.notes.get(record.name, "")
            counts.add({"name": record.name, "caption": record.caption, "label": record.label, "note": note})
        for one in self.left:
            counts.add({"unused" if isinstance(one, UnusedFile) else "skipped": one.name, "reason": one.reason})
        heldout = sum(record.split == "heldout" for record in self.records)
        return describe_set({**counts.to_json(), "heldout": heldout})


def list_folder(folder: Path) -> FolderListing:
    """List a prepared set (`index.jsonl`) or any folder of images, with all that is left out.

    A plain folder's captions come from captions/metadata .jsonl/.csv, in the folder or in sub-folders (keys `file` or
    `file_name`, relative to the table's folder, and those of `caption_and_label`); from .txt, .caption, .cls or .json
    beside the image; or, where no image has any of these, from the sub-folder's name, which is then the class label as
    well. 5 % are held out by the hash of the relative name.

    Raises:
        UserError: no such folder, no images in it, a malformed index or table, or tables that name no image of it.
    """
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "missing"
        raise UserError(f"{folder} is {kind}, expected a folder of pictures: name another or run prepare-data first")
    names, left = walk_files(folder)
    listing = _list_prepared(folder, names) if INDEX_FILE in names else _list_plain(folder, names)
    listing.left += left
    if not listing.records:
        endings = Counter(PurePath(name).suffix.lower() or "no ending" for name in names)
        holds = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(4)) or "no files"
        raise UserError(
            f"{folder} holds no pictures ({shown_name(holds)}), expected one or more "
            f"({', '.join(sorted(IMAGE_SUFFIXES))}); for .tar or .parquet files set data.source"
        )
    return listing


def read_folder(folder: Path, notify: Callable[[str], None] | None = None) -> list[ImageRecord]:
    """Read the records of a folder's images, as `list_folder` finds them; ImageNet's classes are called by their names.

    Args:
        folder: of the images.
        notify: is told what the folder came to, a line at a time.

    Raises:
        UserError: see `list_folder`.
    """
    listing = list_folder(folder)
    if notify is not None:
        for line in listing.summary():
            notify(line)
    names = synset_names(folder, {record.label for record in listing.records if record.label is not None})
    if not names:
        return listing.records
    return [
        replace(one, label=names[one.label], caption=names[one.label] if one.caption == one.label else one.caption)
        if one.label in names
        else one
        for one in listing.records
    ]


def write_index(folder: Path, records: Iterable[ImageRecord]) -> None:
    """Write `folder`/index.jsonl, one record a line, files relative to the folder."""
    lines = (json.dumps(_to_line(folder, record), ensure_ascii=False) for record in records)
    write_text(folder / INDEX_FILE, "".join(line + "\n" for line in lines))


def synset_names(folder: Path, labels: Iterable[str]) -> dict[str, str]:
    """Look up readable names of ImageNet's synset ids, in the ids' order.

    A name is the synset's first word; two synsets of the same first word ("crane") are told apart by their others, or
    by their ids.

    Returns:
        Names by id; empty where a label is no synset id, or no mapping file lies in the folder or near above it.
    """
    synsets = sorted(set(labels))
    if not synsets or not all(_SYNSET.fullmatch(label) for label in synsets):
        return {}
    absolute = folder.absolute()
    folders = [absolute, *absolute.parents][: _PARENTS_SEARCHED + 1]
    found = next((near / name for near in folders for name in SYNSET_FILES if (near / name).is_file()), None)
    if found is None:
        return {}
    lines = found.read_text(encoding="utf-8", errors="replace").split("\n")
    listed = {match[1]: match[2].strip() for line in lines if (match := _SYNSET_LINE.fullmatch(line.strip()))}
    words = {synset: listed.get(synset, synset) for synset in synsets}
    first = {synset: text.split(",")[0].strip() for synset, text in words.items()}
    ambiguous = _repeated(first)
    named = {synset: words[synset] if name in ambiguous else name for synset, name in first.items()}
    twice = _repeated(named)
    return {synset: f"{name} ({synset})" if name in twice else name for synset, name in named.items()}


def order_classes(labels: Iterable[str]) -> list[str]:
    """Sort class labels: by number where all are numbers, else by name (of synsets, ImageNet's own order).

    >>> order_classes(["10", "9", "2", "9"]), order_classes(["dog", "cat"])
    (['2', '9', '10'], ['cat', 'dog'])
    """
    found = sorted(set(labels))
    numbers = all(label.isdecimal() and len(label) <= LONGEST_NUMBER for label in found)
    return sorted(found, key=int) if numbers else found


def _repeated(names: dict[str, str]) -> set[str]:
    """Names that several have, whatever their case."""
    counts = Counter(name.casefold() for name in names.values())
    return {name for name in names.values() if counts[name.casefold()] > 1}


def _to_line(folder: Path, record: ImageRecord) -> dict[str, Any]:
    return {
        "file": record.file.relative_to(folder).as_posix(),
        "caption": record.caption,
        "label": record.label,
        "split": record.split,
        "name": record.name,
        "meta": record.meta,
    }


def _list_prepared(folder: Path, names: Sequence[str]) -> FolderListing:
    records = []
    for number, line in json_lines(folder / INDEX_FILE):
        where = f"{folder / INDEX_FILE}, line {number}"
        try:
            file, caption, label = line["file"], line["caption"], line["label"]
            texts = (file, caption, line["name"], "" if label is None else label)
            record = ImageRecord(folder / str(file), caption, label, line["split"], line["name"], line["meta"])
        except KeyError as error:
            raise UserError(f"{where}: the key {error} is missing; prepare the set again") from None
        if not all(isinstance(text, str) for text in texts) or not isinstance(record.meta, dict):
            raise UserError(f"{where}: a value is of the wrong type, expected texts; prepare the set again")
        if not record.file.is_relative_to(folder) or ".." in record.file.parts[len(folder.parts) :]:
            raise UserError(f"{where}: {file} lies outside of the folder; prepare the set again")
        if record.split not in ("train", "heldout"):
            raise UserError(f"{where}: split is {record.split!r}, expected 'train' or 'heldout'")
        records.append(record)
    listed = {str(record.file.relative_to(folder)) for record in records}
    unlisted = [name for name in names if PurePath(name).suffix.lower() in IMAGE_SUFFIXES and name not in listed]
    left: list[SkippedImage] = [UnusedFile(shown_name(name), f"images not in {INDEX_FILE}") for name in unlisted]
    return FolderListing(records, True, left, texts=[INDEX_FILE])


def _list_plain(folder: Path, names: Sequence[str]) -> FolderListing:
    listing = FolderListing([])
    tables, others = _split_tables(names)
    images = [name for name in names if PurePath(name).suffix.lower() in IMAGE_SUFFIXES]
    rows = _match_rows(folder, names, tables, listing)
    images = sorted({*images, *rows})  # a row may name a file of any ending
    described = {name: caption_and_label(row.fields) for name, row in rows.items()}
    beside = _sidecars(names, [name for name in images if name not in rows])
    described |= {name: found for name, files in beside.items() if (found := _read_sidecars(folder, files))}
    used = {*tables, *images, *(name for found in beside.values() for name in found.values())}
    told = bool(rows) or any(one.caption or one.label is not None for one in described.values())
    for name in images:
        parent = PurePosixPath(name).parent.name
        fallback = {} if told or not parent else {"label": parent}
        caption, label, note = described.get(name) or caption_and_label(fallback)
        shown = shown_name(name)
        split: Split = "heldout" if unit_hash(shown) < HELDOUT_SHARE else "train"
        listing.records.append(ImageRecord(folder / name, caption, label, split, shown))
        if note:
            listing.notes[shown] = note
    listing.texts = sorted(used.difference(images))
    listing.left += [UnusedFile(shown_name(name), f"tables beside another table ({name})") for name in others]
    for name in names:
        if name in used or name in others or name in SYNSET_FILES:
            continue
        is_text = PurePath(name).suffix.lower() in SIDECAR_SUFFIXES[:3]
        listing.left.append(UnusedFile(shown_name(name), NO_IMAGE) if is_text else unused_by_ending(name))
    return listing


def _split_tables(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The tables that are read, one a folder, and the others."""
    tables: dict[str, list[str]] = defaultdict(list)
    for name in names:
        place, base = posixpath.split(name)
        if base.lower() in TABLE_NAMES:
            tables[place].append(name)
    ranked = [sorted(some, key=lambda name: TABLE_NAMES.index(Path(name).name.lower())) for some in tables.values()]
    return [some[0] for some in ranked], [name for some in ranked for name in some[1:]]


def _match_rows(
    folder: Path, names: Sequence[str], tables: Sequence[str], listing: FolderListing
) -> dict[str, TableRow]:
    """The row of each file that a table names; rows that name none, or one again, are left.

    Raises:
        UserError: there are rows, and none of them names a file.
    """
    find = _NameFinder(folder, set(names).difference(tables))
    rows: dict[str, TableRow] = {}
    count = 0
    for table in tables:
        for row in read_table(folder / table):
            count += 1
            name = find(posixpath.dirname(table), row.file)
            if name is None:
                listing.left.append(UnusedFile(shown_name(row.file), NO_IMAGE))
            elif name in rows:
                listing.left.append(UnusedFile(shown_name(row.file), "further captions of an image: the first is read"))
            else:
                rows[name] = row
    if count and not rows:
        raise UserError(
            f"none of the {count} rows of {folder / tables[0]} names a file that is there (the first: "
            f"'{listing.left[0].name}'): names are relative to the table's folder"
        )
    return rows


class _NameFinder:
    """Finds the file that a table means: relative or absolute, in any form of Unicode, with slashes of either kind."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self.names = set(names)
        self.roots = {f"{os.path.abspath(folder)}/", f"{os.path.realpath(folder)}/"}  # noqa: PTH100
        self.forms: dict[str, str] = {}
        for name in self.names:
            form = unicodedata.normalize("NFC", name)
            self.forms[form] = "" if form in self.forms else name  # of two in two forms, neither is meant for sure

    def __call__(self, place: str, file: str) -> str | None:
        for text in (file, file.replace("\\", "/")):
            inside = next((text[len(root) :] for root in self.roots if text.startswith(root)), None)
            for start in ("",) if inside is not None else (place, ""):
                name = posixpath.normpath(posixpath.join(start, text if inside is None else inside))
                found = name if name in self.names else self.forms.get(unicodedata.normalize("NFC", name))
                if found:
                    return found
        return None


def _sidecars(names: Sequence[str], images: Sequence[str]) -> dict[str, dict[str, str]]:
    """Of each image that has any, the files beside it that describe it, by their endings in lower case."""
    by_stem: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        stem, suffix = posixpath.splitext(name)
        if suffix.lower() in SIDECAR_SUFFIXES:
            by_stem[stem].setdefault(suffix.lower(), name)
    for found in by_stem.values():
        if ".txt" in found:
            found.pop(".caption", None)  # one caption alone is read
    return {name: by_stem[stem] for name in images if (stem := posixpath.splitext(name)[0]) in by_stem}


def _read_sidecars(folder: Path, files: dict[str, str]) -> Description | None:
    """What the files beside an image say of it; None where they say nothing of captions or labels."""
    try:
        fields, note = sidecar_fields({suffix: (folder / name).read_bytes() for suffix, name in files.items()})
    except OSError as error:
        return Description("", None, f"images whose caption cannot be read ({error.strerror})")
    if not has_description(fields):
        return Description("", None, note) if note else None
    caption, label, other = caption_and_label(fields)
    return Description(caption, label, note or other)
