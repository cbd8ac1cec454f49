"""`starflow prepare-data`: what it passes on, and bad input. What it builds is tested with the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from starflow.data.sets.glyphs import prepare as glyphs
from starflow.data.sets.glyphs.prepare import GlyphSummary
from starflow.data.sets.glyphs2 import prepare as glyphs2
from starflow.data.sets.glyphs2.prepare import Glyphs2Summary
from starflow.data.sources.base import SkippedImage
from tests.cli.conftest import Run, fails

LOST = SkippedImage("clip-art/x", "broken")


def test_options_reach_the_function(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def prepare(output: Path, tarballs: Path | None, *, size: int, include: str) -> GlyphSummary:
        seen.update(output=output, tarballs=tarballs, size=size, include=include)
        return GlyphSummary(2, {"3d": 2, "flat": 1}, 1, 3, (SkippedImage("noto/1f600", "broken"),))

    monkeypatch.setattr(glyphs, "prepare_glyphs", prepare)
    result = run("prepare-data", "glyphs", "--output", tmp_path, "--tarballs", "tars", "--include", "all", "--size", 64)
    assert seen == {"output": tmp_path, "tarballs": Path("tars"), "size": 64, "include": "all"}
    assert result.out.splitlines() == [
        f"3 pictures of 2 concepts in {tmp_path}, 1 held out",
        "skipped noto/1f600: broken",
    ]


def test_bad_input(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    fails(run("prepare-data", "glyphs", "--output", file), f"{file} is a file")
    fails(run("prepare-data", "glyphs", "--output", tmp_path / "set", "--tarballs", tmp_path / "nowhere"), "nowhere")
    fails(run("prepare-data", "glyphs", "--output", tmp_path, "--size", "3"), "size is 3")
    fails(run("prepare-data", "glyphs", "--include", "some"), "--include is 'some'", "things, all")


def test_options_of_glyphs2_reach_its_function(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def prepare(output: Path, folder: Path | None, **options: Any) -> Glyphs2Summary:
        seen.update(output=output, folder=folder, **options)
        left_out = {"icon-park: category": 2}
        return Glyphs2Summary({"3d": 5, "model": 3}, {"emoji": 5, "objects": 3}, 4, {"pair": 1}, 8, left_out, (LOST,))

    monkeypatch.setattr(glyphs2, "prepare_glyphs2", prepare)
    flags = ["--packages", "debs", "--model-views", "leave-out", "--leave-out-style", "noto", "--sheets", 3]
    result = run("prepare-data", "glyphs2", "--output", tmp_path, "--size", 64, "--workers", 2, *flags)
    assert seen == {
        "output": tmp_path,
        "folder": Path("debs"),
        "size": 64,
        "models": False,
        "held_out_style": "noto",
        "sheets": 3,
        "workers": 2,
    }
    assert result.out.splitlines() == [
        f"8 pictures of 4 concepts in {tmp_path}, 1 held out; by sampling group:",
        "  emoji    5",
        "  objects  3",
        f"3 pictures of the packages are not in it, named in {tmp_path / 'skipped.jsonl'}",
    ]


def test_an_option_of_the_other_set_is_refused(run: Run) -> None:
    fails(run("prepare-data", "glyphs2", "--tarballs", "x"), "--tarballs does nothing for glyphs2")
    fails(run("prepare-data", "glyphs2", "--include", "all"), "--include does nothing for glyphs2")
    fails(run("prepare-data", "glyphs", "--model-views", "leave-out"), "--model-views does nothing for glyphs")
    fails(run("prepare-data", "glyphs", "--packages", "x"), "--packages does nothing for glyphs")
