"""The contract of an autoencoder, which turns images to the latents that a flow models, and the identity.

Contract, held by every class `...Latents` of this room:

- Images are float tensors (B, 3, H, W) in [-1, 1], red first; H and W are multiples of `spec.factor`.
- Latents are (B, `spec.channels`, H / factor, W / factor), already scaled, so that their standard deviation
  over a data set is about one: the flow adds its noise to them and models them as they are.
- `decode` clamps to [-1, 1]; `decode(encode(x))` is close to x, no more; only the identity (`kind` "pixels") is exact.
- Randomness enters by argument: with a `generator` an autoencoder that has a posterior draws from it, without
  one it returns the posterior's mean. One generator serves the whole batch; one seed an image is one call an image.
- `network` holds the weights: move that to a device. Inputs are given on its device; results are float32 whatever
  the weights' precision. Neither call changes the weights or tracks gradients for them; gradients reach the inputs.
- `receptive_radius` says how far a decoded pixel looks around itself in the latents, so that large latents can be
  decoded in tiles (`decode_tiled`).

`PixelLatents` is the case of no autoencoder: the flow models pixels, as TarFlow does (arXiv 2412.06329).

Large latents are decoded in tiles, one image at a time, with the memory of one tile. A decoder of convolutions alone
("small", "diffusers_tiny", and "pixels") decodes each tile with as many latent pixels around it as its output depends
on (`Autoencoder.receptive_radius`), so that the image is the same up to rounding. "diffusers_kl" has attention and
group norms over the whole image: diffusers' own tiling blends overlapping tiles, which changes the image slightly, in
its colours more than in its edges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn

from starflow.errors import UserError


@dataclass(frozen=True)
class AutoencoderSpec:
    """What config.json keeps of an autoencoder, enough to find and check it again.

    Attributes:
        kind: the adapter: "pixels", "diffusers_kl", "diffusers_tiny" or "small".
        channels: channels of a latent.
        factor: image pixels per latent pixel and side, e.g. 8.
        scaling: the factor that raw latents were multiplied by to become the latents of the contract.
        noise_std: standard deviation of the latent noise that the decoder was trained to undo; 0 for none.
        source: the folder, file or hub id that the weights came from; empty where there are none.
    """

    kind: str
    channels: int
    factor: int
    scaling: float = 1.0
    noise_std: float = 0.0
    source: str = ""


class Autoencoder(Protocol):
    """Anything that encodes images to latents and decodes them again, as the module's docstring says."""

    @property
    def spec(self) -> AutoencoderSpec:
        """Its description, as config.json keeps it."""
        ...

    @property
    def network(self) -> nn.Module:
        """The weights, frozen; move this to a device."""
        ...

    @property
    def receptive_radius(self) -> int | None:
        """Latent pixels around it, each way, that a decoded pixel depends on; None where it depends on all."""
        ...

    def encode(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to scaled latents (B, C, H / factor, W / factor).

        Raises:
            UserError: the images' shape does not fit.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (B, C, h, w) to images (B, 3, h * factor, w * factor) in [-1, 1].

        Raises:
            UserError: the latents' shape does not fit.
        """
        ...


def check_images(images: Tensor, spec: AutoencoderSpec) -> None:
    """Refuse images that an autoencoder cannot encode.

    Raises:
        UserError: not (B, 3, H, W), or a side that is no multiple of the factor.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = str(images.dtype).removeprefix("torch.") if isinstance(images, Tensor) else type(images).__name__
        raise UserError(
            f"pictures are {kind}, expected a tensor of floats in [-1, 1]: x / 127.5 - 1 makes it of 0..255"
        )
    if images.ndim != 4 or images.shape[1] != 3:
        raise UserError(f"pictures have shape {tuple(images.shape)}, expected (B, 3, H, W): convert them to RGB first")
    height, width = images.shape[2:]
    if height % spec.factor or width % spec.factor or not height or not width:
        raise UserError(
            f"pictures are {width}x{height} pixels, expected sides that are multiples of {spec.factor}: "
            f"resize or crop them, e.g. to {_nearest(width, spec.factor)}x{_nearest(height, spec.factor)}"
        )


def check_latents(latents: Tensor, spec: AutoencoderSpec) -> None:
    """Refuse latents that an autoencoder cannot decode.

    Raises:
        UserError: not (B, C, h, w) with the autoencoder's C.
    """
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        kind = str(latents.dtype).removeprefix("torch.") if isinstance(latents, Tensor) else type(latents).__name__
        raise UserError(f"latents are {kind}, expected a tensor of floats: encode makes them of pictures")
    if latents.ndim != 4 or latents.shape[1] != spec.channels:
        raise UserError(
            f"latents have shape {tuple(latents.shape)}, expected (B, {spec.channels}, h, w) for the autoencoder "
            f"'{spec.source or spec.kind}': use the autoencoder that the flow was trained with"
        )


def empty_latents(images: Tensor, spec: AutoencoderSpec) -> Tensor:
    """The latents of no images (0, 3, H, W), which convolutions and the like do not all take."""
    height, width = images.shape[2:]
    return images.new_zeros(0, spec.channels, height // spec.factor, width // spec.factor, dtype=torch.float32)


def empty_images(latents: Tensor, spec: AutoencoderSpec) -> Tensor:
    """The images of no latents (0, C, h, w)."""
    height, width = latents.shape[2:]
    return latents.new_zeros(0, 3, height * spec.factor, width * spec.factor, dtype=torch.float32)


def _nearest(size: int, factor: int) -> int:
    return max(factor, round(size / factor) * factor)


class PixelLatents:
    """The `Autoencoder` whose latents are the pixels themselves: factor 1, exact within [-1, 1].

    With 3 channels they are red, green and blue; with 1 they are the mean of the three, and decode to grey.

    >>> import torch
    >>> images = torch.rand(2, 3, 8, 8) * 2 - 1
    >>> torch.equal(PixelLatents().decode(PixelLatents().encode(images)), images)
    True
    >>> PixelLatents(channels=1).encode(images).shape
    torch.Size([2, 1, 8, 8])
    """

    receptive_radius = 0

    def __init__(self, channels: int = 3) -> None:
        """Choose colour (3 channels) or grey (1).

        Raises:
            UserError: neither 3 channels nor 1.
        """
        if channels not in (1, 3):
            raise UserError(f"pixels with {channels} channels: expected 3 (colour) or 1 (grey)")
        self._spec = AutoencoderSpec("pixels", channels=channels, factor=1)
        self.network = nn.Identity()

    @property
    def spec(self) -> AutoencoderSpec:
        return self._spec

    def encode(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """See `Autoencoder.encode`; there is no posterior, so `generator` draws nothing."""
        check_images(images, self._spec)
        return images.float() if self._spec.channels == 3 else images.float().mean(1, keepdim=True)

    def decode(self, latents: Tensor) -> Tensor:
        """See `Autoencoder.decode`."""
        check_latents(latents, self._spec)
        return latents.float().clamp(-1, 1).expand(-1, 3, -1, -1)


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
