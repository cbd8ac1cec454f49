"""The flow's training objective (STARFlow, arXiv 2506.06276, section 3; TarFlow, arXiv 2412.06329, section 2).

Training of the flow on cached latents; see `starflow.train.loop.Task`.

Every update draws, as functions of (seed, step, place in the batch): the pictures, the posterior's sample, the noise
that makes the density continuous (section 3.3 of STARFlow, arXiv 2506.06276), and which conditions are dropped for the
null one.

Training of the flow on pictures that are encoded when it is their turn, instead of from a cache.

It costs the encoders' time in every update, and no disk; and it is what pixels, and sets too large to encode, want.
Draws are those of the cached training, so that the two see the same batches up to the cache's rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from starflow.conditioning.base import Conditioner
from starflow.data.images import dequantise
from starflow.data.index import ImageDataset, split_indices
from starflow.data.latent_cache import LatentDataset
from starflow.errors import UserError
from starflow.flow.model import Flow, TarFlow, Trace
from starflow.latents.base import Autoencoder
from starflow.train.distributed.world import World
from starflow.train.loader import BatchOrder, BatchReader, TrainingLoader, generator, normal, uniform
from starflow.train.log import training_flops
from starflow.train.recipe import Objective
from starflow.train.settings import TrainSettings, network_precision
from starflow.train.tasks.autoencoder import mirrored
from starflow.train.tasks.cache_latents import encode, posterior_sample

Number = TypeVar("Number", float, Tensor)


class FlowLoss(nn.Module):
    """The objective as a module over a flow, so that one call, compiled or not, covers network and loss."""

    def __init__(self, flow: Flow, latent_penalty: float) -> None:
        super().__init__()
        self.flow = flow
        self.latent_penalty = latent_penalty

    def forward(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noised data (B, C, H, W) -> (loss, 0.5 z^2, log-determinant, penalty), scalars, means over dimensions."""
        trace = self.flow.trace(x, condition)
        squares, logdet = likelihood_terms(trace)
        inner = [state.square().mean() for state in trace.states[1:-1]]
        penalty = torch.stack(inner).sum() if inner else squares.new_zeros(())
        return squares - logdet + self.latent_penalty * penalty, squares, logdet, penalty


def likelihood_terms(trace: Trace) -> tuple[Tensor, Tensor]:
    """Mean over dimensions and pictures of 0.5 z^2, and of the log-determinant; their difference is the loss."""
    return 0.5 * trace.z.square().mean(), trace.logdet.mean() / trace.z[0].numel()


def nats_per_dim(loss: Number) -> Number:
    """Negative log-likelihood per dimension, in nats: the loss (without penalty) and the Gaussian's constant."""
    return loss + 0.5 * math.log(2 * math.pi)


def bits_per_dim(loss: Number) -> Number:
    """`nats_per_dim` in bits; of the noised latents or pixels that the flow models."""
    return nats_per_dim(loss) / math.log(2)


EVALUATION_BATCH = 64


