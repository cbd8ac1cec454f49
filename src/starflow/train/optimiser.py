"""Optimiser, learning-rate schedule and averaged weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from starflow.train.distributed.pieces import local, named_state
from starflow.train.settings import TrainSettings


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Learning rate of update `step` (counted from 0)."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    if settings.schedule == "cosine":
        progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        share = min(1.0, (settings.steps - step) / max(1.0, settings.decay * settings.steps))
    return settings.min_lr + (settings.lr - settings.min_lr) * max(0.0, share)


def make_optimiser(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW whose decay spares vectors (biases, norms, start tokens), as is usual."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    spared = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    beta1, beta2 = settings.betas
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=settings.lr, betas=(beta1, beta2), eps=settings.eps, fused=True
    )


class AveragedWeights:
    """Exponential moving average of a model's state (parameters and floating buffers), in float32, split as it is.

    The decay of update t is min(decay, (1 + t) / (10 + t)), so that early averages forget the initialisation.
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
                averaged.append(local(self.state[name]))
                current.append(local(tensor))
            else:
                self.state[name].copy_(tensor)
        torch._foreach_lerp_(averaged, current, weight)
