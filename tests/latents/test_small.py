"""The small autoencoder: shapes, standardised latents, and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from starflow.errors import UserError
from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig, SmallLatents, load_small, save_small

CONFIG = SmallAutoencoderConfig(channels=5, widths=(8, 12), encoder_pairs=1, decoder_pairs=2)


@pytest.fixture
def network() -> SmallAutoencoder:
    torch.manual_seed(0)
    return SmallAutoencoder(CONFIG)


def test_shapes_and_range(network: SmallAutoencoder) -> None:
    latents = SmallLatents(network, noise_std=0.2)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    encoded = latents.encode(images)
    assert encoded.shape == (2, 5, 4, 6)
    decoded = latents.decode(100 * encoded)
    assert decoded.shape == images.shape
    assert decoded.abs().max() <= 1
    assert latents.spec.factor == 4
    assert not encoded.requires_grad


def test_training_latents_have_unit_deviation_per_channel(network: SmallAutoencoder) -> None:
    latents = network.train().encode(torch.rand(16, 3, 16, 16) * 2 - 1)
    deviation, mean = torch.std_mean(latents, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(deviation, torch.ones(5), atol=0.05, rtol=0)  # batch norm's eps takes a little
    torch.testing.assert_close(mean, torch.zeros(5), atol=1e-5, rtol=0)


def test_a_cell_sees_pictures_only_through_its_latents(network: SmallAutoencoder) -> None:
    """Without noise and with it, the output is a function of latents alone."""
    network.eval()
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    noise = torch.randn(1, 5, 4, 4)
    torch.testing.assert_close(network(images, noise), network.decode(network.encode(images) + noise))


def test_files_there_and_back(network: SmallAutoencoder, tmp_path: Path) -> None:
    network.train()(torch.rand(8, 3, 16, 16), torch.zeros(8, 5, 4, 4))  # moves the running statistics
    save_small(network, tmp_path, noise_std=0.25)
    loaded = load_small(tmp_path)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(loaded.encode(images), SmallLatents(network, 0.25).encode(images))
    assert loaded.spec.noise_std == 0.25


def test_half_precision_files_change_little(network: SmallAutoencoder, tmp_path: Path) -> None:
    save_small(network, tmp_path, noise_std=0.2, dtype=torch.float16)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    before = SmallLatents(network, 0.2).decode(SmallLatents(network, 0.2).encode(images))
    loaded = load_small(tmp_path)
    assert (loaded.decode(loaded.encode(images)) - before).abs().max() < 5e-3


def test_wrong_sizes_are_refused(network: SmallAutoencoder) -> None:
    latents = SmallLatents(network, 0.2)
    with pytest.raises(UserError, match="18x16 pixels, expected sides that are multiples of 4"):
        latents.encode(torch.zeros(1, 3, 16, 18))
    with pytest.raises(UserError, match=r"expected \(B, 5, h, w\)"):
        latents.decode(torch.zeros(1, 4, 4, 4))


def test_damaged_files_are_named(network: SmallAutoencoder, tmp_path: Path) -> None:
    save_small(network, tmp_path, noise_std=0.2)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"channels": 5', '"channels": 6'))
    with pytest.raises(UserError, match=r"model\.safetensors.*(shape|missing|unexpected)"):
        load_small(tmp_path)
    (tmp_path / "config.json").write_text(config.replace('"small"', '"large"'))
    with pytest.raises(UserError, match="describes a 'large'"):
        load_small(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"channels": 0}, "channels 0"),
        ({"widths": ()}, r"widths \(\)"),
        ({"widths": (8, 0)}, r"widths \(8, 0\)"),
        ({"decoder_pairs": -1}, "decoder_pairs cannot be negative"),
    ],
)
def test_sizes_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SmallAutoencoderConfig(**values)
