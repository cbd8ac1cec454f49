"""Images in a folder: a prepared set with its index, or any folder of image files; ImageNet's folders as they come.

Contract: an `ImageRecord` names one image file and never holds its pixels, so that a corrupt, truncated or missing file
is told apart where it is opened (`starflow.data.images.open_image`). Records come in the index's order, or in the
sorted order of relative names: never in the file system's.

ImageNet's folders are called by synset ids (n01440764/...). Their readable names are not shipped here: the file
`LOC_synset_mapping.txt` comes with the images, `words.txt` with the development kit. Where one of them lies near the
images, classes are called by its names, otherwise by their ids.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from starflow.data.images import IMAGE_SUFFIXES, ImageError, read_image_size
from starflow.data.sources.base import (
    HELDOUT_SHARE,
    INDEX_FILE,
    ImageLocation,
    ImageRecord,
    ScannedImage,
    SkippedImage,
    Split,
    unit_hash,
)
from starflow.errors import UserError
from starflow.io.files import write_text

CAPTION_FILES = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")

SYNSET_FILES = ("LOC_synset_mapping.txt", "synset_words.txt", "words.txt")

FILES_PER_SHARD = 10_000
"""How many files count as one shard of a folder, which has no shards of its own."""

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
    def _records(self) -> list[ImageRecord]:
        return read_folder(self.folder)

    @property
    def shards(self) -> list[str]:
        """See `Source.shards`."""
        return [f"files from {start}" for start in range(0, len(self._records), FILES_PER_SHARD)]

    def scan(self, shard: int, *, sizes: bool) -> Iterator[ScannedImage | SkippedImage]:
        """See `Source.scan`; only headers are read, and only for sizes."""
        prepared = (self.folder / INDEX_FILE).is_file()
        for record in self._records[shard * FILES_PER_SHARD : (shard + 1) * FILES_PER_SHARD]:
            size = None
            if sizes:
                try:
                    size = read_image_size(record.file, record.name)
                except ImageError as error:
                    yield SkippedImage(record.name, error.reason)
                    continue
            location = (record.file.relative_to(self.folder).as_posix(),)
            split = record.split if prepared else None
            yield ScannedImage(record.name, record.caption, record.label, size, location, split)

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


def read_folder(folder: Path) -> list[ImageRecord]:
    """Read the records of a prepared set (`index.jsonl`) or of any folder of images.

    A plain folder's captions come, in this order, from captions/metadata .jsonl/.csv at its top (keys
    `file` or `file_name`, `caption` or `text`, optionally `label`), from a .txt beside the image, or
    from the sub-folder's name, which is then the class label as well. 5 % are held out by the hash of the
    relative name.

    Raises:
        UserError: no such folder, no images in it, or a malformed index or captions file.
    """
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "missing"
        raise UserError(f"{folder} is {kind}, expected a folder of pictures: name another or run prepare-data first")
    records = _read_index(folder) if (folder / INDEX_FILE).is_file() else _read_images(folder)
    if not records:
        raise UserError(f"{folder} holds no pictures, expected one or more ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return records


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
    lines = found.read_text(encoding="utf-8", errors="replace").splitlines()
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
    found = set(labels)
    return sorted(found, key=int) if all(label.isdecimal() for label in found) else sorted(found)


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


def _read_index(folder: Path) -> list[ImageRecord]:
    records = []
    for number, line in _json_lines(folder / INDEX_FILE):
        where = f"{folder / INDEX_FILE}, line {number}"
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
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    }
    # A listed image that is missing stays in: opening it reports it by name.
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
