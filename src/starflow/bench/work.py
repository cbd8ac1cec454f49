"""What sampling token by token has to read and to compute, counted.

Counted are, for every token of every block, one read of the block's weights and of the keys and values before it, and
the matrix products: 2 operations per weight and row, 4 per query, key and channel of the heads. The condition is one
pass more. Norms, activations, and what is written count nothing.

Shapes: R rows (the batch, twice with guidance), S condition tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from starflow.flow.block import AutoregressiveBlock
from starflow.flow.model import Flow


@dataclass(frozen=True)
class Work:
    """Of one batch."""

    bytes: float
    flops: float


def sampling_work(model: Flow, batch: int, tokens: int, *, guided: bool) -> Work:
    """What one batch of pictures needs, whoever computes it token by token."""
    parts = [
        _block_work(block, batch * (2 if guided and model.guided[number] else 1), tokens, model.condition_length)
        for number, block in enumerate(model.stack())
    ]
    return Work(sum(part.bytes for part in parts), sum(part.flops for part in parts))


def _block_work(block: AutoregressiveBlock, rows: int, tokens: int, condition: int) -> Work:
    inputs, prefix = tokens - block.first_predicted, condition if block.proj_txt is not None else 0
    layer, layers = block.spec.layer, block.spec.layers
    seen = inputs * prefix + inputs * (inputs + 1) // 2  # keys that all tokens together attend to
    seen_before = prefix * (prefix + 1) // 2
    stack, ends = _entries(block.attn_blocks), _entries(block.proj_in) + _entries(block.proj_out)
    size = block.proj_in.weight.element_size()
    cache = 2 * layers * rows * layer.kv_heads * layer.head_dim * size
    read = (inputs + bool(prefix)) * _bytes(block.attn_blocks) + inputs * ends * size + seen * cache
    attention = 4 * layers * layer.heads * layer.head_dim * (seen + seen_before)
    return Work(float(read), float(rows * (2 * (inputs + prefix) * stack + 2 * inputs * ends + attention)))


def _entries(module: nn.Module) -> int:
    """Of the matrices inside."""
    return sum(one.in_features * one.out_features for one in module.modules() if isinstance(one, nn.Linear))


def _bytes(module: nn.Module) -> int:
    return sum(one.numel() * one.element_size() for one in module.parameters())
