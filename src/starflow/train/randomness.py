"""Random numbers and data order as pure functions of (seed, purpose, step)."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator(seed: int, purpose: str, step: int) -> torch.Generator:
    """A CPU generator for one purpose at one step; different purposes never share numbers."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def batch_indices(count: int, batch: int, seed: int, step: int) -> Tensor:
    """Indices (batch,) of the pictures of update `step`.

    The order is the concatenation of one permutation an epoch, so every picture is seen once an epoch.
    """
    start, end = step * batch, (step + 1) * batch
    epochs = range(start // count, (end - 1) // count + 1)
    stream = torch.cat([torch.randperm(count, generator=generator(seed, "order", epoch)) for epoch in epochs])
    offset = start - epochs.start * count
    return stream[offset : offset + batch]
