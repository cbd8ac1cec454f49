"""Decoding of large latents in tiles, one image at a time, with the memory of one tile.

Contract: a decoder of convolutions alone ("small", "diffusers_tiny", and "pixels") decodes each tile with as many
latent pixels around it as its output depends on (`Autoencoder.receptive_radius`), so that the image is the same up to
rounding. "diffusers_kl" has attention and group norms over the whole image: diffusers' own tiling blends overlapping
tiles, which changes the image slightly, in its colours more than in its edges.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from starflow.errors import UserError
from starflow.latents.base import Autoencoder, check_latents

MIN_TILE = 8
"""Smallest side of a tile, latent pixels."""


def decode_in_tiles(autoencoder: Autoencoder, latents: Tensor, tile: int) -> Tensor:
    """Decode latents as `autoencoder.decode` does, with the memory of one tile.

    Args:
        autoencoder: any of this room.
        latents: (B, C, h, w), scaled.
        tile: side of a tile in latent pixels, at least 8.

    Returns:
        Images (B, 3, h * factor, w * factor) in [-1, 1], float32.

    Raises:
        UserError: the latents' shape does not fit, or the tile is too small.

    >>> from starflow.latents import PixelLatents
    >>> latents = torch.rand(1, 3, 20, 12)
    >>> torch.equal(decode_in_tiles(PixelLatents(), latents, tile=8), latents)
    True
    """
    if tile < MIN_TILE:
        raise UserError(f"the tile is {tile} latent pixels, expected at least {MIN_TILE}")
    check_latents(latents, autoencoder.spec)
    radius = autoencoder.receptive_radius
    if radius is None:
        return _decode_blended(autoencoder, latents, tile)
    return torch.cat([_decode_exactly(autoencoder, one, tile, radius) for one in latents.split(1)])


def _decode_exactly(autoencoder: Autoencoder, latents: Tensor, tile: int, radius: int) -> Tensor:
    """Decode one image, every tile with its surroundings, which are cut away again."""
    height, width = latents.shape[2:]
    factor = autoencoder.spec.factor
    image = latents.new_empty(1, 3, height * factor, width * factor, dtype=torch.float32)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            bottom, right = min(top + tile, height), min(left + tile, width)
            above, before = max(0, top - radius), max(0, left - radius)
            piece = autoencoder.decode(latents[:, :, above : bottom + radius, before : right + radius])
            down, across = (top - above) * factor, (left - before) * factor
            inner = piece[:, :, down : down + (bottom - top) * factor, across : across + (right - left) * factor]
            image[:, :, top * factor : bottom * factor, left * factor : right * factor] = inner
    return image


def _decode_blended(autoencoder: Autoencoder, latents: Tensor, tile: int) -> Tensor:
    """Decode by diffusers' tiling: tiles overlap by a quarter and fade into each other. Its settings are put back."""
    network: Any = autoencoder.network
    names = ("use_tiling", "tile_latent_min_size", "tile_sample_min_size")
    before = {name: getattr(network, name) for name in names}
    values = dict(zip(names, (True, tile, tile * autoencoder.spec.factor), strict=True))
    try:
        for name, value in values.items():
            setattr(network, name, value)
        return torch.cat([autoencoder.decode(one) for one in latents.split(1)])
    finally:
        for name, value in before.items():
            setattr(network, name, value)
