"""The contract of all sources: every image is found once, in order, and read again by its location."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from starflow.data.index import open_source
from starflow.data.sources.base import files_state, walk_files
from starflow.data.sources.captions import shown_name
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


def test_files_are_listed_once_and_the_rest_with_its_reason(tmp_path: Path) -> None:
    inside, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    for name in ("a.png", "deep/b.txt", ".thumbs/a.png", "__MACOSX/deep/._a.png", ".DS_Store"):
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        (inside / name).write_bytes(b"x")
    elsewhere.mkdir()
    (elsewhere / "c.png").write_bytes(b"x")
    (inside / "linked").symlink_to(elsewhere)
    (inside / "again").symlink_to(inside / "deep")
    (inside / "deep" / "up").symlink_to(inside)
    (inside / "gone.png").symlink_to(inside / "nothing")
    os.mkfifo(inside / "pipe.png")
    files, left = walk_files(inside)
    assert files == ["a.png", "deep/b.txt", "linked/c.png"]
    assert {one.name: one.reason for one in left} == {
        ".DS_Store": "hidden files",
        ".thumbs/a.png": "hidden files",
        "__MACOSX/deep/._a.png": "hidden files",
        "again/": "folders that were read already by another name",
        "deep/up/": "folders that were read already by another name",
        "gone.png": "links to nothing",
        "pipe.png": "entries that are no regular files",
    }


def test_a_name_that_is_no_utf8_is_shown_in_escapes() -> None:
    name = os.fsdecode(b"a\xff.png")
    assert shown_name(name) == "a\\udcff.png"
    assert shown_name("grün.png") == "grün.png"


def test_the_state_of_files_changes_with_what_they_say(tmp_path: Path) -> None:
    for name in ("a.png", "a.txt"):
        (tmp_path / name).write_text("old")
    before = files_state(tmp_path, ["a.png"], ["a.txt"])
    os.utime(tmp_path / "a.png", (1, 1))
    assert files_state(tmp_path, ["a.png"], ["a.txt"]) == before, "an image that was copied is the same image"
    (tmp_path / "a.txt").write_text("new")
    os.utime(tmp_path / "a.txt", (1, 1))
    changed = files_state(tmp_path, ["a.png"], ["a.txt"])
    assert changed["digest"] != before["digest"]
    assert files_state(tmp_path, ["a.png", "gone.png"], [])["images"] == 2
