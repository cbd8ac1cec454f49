"""Sequential offload: a module's weights lie on another device only for as long as the module works there.

Contract: what the module holds is put back as it was, the very same tensors, so nothing is copied the other way. The
copies live as long as the context, and what autograd keeps of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from starflow.flow.block import AutoregressiveBlock, WeightMover


@contextmanager
def moved_to(module: nn.Module, device: torch.device) -> Iterator[None]:
    """A context in which the module's parameters and buffers are copies on `device`, without gradients.

    >>> linear = nn.Linear(2, 2)
    >>> with moved_to(linear, torch.device("meta")):
    ...     linear.weight.device
    device(type='meta')
    >>> linear.weight.device
    device(type='cpu')
    """
    places = [(part, name, held) for part in module.modules() for name, held in part._parameters.items()]
    buffers = [(part, name, held) for part in module.modules() for name, held in part._buffers.items()]
    try:
        for part, name, held in places:
            if held is not None:
                there = held.detach().to(device, copy=True)
                part._parameters[name] = nn.Parameter(there, requires_grad=False)
        for part, name, buffer in buffers:
            if buffer is not None:
                part._buffers[name] = buffer.to(device, copy=True)
        yield
    finally:
        for part, name, held in places:
            part._parameters[name] = held
        for part, name, buffer in buffers:
            part._buffers[name] = buffer


def run_offloaded(
    block: AutoregressiveBlock,
    move_weights: WeightMover,
    tokens: Tensor,
    condition: Tensor | None,
    rotary: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A block's `forward` with its weights moved; where gradients are wanted, the backward pass moves them again.

    Only the block's inputs are kept for that, so that no copy outlives the pass.
    """

    def work(tokens: Tensor) -> tuple[Tensor, Tensor]:
        with move_weights(block):
            passed: tuple[Tensor, Tensor] = block(tokens, condition, rotary, move_weights)
        return passed

    if not torch.is_grad_enabled():
        return work(tokens)
    passed: tuple[Tensor, Tensor] = checkpoint(work, tokens, use_reentrant=False)
    return passed
