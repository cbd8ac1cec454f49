"""Random numbers and data order as pure functions of (seed, purpose, step), whoever draws them.

Contract: picture number `row` of the batch of update `step` has a generator of its own, so that its draws depend
neither on how many processes share the batch nor on how it is cut into parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def generator(seed: int, purpose: str, step: int) -> torch.Generator:
    """A CPU generator for one purpose at one step; different purposes never share numbers."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def normal(rows: range, shape: Sequence[int], seed: int, purpose: str, step: int) -> Tensor:
    """Standard normal numbers (len(rows), *shape) of these rows of a batch, float32, on the CPU."""
    return _each(torch.randn, rows, shape, seed, purpose, step)


def uniform(rows: range, shape: Sequence[int], seed: int, purpose: str, step: int) -> Tensor:
    """The same, uniform in [0, 1)."""
    return _each(torch.rand, rows, shape, seed, purpose, step)


def _each(draw: Callable[..., Tensor], rows: range, shape: Sequence[int], seed: int, purpose: str, step: int) -> Tensor:
    drawn = [draw(tuple(shape), generator=generator(seed, f"{purpose}/{row}", step)) for row in rows]
    return torch.stack(drawn) if drawn else torch.empty(0, *shape)


def batch_indices(count: int, batch: int, seed: int, step: int) -> Tensor:
    """Indices (batch,) of the pictures of update `step`.

    The order is the concatenation of one permutation an epoch, so every picture is seen once an epoch.
    """
    start, end = step * batch, (step + 1) * batch
    epochs = range(start // count, (end - 1) // count + 1)
    stream = torch.cat([torch.randperm(count, generator=generator(seed, "order", epoch)) for epoch in epochs])
    offset = start - epochs.start * count
    return stream[offset : offset + batch]
