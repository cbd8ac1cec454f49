"""What a data set is on disk: a list of captioned pictures, read from an index or a plain image folder.

Contract: a `Record` names one picture and never holds it; `open_image` decodes it and is the one place
where a corrupt, truncated or missing file is told apart (`ImageError`), so that callers can skip it by
name and count it. Order is the index's, or the sorted order of relative names: never the file system's.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from starflow.errors import UserError
from starflow.files import write_text

if TYPE_CHECKING:
    from PIL import Image

Split = Literal["train", "heldout"]

INDEX = "index.jsonl"
CAPTION_FILES = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
HELDOUT_SHARE = 0.05


class ImageError(UserError):
    """A picture that cannot be decoded; `path` names it, `reason` says why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is not a readable image ({reason}): replace it or remove it")
        self.path = path
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Record:
    """One captioned picture.

    Attributes:
        file: where the picture lies.
        caption: main caption, e.g. `"red apple"`; empty for none.
        label: class name, or None.
        split: training or held out.
        name: unique id within the set.
        meta: free text fields; the glyph set writes style, code, group, subgroup, tags, flip, heldout_kind.
    """

    file: Path
    caption: str
    label: str | None
    split: Split
    name: str
    meta: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A picture that was left out, by name, with the reason."""

    name: str
    reason: str


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone (first 52 bits of its sha256)."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:13], 16) / 16**13


def read_folder(folder: Path) -> list[Record]:
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


def write_index(folder: Path, records: Iterable[Record]) -> None:
    """Write `folder`/index.jsonl, one record a line, files relative to the folder."""
    lines = (json.dumps(_to_line(folder, record), ensure_ascii=False) for record in records)
    write_text(folder / INDEX, "".join(line + "\n" for line in lines))


def open_image(path: Path) -> Image.Image:
    """Decode a picture, upright, as RGB, or RGBA if it has transparency.

    Raises:
        ImageError: missing, truncated, corrupt, or no image at all.
    """
    return _decode(path, path)


def decode_image(data: bytes, name: str) -> Image.Image:
    """The same of a file that is in memory; `name` is for messages."""
    return _decode(io.BytesIO(data), Path(name))


def _decode(file: Path | io.BytesIO, path: Path) -> Image.Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    # What Pillow's decoders raise on broken files.
    broken = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
    try:
        with Image.open(file) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
        return _as_colour(image)
    except FileNotFoundError:
        raise ImageError(path, "no such file") from None
    except UnidentifiedImageError:
        raise ImageError(path, "no known image format") from None
    except broken as error:
        raise ImageError(path, " ".join(str(error).split()) or type(error).__name__) from None


def _as_colour(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit greys; convert() alone would clip them to white
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _to_line(folder: Path, record: Record) -> dict[str, Any]:
    return {
        "file": record.file.relative_to(folder).as_posix(),
        "caption": record.caption,
        "label": record.label,
        "split": record.split,
        "name": record.name,
        "meta": record.meta,
    }


def _read_index(folder: Path) -> list[Record]:
    records = []
    for number, line in _json_lines(folder / INDEX):
        where = f"{folder / INDEX}, line {number}"
        try:
            record = Record(
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


def _read_images(folder: Path) -> list[Record]:
    rows = _read_captions(folder)
    found = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    }
    # A listed picture that is missing stays in: opening it reports it by name.
    return [_image_record(folder, name, rows.get(name)) for name in sorted(found | rows.keys())]


def _image_record(folder: Path, name: str, row: dict[str, str] | None) -> Record:
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
    return Record(file=file, caption=caption, label=label, split=split, name=name)


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
