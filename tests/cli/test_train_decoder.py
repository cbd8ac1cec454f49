"""`starflow train-decoder`: a run, its table, and bad input."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from tests.cli.conftest import Run, fails

from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig, save_small


def test_a_run_and_its_table(run: Run, tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (4 * number, 255 - 4 * number, 20)).save(tmp_path / "data" / f"{number}.png")
    torch.manual_seed(0)
    config = SmallAutoencoderConfig(channels=3, widths=(8,), encoder_pairs=1, decoder_pairs=1)
    save_small(SmallAutoencoder(config), tmp_path / "source", 0.0)
    sizes = (
        "--size",
        8,
        "--crop",
        0,
        "--steps",
        3,
        "--batch",
        2,
        "--perceptual",
        0,
        "--adversarial",
        0,
        "--noise",
        0.2,
    )
    words = ("train-decoder", tmp_path / "source", tmp_path / "data", "--output", tmp_path / "run", *sizes)
    result = run(*words)
    assert result.code == 0, result.err
    assert "PSNR at noise 0.2 (dB)" in result.out
    assert f"done: {tmp_path / 'run' / 'model'}" in result.out
    assert run(*words).out == result.out
    fails(run(*words, "--views", 2), "another views")


def test_bad_input(run: Run, tmp_path: Path) -> None:
    fails(run("train-decoder", tmp_path / "none", tmp_path, "--output", tmp_path / "run"), "none")
    fails(run("train-decoder", "a", "b", "--noise", -2), "--noise is -2")
    fails(run("train-decoder", "a", "b", "--report", -1), "--report is -1")
    fails(run("train-decoder", "a", "b", "--size", 1), "--size is 1")
    fails(run("train-decoder", "a", "b", "--squared", 0, "--output", tmp_path / "run"), "squared weight above 0")
    fails(run("train-decoder", "a", "b", "--features", "vgg"), "--features is 'vgg'")
