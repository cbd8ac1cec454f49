"""A small convolutional autoencoder that is trained here, with noise on its latents.

It works from half resolution down: pixel-unshuffle in, residual pairs of 3x3 convolutions, pixel-shuffle out, which
keeps almost all arithmetic where an image is small. Latents are standardised per channel by a batch norm without
affine parameters, so that "noise of 0.2" means 0.2 standard deviations in every channel; the decoder is trained on
latents with noise added, as the flow's samples carry it (STARFlow, arXiv 2506.06276, section 3.3).

Shapes: images (B, 3, H, W) in [-1, 1]; latents (B, C, H/8, W/8), zero mean and unit standard deviation per channel
unless `standardise` is off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from starflow.config import from_dict, read_mapping, to_dict
from starflow.errors import UserError
from starflow.flow.checkpoint import assign_weights
from starflow.io import weights
from starflow.io.files import write_json
from starflow.latents.base import AutoencoderSpec, check_images, check_latents, empty_images, empty_latents


@dataclass(frozen=True)
class SmallAutoencoderConfig:
    """Sizes of the small autoencoder.

    Raises:
        UserError: a size that is not positive.

    >>> SmallAutoencoderConfig(widths=(48, 96, 160)).factor
    8
    """

    channels: int = 16
    """Latent channels."""
    widths: tuple[int, ...] = (48, 96, 160)
    """Convolution widths at 1/2, 1/4, 1/8 of the image's side; the last is the latent's resolution."""
    encoder_pairs: int = 2
    """Residual pairs per resolution in the encoder."""
    decoder_pairs: int = 2
    """Residual pairs per resolution in the decoder."""
    standardise: bool = True
    """Bring latents to zero mean and unit deviation per channel; not where a flow's likelihood shapes them."""

    def __post_init__(self) -> None:
        if self.channels < 1 or not self.widths or min(self.widths) < 1:
            raise UserError(f"autoencoder sizes must be positive, got channels {self.channels}, widths {self.widths}")
        if min(self.encoder_pairs, self.decoder_pairs) < 0:
            raise UserError("encoder_pairs and decoder_pairs cannot be negative")

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel and side."""
        return int(2 ** len(self.widths))


class ResidualPair(nn.Module):
    """x + conv(relu(conv(relu(x)))), the identity at initialisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(torch.relu(self.first(torch.relu(x))))
        return out


def _encoder(config: SmallAutoencoderConfig) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for width in config.widths:
        layers += [nn.PixelUnshuffle(2), nn.Conv2d(4 * channels, width, 3, padding=1)]
        layers += [ResidualPair(width) for _ in range(config.encoder_pairs)]
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(channels, config.channels, 3, padding=1))


def _decoder(config: SmallAutoencoderConfig) -> nn.Sequential:
    widths = config.widths[::-1]
    layers: list[nn.Module] = [nn.Conv2d(config.channels, widths[0], 3, padding=1)]
    for width, after in zip(widths, (*widths[1:], 3), strict=True):
        layers += [ResidualPair(width) for _ in range(config.decoder_pairs)]
        layers += [nn.Conv2d(width, 4 * after, 3, padding=1), nn.PixelShuffle(2)]
    return nn.Sequential(*layers)


class SmallAutoencoder(nn.Module):
    """The network of the small autoencoder; the module's docstring has the shapes. `forward` is one training pass.

    >>> network = SmallAutoencoder(SmallAutoencoderConfig(channels=4, widths=(8, 8))).eval()
    >>> latents = network.encode(torch.zeros(1, 3, 32, 48))
    >>> latents.shape, network.decode(latents).shape
    (torch.Size([1, 4, 8, 12]), torch.Size([1, 3, 32, 48]))
    """

    def __init__(self, config: SmallAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.standardise: nn.Module = nn.Identity()
        if config.standardise:
            self.standardise = nn.BatchNorm2d(config.channels, affine=False, momentum=0.01)
        self.decoder = _decoder(config)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def encode(self, images: Tensor) -> Tensor:
        """Encode (B, 3, H, W) in [-1, 1] to (B, C, h, w), standardised."""
        latents: Tensor = self.standardise(self.encoder(images.contiguous(memory_format=torch.channels_last)))
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Decode (B, C, h, w) to (B, 3, H, W), unclamped."""
        images: Tensor = self.decoder(latents.contiguous(memory_format=torch.channels_last))
        return images

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Reconstruct (B, 3, H, W) from latents with `noise` (B, C, h, w) added."""
        return self.decode(self.encode(images) + noise)


class SmallLatents:
    """The `Autoencoder` over a trained `SmallAutoencoder`."""

    def __init__(self, network: SmallAutoencoder, noise_std: float, source: str = "") -> None:
        """Wrap a network, which is frozen; `noise_std` is the latent noise that it was trained with."""
        self.network = network.eval().requires_grad_(False)
        self._spec = AutoencoderSpec("small", network.config.channels, network.config.factor, 1.0, noise_std, source)

    @property
    def spec(self) -> AutoencoderSpec:
        """See `Autoencoder.spec`."""
        return self._spec

    @property
    def receptive_radius(self) -> int:
        """See `Autoencoder.receptive_radius`: a pixel a 3x3 convolution, half of it at every doubling."""
        config = self.network.config
        convolutions = 2 * config.decoder_pairs + 1  # at each resolution
        return 1 + math.ceil(sum(convolutions * 0.5**level for level in range(len(config.widths))))

    def encode(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """See `Autoencoder.encode`; there is no posterior, so `generator` draws nothing."""
        check_images(images, self._spec)
        if not len(images):
            return empty_latents(images, self._spec)
        return self.network.encode(images.to(self._dtype)).float()

    def decode(self, latents: Tensor) -> Tensor:
        """See `Autoencoder.decode`."""
        check_latents(latents, self._spec)
        if not len(latents):
            return empty_images(latents, self._spec)
        return self.network.decode(latents.to(self._dtype)).float().clamp(-1, 1)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype


def save_small(network: SmallAutoencoder, folder: Path, noise_std: float, dtype: torch.dtype = torch.float32) -> None:
    """Write the weights and then `config.json`; `dtype` is that of the stored weights."""
    config = {"kind": "small", "noise_std": noise_std, **to_dict(network.config)}
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in network.state_dict().items()}
    weights.write(folder, state.items())
    write_json(folder / "config.json", config)


def load_small(folder: Path) -> SmallLatents:
    """Read what `save_small` wrote, in float32 on the CPU.

    Raises:
        UserError: missing or damaged files, missing or unexpected keys.
    """
    values = read_mapping(folder / "config.json")
    kind, noise_std = values.pop("kind", None), checked_noise(values.pop("noise_std", 0.0), folder / "config.json")
    if kind != "small":
        raise UserError(f"{folder / 'config.json'} describes a '{kind}', expected a 'small' autoencoder")
    with torch.device("meta"):  # without weights that would be drawn and thrown away
        network = SmallAutoencoder(from_dict(SmallAutoencoderConfig, values))
    assign_weights(network, weights.read(folder), str(weights.weight_files(folder)[0]))
    network.float().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return SmallLatents(network, noise_std, str(folder))


def checked_noise(value: Any, path: Path) -> float:
    """A standard deviation that a file gives.

    Raises:
        UserError: it is no finite number from 0 up.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (value >= 0 and math.isfinite(value)):
        raise UserError(f"'noise_std' in {path} is {value!r}, expected a standard deviation from 0 up")
    return float(value)
