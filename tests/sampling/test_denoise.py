"""One Tweedie step, and the network that learns it."""

from __future__ import annotations

import pytest
import torch

from starflow import STARFlow, denoise
from starflow.errors import UserError
from starflow.flow.config import STARFlowConfig
from starflow.sampling.denoise import Denoiser, DenoiserConfig
from starflow.sampling.student import inputs_of
from tests.registry import randomised

CONFIG = STARFlowConfig(
    in_channels=2, img_size=4, channels=48, head_dim=24, num_blocks=2, layers_per_block=1, txt_size=3, txt_dim=5
)


def test_of_a_standard_normal_it_is_a_shrinkage() -> None:
    """A new model is N(0, I): log p's gradient is -x."""
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    clean = denoise(STARFlow(CONFIG).double(), x, torch.zeros(3, 3, 5, dtype=torch.float64), sigma=0.5)
    torch.testing.assert_close(clean, x * (1 - 0.5**2))


def test_it_climbs_log_prob_along_its_gradient() -> None:
    model = randomised(CONFIG, 0).double()
    x, condition = torch.randn(2, 2, 4, 4, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    step = denoise(model, x, condition, sigma=1e-3) - x
    direction = torch.randn_like(x)
    small = 1e-5
    with torch.no_grad():
        rise = model.log_prob(x + small * direction, condition) - model.log_prob(x - small * direction, condition)
    expected = rise / (2 * small) * 1e-3**2
    torch.testing.assert_close((step * direction).sum((1, 2, 3)), expected, rtol=1e-6, atol=1e-12)


def test_it_leaves_no_gradients_and_works_in_inference_mode() -> None:
    model = randomised(CONFIG, 0)
    with torch.inference_mode():
        x, condition = torch.randn(1, 2, 4, 4), torch.randn(1, 3, 5)
        inside = denoise(model, x, condition)
    outside = denoise(model, x.clone(), condition.clone())
    torch.testing.assert_close(inside, outside)
    assert not outside.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_sigma_zero_changes_nothing_and_negative_is_refused() -> None:
    model, x, condition = STARFlow(CONFIG), torch.randn(1, 2, 4, 4), torch.zeros(1, 3, 5)
    assert torch.equal(denoise(model, x, condition, sigma=0.0), x)
    with pytest.raises(UserError, match=r"sigma is -0\.3, expected a standard deviation of at least 0"):
        denoise(model, x, condition, sigma=-0.3)
    with pytest.raises(UserError, match="sigma is inf"):
        denoise(model, x, condition, sigma=float("inf"))


def test_large_pictures_are_taken_in_pieces_of_their_own_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, condition = randomised(CONFIG, 0), torch.randn(5, 2, 4, 4), torch.randn(5, 3, 5)
    whole = denoise(model, x, condition)
    monkeypatch.setattr("starflow.sampling.denoise.denoised_at_once", lambda tokens: 2)
    torch.testing.assert_close(denoise(model, x, condition), whole)


def test_a_new_denoiser_changes_nothing_and_needs_a_noise() -> None:
    sizes = inputs_of(STARFlow(CONFIG))
    x, condition = torch.randn(2, 2, 4, 4), torch.randn(2, 3, 5)
    assert torch.equal(Denoiser(DenoiserConfig(**sizes, channels=16, layers=(1,), head_dim=16)).clean(x, condition), x)
    with pytest.raises(UserError, match=r"noise_std is 0.0, expected above 0: a flow without noise needs no denoiser"):
        DenoiserConfig(**sizes, channels=16, layers=(1,), head_dim=16, noise_std=0.0)
