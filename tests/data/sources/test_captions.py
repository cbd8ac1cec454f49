"""Captions and labels: tables as Python's csv and json mean them, files beside an image, fields of every kind."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from starflow.data.sources.captions import (
    NOT_UTF8,
    SEVERAL_CAPTIONS,
    caption_and_label,
    parse_json_object,
    read_table,
    sidecar_fields,
)
from starflow.errors import UserError

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))

SEPARATORS = 'a red\u2028apple\x85\x0b\x1c, on a "table"\nin the sun'


@settings(max_examples=40, derandomize=True)
@given(st.dictionaries(st.text(), st.integers() | st.text()))
def test_a_json_object_is_parsed(values: dict[str, int | str]) -> None:
    assert parse_json_object(json.dumps(values).encode()) == values


@pytest.mark.parametrize("data", [b"[1, 2]", b"3", b'"text"', b"{", b"", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_object_is_empty(data: bytes) -> None:
    assert parse_json_object(data) == {}


@pytest.mark.parametrize(
    ("fields", "caption", "label", "note"),
    [
        ({"prompt": "last", "caption": "first", "class": "cat"}, "first", "cat", ""),
        ({"TEXT": "laion", " Label ": "Cat "}, "laion", "Cat", ""),
        ({"caption": "", "text": "a cat"}, "a cat", None, ""),
        ({"caption": "", "label": "cat"}, "", "cat", ""),
        ({"caption": None, "label": 3.0}, "3", "3", ""),
        ({"caption": float("nan"), "label": float("nan")}, "", None, ""),
        ({"caption": 5, "label": "", "cls": 0}, "0", "0", "images whose 'caption' is a int, not a text"),
        ({"caption": ["a", "b"]}, "a", None, SEVERAL_CAPTIONS),
        ({"captions": ["a"]}, "a", None, ""),
        ({"caption": [1, 2]}, "", None, "images whose 'caption' is a list, not a text"),
        ({"caption": {"en": "a"}}, "", None, "images whose 'caption' is a dict, not a text"),
        ({"caption": b"gr\xc3\xbcn"}, "grün", None, ""),
        ({"caption": b"gr\xfcn"}, "gr\ufffdn", None, NOT_UTF8),
        ({"caption": "\ud800 lone"}, "? lone", None, ""),
        ({"label": "cafe\u0301"}, "café", "café", ""),
        ({"label": ["cat"]}, "cat", "cat", ""),
        ({"label": ["cat", "dog"]}, "", None, "images with several classes in 'label'"),
        ({}, "", None, ""),
    ],
)
def test_fields_are_read_or_said(fields: dict[str, Any], caption: str, label: str | None, note: str) -> None:
    assert caption_and_label(fields) == (caption, label, note)


def test_files_beside_an_image() -> None:
    files = {".txt": b"a\nb", ".caption": b"other", ".cls": b" 7\n", ".json": b'{"label": 3, "caption": "json"}'}
    assert caption_and_label(sidecar_fields(files)[0]) == ("a b", "7", "")
    del files[".txt"], files[".cls"]
    assert caption_and_label(sidecar_fields(files)[0]) == ("other", "3", "")
    assert sidecar_fields({".txt": "grün".encode("utf-16")}) == ({"caption": "grün"}, "")
    assert sidecar_fields({".txt": b"\xef\xbb\xbfgr\xfcn"}) == ({"caption": "gr\ufffdn"}, NOT_UTF8)
    assert sidecar_fields({".json": b"[]"}) == ({}, "images whose .json is no JSON object")


@settings(max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(captions=st.lists(TEXTS, min_size=1, max_size=5), ending=st.sampled_from(["\n", "\r\n"]))
def test_tables_hold_any_text(tmp_path: Path, captions: list[str], ending: str) -> None:
    captions = [*captions, SEPARATORS]
    names = [f"{number}.png" for number in range(len(captions))]
    lines = [json.dumps({"file": n, "caption": c}, ensure_ascii=False) for n, c in zip(names, captions, strict=True)]
    (tmp_path / "a.jsonl").write_bytes("".join(f"{line}{ending}" for line in lines).encode())
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator=ending)
        writer.writerows([("file", "caption"), *zip(names, captions, strict=True)])
    for name in ("a.jsonl", "a.csv"):
        rows = read_table(tmp_path / name)
        assert [(row.file, row.fields["caption"]) for row in rows] == list(zip(names, captions, strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "file,caption\na.png,red, round\n",
            "line 2 has not the head's 2 fields: put a text that holds commas in quotes",
        ),
        ("file,caption\na.png\n", "line 2 has not the head's 2 fields"),
        (
            'file,caption\na.png,x\nb.png,"never closed\nc.png,y\n',
            "line 3: unexpected end of data; expected each quote",
        ),
        ('file,caption\na.png,"one" two\n', "line 2: ',' expected after"),
        ("file,caption,caption\na.png,x,y\n", "expected each name once"),
        ("file;caption\na.png;x\n", "line 2: the keys are file;caption; expected 'file'"),
        ("file,caption\na.png," + 140_000 * "x", "line 2: field larger than field limit"),
        (b"file,caption\na.png,gr\xfcn\n", "as text: .*; save it as UTF-8"),
    ],
)
def test_csv_that_does_not_fit_is_said_by_its_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "captions.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as caught:
        read_table(path)
    assert "\n" not in str(caught.value)


def test_json_lines_that_do_not_fit_are_said_by_their_line(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    for text, message in (("{}\n[", "line 1: the keys are none"), ("[" * 100_000, "line 1 is not JSON")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_table(path)
