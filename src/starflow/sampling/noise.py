"""Noise that a seed names: picture b's is a function of its seed alone, the same on every device and in every batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from starflow.errors import UserError


def noise_of(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise (B, *shape), on the CPU in float32.

    Raises:
        UserError: a seed outside 0 .. 2^63 - 1.
    """
    return candidates_of(seeds, shape, 1)[:, 0]


def candidates_of(seeds: Sequence[int], shape: tuple[int, ...], count: int) -> Tensor:
    """`count` draws of each seed's generator, (B, count, *shape); the first is `noise_of`'s.

    Raises:
        UserError: a seed outside 0 .. 2^63 - 1.
    """
    wrong = [seed for seed in seeds if not 0 <= seed < 2**63]
    if wrong:
        raise UserError(f"the seed is {wrong[0]}, expected 0 to {2**63 - 1}")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    draws = [torch.stack([torch.randn(shape, generator=one) for _ in range(count)]) for one in generators]
    return torch.stack(draws)
