"""Densities in the plane whose entropy is known: what a flow must at least pay, in nats."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

HALF = 3.0
"""All densities lie within [-HALF, HALF] on both axes, up to e^-12 of their mass."""


@dataclass(frozen=True)
class Density:
    """A density over points (N, 2), in units in which a coordinate's standard deviation is about one."""

    name: str
    draw: Callable[[int, Generator], Tensor]
    log_prob: Callable[[Tensor], Tensor]
    """(N, 2) to (N,) nats, -inf where there is nothing."""
    numbers = 2

    def one_block_limit(self, cells: int = 600) -> float:
        """Gap to the entropy, in nats, of the best single block, which reads the second coordinate and then the first.

        One block is Gaussian in each conditional, so its best has the conditionals' own means and variances: the gap is
        1/2 log(2 pi e Var y) + E 1/2 log(2 pi e Var(x | y)) - H, by integration on a grid.
        """
        axis = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells * 2 * HALF - HALF
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        log_prob = self.log_prob(torch.stack([x, y], -1).view(-1, 2)).view(cells, cells)
        mass = log_prob.exp() / log_prob.exp().sum()
        entropy = -(mass * log_prob.nan_to_num(neginf=0.0)).sum()
        rows = mass.sum(1)
        mean = (mass * x).sum(1) / rows.clamp_min(1e-300)
        spread = (mass * (x - mean[:, None]).square()).sum(1) / rows.clamp_min(1e-300)
        unit = math.log(2 * math.pi * math.e)
        first = 0.5 * (unit + ((rows * axis.square()).sum() - (rows * axis).sum().square()).log())
        second = 0.5 * (rows * (unit + spread.clamp_min(1e-300).log())).sum()
        return float(first + second - entropy)


def mixture(modes: int = 8, radius: float = 1.4, spread: float = 0.18) -> Density:
    """Equal Gaussians on a circle, turned so that no two share a coordinate's axis of symmetry alone."""
    angles = 2 * math.pi * (torch.arange(modes, dtype=torch.float64) + 0.5) / modes
    centres = radius * torch.stack([angles.cos(), angles.sin()], 1)

    def draw(count: int, generator: Generator) -> Tensor:
        which = torch.randint(modes, (count,), generator=generator)
        return centres[which] + spread * torch.randn(count, 2, generator=generator, dtype=torch.float64)

    def log_prob(points: Tensor) -> Tensor:
        squares: Tensor = (points[:, None].double() - centres).square().sum(-1) / spread**2
        each = -0.5 * squares - math.log(2 * math.pi * spread**2) - math.log(modes)
        total: Tensor = each.logsumexp(1)
        return total

    return Density("mixture", draw, log_prob)


def rings(radii: tuple[float, ...] = (0.6, 1.2, 1.8), spread: float = 0.08) -> Density:
    """Circles of equal mass, Gaussian across; the radii are many spreads from zero."""
    places = torch.tensor(radii, dtype=torch.float64)

    def draw(count: int, generator: Generator) -> Tensor:
        which = torch.randint(len(radii), (count,), generator=generator)
        radius = places[which] + spread * torch.randn(count, generator=generator, dtype=torch.float64)
        angle = 2 * math.pi * torch.rand(count, generator=generator, dtype=torch.float64)
        return radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)

    def log_prob(points: Tensor) -> Tensor:
        radius = points.double().norm(dim=1).clamp_min(1e-12)
        across: Tensor = torch.distributions.Normal(places, spread).log_prob(radius[:, None])
        mixed: Tensor = across.logsumexp(1) - math.log(len(radii)) - (2 * math.pi * radius).log()
        return mixed

    return Density("rings", draw, log_prob)


def checkerboard(side: float = 0.9) -> Density:
    """Even mass on the eight dark squares of a 4 x 4 board."""

    def draw(count: int, generator: Generator) -> Tensor:
        row = torch.randint(4, (count,), generator=generator)
        column = 2 * torch.randint(2, (count,), generator=generator) + row % 2
        inside = torch.rand(count, 2, generator=generator, dtype=torch.float64)
        return (torch.stack([column, row], 1) - 2 + inside) * side

    def log_prob(points: Tensor) -> Tensor:
        square = (points.double() / side + 2).floor()
        dark = (square >= 0).all(1) & (square < 4).all(1) & (square.sum(1) % 2 == 0)
        return torch.where(dark, -math.log(8 * side**2), -torch.inf).double()

    return Density("checkerboard", draw, log_prob)


def densities() -> tuple[Density, ...]:
    """All of them."""
    return mixture(), rings(), checkerboard()


@dataclass(frozen=True)
class Series(Density):
    """A density over sequences (N, numbers), each number of which has two modes around what the one before says."""

    numbers = 16
    spread: float = 0.25

    def one_block_limit(self, cells: int = 600) -> float:
        """As of a density in the plane; the best normal of each conditional has its variance, 1 + spread^2."""
        axis = (torch.arange(10 * cells, dtype=torch.float64) + 0.5) / (10 * cells) * 8 - 4
        nats = self._conditional(axis)
        entropy = -(nats.exp() * nats).sum() * 8 / (10 * cells)
        normal = 0.5 * math.log(2 * math.pi * math.e * (1 + self.spread**2))
        return self.numbers * (normal - float(entropy))

    def _conditional(self, step: Tensor) -> Tensor:
        """log p of a number less what is expected of it."""
        modes = torch.stack([step - 1, step + 1], -1)
        each = torch.distributions.Normal(0.0, self.spread).log_prob(modes)
        nats: Tensor = each.logsumexp(-1) - math.log(2)
        return nats


def two_way_series(memory: float = 0.5) -> Series:
    """x_n = memory x_(n-1) + 1 or - 1 + noise, from 0: every conditional is a mixture of two normals."""

    def draw(count: int, generator: Generator) -> Tensor:
        signs = 2.0 * torch.randint(2, (count, Series.numbers), generator=generator) - 1
        steps = signs + Series.spread * torch.randn(count, Series.numbers, generator=generator, dtype=torch.float64)
        x = torch.zeros(count, dtype=torch.float64)
        numbers = []
        for step in steps.unbind(1):
            x = memory * x + step
            numbers.append(x)
        return torch.stack(numbers, 1)

    def log_prob(x: Tensor) -> Tensor:
        before = torch.nn.functional.pad(x.double()[:, :-1], (1, 0))
        nats: Tensor = series._conditional(x.double() - memory * before).sum(1)
        return nats

    series = Series("series", draw, log_prob)
    return series
