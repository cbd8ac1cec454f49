"""Where the caption and class of an image come from: tables, files beside the image, and fields, read in one way.

Every source describes its images by fields (a table's row, a JSON object, the texts beside an image), and
`caption_and_label` alone decides what they mean. What it cannot use it says in a note, which the summary counts.
The summary tells what a data set came to once it was read: counts, and the first names of what is odd.
"""

from __future__ import annotations

import csv
import io
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from starflow.errors import UserError

FILE_KEYS = ("file", "file_name")

CAPTION_KEYS = ("caption", "text", "prompt", "txt", "captions")

LABEL_KEYS = ("label", "class", "cls")

TABLE_NAMES = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")
"""Tables of captions, the first of which is read in each folder; their case does not matter."""

SIDECAR_SUFFIXES = (".txt", ".caption", ".cls", ".json")
"""Endings, in any case, of the files beside an image that describe it; an earlier one goes before a later one."""

SEVERAL_CAPTIONS = "images with several captions, of which the first is read"

NOT_UTF8 = "images whose caption is not UTF-8: its odd bytes are replaced"


class Description(NamedTuple):
    """What the fields of an image say.

    Attributes:
        caption: empty for none.
        label: class name, or None.
        note: what could not be read as it is, or empty; a noun phrase, so that equal ones can be counted.
    """

    caption: str
    label: str | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of a table of captions: the image's file as the table names it, and its fields."""

    file: str
    fields: dict[str, Any]


def caption_and_label(fields: Mapping[str, Any], class_names: Mapping[str, str] | None = None) -> Description:
    """Find the caption and label in the fields of an image; a label alone is a caption too.

    Keys are those of `CAPTION_KEYS` and `LABEL_KEYS`, in any case. Of a list of captions the first is taken.

    Args:
        fields: a JSON object or a table's row; None and NaN stand for nothing.
        class_names: readable names by label, for captions.

    >>> caption_and_label({"text": "a cat on a sofa", "cls": 3})
    Description(caption='a cat on a sofa', label='3', note='')
    >>> caption_and_label({"label": "polar_bear"}).caption
    'polar bear'
    >>> caption_and_label({"caption": ["a red apple", "an apple"]})[:2]
    ('a red apple', None)
    """
    values = {str(key).strip().casefold(): value for key, value in fields.items()}
    caption, notes = None, []
    for key in CAPTION_KEYS:
        text, note = _as_caption(values.get(key), key)
        notes += [note] * bool(note)
        caption = text if not caption and text is not None else caption
    label = None
    for key in LABEL_KEYS:
        text, note = _as_label(values.get(key), key)
        notes += [note] * bool(note)
        label = label if label is not None else text
    if caption is None:
        caption = (class_names or {}).get(label or "", label or "").replace("_", " ")
    return Description(caption, label, notes[0] if notes else "")


def has_description(fields: Mapping[str, Any]) -> bool:
    """Whether any of the keys of captions and labels is there."""
    return not {str(key).strip().casefold() for key in fields}.isdisjoint((*CAPTION_KEYS, *LABEL_KEYS))


def sidecar_fields(files: Mapping[str, bytes]) -> tuple[dict[str, Any], str]:
    """Read the files beside an image, by their endings in lower case; returns fields, and a note or "".

    >>> sidecar_fields({".txt": b"a red\\napple", ".cls": b"7"})
    ({'label': '7', 'caption': 'a red apple'}, '')
    """
    fields: dict[str, Any] = {}
    note = ""
    for suffix in reversed(SIDECAR_SUFFIXES):
        data = files.get(suffix)
        if data is None:
            continue
        if suffix == ".json":
            fields |= parse_json_object(data)
            note = "" if fields or data.strip() == b"{}" else "images whose .json is no JSON object"
            continue
        text, whole = _decode(data)
        note = note if whole else NOT_UTF8
        fields |= {"label": text.strip()} if suffix == ".cls" else {"caption": " ".join(text.split())}
    return fields, note


