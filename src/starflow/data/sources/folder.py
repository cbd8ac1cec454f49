"""ImageNet's folders as they come: one a synset (n01440764/...), readable where the mapping file lies near them.

The names are ImageNet's own and not shipped: `LOC_synset_mapping.txt` comes with the pictures, `words.txt` with the
development kit. Without either, the classes are called by their synset ids.

What a data set is on disk: a list of captioned pictures, read from an index or a plain image folder.

Contract: a `ImageRecord` names one picture and never holds it; `open_image` decodes it and is the one place
where a corrupt, truncated or missing file is told apart (`ImageError`), so that callers can skip it by
name and count it. Order is the index's, or the sorted order of relative names: never the file system's.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starflow.data.images import SUFFIXES, picture_size
from starflow.data.sources.base import HELDOUT_SHARE, ImageLocation, SourceImage, unit_hash
from starflow.errors import UserError
from starflow.io.files import write_text

if TYPE_CHECKING:
    pass

from collections.abc import Iterator
from functools import cached_property

from starflow.data.images import ImageError
from starflow.data.sources.base import INDEX, ImageRecord, SkippedImage, Split

MAPPINGS = ("LOC_synset_mapping.txt", "synset_words.txt", "words.txt")

_SYNSET = re.compile(r"n\d{8}")

_LINE = re.compile(r"(n\d{8})\s+(\S.*)")

_ABOVE = 4
"""Folders above that are searched: the mapping lies beside ILSVRC/, the pictures in ILSVRC/Data/CLS-LOC/train."""


def synset_names(folder: Path, labels: Iterable[str]) -> dict[str, str]:
    """Readable names of synset ids, in the ids' order; empty where the labels are none, or no mapping file is near.

    A name is the synset's first word; two synsets of the same first word ("crane") are told apart by their others, or
    by their ids.
    """
    synsets = sorted(set(labels))
    if not synsets or not all(_SYNSET.fullmatch(label) for label in synsets):
        return {}
    absolute = folder.absolute()
    places = [absolute, *absolute.parents][: _ABOVE + 1]
    found = next((place / name for place in places for name in MAPPINGS if (place / name).is_file()), None)
    if found is None:
        return {}
    lines = found.read_text(encoding="utf-8", errors="replace").splitlines()
    listed = {match[1]: match[2].strip() for line in lines if (match := _LINE.fullmatch(line.strip()))}
    words = {synset: listed.get(synset, synset) for synset in synsets}
    first = {synset: text.split(",")[0].strip() for synset, text in words.items()}
    named = {synset: words[synset] if name in _shared(first) else name for synset, name in first.items()}
    twice = _shared(named)
    return {synset: f"{name} ({synset})" if name in twice else name for synset, name in named.items()}


def _shared(names: dict[str, str]) -> set[str]:
    """Names that several have, whatever their case."""
    counts = Counter(name.casefold() for name in names.values())
    return {name for name in names.values() if counts[name.casefold()] > 1}


def order_classes(labels: Iterable[str]) -> list[str]:
    """Class labels in order: by number where all are numbers, else by name (of synsets, ImageNet's own order)."""
    found = set(labels)
    return sorted(found, key=int) if all(label.isdecimal() for label in found) else sorted(found)


CAPTION_FILES = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")


def read_folder(folder: Path) -> list[ImageRecord]:
    """Records of a prepared set (`index.jsonl`) or of any folder of pictures.

    A plain folder's captions come, in this order, from captions/metadata .jsonl/.csv at its top (keys
    `file` or `file_name`, `caption` or `text`, optionally `label`), from a .txt beside the picture, or
    from the sub-folder's name, which is then the class label as well. 5 % are held out by the hash of the
    relative name.

    Raises:
        UserError: no such folder, no pictures in it, or a malformed index or captions file.
    """
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "missing"
        raise UserError(f"{folder} is {kind}, expected a folder of pictures: name another or run prepare-data first")
    records = _read_index(folder) if (folder / INDEX).is_file() else _read_images(folder)
    if not records:
        raise UserError(f"{folder} holds no pictures, expected one or more ({', '.join(sorted(SUFFIXES))})")
    return records


def write_index(folder: Path, records: Iterable[ImageRecord]) -> None:
    """Write `folder`/index.jsonl, one record a line, files relative to the folder."""
    lines = (json.dumps(_to_line(folder, record), ensure_ascii=False) for record in records)
    write_text(folder / INDEX, "".join(line + "\n" for line in lines))


def _to_line(folder: Path, record: ImageRecord) -> dict[str, Any]:
    return {
        "file": record.file.relative_to(folder).as_posix(),
        "caption": record.caption,
        "label": record.label,
        "split": record.split,
        "name": record.name,
        "meta": record.meta,
    }


def _read_index(folder: Path) -> list[ImageRecord]:
    records = []
    for number, line in _json_lines(folder / INDEX):
        where = f"{folder / INDEX}, line {number}"
        try:
            record = ImageRecord(
                file=folder / line["file"],
                caption=line["caption"],
                label=line["label"],
                split=line["split"],
                name=line["name"],
                meta=line["meta"],
            )
        except KeyError as error:
            raise UserError(f"{where}: the key {error} is missing; prepare the set again") from None
        if record.split not in ("train", "heldout"):
            raise UserError(f"{where}: split is {record.split!r}, expected 'train' or 'heldout'")
        records.append(record)
    return records


def _read_images(folder: Path) -> list[ImageRecord]:
    rows = _read_captions(folder)
    found = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    }
    # A listed picture that is missing stays in: opening it reports it by name.
    return [_image_record(folder, name, rows.get(name)) for name in sorted(found | rows.keys())]


