"""Tiles give the picture that decoding at once gives: exactly for convolutions, nearly for sd-vae's kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from starflow.errors import UserError
from starflow.latents import PixelLatents
from starflow.latents.base import Autoencoder, decode_in_tiles
from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig, SmallLatents


def latents(channels: int, height: int, width: int) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))


def small(pairs: int) -> SmallLatents:
    torch.manual_seed(0)
    network = SmallAutoencoder(SmallAutoencoderConfig(channels=4, widths=(8, 12, 16), decoder_pairs=pairs))
    for parameter in network.parameters():  # the pairs start as the identity, which reaches nowhere
        nn.init.normal_(parameter, std=0.1)
    return SmallLatents(network, 0.0)


@pytest.mark.parametrize("pairs", [0, 1, 2])
@pytest.mark.parametrize("shape", [(8, 8), (40, 24), (33, 17)])
def test_tiles_of_convolutions_are_the_whole(pairs: int, shape: tuple[int, int]) -> None:
    coder, z = small(pairs), latents(4, *shape)
    torch.testing.assert_close(decode_in_tiles(coder, z, 8), coder.decode(z), rtol=1e-4, atol=1e-4)


def test_the_reach_is_no_larger_than_it_must_be() -> None:
    """A latent pixel just within it changes the answer, one beyond does not."""
    coder, z = small(1), latents(4, 41, 41)[:1] * 0.1
    network, reach, centre = coder.network, coder.receptive_radius, slice(20 * 8, 21 * 8)
    before = network.decode(z)[:, :, centre, centre]
    for distance, touched in ((reach - 1, True), (reach + 1, False)):
        other = z.clone()
        other[:, :, 20, 20 + distance] += 10
        change = (network.decode(other)[:, :, centre, centre] - before).abs().max()
        assert bool(change > 0) == touched, (distance, change)


def test_pixels_are_tiled_too() -> None:
    z = latents(3, 20, 12)
    assert torch.equal(decode_in_tiles(PixelLatents(), z, 8), PixelLatents().decode(z))


def test_taesd_is_tiled_exactly(shared: Path) -> None:
    from starflow.latents.diffusers import TinyLatents

    coder: Autoencoder = TinyLatents.from_pretrained(str(shared / "weights"))
    z = latents(4, 64, 8)[:1]
    torch.testing.assert_close(decode_in_tiles(coder, z, 16), coder.decode(z), rtol=1e-3, atol=1e-3)


def test_sd_vae_is_blended_and_its_switches_put_back() -> None:
    diffusers = pytest.importorskip("diffusers")
    from starflow.latents.diffusers import KLLatents

    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=32,
    )  # fmt: skip
    coder, z = KLLatents(network), latents(4, 24, 24)
    whole, before = coder.decode(z), (network.use_tiling, network.tile_latent_min_size)
    pieces = decode_in_tiles(coder, z, 12)
    assert pieces.shape == whole.shape
    assert not torch.equal(pieces, whole)
    assert (pieces - whole).abs().mean() < 0.1
    assert (network.use_tiling, network.tile_latent_min_size) == before
    torch.testing.assert_close(decode_in_tiles(coder, z, 24), whole, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="the tile is 4 latent pixels, expected at least 8"):
        decode_in_tiles(PixelLatents(), latents(3, 8, 8), 4)
    with pytest.raises(UserError, match="expected"):
        decode_in_tiles(PixelLatents(), latents(4, 8, 8), 8)
