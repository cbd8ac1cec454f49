"""The exact map against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from starflow.flow import block


def test_inverse_undoes_forward() -> None:
    x, mu, log_sigma = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(block.inverse(block.forward(x, mu, log_sigma), mu, log_sigma), x)


def test_sigma_is_one_where_the_network_says_zero() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    assert abs(block.log_sigma_of(zero, softplus=True).item()) < 1e-12
    assert block.log_sigma_of(zero, softplus=False).item() == 0


@pytest.mark.parametrize("a", [-800.0, -100.0, -31.0, -30.0, -5.0, 0.0, 3.0, 25.0, 50.0, 300.0])
def test_log_softplus_holds_at_every_scale(a: float) -> None:
    """Against log(log1p(exp(y))) where that can be computed, and its two limits elsewhere."""
    y = a + math.log(math.e - 1)
    expected = y if y < -40 else math.log(math.log1p(math.exp(y))) if y < 500 else math.log(y)
    value = torch.tensor([a], dtype=torch.float64, requires_grad=True)
    log_sigma = block.log_sigma_of(value, softplus=True)
    assert math.isclose(log_sigma.item(), expected, rel_tol=1e-12, abs_tol=1e-12)
    (slope,) = torch.autograd.grad(log_sigma.sum(), value)
    step = 1e-4
    assert 0 < slope.item() <= 1 + 1e-9
    if -25 < y < 100:
        above, below = (math.log(math.log1p(math.exp(y + sign * step))) for sign in (1, -1))
        assert math.isclose(slope.item(), (above - below) / (2 * step), rel_tol=1e-5)


def test_soft_clip_stays_within_its_limit_and_is_nearly_the_identity_at_zero() -> None:
    o = torch.tensor([-100.0, -1e-3, 0.0, 1e-3, 100.0], dtype=torch.float64)
    clipped = block.soft_clip(o, 4.0)
    assert clipped.abs().max() <= 4
    torch.testing.assert_close(clipped[1:4], o[1:4], rtol=1e-6, atol=0)
    assert torch.equal(block.soft_clip(o, 0.0), o)


def test_log_normal_is_the_standard_gaussians() -> None:
    z = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum((1, 2, 3))
    torch.testing.assert_close(block.log_normal(z), expected)
