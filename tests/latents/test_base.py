"""Every autoencoder holds the contract of `starflow.latents.base`, on tiny random networks saved to a folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from starflow.config import from_dict, to_dict
from starflow.errors import UserError
from starflow.latents import Autoencoder, AutoencoderSpec, KLLatents, PixelLatents, TinyLatents, load_autoencoder
from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig, save_small

SHIFT, SCALING = 0.25, 0.5


def save_kl(folder: Path, **options: Any) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        **{"scaling_factor": SCALING, "shift_factor": SHIFT, **options},
    ).save_pretrained(folder)
    return folder


def save_tiny(folder: Path) -> Path:
    from diffusers import AutoencoderTiny

    torch.manual_seed(1)
    network = AutoencoderTiny(
        encoder_block_out_channels=(4, 4, 4),
        decoder_block_out_channels=(4, 4, 4),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=5,
        scaling_factor=2.0,
    )
    torch.nn.init.constant_(network.decoder.layers[-1].bias, 0.5)  # grey on average, within the range
    network.save_pretrained(folder)
    return folder


def save_our_own(folder: Path) -> Path:
    torch.manual_seed(2)
    save_small(SmallAutoencoder(SmallAutoencoderConfig(channels=6, widths=(4, 4))), folder, noise_std=0.2)
    return folder


def described(kind: str, folder: Path) -> AutoencoderSpec:
    return {
        "pixels": AutoencoderSpec("pixels", 3, 1),
        "diffusers_kl": AutoencoderSpec("diffusers_kl", 4, 2, SCALING, 0.3, str(folder)),
        "diffusers_tiny": AutoencoderSpec("diffusers_tiny", 5, 4, 2.0, 0.1, str(folder)),
        "small": AutoencoderSpec("small", 6, 4, 1.0, 0.2, str(folder)),
    }[kind]


MAKERS: dict[str, Callable[[Path], Path]] = {
    "pixels": lambda folder: folder,
    "diffusers_kl": save_kl,
    "diffusers_tiny": save_tiny,
    "small": save_our_own,
}


@pytest.fixture(scope="module", params=list(MAKERS))
def spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AutoencoderSpec:
    return described(request.param, MAKERS[request.param](tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def autoencoder(spec: AutoencoderSpec) -> Autoencoder:
    return load_autoencoder(spec)


def pictures(side: int = 16) -> torch.Tensor:
    return torch.rand(2, 3, side, side + 8, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_loading_gives_what_was_described(autoencoder: Autoencoder, spec: AutoencoderSpec) -> None:
    assert autoencoder.spec == spec
    assert from_dict(AutoencoderSpec, to_dict(spec)) == spec


def test_shapes_range_and_precision(autoencoder: Autoencoder) -> None:
    channels, factor = autoencoder.spec.channels, autoencoder.spec.factor
    latents = autoencoder.encode(pictures())
    assert latents.shape == (2, channels, 16 // factor, 24 // factor)
    images = autoencoder.decode(latents * 50)  # far outside: a network would leave the range here
    assert images.shape == (2, 3, 16, 24)
    assert latents.dtype == images.dtype == torch.float32
    assert -1 <= images.min() < images.max() <= 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_pictures_and_latents_of_any_precision_of_floats(autoencoder: Autoencoder, dtype: torch.dtype) -> None:
    images = pictures().to(dtype)
    latents = autoencoder.encode(images)
    assert torch.equal(latents, autoencoder.encode(images.float()))
    assert torch.equal(autoencoder.decode(latents.to(dtype)), autoencoder.decode(latents.to(dtype).float()))


def test_no_pictures_are_no_latents(autoencoder: Autoencoder) -> None:
    latents = autoencoder.encode(pictures()[:0])
    assert latents.shape == (0, *autoencoder.encode(pictures()).shape[1:])
    assert autoencoder.decode(latents).shape == (0, 3, 16, 24)


def test_encoding_repeats_and_one_picture_does_not_change_another(autoencoder: Autoencoder) -> None:
    latents = autoencoder.encode(pictures())
    assert torch.equal(latents, autoencoder.encode(pictures()))
    torch.testing.assert_close(latents[1:], autoencoder.encode(pictures()[1:]))
    torch.testing.assert_close(autoencoder.decode(latents)[1:], autoencoder.decode(latents[1:]))


def test_weights_are_frozen_and_gradients_reach_the_input(autoencoder: Autoencoder) -> None:
    before = {name: value.clone() for name, value in autoencoder.network.state_dict().items()}
    assert not any(weight.requires_grad for weight in autoencoder.network.parameters())
    latents = autoencoder.encode(pictures()).requires_grad_()
    (autoencoder.decode(latents) * 0.5).square().sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0
    after = autoencoder.network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 1, 16, 16), (1, 4, 16, 16)])
def test_what_is_no_rgb_picture_is_refused(autoencoder: Autoencoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"pictures have shape \(.*expected \(B, 3, H, W\)"):
        autoencoder.encode(torch.zeros(shape))


def test_sides_that_do_not_fit(autoencoder: Autoencoder) -> None:
    if autoencoder.spec.factor == 1:
        autoencoder.encode(torch.zeros(1, 3, 17, 15))
        return
    with pytest.raises(UserError, match=r"15x17.*multiples of"):
        autoencoder.encode(torch.zeros(1, 3, 17, 15))


def test_latents_of_another_autoencoder_are_refused(autoencoder: Autoencoder) -> None:
    channels = autoencoder.spec.channels
    with pytest.raises(
        UserError, match=rf"latents have shape \(1, {channels + 1}, 4, 4\), expected \(B, {channels}, h"
    ):
        autoencoder.decode(torch.zeros(1, channels + 1, 4, 4))


def test_another_than_described_is_refused(spec: AutoencoderSpec) -> None:
    wrong = dataclasses.replace(spec, channels=spec.channels + 1)
    with pytest.raises(UserError, match=f"has {spec.channels} channels.*expects {spec.channels + 1} channels"):
        load_autoencoder(wrong)


def test_an_unknown_kind() -> None:
    with pytest.raises(UserError, match="unknown autoencoder kind 'vq', expected one of pixels, diffusers_kl"):
        load_autoencoder(AutoencoderSpec("vq", 3, 1))


def test_pixels_are_exact() -> None:
    images = pictures()
    assert torch.equal(PixelLatents().decode(PixelLatents().encode(images)), images)


def test_the_posterior_is_scaled_and_sampled(tmp_path: Path) -> None:
    """Against diffusers' own distribution: (raw - shift) * scaling, and draws with its mean and spread."""
    autoencoder = KLLatents.from_pretrained(str(save_kl(tmp_path)))
    network: Any = autoencoder.network
    raw = network.encode(pictures()).latent_dist
    mean, std = autoencoder.posterior(pictures())
    torch.testing.assert_close(mean, (raw.mean - SHIFT) * SCALING)
    torch.testing.assert_close(std, raw.std * SCALING)
    assert torch.equal(autoencoder.encode(pictures()), mean)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([autoencoder.encode(pictures(), generator) for _ in range(50)])
    standard = (draws - mean) / std
    assert abs(float(standard.mean())) < 0.02
    assert abs(float(standard.std()) - 1) < 0.02
    again = autoencoder.encode(pictures(), torch.Generator().manual_seed(0))
    assert torch.equal(again, draws[0])
    assert not torch.equal(draws[0], draws[1])


