"""Training of the small autoencoder on noisy latents, alone or together with a flow.

The decoder sees latents with Gaussian noise whose standard deviation is drawn per image, uniform in a range around the
flow's own noise, so that it removes the noise of what the flow samples (STARFlow, arXiv 2506.06276, section 3.3: the
third way out of the noise).

`JointTask` trains both together, with a constant latent noise (SimFlow, arXiv 2512.04084). The encoder gives the mean
of a latent and nothing else; its standard deviation is a constant sigma. The evidence lower bound of an image is then,
up to the entropy of that noise, which is constant,

    log p(x | z) + log p(z),    z = mean(x) + sigma e,    e standard normal,

with the flow as log p(z). Nothing is detached: the flow's likelihood shapes the encoder, the reconstruction keeps
latents apart, and as the decoder learns from noisy latents, samples need no cleaning. `autoencoder.joint_loss` adds the
perceptual and the adversarial term that a decoder's own training has (`starflow.train.tasks.decoder`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from starflow.conditioning.base import Conditioner
from starflow.data.images import save_grid, to_float
from starflow.data.index import ImageDataset, split_indices
from starflow.evaluate import psnr
from starflow.flow.model import Flow, STARFlow, TarFlow
from starflow.latents.small import SmallAutoencoder, SmallLatents, save_small
from starflow.train.distributed import World
from starflow.train.loader import BatchReader, LoaderSettings, TrainingLoader, normal, random_flip
from starflow.train.recipe import AutoencoderRecipe, Objective
from starflow.train.settings import ReconstructionLoss, TrainSettings, generator, network_precision
from starflow.train.tasks.decoder import Critic, Perceptual, adversarial_terms, load_perceptual
from starflow.train.tasks.flow import FlowLoss, LiveFlowTask, LiveLatents, bits_per_dim, nats_per_dim, own_batches

MAX_HELDOUT = 1024
"""Held-out images that are measured, at most, spread over the set."""

EVALUATION_BATCH = 64


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


class JointModel(nn.Module):
    """Both networks and their objective, as a module, so that one call covers all that is trained."""

    def __init__(
        self,
        autoencoder: SmallAutoencoder,
        flow: STARFlow | TarFlow,
        objective: Objective,
        recipe: AutoencoderRecipe,
        perceptual: Perceptual | None = None,
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.density = FlowLoss(flow, objective.latent_penalty)
        self.sigma, self.reconstruction = objective.noise_std, recipe.loss
        self.critic = Critic() if recipe.joint_loss.adversarial else None
        # Not a submodule: its weights are not trained, averaged or saved.
        self._joint_loss, self._perceptual = recipe.joint_loss, (perceptual,)
        config = autoencoder.config
        self.weight = (
            recipe.flow_weight * config.channels / (3 * config.factor**2)
        )  # latent dimensions per image dimension

    def forward(
        self, images: Tensor, noise: Tensor, condition: Tensor | None, use_critic: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (B, 3, H, W) in [-1, 1] and standard normal noise (B, C, h, w) -> scalar loss, and its terms."""
        z = self.autoencoder.encode(images) + self.sigma * noise
        nats, squares, logdet, penalty = self.density(z.float(), condition)
        output = self.autoencoder.decode(z)
        reconstruction, terms = self.reconstruction(output, images)
        terms = {"reconstruction": reconstruction, **terms}
        terms |= {"squares": squares, "logdet": logdet, "penalty": penalty}
        terms["bits_per_dim"] = bits_per_dim(squares.detach() - logdet.detach())
        loss = reconstruction + self.weight * nats
        (perceptual,) = self._perceptual
        if perceptual is not None:
            terms["perceptual"] = perceptual(output.float(), images)
            loss = loss + self._joint_loss.perceptual * terms["perceptual"]
        if self.critic is not None and use_critic:
            terms |= adversarial_terms(self.critic, output.float(), images)
            loss = loss + self._joint_loss.adversarial * terms["adversarial"] + terms["critic"]
        return loss, terms


