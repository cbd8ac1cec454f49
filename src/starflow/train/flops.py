"""Floating-point operations of a flow's training, counted, and of this machine, measured.

Counted are the matrix products that the model needs: every linear layer (2 per weight and token) and attention over
the tokens that causality lets it see (4 per query, key and channel of the heads). The backward pass counts twice the
forward one. What is computed again to save memory, norms, activations, the optimiser and the averages count nothing.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from starflow.flow.block import AutoregressiveBlock
from starflow.flow.model import Flow

BACKWARD = 2


def training_flops(flow: Flow) -> float:
    """Operations of one picture's forward and backward pass, at the model's own size."""
    tokens = flow.config.grid_side**2
    return (1 + BACKWARD) * float(sum(_forward_flops(block, tokens, flow.condition_length) for block in flow.stack()))


def _forward_flops(block: AutoregressiveBlock, tokens: int, condition: int) -> int:
    inputs = tokens - block.first_predicted
    length = inputs + (condition if block.proj_txt is not None else 0)
    total = 2 * inputs * (_weights(block.proj_in) + _weights(block.proj_out))
    if block.proj_txt is not None:
        total += 2 * condition * _weights(block.proj_txt)
    spec = block.spec.layer
    attention = 4 * (length * (length + 1) // 2) * spec.heads * spec.head_dim
    return total + sum(2 * length * _weights(layer) + attention for layer in block.attn_blocks)


def _weights(module: nn.Module) -> int:
    """Entries of the matrices inside."""
    return sum(one.in_features * one.out_features for one in module.modules() if isinstance(one, nn.Linear))


class Product:
    """A large square matrix product of this machine, to be timed beside other work."""

    def __init__(self, device: torch.device, dtype: torch.dtype, side: int = 0) -> None:
        """`side` 0 is 1024 on a CPU and 8192 elsewhere."""
        self.side = side or (1024 if device.type == "cpu" else 8192)
        self.device = device
        draw = torch.Generator().manual_seed(0)
        left, right = (torch.randn(self.side, self.side, generator=draw).to(device, dtype) for _ in range(2))
        self.left, self.right, self.out = left, right, torch.empty_like(left)

    def rate(self, repeats: int = 1) -> float:
        """Operations a second over that many products."""
        synchronise(self.device)
        started = time.perf_counter()
        for _ in range(repeats):
            torch.mm(self.left, self.right, out=self.out)
        synchronise(self.device)
        return repeats * 2 * self.side**3 / (time.perf_counter() - started)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large product, the best of a few."""
    product = Product(device, dtype)
    return max(product.rate() for _ in range(4))


def synchronise(device: torch.device) -> None:
    """Wait for what a device still computes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
