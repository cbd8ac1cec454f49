"""Guidance rules against what they are meant to be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from starflow.sampling import guidance as rules
from starflow.sampling.guidance import Guidance

means = st.floats(-2, 2)
weights = st.floats(0, 6)


def moments(log_density: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a density given up to a constant on an even grid."""
    p = (log_density - log_density.max()).exp()
    p = p / p.sum()
    mean = (p * x).sum()
    return mean, (p * (x - mean).square()).sum().sqrt()


@settings(max_examples=60, derandomize=True)
@given(mu_c=means, mu_u=means, log_sigma_c=st.floats(-1, 1), wider=st.floats(0, 1.5), weight=weights)
def test_gaussian_rule_is_the_renormalised_power(
    mu_c: float, mu_u: float, log_sigma_c: float, wider: float, weight: float
) -> None:
    """p_c^(1+w) / p_u^w by quadrature, where sigma_u >= sigma_c."""
    values = (mu_c, log_sigma_c, mu_u, log_sigma_c + wider, weight)
    mc, sc, mu, su, w = (torch.tensor(value, dtype=torch.float64) for value in values)
    ours, log_sigma = rules.gaussian(mc, sc, mu, su, w)
    x = ours + log_sigma.exp() * torch.linspace(-12, 12, 4001, dtype=torch.float64)
    log_c = torch.distributions.Normal(mc, sc.exp()).log_prob(x)
    log_u = torch.distributions.Normal(mu, su.exp()).log_prob(x)
    mean, std = moments((1 + w) * log_c - w * log_u, x)
    torch.testing.assert_close(mean, ours, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(std, log_sigma.exp(), rtol=1e-9, atol=1e-9)


@settings(max_examples=60, derandomize=True)
@given(mu_c=means, mu_u=means, log_sigma_c=st.floats(-3, 3), log_sigma_u=st.floats(-3, 3), weight=weights)
def test_gaussian_rule_stays_defined_and_never_widens(
    mu_c: float, mu_u: float, log_sigma_c: float, log_sigma_u: float, weight: float
) -> None:
    values = (mu_c, log_sigma_c, mu_u, log_sigma_u, weight)
    mu, log_sigma = rules.gaussian(*(torch.tensor(value, dtype=torch.float64) for value in values))
    assert mu.isfinite()
    assert log_sigma <= log_sigma_c + 1e-12
    if log_sigma_u <= log_sigma_c:  # the clamp: both are taken as equally wide
        torch.testing.assert_close(mu.item(), mu_c + weight * (mu_c - mu_u), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(log_sigma.item(), log_sigma_c, rtol=1e-9, atol=1e-9)


def test_weight_zero_is_the_conditional_prediction_bit_for_bit() -> None:
    mu_c, log_sigma_c, mu_u, log_sigma_u = torch.randn(4, 2, 3, 5)
    mu, log_sigma = rules.gaussian(mu_c, log_sigma_c, mu_u, log_sigma_u, torch.zeros(2, 1, 1))
    assert torch.equal(mu, mu_c)
    assert torch.equal(log_sigma, log_sigma_c)
    assert torch.equal(rules.linear(mu_c, mu_u, torch.zeros(2, 1, 1)), mu_c)


def test_linear_rule_extrapolates() -> None:
    assert rules.linear(torch.tensor(3.0), torch.tensor(1.0), torch.tensor(2.0)).item() == 7


@pytest.mark.parametrize(
    ("first", "count", "tokens", "expected"),
    [(0, 5, 5, [0, 0.5, 1.0, 1.5, 2.0]), (3, 2, 5, [1.5, 2.0]), (0, 1, 1, [0.0])],
)
def test_the_annealed_weight_grows_to_its_full_value_at_the_last_token(
    first: int, count: int, tokens: int, expected: list[float]
) -> None:
    annealed = Guidance(torch.tensor([2.0, 4.0]), "linear", "linear", temperature=1.0)
    weight = annealed.weights(first, count, tokens)
    torch.testing.assert_close(weight[0, :, 0], torch.tensor(expected))
    torch.testing.assert_close(weight[1, :, 0], 2 * torch.tensor(expected))


def test_the_constant_weight_is_the_same_for_every_token() -> None:
    constant = Guidance(torch.tensor([2.0, 4.0]), "gaussian", "constant", temperature=1.0)
    assert constant.weights(3, 2, 9).tolist() == [[[2.0]], [[4.0]]]
    assert constant.query_scale() is None
    halved = Guidance(torch.tensor([2.0, 4.0]), "gaussian", "constant", temperature=0.5).query_scale()
    assert halved is not None
    assert halved.flatten().tolist() == [1, 1, 2, 2]