def parse_json_object(data: bytes | str) -> dict[str, Any]:
    """Parse a JSON object; an empty dictionary where the bytes are none."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def read_table(path: Path) -> list[TableRow]:
    """Read a table of captions, `.jsonl` or `.csv`: a file, and a caption or a label, on each row.

    Raises:
        UserError: it cannot be read, and in which line.
    """
    rows = []
    for number, fields in json_lines(path) if path.suffix.lower() == ".jsonl" else _csv_lines(path):
        file = next((fields[key] for key in FILE_KEYS if fields.get(key)), None)
        if not isinstance(file, str) or not has_description(fields):
            keys = ", ".join(map(str, fields)) or "none"
            wanted = "'file' (or 'file_name') and 'caption' (or 'text') or 'label'"
            raise UserError(f"{path}, line {number}: the keys are {keys}; expected {wanted}")
        rows.append(TableRow(file, fields))
    return rows


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the JSON objects of a file with one on each line, with the lines' numbers.

    Raises:
        UserError: a line is no JSON object.
    """
    # Only a newline ends a line: U+2028 and its like may stand in a JSON string.
    for number, text in enumerate(_read_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep"
            raise UserError(f"{path}, line {number} is not JSON ({reason}): one object a line is expected") from None
        if not isinstance(line, dict):
            raise UserError(f"{path}, line {number} holds a {type(line).__name__}, expected an object")
        yield number, line


def shown_name(name: str) -> str:
    """The name as it can be printed and written: bytes that are no UTF-8 (lone surrogates) become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def _csv_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    first = 1
    try:
        head = list(reader.fieldnames or [])
        if len(set(head)) < len(head):
            raise UserError(f"{path}: the head is {', '.join(head)}; expected each name once")
        while True:
            first = reader.line_num + 1
            row = next(reader, None)
            if row is None:
                return
            if None in row or None in row.values():
                raise UserError(
                    f"{path}, line {first} has not the head's {len(head)} fields: "
                    "put a text that holds commas in quotes"
                )
            yield first, row
    except csv.Error as error:
        raise UserError(
            f"{path}, line {first}: {error}; expected each quote closed, and a quote within as two"
        ) from None


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as text: {error}; save it as UTF-8") from None


def _decode(data: bytes) -> tuple[str, bool]:
    """A text in UTF-8, or in UTF-16 where a mark says so, and whether all of it is."""
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return data.decode(encoding), True
    except UnicodeDecodeError:
        return data.decode(encoding, "replace"), False


def _as_caption(value: Any, key: str) -> tuple[str | None, str]:
    """A caption, None for nothing, and a note."""
    if _is_nothing(value):
        return None, ""
    if isinstance(value, bytes):
        text, whole = _decode(value)
        return text, "" if whole else NOT_UTF8
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode(), ""  # a lone surrogate of JSON cannot be written
    if isinstance(value, Sequence):
        texts = [one for one in value if isinstance(one, str) and one.strip()]
        note = SEVERAL_CAPTIONS if len(texts) > 1 else "" if texts or not value else _not_text(key, value)
        return (_as_caption(texts[0], key)[0] if texts else None), note
    return None, _not_text(key, value)


def _as_label(value: Any, key: str) -> tuple[str | None, str]:
    """A class name, None for nothing, and a note."""
    if _is_nothing(value):
        return None, ""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return _as_label(value[0], key) if len(value) == 1 else (None, f"images with {_count(value)} in '{key}'")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # tables keep whole numbers with gaps as floats
    if isinstance(value, bytes):
        value = _decode(value)[0]
    if not isinstance(value, str | int | float):
        return None, _not_text(key, value)
    # One form of Unicode, so that a folder's name on any system and a typed class are equal.
    text = unicodedata.normalize("NFC", shown_name(str(value)).strip())
    return text or None, ""


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _not_text(key: str, value: Any) -> str:
    return f"images whose '{key}' is a {type(value).__name__}, not a text"


def _count(values: Sequence[Any]) -> str:
    return "several classes" if values else "no class"


NAMES_SHOWN = 3


@dataclass
class SetSummary:
    """Counts over the lines of an index: every image, what was skipped and what was not used.

    >>> summary = SetSummary()
    >>> summary.add({"name": "a.png", "caption": "a cat", "label": None, "at": ["a.png"]})
    >>> summary.add({"name": "b.png", "caption": "", "label": None, "at": ["b.png"]})
    >>> describe_set({**summary.to_json(), "heldout": 1})[1]
    'warning: 1 of 2 pictures have no caption: b.png'
    """

    pictures: int = 0
    captioned: int = 0
    skipped: int = 0
    uncaptioned: list[str] = field(default_factory=list)
    """The first names."""
    labels: Counter[str] = field(default_factory=Counter)
    unused: dict[str, list[Any]] = field(default_factory=dict)
    """By reason, how many and the first name."""
    notes: dict[str, list[Any]] = field(default_factory=dict)
    first_reason: str = ""
    """The first skipped image with its reason, as the end of a sentence."""

    def add(self, line: Mapping[str, Any]) -> None:
        """Count one line of an index."""
        if "unused" in line:
            _counted(self.unused, line["reason"], line["unused"])
        elif "skipped" in line:
            self.skipped += 1
            self.first_reason = self.first_reason or f", the first: {line['skipped']}: {line['reason']}"
        else:
            self.pictures += 1
            self.captioned += bool(line["caption"].strip())
            if not line["caption"].strip() and len(self.uncaptioned) < NAMES_SHOWN:
                self.uncaptioned.append(line["name"])
            if line["label"]:
                self.labels[line["label"]] += 1
            if line.get("note"):
                _counted(self.notes, line["note"], line["name"])

    def to_json(self) -> dict[str, Any]:
        """What info.json keeps."""
        counts = {"pictures": self.pictures, "captioned": self.captioned, "labelled": self.labels.total()}
        counts |= {"classes": len(self.labels), "skipped": self.skipped}
        return {**counts, "uncaptioned": self.uncaptioned, "unused": self.unused, "notes": self.notes}


def describe_set(info: Mapping[str, Any], where: Path | None = None) -> list[str]:
    """Say what `SetSummary.to_json` has counted: one line for the whole, and a warning for each thing that is odd.

    Args:
        info: the counts, with those of held-out images as `heldout`.
        where: the file that names what was skipped or not used.
    """
    count, captioned = info["pictures"], info["captioned"]
    unused = sum(number for number, _ in info["unused"].values())
    lines = [
        f"pictures: {count}, {info['heldout']} of them held out, {captioned} with and {count - captioned} without a "
        f"caption, {info['classes']} classes; {info['skipped']} skipped, {unused} other files and rows not used"
        + (f" ({where})" if where and (unused or info["skipped"]) else "")
    ]
    if captioned < count:
        more = ", ..." if count - captioned > len(info["uncaptioned"]) else ""
        lines.append(
            f"warning: {count - captioned} of {count} pictures have no caption: {', '.join(info['uncaptioned'])}{more}"
        )
    if 0 < info["labelled"] < count:
        lines.append(f"warning: {count - info['labelled']} of {count} pictures have no class")
    for kind, counts in (("warning", info["notes"]), ("not used", info["unused"])):
        for reason, (number, name) in counts.items():
            lines.append(f"{kind}: {number} {reason}: {name}{', ...' if number > 1 else ''}")
    return lines


def _counted(counts: dict[str, list[Any]], reason: str, name: str) -> None:
    entry = counts.setdefault(reason, [0, name])
    entry[0] += 1
