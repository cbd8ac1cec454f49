"""Markov chains over what a hole may hold, each with its stationary distribution in closed form.

Notation: x_O is the known part and is given, x_M what the hole holds, p the density (`starflow.edit.density`), and y a
whole picture whose hole is x_M = y_M while its known part y_O is free. All chains are of one of two targets:

    hole:   p(x_M | x_O), up to a factor p(x_O, x_M)
    whole:  p(x_O, y_M) q(y_O),   q = N(x_O, s^2 I)

The second has the first as its marginal of y_M, for any spread s > 0, so that y_M is a filling whichever of the two a
chain is of (PL-MCMC, arXiv 2007.06140). A draw y of the flow has the density p(y), hence the importance weight

    w(y) = p(x_O, y_M) q(y_O) / p(y).

Random numbers are arguments; every row of a batch is a chain of its own.

Shapes: B rows, C x H x W latents; known (1, C, H, W), hole (1, 1, H, W) of bool.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from starflow.edit.density import Density, log_density


@dataclass(frozen=True)
class Problem:
    """A density, what is known, and what is to be filled."""

    density: Density
    known: Tensor
    """(1, C, H, W); what it has in the hole counts for nothing."""
    hole: Tensor
    """(1, 1, H, W), bool: True is to be filled."""
    spread: float
    """s of q, in the latents' units."""

    def paste(self, y: Tensor) -> Tensor:
        """(x_O, y_M): the known part over y."""
        return torch.where(self.hole, y, self.known)

    def log_q(self, y: Tensor) -> Tensor:
        """log q(y_O) of each row, nats."""
        gap = torch.where(self.hole, 0, (y - self.known) / self.spread)
        dimensions = int((~self.hole).sum()) * self.known.shape[1]
        return -0.5 * gap.square().flatten(1).sum(1) - dimensions * (
            math.log(self.spread) + 0.5 * math.log(2 * math.pi)
        )

    @torch.no_grad()
    def log_hole(self, y: Tensor) -> Tensor:
        """log p(x_O, y_M) of each row, nats."""
        return log_density(self.density, self.paste(y))

    @torch.no_grad()
    def log_weight(self, y: Tensor) -> Tensor:
        """log w(y) of each row, nats."""
        return self.log_hole(y) + self.log_q(y) - log_density(self.density, y)


@dataclass(frozen=True)
class Step:
    """What a step of a chain did."""

    x: Tensor
    """(B, C, H, W), the state after it."""
    log_ratio: Tensor
    """(B,), log of the Metropolis-Hastings ratio of the proposal; it was accepted with min(1, ratio)."""
    proposal: Tensor
    """(B, C, H, W)"""
    accepted: Tensor
    """(B,), bool"""

    @property
    def probability(self) -> Tensor:
        """min(1, ratio), (B,); 0 where the ratio is not a number."""
        return self.log_ratio.clamp(max=0).exp().nan_to_num(0)


def accept(x: Tensor, proposal: Tensor, log_ratio: Tensor, log_uniform: Tensor) -> Step:
    """Metropolis-Hastings' choice; `log_uniform` (B,) is the log of a uniform number."""
    accepted = log_uniform < log_ratio  # False where the ratio is not a number
    return Step(torch.where(accepted.view(-1, 1, 1, 1), proposal, x), log_ratio, proposal, accepted)


def noise_step(problem: Problem, z: Tensor, part: Tensor, b: float, noise: Tensor, log_uniform: Tensor) -> Step:
    """One prior-preserving step in the flow's noise (preconditioned Crank-Nicolson), of the target "whole".

    With y the data of z: z' = sqrt(1 - b^2) z + b g in `part`, accepted with min(1, w(y') / w(y)). The proposal is
    reversible with respect to N(0, I), the noise's density under p, so that only the weights' ratio is left.

    Args:
        problem: what is filled.
        z: (B, C, H, W), the state, as noise.
        part: (1, 1, H, W) of bool, the noise that moves: the hole's, or all of it, which alone reaches everything.
        b: 0 < b <= 1; 1 draws anew.
        noise: (B, C, H, W), g.
        log_uniform: (B,).

    Returns:
        The step in z.
    """
    proposal = torch.where(part, math.sqrt(1 - b * b) * z + b * noise, z)
    both = problem.density.decode(torch.cat((z, proposal)))
    before, after = problem.log_weight(both).chunk(2)
    return accept(z, proposal, after - before, log_uniform)


def hamiltonian_step(
    problem: Problem, x: Tensor, size: float, leapfrogs: int, momentum: Tensor, log_uniform: Tensor
) -> Step:
    """One step of Hamiltonian Monte Carlo on x_M itself, of the target "hole" (Neal, arXiv 1206.1901, section 5.2).

    The energy is -log p(x_O, x_M) + |v|^2 / 2; a leapfrog costs one parallel pass forward and one back, none token by
    token. One leapfrog is a Langevin step.

    Args:
        problem: what is filled.
        x: (B, C, H, W), the state, with the known part in place.
        size: of a leapfrog's step, in the latents' units.
        leapfrogs: a step, at least 1.
        momentum: (B, C, H, W), v, standard normal; that of the hole is used.
        log_uniform: (B,).
    """
    start, moved = torch.where(problem.hole, momentum, 0), x
    nats, force = _force(problem, x)
    before = nats - 0.5 * start.square().flatten(1).sum(1)
    v = start
    for _ in range(leapfrogs):
        v = v + 0.5 * size * force
        moved = moved + size * v
        nats, force = _force(problem, moved)
        v = v + 0.5 * size * force
    after = nats - 0.5 * v.square().flatten(1).sum(1)
    return accept(x, moved, after - before, log_uniform)


def _force(problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x) and its gradient in the hole."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        at = x.detach().clone().requires_grad_()
        nats = log_density(problem.density, at)
        (gradient,) = torch.autograd.grad(nats.sum(), at)
    return nats.detach(), torch.where(problem.hole, gradient, 0)


@dataclass(frozen=True)
class Adapted:
    """A step's size that is changed until the chain accepts as often as it should; only while it warms up."""

    size: float
    target: float
    """Acceptance to reach: 0.234 for random walks, 0.65 for Hamiltonian steps."""
    largest: float = math.inf
    rate: float = 0.6

    def after(self, step: Step) -> Adapted:
        """The next size, from the mean probability of acceptance of all rows."""
        gap = float(step.probability.mean()) - self.target
        return dataclasses.replace(self, size=min(self.size * math.exp(self.rate * gap), self.largest))
