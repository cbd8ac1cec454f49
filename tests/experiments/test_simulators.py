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


def test_the_tables() -> None:
    one: Measurements = {
        "heldout_nats": 1.0, "c2st": 0.6, "calibration": 0.02, "epochs": 30, "cpu_seconds": 9.0, "parameters": 700,
    }  # fmt: skip
    posterior = sbi.table("two moons", {"SequenceFlow": [one, {**one, "c2st": 0.8}]})
    assert posterior[0][:3] == ["two moons", "held-out log-likelihood, nats", "C2ST (0.5 is perfect)"]
    assert posterior[1][2] == "0.7 ± 0.1"
    likelihood = sbi.table("process", {"SequenceFlow": [{**one, "calibration": None, "exact_nats": 2.0}]})
    assert len(likelihood[0]) == len(posterior[0]) - 1
    assert likelihood[-1][:3] == ["the process itself", "2", "0.5"]
