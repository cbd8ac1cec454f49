"""Training of the flow, on cached latents or on images that are encoded when it is their turn, and its objective."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from starflow.conditioning.base import Conditioner
from starflow.data.images import dequantise
from starflow.data.index import ImageDataset, split_indices
from starflow.data.latent_cache import LatentDataset
from starflow.flow.model import Flow, TarFlow, Trace
from starflow.latents.base import Autoencoder
from starflow.train.distributed import World
from starflow.train.loader import (
    BatchOrder,
    BatchReader,
    LoaderSettings,
    check_splits,
    make_loader,
    normal,
    random_flip,
    uniform,
)
from starflow.train.recipe import Objective
from starflow.train.run import training_flops
from starflow.train.settings import TrainSettings, generator, network_precision
from starflow.train.tasks.cache_latents import condition_text, encode_images, posterior_sample

Number = TypeVar("Number", float, Tensor)


class FlowLoss(nn.Module):
    """The objective as a module over a flow, so that one call, compiled or not, covers network and loss.

    It is the negative log-likelihood per dimension in nats, without the Gaussian's constant, and a penalty on what
    flows between blocks (STARFlow, arXiv 2506.06276, section 3; TarFlow, arXiv 2412.06329, section 2).
    """

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
    """Means over dimensions and images of 0.5 z^2 and of the log-determinant; their difference is the loss."""
    return 0.5 * trace.z.square().mean(), trace.logdet.mean() / trace.z[0].numel()


def nats_per_dim(loss: Number) -> Number:
    """Negative log-likelihood per dimension, in nats: the loss (without penalty) and the Gaussian's constant.

    Example:
        >>> round(nats_per_dim(0.5), 4)  # of standard normal numbers under a standard normal
        1.4189
    """
    return loss + 0.5 * math.log(2 * math.pi)


def bits_per_dim(loss: Number) -> Number:
    """`nats_per_dim` in bits; of the noised latents or pixels that the flow models.

    Example:
        >>> round(bits_per_dim(0.5), 4)
        2.0471
    """
    return nats_per_dim(loss) / math.log(2)


EVALUATION_BATCH = 64


class FlowTask:
    """Maximum likelihood of noised latents from a cache; see `starflow.train.loop.Task`.

    Every update draws, as functions of (seed, step, row of the batch): the images, the posterior's sample, the noise
    that makes the density continuous (STARFlow, arXiv 2506.06276, section 3.3), and which conditions are dropped for
    the null one. `model` is the `FlowLoss` over the flow.
    """

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
        """Train this flow.

        Args:
            flow: may be on the meta device.
            cache: latents and conditions by index: a cache, or `LiveLatents`.
            objective: see `Objective`.
            settings: see `TrainSettings`.
            draw: writes a sample grid of the flow that it is handed.
            save: writes the flow that it is handed as a pipeline.
            world: the processes that train together; None is this one alone.
            window: see `BatchOrder`.

        Raises:
            UserError: a split has no images.
        """
        self.world = world or World(device=next(flow.parameters()).device)
        self.reads_labels, self.flops = isinstance(flow, TarFlow), training_flops(flow)
        self.null_label = flow.config.num_classes if isinstance(flow, TarFlow) else 0
        self.model: nn.Module = FlowLoss(flow, objective.latent_penalty)
        self.cache, self.objective, self.settings = cache, objective, settings
        self._draw, self._save = draw, save
        self.train, self.heldout = cache.indices("train"), cache.indices("heldout")
        check_splits(self.train, self.heldout)
        if 0 < settings.evaluate_pictures < sum(map(len, self.heldout)):
            self.heldout = random_subset(self.heldout, settings.evaluate_pictures)
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
        """The loss of `FlowLoss`, its terms, and bits per dimension."""
        with network_precision(self.settings, self._device):
            loss, squares, logdet, penalty = model(*batch)
        bits = bits_per_dim(squares.detach() - logdet.detach() + self._dequantisation_nats)
        return loss, {"squares": squares, "logdet": logdet, "penalty": penalty, "bits_per_dim": bits}

    def batch_names(self, step: int, rows: range) -> list[str]:
        """Names of the images in these rows."""
        return [self.cache.name(i) for i in self._indices(step, rows).tolist()]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Nats and bits per dimension of noised held-out latents, and of as many training ones."""
        heldout = self._likelihood(model, self.heldout)
        train = self._likelihood(model, random_subset(self.train, sum(map(len, self.heldout))))
        return {
            "loss": heldout,
            "nats_per_dim": nats_per_dim(heldout) + self._dequantisation_nats,
            "bits_per_dim": bits_per_dim(heldout + self._dequantisation_nats),
            "train_nats_per_dim": nats_per_dim(train) + self._dequantisation_nats,
        }

    @property
    def _dequantisation_nats(self) -> float:
        """Nats a dimension from units of [-1, 1] to those of 8-bit levels, whose probability the density bounds."""
        return math.log(128) if self.objective.noise == "uniform" else 0.0

    def _likelihood(self, model: nn.Module, buckets: Sequence[Tensor]) -> float:
        """Mean of the loss over these images, without penalty; the processes share the batches."""
        total = torch.zeros(1, device=self._device)
        for start, batch, weight in own_batches(buckets, self.world):
            noised = self._noised(batch, 0, 0, range(start, start + len(batch)))
            with network_precision(self.settings, self._device):
                _, squares, logdet, _ = model(noised, self._conditions(batch, None))
            total += (squares - logdet) * weight
        return self.world.all_reduce(total)[0] / sum(map(len, buckets))

    @torch.no_grad()
    def draw(self, model: nn.Module, path: Path) -> None:
        """Write a sample grid of the flow."""
        assert isinstance(model, FlowLoss)
        self._draw(model.flow, path)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the flow as a pipeline."""
        assert isinstance(model, FlowLoss)
        self._save(model.flow, folder)

    def describe(self, terms: Mapping[str, float]) -> dict[str, str]:
        """Nats and bits per dimension."""
        loss = terms["squares"] - terms["logdet"] + self._dequantisation_nats
        return {"nats/dim": f"{nats_per_dim(loss):.3f}", "bits/dim": f"{bits_per_dim(loss):.3f}"}


def own_batches(
    buckets: Sequence[Tensor], world: World, size: int = EVALUATION_BATCH
) -> Iterator[tuple[int, Tensor, int]]:
    """This process's batches of an evaluation, each of one bucket: the row of its first image, its indices, its weight.

    A sharded model needs all processes in every pass, so that some batches may count for nothing.
    """
    batches = [batch for indices in buckets for batch in indices.split(size) if len(batch)]
    starts = [0, *itertools.accumulate(map(len, batches))]
    for turn in range(-(-len(batches) // world.size)):
        index = turn * world.size + world.rank
        batch = batches[index % len(batches)]
        yield starts[index % len(batches)], batch, len(batch) if index < len(batches) else 0


def random_subset(buckets: Sequence[Tensor], count: int) -> list[Tensor]:
    """At most `count` of the indices in these buckets, always the same ones, a tensor a bucket.

    Example:
        >>> buckets = [torch.arange(8), torch.arange(8, 12)]
        >>> sum(map(len, random_subset(buckets, 5)))
        5
    """
    owners = torch.cat([torch.full((len(indices),), bucket) for bucket, indices in enumerate(buckets)])
    chosen = torch.randperm(len(owners), generator=generator(0, "evaluation", 0))[:count]
    indices = torch.cat(list(buckets))
    return [indices[chosen[owners[chosen] == bucket]] for bucket in range(len(buckets))]


class LiveLatents:
    """Latents of images that are encoded when they are asked for; a `starflow.data.latent_cache.LatentDataset`.

    It costs the encoders' time in every update, and no disk. Pixels are trained this way, and sets that are too large
    to encode. Draws are those of the cached training, so that the two see the same batches up to the cache's rounding.
    """

    def __init__(self, dataset: ImageDataset, autoencoder: Autoencoder, conditioner: Conditioner | None) -> None:
        self.dataset, self.autoencoder, self.conditioner = dataset, autoencoder, conditioner
        self.null = conditioner.null(1)[0].cpu() if conditioner else None
        self._reader = BatchReader(dataset, replace=True)

    @property
    def side(self) -> int:
        """Side of a square latent of the buckets' area."""
        return self.dataset.buckets.side // self.autoencoder.spec.factor

    def indices(self, split: str) -> list[Tensor]:
        """Indices of one split, a tensor a bucket."""
        return split_indices(self.dataset, heldout=split == "heldout")

    def images(self, indices: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8, read when asked for."""
        return self._reader[indices.tolist()].images

    @torch.no_grad()
    def posterior(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and deviation (or None) of latents of one bucket, (B, C, h, w)."""
        return encode_images(self.autoencoder, self.images(indices))

    def conditions(self, indices: Tensor) -> Tensor:
        """Condition tokens (B, S, D)."""
        assert self.conditioner is not None
        entries = [self.dataset.entry(index) for index in indices.tolist()]
        return self.conditioner.encode([condition_text(entry, self.conditioner) for entry in entries]).cpu()

    def name(self, index: int) -> str:
        """The image's name."""
        return self.dataset.entry(index).name


class LiveFlowTask(FlowTask):
    """A `FlowTask` whose latents are encoded live, from images that a loader reads ahead."""

    def __init__(
        self,
        flow: Flow,
        latents: LiveLatents,
        objective: Objective,
        settings: TrainSettings,
        draw: Callable[[Flow, Path], None],
        save: Callable[[Flow, Path], None],
        world: World | None = None,
        loading: LoaderSettings | None = None,
    ) -> None:
        """See `FlowTask`; `loading` says how images are read."""
        self.loading = loading or LoaderSettings()
        super().__init__(flow, latents, objective, settings, draw, save, world, self.loading.window)
        self.latents = latents
        self.loader = make_loader(latents.dataset, self.order, settings, self.world, self.loading)

    def _images(self, step: int, rows: range) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) uint8, half of them flipped where the recipe says so, and their indices."""
        images, indices, _ = self.loader.batch(step, rows)
        return random_flip(images, self.settings.seed, step, rows) if self.loading.flip else images, indices

    @torch.no_grad()
    def batch(self, step: int, rows: range) -> Any:
        """Noised latents (B, C, H, W) and their conditions."""
        images, indices = self._images(step, rows)
        mean, std = encode_images(self.latents.autoencoder, images)
        noised = self._add_noise(mean, std, self.settings.seed, step, rows)
        return noised, self._conditions(indices, self._dropped(step, rows))

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Task.loss`; `unreadable` counts the images that neighbours stand in for, over all processes."""
        loss, terms = super().loss(model, batch)
        return loss, terms | {"unreadable": loss.new_tensor(float(len(self.loader.unreadable) * self.world.size))}
