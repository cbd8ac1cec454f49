"""Decoding large latents piece by piece: one picture at a time, in tiles.

Contract: a decoder of convolutions alone ("small", "diffusers_tiny", and "pixels") decodes each tile with as many
latent pixels around it as its output depends on, so that the picture is the same up to rounding. "diffusers_kl" has
attention and group norms over the whole picture: diffusers' own tiling blends overlapping tiles, which changes the
picture slightly, in its colours more than in its edges.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from starflow.errors import UserError
from starflow.latents.base import Autoencoder, check_latents
from starflow.latents.small import SmallAutoencoder

TINY_REACH = 20
"""Latent pixels that TAESD's decoder looks around itself: 1 + 9 convolutions at 1/8, and 10 at each of 1/4 and 1/2."""
MIN_TILE = 8


def decode_in_tiles(autoencoder: Autoencoder, latents: Tensor, tile: int) -> Tensor:
    """As `autoencoder.decode`, with the memory of one tile.

    Args:
        autoencoder: any of this room.
        latents: (B, C, h, w), scaled.
        tile: side of a tile in latent pixels, at least 8.

    Raises:
        UserError: the latents' shape does not fit, or the tile is too small.
    """
    if tile < MIN_TILE:
        raise UserError(f"the tile is {tile} latent pixels, expected at least {MIN_TILE}")
    check_latents(latents, autoencoder.spec)
    if autoencoder.spec.kind == "diffusers_kl":
        return _blended(autoencoder, latents, tile)
    reach = reach_of(autoencoder)
    return torch.cat([_exact(autoencoder, picture, tile, reach) for picture in latents.split(1)])


def reach_of(autoencoder: Autoencoder) -> int:
    """Latent pixels around it, each way, that a decoded pixel depends on."""
    network = autoencoder.network
    if isinstance(network, SmallAutoencoder):
        at_a_level = 2 * network.config.decoder_pairs + 1
        levels = range(len(network.config.widths))
        return 1 + int(sum(at_a_level / 2**level for level in levels) + 0.999)
    return 0 if autoencoder.spec.factor == 1 else TINY_REACH


def _exact(autoencoder: Autoencoder, latents: Tensor, tile: int, reach: int) -> Tensor:
    """One picture, every tile with its surroundings, which are cut away again."""
    height, width = latents.shape[2:]
    factor = autoencoder.spec.factor
    picture = latents.new_empty(1, 3, height * factor, width * factor, dtype=torch.float32)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            bottom, right = min(top + tile, height), min(left + tile, width)
            above, before = max(0, top - reach), max(0, left - reach)
            piece = autoencoder.decode(latents[:, :, above : bottom + reach, before : right + reach])
            down, across = (top - above) * factor, (left - before) * factor
            inner = piece[:, :, down : down + (bottom - top) * factor, across : across + (right - left) * factor]
            picture[:, :, top * factor : bottom * factor, left * factor : right * factor] = inner
    return picture


def _blended(autoencoder: Autoencoder, latents: Tensor, tile: int) -> Tensor:
    """By diffusers: tiles that overlap by a quarter, faded into each other. Its switches are put back."""
    network: Any = autoencoder.network
    names = ("use_tiling", "tile_latent_min_size", "tile_sample_min_size")
    before = {name: getattr(network, name) for name in names}
    values = dict(zip(names, (True, tile, tile * autoencoder.spec.factor), strict=True))
    try:
        for name, value in values.items():
            setattr(network, name, value)
        return torch.cat([autoencoder.decode(picture) for picture in latents.split(1)])
    finally:
        for name, value in before.items():
            setattr(network, name, value)
