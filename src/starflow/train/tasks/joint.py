"""Training of an autoencoder and a flow together, with a constant latent noise (SimFlow, arXiv 2512.04084).

The encoder gives the mean of a latent and nothing else; its standard deviation is a constant sigma. The evidence lower
bound of an image is then, up to the entropy of that noise, which is constant,

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
from starflow.data.images import to_float
from starflow.data.index import ImageDataset
from starflow.flow.model import Flow, STARFlow, TarFlow
from starflow.latents.small import SmallAutoencoder, SmallLatents
from starflow.train.distributed import World
from starflow.train.loader import LoaderSettings, normal
from starflow.train.recipe import AutoencoderRecipe, Objective
from starflow.train.settings import TrainSettings, network_precision
from starflow.train.tasks.decoder import Critic, Perceptual, adversarial_terms, load_perceptual
from starflow.train.tasks.flow import FlowLoss, LiveFlowTask, LiveLatents, bits_per_dim, nats_per_dim


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
        for start, indices, weight in self._own_batches(self.heldout):
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
