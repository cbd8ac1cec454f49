"""Simulators of inference: their exact posteriors are those of their simulations, and their likelihood is one."""

from __future__ import annotations

import math

import pytest
import torch

from experiments import sbi, simulators
from experiments.results import Measurements


@pytest.mark.parametrize("name", ["two moons", pytest.param("SLCP", marks=pytest.mark.slow)])
def test_true_parameters_rank_anywhere_among_exact_samples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulation-based calibration of what estimates are compared with."""
    monkeypatch.setattr(simulators, "PROPOSALS", 200_000)
    (simulator,) = (one for one in simulators.simulators() if one.name == name)
    generator = torch.Generator().manual_seed(0)
    theta, x = simulator.draw(24, generator)
    assert bool(simulator.prior.log_prob(theta).isfinite().all())
    exact = torch.stack([simulator.exact_samples(one, 40, generator) for one in x])
    assert exact.shape == (24, 40, theta.shape[1])
    shares = (exact < theta[:, None]).double().mean(1)
    assert sbi.distance_from_uniform(shares) < 0.14
    others = exact.roll(1, 0)  # of other observations
    assert sbi.distance_from_uniform((others < theta[:, None]).double().mean(1)) > sbi.distance_from_uniform(shares)


def test_a_moon_of_the_posterior_simulates_the_observation() -> None:
    simulator, generator = simulators.two_moons(), torch.Generator().manual_seed(0)
    x = torch.tensor([0.1, 0.1])
    theta = simulator.exact_samples(x, 500, generator)
    again = simulator.simulate(theta, generator)
    assert (again - x).norm(dim=1).max() < 0.25  # both lie on one crescent of radius 0.1
    assert 0.3 < float((theta.sum(1) > 0).double().mean()) < 0.7  # both moons


def test_the_process_has_the_likelihood_of_its_samples() -> None:
    simulator, generator = simulators.gaussian_process(), torch.Generator().manual_seed(0)
    assert simulator.exact_log_prob is not None
    theta = torch.tensor([0.5, 0.2])
    x = simulator.exact_samples(theta, 4000, generator)
    nats = simulator.exact_log_prob(x, theta.expand(4000, 2))
    covariance = x.double().T.cov()
    fitted = torch.distributions.MultivariateNormal(torch.zeros(simulators.STEPS).double(), covariance)
    assert abs(float(nats.mean() - fitted.log_prob(x.double()).mean())) < 0.1
    assert float(nats.mean()) < float(fitted.log_prob(x.double()).mean())


def test_distance_from_uniform_in_closed_form() -> None:
    assert sbi.distance_from_uniform((torch.arange(10) + 0.5)[:, None] / 10) == pytest.approx(0)
    assert sbi.distance_from_uniform(torch.zeros(1000, 2)) == pytest.approx(0.5)
    draws = torch.rand(400, 200, generator=torch.Generator().manual_seed(0))
    assert sbi.distance_from_uniform(draws) == pytest.approx(0.31 / math.sqrt(400), rel=0.1)


def test_posterior_shares_in_closed_form() -> None:
    """Of a normal mean they are the normal distribution function, and without any information the prior's."""
    normal, deviations = torch.distributions.Normal(0.0, 1.0), torch.tensor([0.3, 0.6])

    def simulate(theta: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return theta + deviations * torch.randn(theta.shape, generator=generator)

    simulator = simulators.Simulator(
        "means", (-4.0, -4.0), (4.0, 4.0), simulate, lambda x, count, _: x.expand(count, 2)
    )
    theta = torch.tensor([[0.0, 0.5], [-1.0, 1.0], [0.2, 0.1]])
    x = torch.tensor([[0.1, 0.3], [-1.3, 0.2], [0.2, 0.9]])
    shares = sbi.posterior_shares(
        simulator, lambda x, theta: normal.log_prob((x - theta) / deviations).sum(1), theta, x
    )
    assert torch.allclose(shares, normal.cdf((theta - x) / deviations).double(), atol=0.05)
    ignorant = sbi.posterior_shares(simulator, lambda x, theta: torch.zeros(len(theta)), theta, x)
    assert torch.allclose(ignorant, (theta + 4).double() / 8, atol=0.01)


@pytest.mark.slow
def test_the_shares_of_the_process_itself_are_uniform_and_those_of_a_wrong_one_are_not() -> None:
    simulator = simulators.gaussian_process()
    exact = simulator.exact_log_prob
    assert exact is not None
    theta, x = simulator.draw(60, torch.Generator().manual_seed(0))
    right = sbi.distance_from_uniform(sbi.posterior_shares(simulator, exact, theta, x))
    wrong = sbi.distance_from_uniform(sbi.posterior_shares(simulator, exact, theta, 1.5 * x))
    assert right < 0.08 < wrong


def test_the_tables() -> None:
    one: Measurements = {
        "heldout_nats": 1.0, "c2st": 0.6, "calibration": 0.02, "epochs": 30, "cpu_seconds": 9.0, "parameters": 700,
    }  # fmt: skip
    posterior = sbi.table("two moons", {"SequenceFlow": [one, {**one, "c2st": 0.8}]})
    assert posterior[0][:3] == ["two moons", "held-out log-likelihood, nats", "C2ST (0.5 is perfect)"]
    assert posterior[1][2] == "0.7 ± 0.1"
    likelihood = sbi.table("process", {"SequenceFlow": [{**one, "exact_nats": 2.0, "exact_calibration": 0.03}]})
    assert likelihood[-1] == ["the process itself", "2", "0.5", "0.03", "", "", ""]
    assert {len(row) for row in likelihood} == {len(posterior[0])}
