"""`starflow prepare-data`: what it passes on, and bad input. What it builds is tested with the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from starflow.data.sets.glyphs import prepare as glyphs
from starflow.data.sets.glyphs.prepare import GlyphSummary
from starflow.data.sources.base import SkippedImage
from tests.cli.conftest import Run, fails


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
