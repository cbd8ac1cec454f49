"""Stable Diffusion's autoencoder and its relatives, by diffusers' AutoencoderKL.

The latent is (raw - shift) * scaling, with the network's own `scaling_factor` (0.18215 for sd-vae) and
`shift_factor` (none for sd-vae), raw being a draw from the posterior N(mean, std^2), or its mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from starflow.hub import HERE, Fetch
from starflow.latents.base import AutoencoderSpec, check_images, check_latents
from starflow.latents.diffusers_load import freeze, load_network


class KLLatents:
    """`starflow.latents.base.Autoencoder` over an AutoencoderKL."""

    def __init__(self, network: nn.Module, source: str = "", noise_std: float = 0.0) -> None:
        """Wrap an AutoencoderKL; `noise_std` is the latent noise its decoder was fine-tuned for, 0 for none."""
        self.network = freeze(network)
        config: Any = network.config
        self.shift = float(config.shift_factor or 0.0)
        self._spec = AutoencoderSpec(
            kind="diffusers_kl",
            channels=int(config.latent_channels),
            factor=int(2 ** (len(config.block_out_channels) - 1)),
            scaling=float(config.scaling_factor),
            noise_std=noise_std,
            source=source,
        )

    @classmethod
    def from_pretrained(
        cls, source: str, dtype: torch.dtype = torch.float32, noise_std: float = 0.0, fetch: Fetch = HERE
    ) -> KLLatents:
        """Load from a folder or a hub repository, e.g. "stabilityai/sd-vae-ft-ema".

        Raises:
            UserError: see `load_network`.
        """
        return cls(load_network("AutoencoderKL", source, dtype, fetch), source, noise_std)

    @property
    def spec(self) -> AutoencoderSpec:
        return self._spec

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents, each (B, C, H / factor, W / factor), float32.

        Raises:
            UserError: the pictures' shape does not fit.
        """
        check_images(images, self._spec)
        network: Any = self.network
        posterior = network.encode(images.to(network.dtype)).latent_dist
        mean: Tensor = (posterior.mean.float() - self.shift) * self._spec.scaling
        std: Tensor = posterior.std.float() * self._spec.scaling
        return mean, std

    def encode(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """See `Autoencoder.encode`: a draw from the posterior with `generator`, else its mean.

        The draw is made on the generator's device, so that one on the CPU gives the same picture anywhere.
        """
        mean, std = self.posterior(images)
        if generator is None:
            return mean
        return mean + std * torch.randn(mean.shape, generator=generator, device=generator.device).to(mean.device)

    def decode(self, latents: Tensor) -> Tensor:
        """See `Autoencoder.decode`."""
        check_latents(latents, self._spec)
        network: Any = self.network
        raw = latents.float() / self._spec.scaling + self.shift
        images: Tensor = network.decode(raw.to(network.dtype)).sample.float()
        return images.clamp(-1, 1)
