"""`starflow evaluate`: the files it writes, its table, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from tests.cli.conftest import CLASSES, Run, fails
from tests.test_measure import MeanColour

from starflow import measure


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of classes, enough pictures that the hash holds some out."""
    monkeypatch.setattr(measure, "load_mobilenet", MeanColour)
    for number in range(60):
        folder = tmp_path / "pictures" / CLASSES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (200, 3 * number, 20)).save(folder / f"{number}.png")
    return tmp_path / "pictures"


def test_table_report_and_sheets(run: Run, classes: Path, pictures: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("circle\nstar\n")
    sizes = ("--samples", 4, "--tuning-samples", 3, "--guidance", 0, "--guidance", 1)
    result = run("evaluate", classes, pictures, "--output", tmp_path / "report", "--prompts", prompts, *sizes)
    assert result.code == 0, result.err
    for part in ("reconstruction, noise 0.2 (dB)", "heldout", "kid_mobilenetv2 x 1000, samples", "retrieval, grid"):
        assert part in result.out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["counts"]["samples"] == 4
    assert set(report["tuning"]) == {"0", "1"}
    assert report["counts"]["train"] + report["counts"]["heldout"] == 60
    for name in ("grid.png", "nearest.png"):
        with Image.open(tmp_path / "report" / name) as sheet:
            assert sheet.width > 2 * 8


def test_bad_input_is_one_line(run: Run, classes: Path, tmp_path: Path) -> None:
    fails(run("evaluate", classes, tmp_path / "none", "--output", tmp_path / "r"), "none")
    fails(run("evaluate", classes, tmp_path, "--samples", 1), "--samples is 1", "at least 2")
    (tmp_path / "file").write_text("")
    fails(run("evaluate", classes, tmp_path, "--output", tmp_path / "file"), "is a file, expected a folder")
