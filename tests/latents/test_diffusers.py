"""Autoencoders of diffusers in their published layouts: sd-vae-ft-ema's, and the real TAESD where its files are.

sd-vae-ft-ema has four levels, no scaling factor in its config, and attention under its old names.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image, ImageDraw

from starflow.errors import UserError
from starflow.io.files import read_tensors, write_tensors
from starflow.latents import KLLatents, load_autoencoder
from starflow.latents.diffusers import TAESD_FILES, TinyLatents, only_diffusers_errors

OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def save_sd_vae(folder: Path, seed: int = 0) -> Path:
    """A tiny random autoencoder, written as the published one lies on the hub."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=256,
    ).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    known = ("_class_name", "act_fn", "block_out_channels", "down_block_types", "in_channels", "latent_channels",
             "layers_per_block", "norm_num_groups", "out_channels", "sample_size", "up_block_types")  # fmt: skip
    (folder / "config.json").write_text(json.dumps({name: values[name] for name in known}))
    tensors = {}
    for name, tensor in read_tensors(folder / WEIGHTS).items():
        for new, old in OLD.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
        tensors[name] = tensor
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd_vae(tmp_path_factory.mktemp("sd-vae"))


def pictures() -> torch.Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_published_layout_is_read_strictly(folder: Path, tmp_path: Path) -> None:
    assert any(".query." in name for name in read_tensors(folder / WEIGHTS))
    autoencoder = KLLatents.from_pretrained(str(folder))
    assert (autoencoder.spec.channels, autoencoder.spec.factor) == (4, 8)
    assert autoencoder.spec.scaling == pytest.approx(0.18215)
    assert load_autoencoder(autoencoder.spec).spec == autoencoder.spec
    tensors = read_tensors(folder / WEIGHTS)
    del tensors["encoder.mid_block.attentions.0.query.weight"]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    write_tensors(tmp_path / WEIGHTS, tensors)
    with pytest.raises(UserError, match=r"1 missing weights \(encoder.mid_block.attentions.0.to_q.weight\)"):
        KLLatents.from_pretrained(str(tmp_path))


@torch.no_grad()
def test_latents_and_pictures_are_those_of_diffusers(folder: Path) -> None:
    """Scaled by 0.18215, and drawn from the posterior where training asks for it."""
    from diffusers import AutoencoderKL

    reference = AutoencoderKL.from_pretrained(folder).eval()
    autoencoder = KLLatents.from_pretrained(str(folder))
    posterior = reference.encode(pictures()).latent_dist
    mean = autoencoder.encode(pictures())
    assert mean.shape == (2, 4, 4, 6)
    torch.testing.assert_close(mean, posterior.mean * 0.18215)
    draw = autoencoder.encode(pictures(), torch.Generator().manual_seed(3))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(draw, (posterior.mean + posterior.std * noise) * 0.18215)
    torch.testing.assert_close(autoencoder.decode(mean), reference.decode(mean / 0.18215).sample.clamp(-1, 1))


def test_shards_are_read_and_a_damaged_one_is_named(folder: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    AutoencoderKL.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    whole = KLLatents.from_pretrained(str(folder))
    assert torch.equal(KLLatents.from_pretrained(str(tmp_path)).encode(pictures()), whole.encode(pictures()))
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{shards[1].name} is not a whole safetensors file"):
        KLLatents.from_pretrained(str(tmp_path))
    shards[1].unlink()
    with pytest.raises(UserError, match=rf"lacks 1 of \d+ shards \({shards[1].name}\)"):
        KLLatents.from_pretrained(str(tmp_path))


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


def test_remarks_of_diffusers_are_silenced_while_it_loads_alone() -> None:
    import diffusers

    logging = diffusers.utils.logging
    before = logging.get_verbosity()
    with pytest.raises(KeyboardInterrupt), only_diffusers_errors(diffusers):
        assert logging.get_verbosity() == logging.ERROR
        raise KeyboardInterrupt
    assert logging.get_verbosity() == before != logging.ERROR