class FlowTask:
    """Maximum likelihood of noised latents. `model` is the objective over the flow."""

    def __init__(
        self,
        flow: Flow,
        cache: LatentDataset,
        objective: Objective,
        settings: TrainSettings,
        draw: Callable[[Flow, Path], None],
        save: Callable[[Flow, Path], None],
        world: World | None = None,
        window: int = 0,
    ) -> None:
        """`flow` may be on the meta device; `draw` and `save` are handed the one to use. `window`: see `BatchOrder`."""
        self.world = world or World(device=next(flow.parameters()).device)
        self.reads_labels, self.flops = isinstance(flow, TarFlow), training_flops(flow)
        self.null_label = flow.config.num_classes if isinstance(flow, TarFlow) else 0
        self.model: nn.Module = FlowLoss(flow, objective.latent_penalty)
        self.cache, self.objective, self.settings = cache, objective, settings
        self._draw, self._save = draw, save
        self.train, self.heldout = cache.indices("train"), cache.indices("heldout")
        counts = [sum(map(len, numbers)) for numbers in (self.train, self.heldout)]
        if not all(counts):
            raise UserError(f"{counts[0]} training and {counts[1]} held-out pictures: both must be at least 1")
        if 0 < settings.evaluate_pictures < counts[1]:
            self.heldout = some_of(self.heldout, settings.evaluate_pictures)
        self.order = BatchOrder(self.train, settings.batch, settings.seed, window)

    @property
    def _device(self) -> torch.device:
        return self.world.device

    def _indices(self, step: int, rows: range) -> Tensor:
        return self.order(step)[rows.start : rows.stop]

    def _noised(self, indices: Tensor, seed: int, step: int, rows: range) -> Tensor:
        return self._add_noise(*self.cache.posterior(indices), seed, step, rows)

    def _add_noise(self, mean: Tensor, std: Tensor | None, seed: int, step: int, rows: range) -> Tensor:
        latents = posterior_sample(mean, std, seed, step, rows)
        if self.objective.noise == "uniform":
            return dequantise(latents, uniform(rows, latents.shape[1:], seed, "noise", step)).to(self._device)
        noise = normal(rows, latents.shape[1:], seed, "noise", step)
        return (latents + self.objective.noise_std * noise).to(self._device)

    def _conditions(self, indices: Tensor, dropped: Tensor | None) -> Tensor | None:
        """(B, S, D) condition tokens, the null ones where `dropped` (B,) is true."""
        if self.cache.null is None:
            return None
        states = self.cache.conditions(indices)
        if dropped is not None:
            states[dropped] = self.cache.null.to(states)
        if self.reads_labels:  # -1 is no class; the cache holds one-hot rows
            labels = states[:, 0].argmax(dim=-1)
            return labels.where(labels < self.null_label, -1).to(self._device)
        return states.to(self._device)

    def _dropped(self, step: int, rows: range) -> Tensor:
        return uniform(rows, (), self.settings.seed, "drop", step) < self.objective.drop_condition

    def batch(self, step: int, rows: range) -> tuple[Tensor, Tensor | None]:
        """Noised latents (B, C, H, W) and their conditions."""
        indices, seed = self._indices(step, rows), self.settings.seed
        return self._noised(indices, seed, step, rows), self._conditions(indices, self._dropped(step, rows))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor | None]) -> tuple[Tensor, dict[str, Tensor]]:
        with network_precision(self.settings, self._device):
            loss, squares, logdet, penalty = model(*batch)
        bits = bits_per_dim(squares.detach() - logdet.detach() + self._level)
        return loss, {"squares": squares, "logdet": logdet, "penalty": penalty, "bits_per_dim": bits}

    def batch_names(self, step: int, rows: range) -> list[str]:
        return [self.cache.name(i) for i in self._indices(step, rows).tolist()]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Nats and bits per dimension of noised held-out latents, and of as many training ones."""
        heldout = self._likelihood(model, self.heldout)
        train = self._likelihood(model, some_of(self.train, sum(map(len, self.heldout))))
        return {
            "loss": heldout,
            "nats_per_dim": nats_per_dim(heldout) + self._level,
            "bits_per_dim": bits_per_dim(heldout + self._level),
            "train_nats_per_dim": nats_per_dim(train) + self._level,
        }

    @property
    def _level(self) -> float:
        """A density of evenly dequantised pixels, in units of a level, bounds the log-probability of the levels."""
        return math.log(128) if self.objective.noise == "uniform" else 0.0

    def _likelihood(self, model: nn.Module, buckets: Sequence[Tensor]) -> float:
        """Mean over these pictures, the batches dealt out to the processes."""
        total = torch.zeros(1, device=self._device)
        for start, batch, weight in self._dealt(buckets):
            noised = self._noised(batch, 0, 0, range(start, start + len(batch)))
            with network_precision(self.settings, self._device):
                _, squares, logdet, _ = model(noised, self._conditions(batch, None))
            total += (squares - logdet) * weight
        return self.world.total(total)[0] / sum(map(len, buckets))

    def _dealt(self, buckets: Sequence[Tensor]) -> Iterator[tuple[int, Tensor, int]]:
        """This process's batches, each of one bucket: the place of its first picture, its numbers and its weight.

        A sharded model needs all processes in every pass: some batches may count for nothing.
        """
        batches = [batch for numbers in buckets for batch in numbers.split(EVALUATION_BATCH) if len(batch)]
        starts = [0, *itertools.accumulate(map(len, batches))]
        for turn in range(-(-len(batches) // self.world.size)):
            place = turn * self.world.size + self.world.rank
            batch = batches[place % len(batches)]
            yield starts[place % len(batches)], batch, len(batch) if place < len(batches) else 0

    @torch.no_grad()
    def draw(self, model: nn.Module, path: Path) -> None:
        assert isinstance(model, FlowLoss)
        self._draw(model.flow, path)

    def save(self, model: nn.Module, folder: Path) -> None:
        assert isinstance(model, FlowLoss)
        self._save(model.flow, folder)

    def describe(self, terms: Mapping[str, float]) -> dict[str, str]:
        loss = terms["squares"] - terms["logdet"] + self._level
        return {"nats/dim": f"{nats_per_dim(loss):.3f}", "bits/dim": f"{bits_per_dim(loss):.3f}"}


def some_of(buckets: Sequence[Tensor], count: int) -> list[Tensor]:
    """At most `count` pictures, always the same ones, a tensor a bucket."""
    owners = torch.cat([torch.full((len(numbers),), bucket) for bucket, numbers in enumerate(buckets)])
    chosen = torch.randperm(len(owners), generator=generator(0, "evaluation", 0))[:count]
    numbers = torch.cat(list(buckets))
    return [numbers[chosen[owners[chosen] == bucket]] for bucket in range(len(buckets))]


class LiveLatents:
    """`starflow.data.latent_cache.LatentDataset` of pictures that are encoded when asked for."""

    def __init__(self, pictures: ImageDataset, autoencoder: Autoencoder, conditioner: Conditioner | None) -> None:
        self.pictures, self.autoencoder, self.conditioner = pictures, autoencoder, conditioner
        self.null = conditioner.null(1)[0].cpu() if conditioner else None
        self._decoder = BatchReader(pictures, replace=True)

    @property
    def side(self) -> int:
        return self.pictures.buckets.side // self.autoencoder.spec.factor

    def indices(self, split: str) -> list[Tensor]:
        return split_indices(self.pictures, heldout=split == "heldout")

    def images(self, numbers: Tensor) -> Tensor:
        """uint8 (B, 3, H, W), decoded on the spot."""
        return self._decoder[numbers.tolist()].images

    @torch.no_grad()
    def posterior(self, numbers: Tensor) -> tuple[Tensor, Tensor | None]:
        return encode(self.autoencoder, self.images(numbers))

    def conditions(self, numbers: Tensor) -> Tensor:
        assert self.conditioner is not None
        entries = [self.pictures.entry(number) for number in numbers.tolist()]
        by_class = self.conditioner.spec.kind == "class"
        return self.conditioner.encode([(one.label or "") if by_class else one.caption for one in entries]).cpu()

    def name(self, number: int) -> str:
        return self.pictures.entry(number).name


@dataclass(frozen=True)
class LoaderSettings:
    """How pictures reach a task; see `DataRecipe`."""

    workers: int = 0
    window: int = 0
    mirror: bool = False
    say: Callable[[str], None] = print


def make_loader(
    pictures: ImageDataset, order: BatchOrder, settings: TrainSettings, world: World, how: LoaderSettings
) -> TrainingLoader:
    """The feed of this process's parts of every batch."""
    parts = settings.rows(world.rank, world.size)
    pin = world.device.type == "cuda"
    return TrainingLoader(pictures, order, parts, how.workers, steps=settings.steps, pin=pin, say=how.say)


