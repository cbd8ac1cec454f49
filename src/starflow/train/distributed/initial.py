"""First weights of a flow that was built on the meta device.

Every Transformer layer, and the rest of every block, draws from a seed of its own: each process makes one of them at a
time on the CPU and keeps its part. So a model larger than a process's memory starts with the same weights in any
layout, and at any number of processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from starflow.flow.block import AutoregressiveBlock
from starflow.flow.model import Flow
from starflow.nn.attention import Layer
from starflow.train.distributed.pieces import named_state, write
from starflow.train.randomness import generator


def initialise(model: nn.Module, seed: int) -> None:
    """Fill the flow inside `model` with what its constructors would draw; not collective."""
    for module in model.modules():
        if isinstance(module, Flow):
            _initialise_flow(module, seed)


def _initialise_flow(flow: Flow, seed: int) -> None:
    for buffer in flow.buffers(recurse=False):
        buffer.fill_(1.0)  # TarFlow's variances, the only ones: a new model has the standard normal for a prior
    for number, block in enumerate(flow.stack()):
        with _seeded(seed, f"initial/{number}"):
            _copy(AutoregressiveBlock(replace(block.spec, layers=0)), block)
        for depth, layer in enumerate(block.attn_blocks):
            with _seeded(seed, f"initial/{number}/{depth}"):
                _copy(Layer(block.spec.layer), layer)


@contextlib.contextmanager
def _seeded(seed: int, purpose: str) -> Iterator[None]:
    """Run a block with the CPU's global generator seeded for one purpose, and put it back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, purpose, 0).initial_seed())
        yield


def _copy(source: nn.Module, target: nn.Module) -> None:
    into = named_state(target)
    for name, value in source.state_dict().items():
        write(into[name], value)
