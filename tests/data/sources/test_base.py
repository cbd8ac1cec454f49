"""The contract of all sources: every image is found once, in order, and read again by its location."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starflow.data.index import open_source
from starflow.data.sources.base import caption_and_label, parse_json_object
from tests.data.sources.common import WRITERS, red, scanned


@pytest.mark.parametrize("sizes", [True, False])
@pytest.mark.parametrize("kind", WRITERS)
def test_every_picture_is_found_and_read_again_in_another_process(tmp_path: Path, kind: str, sizes: bool) -> None:
    source = open_source(kind, str(WRITERS[kind](tmp_path / "set")))  # type: ignore[arg-type]
    found, _ = scanned(source, sizes=sizes)
    again = pickle.loads(pickle.dumps(source))  # as a worker gets it
    reds = [red(again.read(one.location)) for one in found]
    assert sorted(reds)[:3] == [0, 1, 2]
    assert len(found) == 7
    assert all(abs(value - n) <= 2 for n, value in enumerate(sorted(reds)))
    assert len({one.name for one in found}) == 7
    assert {one.size for one in found} == ({(12, 12)} if sizes else {None})
    assert scanned(again, sizes=sizes)[0] == found


@settings(max_examples=40, derandomize=True)
@given(st.dictionaries(st.text(), st.integers() | st.text()))
def test_a_json_object_is_parsed(values: dict[str, int | str]) -> None:
    assert parse_json_object(json.dumps(values).encode()) == values


@pytest.mark.parametrize("data", [b"[1, 2]", b"3", b'"text"', b"{", b"", b"\xff\xfe"])
def test_what_is_no_json_object_is_empty(data: bytes) -> None:
    assert parse_json_object(data) == {}


def test_a_caption_goes_before_a_label_and_an_empty_label_is_none() -> None:
    assert caption_and_label({"prompt": "last", "caption": "first", "class": "cat"}) == ("first", "cat")
    assert caption_and_label({"caption": 5, "label": "", "cls": 0}) == ("0", "0"), "a caption is a text"
    assert caption_and_label({}) == ("", None)