class LiveFlowTask(FlowTask):
    """`FlowTask` over a feed of pictures."""

    def __init__(
        self,
        flow: Flow,
        latents: LiveLatents,
        objective: Objective,
        settings: TrainSettings,
        draw: Callable[[Flow, Path], None],
        save: Callable[[Flow, Path], None],
        world: World | None = None,
        how: LoaderSettings | None = None,
    ) -> None:
        """As `FlowTask`'s."""
        self.how = how or LoaderSettings()
        super().__init__(flow, latents, objective, settings, draw, save, world, self.how.window)
        self.latents = latents
        self.feed = make_loader(latents.pictures, self.order, settings, self.world, self.how)

    def _images(self, step: int, rows: range) -> tuple[Tensor, Tensor]:
        """uint8 pictures (B, 3, H, W), half of them mirrored where the recipe says so, and their numbers."""
        images, numbers, _ = self.feed.batch(step, rows)
        return mirrored(images, self.settings.seed, step, rows) if self.how.mirror else images, numbers

    @torch.no_grad()
    def batch(self, step: int, rows: range) -> Any:
        """Noised latents (B, C, H, W) and their conditions."""
        images, numbers = self._images(step, rows)
        mean, std = encode(self.latents.autoencoder, images)
        noised = self._add_noise(mean, std, self.settings.seed, step, rows)
        return noised, self._conditions(numbers, self._dropped(step, rows))

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Task.loss`; `unreadable` counts the pictures that neighbours stand in for, over all processes."""
        loss, terms = super().loss(model, batch)
        return loss, terms | {"unreadable": loss.new_tensor(float(len(self.feed.unreadable) * self.world.size))}