def _image_record(folder: Path, name: str, row: dict[str, str] | None) -> ImageRecord:
    file = folder / name
    beside = file.with_suffix(".txt")
    label = None
    if row is not None:
        caption, label = row["caption"], row.get("label")
    elif beside.is_file():
        caption = " ".join(_read_text(beside).split())
    else:
        label = file.parent.name if file.parent != folder else None
        caption = (label or "").replace("_", " ")
    split: Split = "heldout" if unit_hash(name) < HELDOUT_SHARE else "train"
    return ImageRecord(file=file, caption=caption, label=label, split=split, name=name)


def _read_captions(folder: Path) -> dict[str, dict[str, str]]:
    path = next((folder / name for name in CAPTION_FILES if (folder / name).is_file()), None)
    if path is None:
        return {}
    rows = {}
    for number, line in _json_lines(path) if path.suffix == ".jsonl" else _csv_lines(path):
        file = line.get("file") or line.get("file_name")
        caption = line.get("caption", line.get("text"))
        if not isinstance(file, str) or not isinstance(caption, str):
            keys = ", ".join(map(str, line)) or "none"
            wanted = "'file' (or 'file_name') and 'caption' (or 'text'), both text"
            raise UserError(f"{path}, line {number}: the keys are {keys}; expected {wanted}")
        label = line.get("label")
        rows[Path(file).as_posix()] = {"caption": caption} | ({} if label in (None, "") else {"label": str(label)})
    return rows


def _json_lines(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    for number, text in enumerate(_read_text(path).splitlines(), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number} is not JSON ({error.msg}): one object a line is expected") from None
        if not isinstance(line, dict):
            raise UserError(f"{path}, line {number} holds a {type(line).__name__}, expected an object")
        yield number, line


def _csv_lines(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(_read_text(path).splitlines())
    for line in reader:
        yield reader.line_num, line


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as text: {error}") from None


FILES_A_SHARD = 10_000
"""Of a folder, which has no shards of its own."""


class FolderSource:
    """Files in a folder, as `starflow.data.sources.folder.read_folder` understands it; ImageNet's as they come.

    A place is the file's name relative to the folder.
    """

    def __init__(self, path: str) -> None:
        """Raises UserError: no such folder."""
        self.folder = Path(path).expanduser()
        if not path or not self.folder.is_dir():
            raise UserError(f"no folder of pictures at '{path}': set data.path to your pictures")

    def __reduce__(self) -> tuple[type[FolderSource], tuple[str]]:
        return FolderSource, (str(self.folder),)

    @cached_property
    def _records(self) -> list[ImageRecord]:
        return read_folder(self.folder)

    @property
    def shards(self) -> list[str]:
        return [f"files from {start}" for start in range(0, len(self._records), FILES_A_SHARD)]

    def scan(self, shard: int, *, sizes: bool) -> Iterator[SourceImage | SkippedImage]:
        """See `Source.scan`; only headers are read, and only for sizes."""
        prepared = (self.folder / INDEX).is_file()
        for record in self._records[shard * FILES_A_SHARD : (shard + 1) * FILES_A_SHARD]:
            size = None
            if sizes:
                try:
                    size = picture_size(record.file, record.name)
                except ImageError as error:
                    yield SkippedImage(record.name, error.reason)
                    continue
            place = (record.file.relative_to(self.folder).as_posix(),)
            split = record.split if prepared else None
            yield SourceImage(record.name, record.caption, record.label, size, place, split)

    def read(self, place: ImageLocation) -> bytes:
        path = self.folder / str(place[0])
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise ImageError(path, "no such file") from None
        except OSError as error:
            raise ImageError(path, str(error.strerror or error)) from None

    def class_names(self, labels: set[str]) -> dict[str, str]:
        return synset_names(self.folder, labels)
