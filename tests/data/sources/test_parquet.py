"""Parquet files: columns of images in every form, and files without any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from starflow.data.buckets import Buckets
from starflow.data.images import ImageError
from starflow.data.index import open_source
from starflow.errors import UserError
from tests.data.sources.common import encoded, indexed, red, scanned, write_parquet


def test_parquet_of_plain_bytes_and_without_pictures(tmp_path: Path) -> None:
    source = open_source("parquet", str(write_parquet(tmp_path / "a", struct=False)))
    assert [red(source.read(one.location)) for one in scanned(source)[0]] == list(range(7))
    from pyarrow import parquet, table

    (tmp_path / "b").mkdir()
    parquet.write_table(table({"words": ["x"]}), tmp_path / "b" / "0.parquet")
    with pytest.raises(UserError, match="has the columns words: expected one of image, jpg"):
        open_source("parquet", str(tmp_path / "b"))
    (tmp_path / "b" / "0.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match="no whole parquet file"):
        open_source("parquet", str(tmp_path / "b"))


def write(path: Path, columns: dict[str, list[Any]], info: dict[str, Any] | None = None) -> Path:
    from pyarrow import parquet, table

    path.parent.mkdir(parents=True, exist_ok=True)
    made = table(columns)
    parquet.write_table(
        made.replace_schema_metadata({"huggingface": json.dumps({"info": info})}) if info else made, path
    )
    return path


def class_names(*names: str) -> dict[str, Any]:
    return {"features": {"label": {"names": list(names), "_type": "ClassLabel"}, "image": {"_type": "Image"}}}


def test_classes_of_the_hub_have_their_names(tmp_path: Path) -> None:
    rows: dict[str, list[Any]] = {"image": [encoded(n) for n in range(4)], "label": [1, 0, -1, None]}
    write(tmp_path / "set" / "0.parquet", rows, class_names("polar_bear", "dog"))
    write(tmp_path / "set" / "1.parquet", rows, class_names("dog", "polar_bear"))
    source = open_source("parquet", str(tmp_path / "set"))
    found, _ = scanned(source)
    told = [(one.caption, one.label) for one in found]
    assert told[:4] == [("dog", "1"), ("polar bear", "0"), ("", None), ("", None)]
    assert told[4:] == [("polar bear", "0"), ("dog", "1"), ("", None), ("", None)], "numbers of the first file"
    pictures = indexed(source, tmp_path / "index", Buckets(8, 8))
    assert pictures.classes() == ["polar_bear", "dog"], "in the order of their numbers"
    assert [pictures.entry(n).label for n in range(4)] == ["dog", "polar_bear", None, None]


def test_each_file_may_name_its_columns(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", {"image": [encoded(0)], "caption": [["a red apple", "an apple"]]})
    write(tmp_path / "1.parquet", {"jpg": [encoded(1)], "TEXT": ["a car"]})
    write(tmp_path / "2.parquet", {"words": ["a", "b"]})
    write(tmp_path / "3.parquet", {"image": ["http://host/a.png"], "bytes": [encoded(3)]})
    write(tmp_path / "4.parquet", {"image": [[encoded(4)]]})
    (tmp_path / "5.parquet").write_bytes(b"nothing")
    source = open_source("parquet", str(tmp_path))
    found, skipped = scanned(source)
    assert [(one.caption, red(source.read(one.location))) for one in found] == [
        ("a red apple", 0),
        ("a car", 1),
        ("", 3),
    ]
    assert [one.name for one in skipped] == ["2.parquet, row 0", "2.parquet, row 1", "4.parquet, row 0", "5.parquet"]
    assert "has the columns words" in skipped[0].reason
    assert "holds list<" in skipped[2].reason


@pytest.mark.parametrize("column", [["http://host/a.png"], [["x"]], [3], [{"path": "a.png"}]])
def test_a_column_without_pictures_is_one_line(tmp_path: Path, column: list[Any]) -> None:
    path = write(tmp_path / "0.parquet", {"image": column})
    with pytest.raises(UserError, match="'image' holds .*, expected encoded pictures") as caught:
        open_source("parquet", str(path))
    assert "\n" not in str(caught.value)


def test_rows_without_bytes_are_named(tmp_path: Path) -> None:
    rows = [{"bytes": encoded(0), "path": None}, {"bytes": None, "path": "a.png"}, None]
    source = open_source("parquet", str(write(tmp_path / "0.parquet", {"image": rows})))
    found, skipped = scanned(source)
    assert len(found) == 1
    assert [one.reason for one in skipped] == ["the row has only a path, 'a.png'", "the row is empty"]
    for location in ((0, 0, 1), (0, 0, 2), (0, 0, 9)):
        with pytest.raises(ImageError):
            source.read(location)
