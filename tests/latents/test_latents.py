"""Decoders to train: the adapter's own decoding, no weight of the encoder, and the way to disk and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from starflow.errors import UserError
from starflow.io.files import write_json
from starflow.latents import (
    DecoderModule,
    TrainableAutoencoder,
    decoder_noise,
    load_trainable,
    memory_layout,
    save_trainable,
)
from starflow.latents.diffusers import TinyLatents
from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig, SmallLatents, save_small
from tests.latents.test_base import save_kl, save_tiny


def save_ours(folder: Path) -> Path:
    torch.manual_seed(0)
    config = SmallAutoencoderConfig(channels=4, widths=(8,), encoder_pairs=1, decoder_pairs=1)
    save_small(SmallAutoencoder(config), folder, 0.1)
    return folder


@pytest.fixture(params=[save_kl, save_tiny, save_ours], ids=["kl", "tiny", "small"])
def autoencoder(request: pytest.FixtureRequest, tmp_path: Path) -> TrainableAutoencoder:
    make: Callable[[Path], Path] = request.param
    return load_trainable(str(make(tmp_path / "source")))


def latents(autoencoder: TrainableAutoencoder) -> torch.Tensor:
    return torch.randn(2, autoencoder.spec.channels, 4, 4, generator=torch.Generator().manual_seed(0))


def test_it_decodes_as_the_adapter_does_but_for_the_clamp(autoencoder: TrainableAutoencoder) -> None:
    decoder = DecoderModule(autoencoder)
    found = decoder(latents(autoencoder))
    torch.testing.assert_close(found.clamp(-1, 1), autoencoder.decode(latents(autoencoder)), rtol=0, atol=1e-5)


def test_the_encoder_stays_out(autoencoder: TrainableAutoencoder) -> None:
    decoder = DecoderModule(autoencoder)
    decoder(latents(autoencoder)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())
    own = {id(parameter) for parameter in decoder.parameters()}
    others = [parameter for parameter in autoencoder.network.parameters() if id(parameter) not in own]
    assert others
    assert not any(parameter.requires_grad for parameter in others)


def test_to_disk_and_back_with_the_noise(autoencoder: TrainableAutoencoder, tmp_path: Path) -> None:
    with torch.no_grad():
        for parameter in DecoderModule(autoencoder).parameters():
            parameter.add_(0.01)
    save_trainable(autoencoder, tmp_path / "out", 0.3)
    again = load_trainable(str(tmp_path / "out"))
    assert again.spec.noise_std == 0.3
    assert type(again) is type(autoencoder)
    torch.testing.assert_close(again.decode(latents(again)), autoencoder.decode(latents(again)), rtol=0, atol=1e-5)
    if not isinstance(again, SmallLatents):
        assert decoder_noise(str(tmp_path / "out")) == 0.3
    assert decoder_noise("stabilityai/sd-vae-ft-ema") == 0.0


def test_what_has_no_decoder_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"_class_name": "UNet2DModel"})
    with pytest.raises(UserError, match="UNet2DModel"):
        load_trainable(str(tmp_path))


def test_the_decoder_is_in_the_layout_that_is_fastest_to_train(autoencoder: TrainableAutoencoder) -> None:
    tiny = isinstance(autoencoder, TinyLatents)  # on a CPU, as here
    assert memory_layout(autoencoder) == (torch.contiguous_format if tiny else torch.channels_last)
    weights = [weight for weight in DecoderModule(autoencoder).parameters() if weight.ndim == 4 and weight.shape[1] > 1]
    wide = [weight for weight in weights if weight.shape[-1] > 1]
    assert wide
    assert all(weight.is_contiguous(memory_format=memory_layout(autoencoder)) for weight in wide)