class JointTask(LiveFlowTask):
    """Training of both networks; see the module's docstring and `starflow.train.loop.Task`."""

    def __init__(
        self,
        autoencoder: SmallAutoencoder,
        flow: STARFlow | TarFlow,
        dataset: ImageDataset,
        conditioner: Conditioner | None,
        objective: Objective,
        recipe: AutoencoderRecipe,
        settings: TrainSettings,
        draw: Callable[[SmallLatents, STARFlow | TarFlow, Path], None],
        save: Callable[[SmallLatents, STARFlow | TarFlow, Path], None],
        world: World | None = None,
        loading: LoaderSettings | None = None,
    ) -> None:
        """See `FlowTask`; both networks are real and equal in every process, and `draw` and `save` are handed both."""
        # Only sizes are read of this copy: the autoencoder that is trained encodes for itself.
        latents = LiveLatents(dataset, joint_latents(copy.deepcopy(autoencoder), objective), conditioner)
        super().__init__(flow, latents, objective, settings, _do_nothing, _do_nothing, world, loading)
        self.adversarial_from = recipe.joint_loss.adversarial_from
        perceptual = None
        if recipe.joint_loss.perceptual:
            perceptual = load_perceptual(recipe.joint_loss.features, self._device)
        with torch.random.fork_rng(devices=[]):  # the critic's first weights, equal in every process
            torch.manual_seed(settings.seed)
            self.model = JointModel(autoencoder, flow, objective, recipe, perceptual).to(self._device)
        self._draw_both, self._save_both = draw, save

    def _latent_noise(self, images: Tensor, seed: int, step: int, rows: range) -> Tensor:
        spec = self.latents.autoencoder.spec
        shape = (spec.channels, images.shape[-2] // spec.factor, images.shape[-1] // spec.factor)
        return normal(rows, shape, seed, "noise", step).to(self._device)

    def batch(self, step: int, rows: range) -> Any:
        """Images in [-1, 1], the noise of their latents, their conditions, and whether the critic is used."""
        images, indices = self._images(step, rows)
        noise = self._latent_noise(images, self.settings.seed, step, rows)
        condition = self._conditions(indices, self._dropped(step, rows))
        critic = step >= self.adversarial_from
        return to_float(images.to(self._device, non_blocking=True)), noise, condition, critic

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The bound of both parts, its terms, and how many images neighbours stand in for."""
        with network_precision(self.settings, self._device):
            loss, terms = model(*batch)
        return loss, terms | {"unreadable": loss.new_tensor(float(len(self.loader.unreadable) * self.world.size))}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The held-out loss, the flow's nats and bits per latent dimension, and the PSNR in dB of noised latents."""
        total = torch.zeros(3, device=self._device)
        for start, indices, weight in own_batches(self.heldout, self.world):
            images = self.latents.images(indices)
            noise = self._latent_noise(images, 0, 0, range(start, start + len(indices)))
            condition = self._conditions(indices, None)
            with network_precision(self.settings, self._device):
                loss, terms = model(to_float(images.to(self._device)), noise, condition)
            total += weight * torch.stack([loss, terms["squares"] - terms["logdet"], terms["squared"]]).float()
        count = sum(map(len, self.heldout))
        loss, nats, squared = (value / count for value in self.world.all_reduce(total))
        return {
            "loss": loss,
            "nats_per_dim": nats_per_dim(nats),
            "bits_per_dim": bits_per_dim(nats),
            "psnr_noised": 10 * math.log10(4 / max(squared, 1e-12)),
        }

    @torch.no_grad()
    def draw(self, model: nn.Module, path: Path) -> None:
        """Write a sample grid of both networks together."""
        self._draw_both(*self._parts(model), path)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write both networks as a pipeline."""
        self._save_both(*self._parts(model), folder)

    def _parts(self, model: nn.Module) -> tuple[SmallLatents, STARFlow | TarFlow]:
        """A frozen copy of the autoencoder, and the flow."""
        assert isinstance(model, JointModel)
        flow: Any = model.density.flow
        return joint_latents(copy.deepcopy(model.autoencoder), self.objective), flow

    def describe(self, terms: Mapping[str, float]) -> dict[str, str]:
        """Nats and bits per latent dimension, and the mean squared error of the images."""
        return {**super().describe(terms), "mse": f"{terms['squared']:.5f}"}


def _do_nothing(flow: Flow, path: Path) -> None:
    """`JointTask` draws and saves both networks itself."""


def joint_latents(autoencoder: SmallAutoencoder, objective: Objective) -> SmallLatents:
    """The autoencoder as a pipeline holds it: frozen, with a decoder that is meant for the constant latent noise."""
    return SmallLatents(autoencoder, objective.noise_std)
