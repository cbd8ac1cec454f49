"""Simulators whose posterior or likelihood is known: what an estimate of simulation-based inference is compared with.

Two moons and SLCP are tasks of the benchmark of Lueckmann et al. (arXiv 2101.04653); the Gaussian process is a time
series whose likelihood is that of a multivariate normal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Uniform

STEPS = 20
"""Of the time series."""

PROPOSALS = 800_000
"""Draws of the prior that samples of SLCP's posterior are resampled from."""


@dataclass(frozen=True)
class Simulator:
    """A prior over theta, x given theta, and exact samples of what is estimated."""

    name: str
    low: tuple[float, ...]
    high: tuple[float, ...]
    simulate: Callable[[Tensor, Generator], Tensor]
    """theta (R, K) to x (R, ...)."""
    exact_samples: Callable[[Tensor, int, Generator], Tensor]
    """Of p(theta | x) at one x, or, for a likelihood, of p(x | theta) at one theta."""
    exact_log_prob: Callable[[Tensor, Tensor], Tensor] | None = None
    """log p(x | theta) (R,) of a simulator whose likelihood is estimated; None where its posterior is."""

    @property
    def prior(self) -> Distribution:
        return Independent(Uniform(torch.tensor(self.low), torch.tensor(self.high)), 1)

    def draw(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """`count` pairs (theta, x)."""
        low, high = torch.tensor(self.low), torch.tensor(self.high)
        theta = low + (high - low) * torch.rand(count, len(low), generator=generator)
        return theta, self.simulate(theta, generator)


def two_moons() -> Simulator:
    """Two parameters and two numbers; the posterior is two crescents."""

    def crescent(count: int, generator: Generator) -> Tensor:
        angle = math.pi * (torch.rand(count, generator=generator) - 0.5)
        radius = 0.1 + 0.01 * torch.randn(count, generator=generator)
        return torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], 1)

    def simulate(theta: Tensor, generator: Generator) -> Tensor:
        moved = torch.stack([-(theta[:, 0] + theta[:, 1]).abs(), theta[:, 1] - theta[:, 0]], 1) / math.sqrt(2)
        return crescent(len(theta), generator) + moved

    def posterior(x: Tensor, count: int, generator: Generator) -> Tensor:
        """The inverse of `simulate` for every crescent, whose Jacobian is constant; the prior's box cuts it."""
        found = torch.empty(0, 2)
        while len(found) < count:
            moved = math.sqrt(2) * (x - crescent(4 * count, generator))
            sign = torch.where(torch.rand(len(moved), generator=generator) < 0.5, -1.0, 1.0)
            total, difference = -moved[:, 0] * sign, moved[:, 1]
            theta = torch.stack([(total - difference) / 2, (total + difference) / 2], 1)
            found = torch.cat([found, theta[(moved[:, 0] <= 0) & (theta.abs() <= 1).all(1)]])
        return found[:count]

    return Simulator("two moons", (-1.0, -1.0), (1.0, 1.0), simulate, posterior)


def slcp() -> Simulator:
    """Simple likelihood, complex posterior: four points of a normal whose mean and covariance five parameters give."""

    def normal(theta: Tensor) -> MultivariateNormal:
        first, second = theta[:, 2].square(), theta[:, 3].square()
        cross = theta[:, 4].tanh() * first * second
        covariance = torch.stack([first.square(), cross, cross, second.square()], 1).view(-1, 2, 2)
        return MultivariateNormal(theta[:, :2], covariance + 1e-6 * torch.eye(2), validate_args=False)

    def simulate(theta: Tensor, generator: Generator) -> Tensor:
        noise = torch.randn(len(theta), 4, 2, generator=generator)
        there = normal(theta)
        return (there.loc[:, None] + noise @ there.scale_tril.mT).flatten(1)

    def posterior(x: Tensor, count: int, generator: Generator) -> Tensor:
        """Draws of the prior, resampled by their likelihood."""
        theta, weights = [], []
        for _ in range(PROPOSALS // 200_000):
            some = 6 * torch.rand(200_000, 5, generator=generator) - 3
            nats = normal(some).log_prob(x.view(4, 1, 2)).sum(0).nan_to_num(nan=-math.inf)
            theta.append(some)
            weights.append(nats.double())
        nats = torch.cat(weights)
        kept = torch.multinomial((nats - nats.max()).exp(), count, replacement=True, generator=generator)
        return torch.cat(theta)[kept]

    return Simulator("SLCP", (-3.0,) * 5, (3.0,) * 5, simulate, posterior)


def gaussian_process() -> Simulator:
    """A time series (STEPS,) of a squared-exponential kernel; theta is its log length scale and log amplitude."""
    times = torch.arange(STEPS, dtype=torch.float64)
    squares = (times[:, None] - times).square()

    def process(theta: Tensor) -> MultivariateNormal:
        length, amplitude = theta[:, 0].double().exp()[:, None, None], theta[:, 1].double().exp()[:, None, None]
        covariance = amplitude**2 * torch.exp(-0.5 * squares / length**2) + 0.01 * torch.eye(STEPS).double()
        return MultivariateNormal(torch.zeros(STEPS).double(), covariance)

    def simulate(theta: Tensor, generator: Generator) -> Tensor:
        noise = torch.randn(len(theta), STEPS, 1, generator=generator, dtype=torch.float64)
        return (process(theta).scale_tril @ noise)[..., 0].float()

    def samples(theta: Tensor, count: int, generator: Generator) -> Tensor:
        return simulate(theta.expand(count, -1), generator)

    def log_prob(x: Tensor, theta: Tensor) -> Tensor:
        nats: Tensor = process(theta).log_prob(x.double())
        return nats

    return Simulator("Gaussian process", (0.0, -0.5), (1.5, 0.5), simulate, samples, log_prob)


def simulators() -> tuple[Simulator, ...]:
    """All of them, in the order of the tables."""
    return (two_moons(), slcp(), gaussian_process())