def test_decoding_undoes_scale_and_shift(tmp_path: Path) -> None:
    autoencoder = KLLatents.from_pretrained(str(save_kl(tmp_path)))
    network: Any = autoencoder.network
    raw = network.encode(pictures()).latent_dist.mean
    expected = network.decode(raw).sample.clamp(-1, 1)
    torch.testing.assert_close(autoencoder.decode(autoencoder.encode(pictures())), expected)


def test_a_network_without_a_shift(tmp_path: Path) -> None:
    autoencoder = KLLatents.from_pretrained(str(save_kl(tmp_path, shift_factor=None, scaling_factor=0.18215)))
    network: Any = autoencoder.network
    torch.testing.assert_close(autoencoder.encode(pictures()), network.encode(pictures()).latent_dist.mean * 0.18215)


def test_half_precision_weights_give_float32(tmp_path: Path) -> None:
    autoencoder = KLLatents.from_pretrained(str(save_kl(tmp_path)), dtype=torch.bfloat16)
    latents = autoencoder.encode(pictures())
    assert latents.dtype == autoencoder.decode(latents).dtype == torch.float32
    exact = KLLatents.from_pretrained(str(tmp_path)).encode(pictures())
    torch.testing.assert_close(latents, exact, rtol=0.1, atol=0.05)


def test_reading_is_strict(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = save_tiny(tmp_path) / "diffusion_pytorch_model.safetensors"
    whole = load_file(weights)
    short = {name: value for name, value in whole.items() if name != "encoder.layers.0.weight"}
    save_file({**short, "extra.weight": torch.zeros(1)}, weights, metadata={"format": "pt"})
    expected = r"1 missing weights \(encoder.layers.0.weight\) and 1 unexpected weights \(extra.weight\)"
    with pytest.raises(UserError, match=expected):
        TinyLatents.from_pretrained(str(tmp_path))
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(UserError, match="diffusion_pytorch_model.safetensors is not a whole safetensors file"):
        TinyLatents.from_pretrained(str(tmp_path))
    weights.unlink()
    with pytest.raises(UserError, match="has no diffusion_pytorch_model"):
        TinyLatents.from_pretrained(str(tmp_path))


def test_the_wrong_adapter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a AutoencoderTiny, expected a AutoencoderKL"):
        KLLatents.from_pretrained(str(save_tiny(tmp_path)))


def test_neither_folder_nor_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*arguments: Any, **settings: Any) -> str:
        raise FileNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    with pytest.raises(UserError, match=r"'stabilityai/sd-vae-ft-ema' is no folder, and the hub .*no connection"):
        KLLatents.from_pretrained("stabilityai/sd-vae-ft-ema")


def test_without_diffusers_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"pip install 'starflow\[diffusers\]'"):
        KLLatents.from_pretrained("anything")


def test_a_folder_with_a_class_that_is_not_named(tmp_path: Path) -> None:
    """Old configurations do not say which class they are of."""
    config = save_kl(tmp_path / "kl") / "config.json"
    values = json.loads(config.read_text())
    del values["_class_name"]
    config.write_text(json.dumps(values))
    shutil.copytree(tmp_path / "kl", tmp_path / "copy")
    assert KLLatents.from_pretrained(str(tmp_path / "copy")).spec.channels == 4


def test_grey_pixels_are_the_mean_and_decode_to_grey() -> None:
    images = torch.rand(2, 3, 4, 4) * 2 - 1
    grey = PixelLatents(1)
    assert grey.spec.channels == 1
    latents = grey.encode(images)
    torch.testing.assert_close(latents, images.mean(1, keepdim=True))
    assert torch.equal(grey.decode(latents), latents.expand(-1, 3, -1, -1))
    assert load_autoencoder(grey.spec).spec == grey.spec
    with pytest.raises(UserError, match="2 channels"):
        PixelLatents(2)
