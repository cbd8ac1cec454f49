"""Training of the small autoencoder on noisy latents.

The decoder sees latents with Gaussian noise whose standard deviation is drawn per image, uniform in a range around the
flow's own noise, so that it removes the noise of what the flow samples (STARFlow, arXiv 2506.06276, section 3.3: the
third way out of the noise).
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
from starflow.train.loader import BatchReader, TrainingLoader, random_flip
from starflow.train.settings import TrainSettings, generator, network_precision

MAX_HELDOUT = 1024
"""Held-out images that are measured, at most, spread over the set."""

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class ReconstructionLoss:
    """A weighted sum of reconstruction errors of images in [-1, 1].

    Example:
        >>> loss, terms = ReconstructionLoss()(torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4))
        >>> float(loss), sorted(terms)
        (11.0, ['absolute', 'gradient', 'squared'])
    """

    squared: float = 10.0
    """Weight of the mean squared error."""
    absolute: float = 1.0
    """Weight of the mean absolute error."""
    gradient: float = 0.5
    """Weight of the mean absolute error of horizontal and vertical differences, which keeps edges."""

    def __call__(self, output: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Decoded and original images (B, 3, H, W) -> scalar loss, and its terms without weights."""
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
        loader: TrainingLoader,
        noise: tuple[float, float],
        loss: ReconstructionLoss,
        settings: TrainSettings,
        *,
        flip: bool = False,
    ) -> None:
        """Train this model.

        Args:
            model: on its device.
            loader: of the training images, whose dataset also has the held-out ones.
            noise: range of the latent noise, in standard deviations of the latents.
            loss: of the reconstruction.
            settings: see `TrainSettings`.
            flip: turn half of the training images around.
        """
        self.model: nn.Module = model
        self.autoencoder, self.loader, self.flip = model, loader, flip
        self.noise, self.reconstruction_loss, self.settings = noise, loss, settings
        self.heldout = heldout_images(loader.dataset)

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
        """Images (B, 3, H, W) in [-1, 1] and the noise of their latents."""
        images = self.loader.batch(step, rows).images
        if self.flip:
            images = random_flip(images, self.settings.seed, step, rows)
        whole = images[:1].expand(self.settings.batch, -1, -1, -1)  # the draws are those of the whole batch
        noise = self._latent_noise(whole, generator(self.settings.seed, "autoencoder", step))
        return to_float(images.to(self._device)), noise[rows.start : rows.stop]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The reconstruction loss of noisy latents, and its terms."""
        images, noise = batch
        with network_precision(self.settings, self._device):
            output = model(images, noise)
        return self.reconstruction_loss(output, images)

    def batch_names(self, step: int, rows: range) -> list[str]:
        """Names of the images in these rows."""
        return self.loader.names(step, rows)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Mean PSNR in dB over held-out images at latent noise 0, 0.2 and 0.3; the loss is minus that at 0.2."""
        values = {f"psnr_noise_{sigma}": self._psnr(sigma) for sigma in (0.0, 0.2, 0.3)}
        return {"loss": -values["psnr_noise_0.2"], **values}

    def _psnr(self, sigma: float) -> float:
        total = 0.0
        for start in range(0, len(self.heldout), EVALUATION_BATCH):
            images = to_float(self.heldout[start : start + EVALUATION_BATCH].to(self._device))
            latents = self.autoencoder.encode(images)
            noise = torch.randn(latents.shape, generator=generator(0, "heldout", start)).to(self._device)
            total += float(psnr(self.autoencoder.decode(latents + sigma * noise), images).sum())
        return total / len(self.heldout)

    @torch.no_grad()
    def draw(self, model: nn.Module, path: Path) -> None:
        """Rows: held-out images, their reconstructions, and those with latent noise 0.2 and 0.3."""
        stride = max(1, len(self.heldout) // 16)
        images = to_float(self.heldout[::stride][:16].to(self._device))
        latents = self.autoencoder.encode(images)
        noise = torch.randn(latents.shape, generator=generator(0, "draw", 0)).to(self._device)
        rows = [images] + [self.autoencoder.decode(latents + sigma * noise) for sigma in (0.0, 0.2, 0.3)]
        save_grid(torch.cat(rows), path, columns=len(images))

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the autoencoder, which is said to undo the mean of the noise's range."""
        low, high = self.noise
        save_small(self.autoencoder, folder, noise_std=(low + high) / 2)

    def describe(self, terms: Mapping[str, float]) -> dict[str, str]:
        """The loss and the mean squared error."""
        return {"loss": f"{terms['loss']:.4f}", "mse": f"{terms['squared']:.5f}"}


def heldout_images(dataset: ImageDataset) -> Tensor:
    """Held-out images of the fullest bucket, uint8 (N, 3, H, W), at most `MAX_HELDOUT` of them."""
    indices = max(split_indices(dataset, heldout=True), key=len)
    chosen = indices[:: max(1, -(-len(indices) // MAX_HELDOUT))].tolist()
    return BatchReader(dataset, replace=True)[chosen].images
