"""Chains have the stationary distribution that they state: in closed form, by quadrature, and step by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from starflow.edit.chains import Adapted, Problem, Step, hamiltonian_step, noise_step
from starflow.edit.density import Density, GuidedFlow
from starflow.flow.model import STARFlow
from tests.edit.conftest import STANDARD_ERRORS, Affine, Funnel, far, histogram_apart, log_uniform, normal, quadrature

ROWS = 1500
HOLE = torch.tensor([False, True, False, True]).view(1, 1, 1, 4)
EVERYTHING = torch.ones_like(HOLE)
KNOWN = torch.tensor([1.2, 0, 1.5, 0], dtype=torch.float64).view(1, 1, 1, 4)

Chain = Callable[[Problem, torch.Generator, Tensor, int], Tensor]
"""Takes fillings (B, C, H, W) through some steps of independent chains."""


def by_noise(problem: Problem, generator: torch.Generator, x: Tensor, steps: int) -> Tensor:
    z, _ = problem.density.encode(x)
    for step in range(steps):
        part = problem.hole if step % 2 else torch.ones_like(problem.hole)
        z = noise_step(problem, z, part, 0.7, normal(generator, *x.shape), log_uniform(generator, len(x))).x
    return problem.paste(problem.density.decode(z))


def by_force(problem: Problem, generator: torch.Generator, x: Tensor, steps: int) -> Tensor:
    x = problem.paste(x)
    for _ in range(steps):
        x = hamiltonian_step(problem, x, 0.35, 3, normal(generator, *x.shape), log_uniform(generator, len(x))).x
    return x


def moments_apart(affine: Affine, x: Tensor) -> float:
    """How far means and second moments of the hole are from the closed form, in standard errors."""
    mean, covariance = affine.conditional(KNOWN, HOLE)
    gap = x.flatten(1)[:, HOLE.flatten()] - mean
    products = torch.stack((gap[:, 0].square(), gap[:, 1].square(), gap[:, 0] * gap[:, 1]), 1)
    truth = torch.stack((covariance[0, 0], covariance[1, 1], covariance[0, 1]))
    return max(far(gap, torch.zeros(2).double()), far(products, truth))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("chain", [by_noise, by_force])
def test_a_gaussian_is_filled_as_its_closed_form_says(affine: Affine, chain: Chain, seed: int) -> None:
    problem = Problem(affine, KNOWN, HOLE, spread=0.8)
    generator = torch.Generator().manual_seed(seed)
    x = chain(problem, generator, affine.decode(normal(generator, ROWS, 1, 1, 4)), 200)
    assert torch.equal(x[:, :, :, [0, 2]], KNOWN[:, :, :, [0, 2]].expand(ROWS, 1, 1, 2))
    assert moments_apart(affine, x) < STANDARD_ERRORS


class WithoutProposalDensity(Problem):
    """A wrong weight: p(y) is left out."""

    def log_weight(self, y: Tensor) -> Tensor:
        return self.log_hole(y) + self.log_q(y)


class WithoutTheKnownPart(Problem):
    """A wrong weight: the density is that of y as it was drawn, the known part not in its place."""

    def paste(self, y: Tensor) -> Tensor:
        return y


@pytest.mark.parametrize("wrong", [WithoutProposalDensity, WithoutTheKnownPart])
def test_a_wrong_weight_is_seen(affine: Affine, wrong: type[Problem]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = by_noise(wrong(affine, KNOWN, HOLE, 0.8), generator, affine.decode(normal(generator, ROWS, 1, 1, 4)), 200)
    assert moments_apart(affine, x) > 2 * STANDARD_ERRORS


def exact_draws(density: Density, problem: Problem, generator: torch.Generator, rows: int) -> Tensor:
    """Fillings drawn from the conditional distribution itself, by the inverse of its distribution function."""
    hole = int(problem.hole.flatten().nonzero())
    edges = torch.linspace(-6, 6, 961, dtype=torch.float64)
    below = quadrature(density, float(problem.known[0, 0, 0, 1 - hole]), hole, edges).cumsum(0)
    uniform = torch.rand(rows, generator=generator, dtype=torch.float64)
    x = problem.known.repeat(rows, 1, 1, 1)
    x[:, 0, 0, hole] = edges[torch.searchsorted(below, uniform).clamp(max=959)] + 0.00625
    return x


CASES = [(0.7, 1), (1.0, 0)]
"""The known coordinate's value, and which one is the hole; given the second, the first has two modes."""
FEW = 300


def problem_of(density: Density, known: float, hole: int) -> Problem:
    given = torch.full((1, 1, 1, 2), known, dtype=torch.float64)
    return Problem(density, given, (torch.arange(2) == hole).view(1, 1, 1, 2), 0.5)


def drift(
    right: Density, used: Density, chain: Chain, known: float, hole: int, rows: int = FEW, steps: int = 5
) -> float:
    """How far a chain of the density `used` leads from the right one, where it starts, in standard errors."""
    generator, problem = torch.Generator().manual_seed(5), problem_of(used, known, hole)
    x = exact_draws(right, problem, generator, rows)
    y = torch.where(problem.hole, x, x + problem.spread * normal(generator, *x.shape))
    x = chain(problem, generator, y, steps)
    return histogram_apart(right, x, known, hole)


