"""Densities in the plane: mass one, draws that follow them, known entropies, and what one block can do at best."""

from __future__ import annotations

import math

import pytest
import torch

from experiments.densities import HALF, Density, checkerboard, densities, two_way_series
from experiments.universality import total_variation

CELLS = 900


def grid() -> torch.Tensor:
    axis = (torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS * 2 * HALF - HALF
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], -1).view(-1, 2)


@pytest.mark.parametrize("density", densities(), ids=lambda density: density.name)
def test_mass_is_one_and_draws_follow_the_density(density: Density) -> None:
    probability = density.log_prob(grid()).exp() * (2 * HALF / CELLS) ** 2
    assert float(probability.sum()) == pytest.approx(1, abs=2e-3)
    draws = density.draw(40_000, torch.Generator().manual_seed(0))
    log_prob = density.log_prob(draws)
    assert bool(log_prob.isfinite().all())
    entropy = -float((probability * density.log_prob(grid()).nan_to_num(neginf=0.0)).sum())
    assert -float(log_prob.mean()) == pytest.approx(entropy, abs=0.02)
    assert 0.5 < float(draws.std(0).min()) <= float(draws.std(0).max()) < 1.6


def test_the_checkerboards_entropy_is_the_log_of_its_area() -> None:
    draws = checkerboard(0.5).draw(100, torch.Generator().manual_seed(0))
    assert float(-checkerboard(0.5).log_prob(draws).mean()) == pytest.approx(math.log(8 * 0.25))


def test_one_block_is_enough_for_a_gaussian() -> None:
    """And its limit is what is missing where the conditional is no Gaussian: two points far apart cost log 2 less."""
    normal = torch.distributions.MultivariateNormal(
        torch.zeros(2).double(), torch.tensor([[0.3, 0.1], [0.1, 0.2]]).double()
    )
    gaussian = Density("gaussian", lambda count, draw: torch.zeros(count, 2), normal.log_prob)
    assert gaussian.one_block_limit() == pytest.approx(0, abs=1e-3)

    def pair(points: torch.Tensor) -> torch.Tensor:
        x = torch.distributions.Normal(torch.tensor([-1.0, 1.0]).double(), 0.1).log_prob(points[:, :1])
        y = torch.distributions.Normal(0.0, 0.3).log_prob(points[:, 1])
        total: torch.Tensor = x.logsumexp(1) - math.log(2) + y
        return total

    entropy = 0.5 * math.log(2 * math.pi * math.e * 0.1**2) + math.log(2)
    best = 0.5 * math.log(2 * math.pi * math.e * (0.1**2 + 1))
    found = Density("pair", lambda count, draw: torch.zeros(count, 2), pair).one_block_limit()
    assert found == pytest.approx(best - entropy, abs=1e-3)
    assert all(density.one_block_limit(200) > 0.3 for density in densities())


def test_total_variation_in_closed_form() -> None:
    """Two normals a apart: 2 Phi(a / 2) - 1; and disjoint sets: 1."""
    apart, normal = 1.2, torch.distributions.Normal(0.0, 1.0)
    draws = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    gaps = normal.log_prob(draws) - normal.log_prob(draws - apart)
    assert total_variation(gaps) == pytest.approx(2 * float(normal.cdf(torch.tensor(apart / 2))) - 1, abs=3e-3)
    assert total_variation(torch.full((3,), torch.inf)) == 1


def test_the_series_density_is_that_of_its_draws() -> None:
    """What the best normal conditionals miss of it, measured on draws, is the limit; a conditional's mass is one."""
    series = two_way_series()
    draws = series.draw(20_000, torch.Generator().manual_seed(0))
    steps = draws - 0.5 * torch.nn.functional.pad(draws[:, :-1], (1, 0))
    normal = torch.distributions.Normal(0.0, math.sqrt(1 + series.spread**2)).log_prob(steps).sum(1)
    assert float((series.log_prob(draws) - normal).mean()) == pytest.approx(series.one_block_limit(), abs=0.1)
    others = 3 * torch.randn(200_000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ratios = (series._conditional(others[:, 0]) - torch.distributions.Normal(0.0, 3.0).log_prob(others[:, 0])).exp()
    assert float(ratios.mean()) == pytest.approx(1, abs=0.02)
