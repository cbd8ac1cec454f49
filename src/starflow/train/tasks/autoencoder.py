"""Training of the small autoencoder on noisy latents.

The decoder sees latents with Gaussian noise whose standard deviation is drawn per picture, uniform in a range around
the flow's own noise, so that it cleans what the flow samples (STARFlow, arXiv 2506.06276, section 3.3: the third way
out of the noise).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from starflow.data.images import save_grid, to_float
from starflow.data.index import ImageDataset, split_indices
from starflow.evaluate import psnr
from starflow.latents.small import SmallAutoencoder, save_small
from starflow.train.loader import BatchReader, TrainingLoader, generator, uniform
from starflow.train.settings import TrainSettings, network_precision

HELDOUT = 1024
"""Held-out pictures that are measured, at most, spread over the set."""


@dataclass(frozen=True)
class ReconstructionLoss:
    """Weights of the loss's terms; images are in [-1, 1]."""

    squared: float = 10.0
    """Of the mean squared error."""
    absolute: float = 1.0
    """Of the mean absolute error."""
    gradient: float = 0.5
    """Of the mean absolute error of horizontal and vertical differences, which keeps edges."""

    def __call__(self, output: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, 3, H, W) twice -> scalar and its terms."""
        error = (output - target).float()
        squared, absolute = error.square().mean(), error.abs().mean()
        gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = self.squared * squared + self.absolute * absolute + self.gradient * gradient
        return loss, {"squared": squared, "absolute": absolute, "gradient": gradient}


class AutoencoderTask:
    """Noisy-latent reconstruction; see `starflow.train.loop.Task`."""

    flops = 0.0

    def __init__(
        self,
        model: SmallAutoencoder,
        feed: TrainingLoader,
        noise: tuple[float, float],
        loss: ReconstructionLoss,
        settings: TrainSettings,
        *,
        mirror: bool = False,
    ) -> None:
        """`mirror` turns half of the training pictures around."""
        self.model: nn.Module = model
        self.autoencoder, self.feed, self.mirror = model, feed, mirror
        self.noise, self.reconstruction_loss, self.settings = noise, loss, settings
        self.heldout = heldout_images(feed.pictures)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _latent_noise(self, images: Tensor, draw: torch.Generator) -> Tensor:
        config = self.autoencoder.config
        count, height, width = len(images), images.shape[2] // config.factor, images.shape[3] // config.factor
        low, high = self.noise
        sigma = low + (high - low) * torch.rand(count, 1, 1, 1, generator=draw)
        return (sigma * torch.randn(count, config.channels, height, width, generator=draw)).to(self._device)

    def batch(self, step: int, rows: range) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W) in [-1, 1] and the noise of their latents."""
        images = self.feed.batch(step, rows).images
        if self.mirror:
            images = mirrored(images, self.settings.seed, step, rows)
        whole = images[:1].expand(self.settings.batch, -1, -1, -1)  # the draws are those of the whole batch
        noise = self._latent_noise(whole, generator(self.settings.seed, "autoencoder", step))
        return to_float(images.to(self._device)), noise[rows.start : rows.stop]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images, noise = batch
        with network_precision(self.settings, self._device):
            output = model(images, noise)
        return self.reconstruction_loss(output, images)

    def batch_names(self, step: int, rows: range) -> list[str]:
        return self.feed.names(step, rows)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Mean PSNR in dB over held-out pictures at latent noise 0, 0.2 and 0.3; loss is minus that at 0.2."""
        values = {f"psnr_noise_{sigma}": self._psnr(sigma) for sigma in (0.0, 0.2, 0.3)}
        return {"loss": -values["psnr_noise_0.2"], **values}

    def _psnr(self, sigma: float) -> float:
        total = 0.0
        for start in range(0, len(self.heldout), 64):
            images = to_float(self.heldout[start : start + 64].to(self._device))
            latents = self.autoencoder.encode(images)
            noise = torch.randn(latents.shape, generator=generator(0, "heldout", start)).to(self._device)
            total += float(psnr(self.autoencoder.decode(latents + sigma * noise), images).sum())
        return total / len(self.heldout)

    @torch.no_grad()
    def draw(self, model: nn.Module, path: Path) -> None:
        """Rows: held-out pictures, their reconstructions, and those with latent noise 0.2 and 0.3."""
        stride = max(1, len(self.heldout) // 16)
        images = to_float(self.heldout[::stride][:16].to(self._device))
        latents = self.autoencoder.encode(images)
        noise = torch.randn(latents.shape, generator=generator(0, "draw", 0)).to(self._device)
        rows = [images] + [self.autoencoder.decode(latents + sigma * noise) for sigma in (0.0, 0.2, 0.3)]
        save_grid(torch.cat(rows), path, columns=len(images))

    def save(self, model: nn.Module, folder: Path) -> None:
        low, high = self.noise
        save_small(self.autoencoder, folder, noise_std=(low + high) / 2)

    def describe(self, terms: Mapping[str, float]) -> dict[str, str]:
        return {"loss": f"{terms['loss']:.4f}", "mse": f"{terms['squared']:.5f}"}


def heldout_images(pictures: ImageDataset) -> Tensor:
    """uint8 (N, 3, H, W): held-out pictures of the fullest bucket."""
    numbers = max(split_indices(pictures, heldout=True), key=len)
    some = numbers[:: max(1, -(-len(numbers) // HELDOUT))].tolist()
    return BatchReader(pictures, replace=True)[some].images


def mirrored(images: Tensor, seed: int, step: int, rows: range) -> Tensor:
    """Half of the pictures (B, 3, H, W) turned around, drawn by (seed, step, row)."""
    turned = uniform(rows, (), seed, "mirror", step) < 0.5
    return torch.where(turned.view(-1, 1, 1, 1).to(images.device), images.flip(-1), images)
