"""The state that training changes (weights, averages, optimiser), in one process or many, and one update of it.

Contract: gradients are means over the whole batch, in float32, whatever the layout, the number of processes and of
micro-batches. All processes take the same decisions: they compare numbers that were summed over all of them.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule

from starflow.nn.cpu import keep_freed_memory
from starflow.train.distributed import (
    ShardingLayout,
    World,
    checkpoint_activations,
    compile_layers,
    full_tensor,
    initialise,
    local_shard,
    make_layout,
    named_state,
    shard_model,
)
from starflow.train.settings import TrainSettings, network_dtype


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Learning rate of update `step` (counted from 0).

    Example:
        >>> settings = TrainSettings(steps=100, lr=1.0, warmup=10)
        >>> [round(learning_rate(settings, step), 2) for step in (0, 9, 55, 100)]
        [0.1, 1.0, 0.5, 0.0]
    """
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    if settings.schedule == "cosine":
        progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        share = min(1.0, (settings.steps - step) / max(1.0, settings.decay * settings.steps))
    return settings.min_lr + (settings.lr - settings.min_lr) * max(0.0, share)


def make_optimiser(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW whose weight decay leaves vectors (biases, norms, start tokens) out, as is usual."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    not_decayed = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": not_decayed, "weight_decay": 0.0},
    ]
    beta1, beta2 = settings.betas
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=settings.lr, betas=(beta1, beta2), eps=settings.eps, fused=True
    )


class AveragedWeights:
    """Exponential moving average of a model's state (parameters and floating buffers), in float32, split as it is.

    The decay of update t is min(decay, (1 + t) / (10 + t)), so that early averages forget the initialisation.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> average = AveragedWeights(model, decay=0.9)
        >>> _ = nn.init.zeros_(model.weight)
        >>> average.update(model, step=0)
        >>> bool(average.state["weight"].abs() <= 0.1)
        True
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: tensor.clone() for name, tensor in named_state(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after update `step` (counted from 0)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        averaged: list[Tensor] = []
        current: list[Tensor] = []
        for name, tensor in named_state(model).items():
            if tensor.is_floating_point():
                averaged.append(local_shard(self.state[name]))
                current.append(local_shard(tensor))
            else:
                self.state[name].copy_(tensor)
        torch._foreach_lerp_(averaged, current, weight)


class TrainState:
    """A model, wrapped in place for its world, with its optimiser and its average."""

    def __init__(self, model: nn.Module, settings: TrainSettings, world: World) -> None:
        """Wrap the model for its world.

        Args:
            model: real and equal in every process, or on the meta device, where its flow is initialised here.
            settings: see `TrainSettings`.
            world: the processes that hold the model.

        Raises:
            UserError: a layout that these processes cannot have.
        """
        self.model, self.settings, self.world = model, settings, world
        self.layout: ShardingLayout | None = None
        if world.device.type == "cpu":
            keep_freed_memory()
        on_meta = all(parameter.is_meta for parameter in model.parameters())
        if world.size > 1:
            self._plain = copy.deepcopy(model).to("meta")  # what the full average is put into, to draw and to save
            self.layout = make_layout(settings.parallel, world)
        checkpoint_activations(model, settings.parallel)
        if settings.compile:
            compile_layers(model)
        if self.layout is not None:
            dtype = network_dtype(settings, world.device)
            shard_model(model, self.layout, None if dtype == torch.float32 else dtype)
        if on_meta:
            model.to_empty(device=world.device)
            initialise(model, settings.seed)
        self.optimiser = make_optimiser(model, settings)
        self.average = AveragedWeights(model, settings.average)

    def set_learning_rate(self, rate: float) -> None:
        """Use this rate from the next update on."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate

    def begin_micro_batch(self, *, last: bool) -> None:
        """Exchange gradients after the last micro-batch of an update alone, as far as the layout allows it."""
        if self.layout is not None and isinstance(self.model, FSDPModule):
            if self.layout.shards == 1:
                self.model.set_requires_gradient_sync(last)
            elif self.layout.copies > 1:
                self.model.set_requires_all_reduce(last)

    def gradient_norm(self) -> Tensor:
        """Norm of all gradients, float32, on the device; collective.

        Summed over all copies, not one: the same bits everywhere, so that no two clip or skip differently.
        """
        norms = torch._foreach_norm(self._gradients())
        squares = torch.stack([norm.float() for norm in norms]).square().sum()
        if self.layout is not None:
            dist.all_reduce(squares)
            squares = squares / self.layout.copies
        return squares.sqrt()

    def update(self, norm: float, step: int) -> None:
        """Clip the gradients, whose norm is given, update the weights and then their average."""
        factor = self.settings.clip / (norm + 1e-6)
        if factor < 1:
            torch._foreach_mul_(self._gradients(), factor)
        self.optimiser.step()
        self.average.update(self.model, step)

    def zero_grad(self) -> None:
        """Free the gradients."""
        self.optimiser.zero_grad(set_to_none=True)

    def _gradients(self) -> list[Tensor]:
        return [local_shard(parameter.grad) for parameter in self.model.parameters() if parameter.grad is not None]

    @contextlib.contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Run a block with the averaged weights in the model, in eval mode; all is put back bit for bit afterwards."""
        self._swap()
        self.model.eval()
        try:
            yield self.model
        finally:
            self._swap()
            self.model.train()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in named_state(self.model).items():
            current, averaged = local_shard(tensor), local_shard(self.average.state[name])
            kept = current.clone()
            current.copy_(averaged)
            averaged.copy_(kept)

    @contextlib.contextmanager
    def full_average(self, device: torch.device) -> Iterator[nn.Module | None]:
        """Run a block with the averaged model as a plain one in the main process, and None in the others, which wait.

        Args:
            device: that a model of several processes is gathered on; alone, a model stays where it is.
        """
        if self.layout is None:
            with self.averaged() as model:
                yield model
            return
        state: dict[str, Tensor] = {}
        for name, tensor in self.average.state.items():
            gathered = full_tensor(tensor)
            if self.world.is_main:
                state[name] = gathered.to(device)
        if self.world.is_main:
            model = copy.deepcopy(self._plain)
            model.load_state_dict(state, assign=True)
            yield model.eval()
        else:
            yield None
        self.world.barrier()
