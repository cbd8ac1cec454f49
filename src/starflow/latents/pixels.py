"""The case of no autoencoder: the flow models pixels, as TarFlow does (arXiv 2412.06329)."""

from __future__ import annotations

from torch import Generator, Tensor, nn

from starflow.latents.base import AutoencoderSpec, check_images, check_latents


class PixelLatents:
    """Pictures are their own latents: 3 channels, factor 1, exact within [-1, 1]."""

    def __init__(self) -> None:
        self._spec = AutoencoderSpec("pixels", channels=3, factor=1)
        self.network = nn.Identity()

    @property
    def spec(self) -> AutoencoderSpec:
        return self._spec

    def encode(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """See `Autoencoder.encode`; there is no posterior, so `generator` draws nothing."""
        check_images(images, self._spec)
        return images.float()

    def decode(self, latents: Tensor) -> Tensor:
        """See `Autoencoder.decode`."""
        check_latents(latents, self._spec)
        return latents.float().clamp(-1, 1)
