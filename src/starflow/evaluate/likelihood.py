"""Bits per dimension of a set, averaged over draws of the noise, with a standard error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from starflow.errors import UserError
from starflow.evaluate.gather import gather_rows, own_rows

Density = Callable[[Sequence[int], Sequence[int]], Tensor]
"""Rows of a set and a seed for each, to log-likelihoods in nats (B,)."""


@dataclass(frozen=True)
class Bits:
    """Mean negative log-likelihood of a set; of which dimensions, `space` says.

    Attributes:
        space: "noised latent", "noised pixels" or "8-bit pixels" (there, dequantisation's bound on log P).
        dimensions: of one picture.
        nats_per_dim: mean over pictures and draws.
        bits_per_dim: the same over ln 2.
        error: standard error of bits_per_dim over pictures, the draws of each averaged first.
        draw_error: standard error of bits_per_dim that the draws alone cause; None for a single draw.
        count: pictures with a finite log-likelihood.
        draws: of the noise.
        not_finite: pictures that are left out because a log-likelihood is not finite.
    """

    space: str
    dimensions: int
    nats_per_dim: float
    bits_per_dim: float
    error: float
    draw_error: float | None
    count: int
    draws: int = 1
    not_finite: int = 0


@torch.no_grad()
def log_likelihoods(density: Density, rows: Sequence[int], draws: int, batch: int) -> Tensor:
    """Nats (N, draws) of a set's rows, float64, on the CPU; under torchrun every process computes its share.

    Draw d of row r has the seed r * draws + d, at any batch size and in any number of processes.

    Raises:
        UserError: no rows or no draws.
    """
    if not rows or draws < 1:
        raise UserError(f"{len(rows)} pictures with {draws} draws of the noise: both must be at least 1")
    own = [rows[index] for index in own_rows(len(rows))]
    parts = [
        [density(own[at : at + batch], [row * draws + draw for row in own[at : at + batch]]) for draw in range(draws)]
        for at in range(0, len(own), batch)
    ]
    found = [torch.stack([nats.double().cpu() for nats in part], dim=1) for part in parts]
    return gather_rows(torch.cat(found) if found else torch.zeros(0, draws, dtype=torch.float64), len(rows))


def bits(nats: Tensor, dimensions: int, space: str) -> Bits:
    """The mean and its errors of log-likelihoods (N, draws).

    Raises:
        UserError: not one picture has a finite log-likelihood.
    """
    finite = nats.isfinite().all(1)
    kept = nats[finite]
    if not len(kept):
        raise UserError(f"not one of {len(nats)} pictures has a finite log-likelihood: the model is broken")
    unit = dimensions * math.log(2)
    means = -kept.mean(1) / unit
    draws = nats.shape[1]
    draw_error = float((kept.mean(0) / unit).std()) / math.sqrt(draws) if draws > 1 else None
    return Bits(
        space=space,
        dimensions=dimensions,
        nats_per_dim=float(means.mean()) * math.log(2),
        bits_per_dim=float(means.mean()),
        error=float(means.std()) / math.sqrt(len(means)) if len(means) > 1 else 0.0,
        draw_error=draw_error,
        count=len(kept),
        draws=draws,
        not_finite=int((~finite).sum()),
    )
