"""Every example runs as it says."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from starflow.pipeline.folder import BUNDLED

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.slow
def test_two_moons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("two_moons.py", monkeypatch, str(tmp_path / "moons.png"))
    heldout = float(capsys.readouterr().out.split("held out:")[1].split()[0])
    assert heldout < 1.5  # a single Gaussian gives 2.3 nats
    with Image.open(tmp_path / "moons.png") as picture:
        assert picture.size == (320, 160)


def test_which_prompt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "glyphs" in BUNDLED
    run("which_prompt.py", monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    gains = [float(line.split()[0]) for line in lines]
    assert gains == sorted(gains, reverse=True)
    assert len(gains) == 5


def test_classify(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("classify.py", monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line in lines:
        shares = [float(word) for word in line.replace(",", " ").split() if word.replace(".", "").isdigit()]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(100, abs=0.2)


def test_every_example_is_run_here() -> None:
    text = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.name}"' in text, f"{path.name} has no test"
