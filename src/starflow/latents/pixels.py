"""The case of no autoencoder: the flow models pixels, as TarFlow does (arXiv 2412.06329)."""

from __future__ import annotations

from torch import Generator, Tensor, nn

from starflow.errors import UserError
from starflow.latents.base import AutoencoderSpec, check_images, check_latents


class PixelLatents:
    """Pictures are their own latents: factor 1, exact within [-1, 1].

    With 3 channels they are red, green and blue; with 1 they are the mean of the three, and decode to grey.
    """

    def __init__(self, channels: int = 3) -> None:
        """Raises UserError: neither 3 channels nor 1."""
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
