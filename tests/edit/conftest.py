"""Densities whose conditional distributions are known: a Gaussian in closed form, two others by quadrature."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from starflow.edit.density import Density, log_density
from starflow.flow.config import STARFlowConfig
from starflow.flow.model import STARFlow


@dataclass(frozen=True)
class Affine:
    """x = mean + L z: the Gaussian with covariance L L^T, of pictures (B, 1, 1, D)."""

    mean: Tensor
    root: Tensor

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gap = x.flatten(1) - self.mean
        z = torch.linalg.solve_triangular(self.root, gap.T, upper=False).T
        return z.view_as(x), -self.root.diagonal().log().sum().expand(len(x))

    def decode(self, z: Tensor) -> Tensor:
        return (self.mean + z.flatten(1) @ self.root.T).view_as(z)

    def conditional(self, known: Tensor, hole: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of x_M given x_O."""
        covariance = self.root @ self.root.T
        m, o = hole.flatten(), ~hole.flatten()
        gain = covariance[m][:, o] @ torch.linalg.inv(covariance[o][:, o])
        mean = self.mean[m] + gain @ (known.flatten()[o] - self.mean[o])
        return mean, covariance[m][:, m] - gain @ covariance[o][:, m]


@pytest.fixture(scope="session")
def affine() -> Affine:
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64).tril(-1) * 0.7
    return Affine(
        torch.tensor([0.5, -1, 0.2, 1], dtype=torch.float64),
        root + torch.diag(torch.rand(4, generator=generator).double() + 0.5),
    )


@dataclass(frozen=True)
class Funnel:
    """x_2 = exp(2 z_1) z_2, x_1 = exp(tanh x_2) z_1: the Jacobian changes much with both; pictures (B, 1, 1, 2)."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.unbind(-1)
        z_1 = first * torch.exp(-torch.tanh(second))
        logdet = -torch.tanh(second) - 2 * z_1
        return torch.stack((z_1, second * torch.exp(-2 * z_1)), -1), logdet.flatten()

    def decode(self, z: Tensor) -> Tensor:
        z_1, z_2 = z.unbind(-1)
        second = torch.exp(2 * z_1) * z_2
        return torch.stack((torch.exp(torch.tanh(second)) * z_1, second), -1)


@pytest.fixture(scope="session")
def banana() -> STARFlow:
    """A flow of two tokens in float64, trained for a moment on a bent band."""
    torch.manual_seed(0)
    config = STARFlowConfig(
        in_channels=1, img_size=2, channels=32, num_blocks=3, layers_per_block=1, head_dim=16, rope=True, sos=True
    )
    model = STARFlow(config)
    generator = torch.Generator().manual_seed(1)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        first = 1.2 * torch.randn(128, generator=generator)
        second = first.square() - 1 + 0.4 * torch.randn(128, generator=generator)
        loss = -model.log_prob(torch.stack((first, second), 1).view(-1, 1, 1, 2)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.double().eval().requires_grad_(False)


def quadrature(density: Density, known: float, hole: int, edges: Tensor) -> Tensor:
    """Probability of each interval of the hole's coordinate, given that the other one is `known`."""
    fine = torch.linspace(float(edges[0]), float(edges[-1]), 40 * (len(edges) - 1) + 1, dtype=torch.float64)
    points = torch.full((len(fine), 1, 1, 2), known, dtype=torch.float64)
    points[:, 0, 0, hole] = fine
    values = log_density(density, points).exp()
    cells = 0.5 * (values[1:] + values[:-1]) * (fine[1] - fine[0])
    mass = cells.view(-1, 40).sum(1)
    return mass / mass.sum()


def histogram_apart(density: Density, x: Tensor, known: float, hole: int) -> float:
    """How far the shares of rows below each tenth are from quadrature, in standard errors."""
    edges = torch.linspace(-6, 6, 241, dtype=torch.float64)
    exact = quadrature(density, known, hole, edges).cumsum(0)
    cuts = torch.searchsorted(exact, torch.arange(0.1, 0.95, 0.1, dtype=torch.float64))
    below = (x[:, 0, 0, hole][:, None] <= edges[cuts + 1]).double()
    error = (exact[cuts] * (1 - exact[cuts]) / len(x)).sqrt()
    return float(((below.mean(0) - exact[cuts]) / error).abs().max())


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def log_uniform(generator: torch.Generator, count: int) -> Tensor:
    return torch.rand(count, generator=generator, dtype=torch.float64).log()


STANDARD_ERRORS = 4.5
"""How far from the truth a mean may lie; of a hundred comparisons one goes beyond it in about a thousand runs."""


def far(values: Tensor, truth: Tensor) -> float:
    """The largest distance of means over independent rows (R, K) from the truth (K,), in standard errors."""
    error = values.std(0) / math.sqrt(len(values))
    return float(((values.mean(0) - truth) / error).abs().max())