@pytest.mark.parametrize(("known", "hole"), CASES)
@pytest.mark.parametrize("chain", [by_noise, by_force])
def test_a_trained_density_stays_as_quadrature_says(banana: STARFlow, chain: Chain, known: float, hole: int) -> None:
    assert drift(GuidedFlow(banana), GuidedFlow(banana), chain, known, hole) < STANDARD_ERRORS


@pytest.mark.parametrize("chain", [by_noise, by_force])
def test_a_funnel_stays_as_quadrature_says(chain: Chain) -> None:
    assert drift(Funnel(), Funnel(), chain, -0.5, 0, 25000, 30) < STANDARD_ERRORS


class WithoutJacobian(Funnel):
    """A wrong density: log |det dz/dx| is left out."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, logdet = super().encode(x)
        return z, 0 * logdet


@pytest.mark.parametrize("chain", [by_noise, by_force])
def test_a_wrong_jacobian_is_seen(chain: Chain) -> None:
    assert drift(Funnel(), WithoutJacobian(), chain, -0.5, 0, 25000, 30) > 2 * STANDARD_ERRORS


def test_chains_from_anywhere_come_to_what_quadrature_says(banana: STARFlow) -> None:
    generator, problem = torch.Generator().manual_seed(6), problem_of(GuidedFlow(banana), 0.7, 1)
    x = by_force(problem, generator, problem.paste(normal(generator, FEW, 1, 1, 2)), 12)
    assert histogram_apart(problem.density, x, 0.7, 1) < STANDARD_ERRORS


def ratios_are_inverse(forth: Step, back: Step, x: Tensor) -> bool:
    returned = torch.allclose(back.proposal, x, atol=1e-8)
    return returned and torch.allclose(back.log_ratio, -forth.log_ratio, atol=1e-6)


def test_the_reverse_of_a_noise_step_has_the_inverse_ratio(affine: Affine) -> None:
    problem, generator = Problem(affine, KNOWN, HOLE, 0.8), torch.Generator().manual_seed(0)
    z, noise, b = normal(generator, 8, 1, 1, 4), normal(generator, 8, 1, 1, 4), 0.6
    never = torch.full((8,), torch.inf, dtype=torch.float64)
    forth = noise_step(problem, z, EVERYTHING, b, noise, never)
    assert torch.equal(forth.x, z)
    reverse = (z - (1 - b * b) ** 0.5 * forth.proposal) / b
    assert ratios_are_inverse(forth, noise_step(problem, forth.proposal, EVERYTHING, b, reverse, never), z)


def test_the_reverse_of_a_hamiltonian_step_has_the_inverse_ratio(banana: STARFlow) -> None:
    problem, generator = problem_of(GuidedFlow(banana), 0.7, 1), torch.Generator().manual_seed(0)
    x, momentum = problem.paste(normal(generator, 8, 1, 1, 2)), normal(generator, 8, 1, 1, 2)
    never = torch.full((8,), torch.inf, dtype=torch.float64)
    forth = hamiltonian_step(problem, x, 0.2, 3, momentum, never)
    assert bool((forth.log_ratio.abs() > 1e-6).any()), "a step that loses nothing proves nothing"
    arrived = final_momentum(problem, x, 0.2, 3, momentum)
    assert ratios_are_inverse(forth, hamiltonian_step(problem, forth.proposal, 0.2, 3, -arrived, never), x)


def final_momentum(problem: Problem, x: Tensor, size: float, leapfrogs: int, momentum: Tensor) -> Tensor:
    """The momentum after a trajectory, from the positions of one that is a leapfrog longer: x(n+1) - x(n-1) = 2 s v."""
    never = torch.full((len(x),), torch.inf, dtype=torch.float64)
    before, after = (
        hamiltonian_step(problem, x, size, count, momentum, never).proposal for count in (leapfrogs - 1, leapfrogs + 1)
    )
    return (after - before) / (2 * size)


def test_what_is_not_a_number_is_never_accepted(affine: Affine) -> None:
    problem = Problem(affine, KNOWN, HOLE, 0.8)
    momentum = torch.full((1, 1, 1, 4), torch.nan, dtype=torch.float64)
    step = hamiltonian_step(problem, KNOWN, 0.1, 1, momentum, torch.tensor([-1e9], dtype=torch.float64))
    assert not step.accepted.item()
    assert torch.equal(step.x, KNOWN)
    assert step.probability.item() == 0


def test_a_size_grows_where_everything_is_accepted_and_has_a_bound(affine: Affine) -> None:
    sure = Step(KNOWN, torch.zeros(1), KNOWN, torch.ones(1, dtype=torch.bool))
    never = dataclasses.replace(sure, log_ratio=torch.tensor([-torch.inf]))
    size = Adapted(0.5, target=0.65, largest=0.6)
    assert size.after(never).size < 0.5 < size.after(sure).size <= 0.6
    assert size.after(sure).after(sure).size == 0.6
