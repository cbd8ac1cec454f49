"""Training of the flow on pictures that are encoded when it is their turn, instead of from a cache.

It costs the encoders' time in every update, and no disk; and it is what pixels, and sets too large to encode, want.
Draws are those of the cached training, so that the two see the same batches up to the cache's rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from starflow.conditioning.base import Conditioner
from starflow.data.picture_set import Pictures, all_numbers
from starflow.flow.model import Flow
from starflow.latents.base import Autoencoder
from starflow.train.autoencoder import mirrored
from starflow.train.cache import encode
from starflow.train.decode import Decoder
from starflow.train.distributed.world import World
from starflow.train.feed import Feed
from starflow.train.flow import FlowTask
from starflow.train.order import Order
from starflow.train.recipe import Objective
from starflow.train.settings import TrainSettings


class LiveLatents:
    """`starflow.data.latent_cache.Latents` of pictures that are encoded when asked for."""

    def __init__(self, pictures: Pictures, autoencoder: Autoencoder, conditioner: Conditioner | None) -> None:
        self.pictures, self.autoencoder, self.conditioner = pictures, autoencoder, conditioner
        self.null = conditioner.null(1)[0].cpu() if conditioner else None
        self._decoder = Decoder(pictures, replace=True)

    @property
    def side(self) -> int:
        return self.pictures.buckets.side // self.autoencoder.spec.factor

    def numbers(self, split: str) -> list[Tensor]:
        return all_numbers(self.pictures, heldout=split == "heldout")

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
class FeedSettings:
    """How pictures reach a task; see `DataRecipe`."""

    workers: int = 0
    window: int = 0
    mirror: bool = False
    say: Callable[[str], None] = print


def make_feed(pictures: Pictures, order: Order, settings: TrainSettings, world: World, how: FeedSettings) -> Feed:
    """The feed of this process's parts of every batch."""
    parts = settings.rows(world.rank, world.size)
    return Feed(pictures, order, parts, how.workers, pin=world.device.type == "cuda", say=how.say)


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
        how: FeedSettings | None = None,
    ) -> None:
        """As `FlowTask`'s."""
        self.how = how or FeedSettings()
        super().__init__(flow, latents, objective, settings, draw, save, world, self.how.window)
        self.latents = latents
        self.feed = make_feed(latents.pictures, self.order, settings, self.world, self.how)

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
