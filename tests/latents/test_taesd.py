"""The real TAESD, where its two files are at hand: it reconstructs, and its latents are of the documented scale."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image, ImageDraw

from starflow.errors import UserError
from starflow.files import read_tensors, write_tensors
from starflow.latents.diffusers_tiny import TAESD_FILES, TinyLatents


@pytest.fixture
def taesd(shared: Path) -> Path:
    folder = shared / "weights"
    if not all((folder / name).is_file() for name in TAESD_FILES):
        pytest.skip(f"TAESD's files are not in {folder}")
    return folder


def drawing(side: int) -> torch.Tensor:
    """A smooth-edged apple on a sky that shades, (1, 3, side, side)."""
    canvas = Image.new("RGB", (512, 512), "white")
    pen = ImageDraw.Draw(canvas)
    for row in range(512):
        pen.line((0, row, 512, row), fill=(120 + row // 8, 170 + row // 10, 250))
    pen.ellipse((90, 130, 420, 470), fill=(214, 40, 50))
    pen.ellipse((150, 180, 230, 270), fill=(240, 120, 120))
    pen.polygon([(255, 150), (330, 40), (380, 60), (300, 150)], fill=(70, 150, 60))
    pixels = numpy.asarray(canvas.resize((side, side), Image.Resampling.LANCZOS))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


@pytest.mark.parametrize(("side", "decibels"), [(64, 24.0), (128, 29.0)])
def test_it_reconstructs(taesd: Path, side: int, decibels: float) -> None:
    autoencoder = TinyLatents.from_pretrained(str(taesd))
    images = drawing(side)
    latents = autoencoder.encode(images)
    assert (autoencoder.spec.channels, autoencoder.spec.factor) == (4, 8)
    assert latents.shape == (1, 4, side // 8, side // 8)
    assert 0.5 < float(latents.std()) < 1.8
    error = ((autoencoder.decode(latents) - images) / 2).square().mean()
    assert -10 * torch.log10(error) > decibels


def test_a_folder_that_lacks_a_layer(taesd: Path, tmp_path: Path) -> None:
    shutil.copy(taesd / TAESD_FILES[0], tmp_path)
    tensors = read_tensors(taesd / TAESD_FILES[1])
    del tensors["19.weight"]
    write_tensors(tmp_path / TAESD_FILES[1], tensors)
    with pytest.raises(UserError, match=r"1 missing weights \(decoder.layers.18.weight\)"):
        TinyLatents.from_pretrained(str(tmp_path))


def test_it_can_be_saved_for_diffusers_and_read_again(taesd: Path, tmp_path: Path) -> None:
    autoencoder = TinyLatents.from_pretrained(str(taesd), dtype=torch.bfloat16)
    autoencoder.network.save_pretrained(tmp_path)  # type: ignore[operator]
    again = TinyLatents.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    assert torch.equal(again.encode(drawing(64)), autoencoder.encode(drawing(64)))
