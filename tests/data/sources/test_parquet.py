"""Parquet files: columns of images in every form, and files without any."""

from __future__ import annotations

from pathlib import Path

import pytest

from starflow.data.index import open_source
from starflow.errors import UserError
from tests.data.sources.common import red, scanned, write_parquet


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
