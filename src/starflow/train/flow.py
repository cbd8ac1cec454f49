"""Training of the flow on cached latents; see `starflow.train.loop.Task`.

Every update draws, as functions of (seed, step): the pictures, the posterior's sample, the noise that makes the density
continuous (section 3.3 of STARFlow, arXiv 2506.06276), and which conditions are dropped for the null one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from starflow.data.latent_cache import LatentCache
from starflow.errors import UserError
from starflow.flow.model import Flow, TarFlow
from starflow.train.cache import posterior_sample
from starflow.train.objective import TracedLoss, bits_per_dim, nats_per_dim
from starflow.train.precision import network_precision
from starflow.train.randomness import batch_indices, generator
from starflow.train.recipe import Objective
from starflow.train.settings import TrainSettings

EVALUATION_BATCH = 64


class FlowTask:
    """Maximum likelihood of noised latents. `model` is the objective over the flow."""

    def __init__(
        self,
        flow: Flow,
        cache: LatentCache,
        objective: Objective,
        settings: TrainSettings,
        draw: Callable[[Path], None],
        save: Callable[[Path], None],
    ) -> None:
        self.flow = flow
        self.model: nn.Module = TracedLoss(flow, objective.latent_penalty)
        self.cache, self.objective, self.settings = cache, objective, settings
        self._draw, self._save = draw, save
        self.train, self.heldout = cache.split("train"), cache.split("heldout")
        if len(self.train) == 0 or len(self.heldout) == 0:
            raise UserError(
                f"{len(self.train)} training and {len(self.heldout)} held-out pictures: both must be at least 1"
            )

    @property
    def _device(self) -> torch.device:
        return next(self.flow.parameters()).device

    def _indices(self, step: int) -> Tensor:
        seed, batch = self.settings.seed, self.settings.batch
        return self.train[batch_indices(len(self.train), batch, seed, step)]

    def _noised(self, indices: Tensor, seed: int, step: int) -> Tensor:
        std = None if self.cache.std is None else self.cache.std[indices]
        latents = posterior_sample(self.cache.mean[indices], std, seed, step)
        noise = torch.randn(latents.shape, generator=generator(seed, "noise", step))
        return (latents + self.objective.noise_std * noise).to(self._device)

    def _conditions(self, indices: Tensor, dropped: Tensor | None) -> Tensor | None:
        """(B, S, D) condition tokens, the null ones where `dropped` (B,) is true."""
        if self.cache.states is None:
            return None
        rows = torch.tensor([self.cache.pictures[i].condition for i in indices.tolist()])
        states = self.cache.states[rows].float()
        if dropped is not None:
            assert self.cache.null is not None
            states[dropped] = self.cache.null.float()
        if isinstance(self.flow, TarFlow):  # reads labels, -1 for no class; the cache holds one-hot rows
            labels = states[:, 0].argmax(dim=-1)
            return labels.where(labels < self.flow.config.num_classes, -1).to(self._device)
        return states.to(self._device)

    def loss(self, network: nn.Module, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        indices, seed = self._indices(step), self.settings.seed
        dropped = torch.rand(len(indices), generator=generator(seed, "drop", step)) < self.objective.drop_condition
        with network_precision(self.settings, self._device):
            loss, squares, logdet, penalty = network(
                self._noised(indices, seed, step), self._conditions(indices, dropped)
            )
        return loss, {"squares": squares, "logdet": logdet, "penalty": penalty}

    def batch_names(self, step: int) -> list[str]:
        return [self.cache.pictures[i].name for i in self._indices(step).tolist()]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Nats and bits per dimension of noised held-out latents, and of as many training ones."""
        count = len(self.heldout)
        some = self.train[torch.randperm(len(self.train), generator=generator(0, "evaluation", 0))[:count]]
        heldout, train = self._likelihood(model, self.heldout), self._likelihood(model, some)
        return {
            "loss": heldout,
            "nats_per_dim": nats_per_dim(heldout),
            "bits_per_dim": bits_per_dim(heldout),
            "train_nats_per_dim": nats_per_dim(train),
        }

    def _likelihood(self, model: nn.Module, indices: Tensor) -> float:
        total = 0.0
        for start in range(0, len(indices), EVALUATION_BATCH):
            batch = indices[start : start + EVALUATION_BATCH]
            with network_precision(self.settings, self._device):
                _, squares, logdet, _ = model(self._noised(batch, 0, start), self._conditions(batch, None))
            total += float(squares - logdet) * len(batch)
        return total / len(indices)

    @torch.no_grad()
    def draw(self, model: nn.Module, path: Path) -> None:
        self._draw(path)

    def save(self, model: nn.Module, folder: Path) -> None:
        self._save(folder)

    def describe(self, terms: Mapping[str, float]) -> dict[str, str]:
        loss = terms["squares"] - terms["logdet"]
        return {"nats/dim": f"{nats_per_dim(loss):.3f}", "bits/dim": f"{bits_per_dim(loss):.3f}"}
