"""Editing is the identity where nothing changes, a new draw where everything does, and a great circle between two."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from starflow.edit.density import GuidedFlow
from starflow.edit.editing import edit, interpolate, slerp
from starflow.edit.inpainting import Random
from starflow.errors import UserError
from starflow.flow.config import STARFlowConfig
from starflow.flow.model import Flow
from starflow.sampling.sampler import sample
from tests.registry import randomised


@pytest.fixture(scope="module")
def flow() -> Flow:
    config = STARFlowConfig(2, 4, channels=48, num_blocks=2, layers_per_block=1, head_dim=24, txt_size=2, txt_dim=5)
    return randomised(config, 0).requires_grad_(False)


def some(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def test_at_strength_0_a_latent_is_itself_and_guidance_or_a_prompt_moves_it(flow: Flow) -> None:
    x, a, b, null = some(2, 2, 4, 4), some(2, 2, 5, seed=1), some(2, 2, 5, seed=2), some(2, 2, 5, seed=3)
    assert torch.allclose(edit(flow, x, a, a, seeds=[0, 1]), x, atol=1e-4)
    assert not torch.allclose(edit(flow, x, a, b, seeds=[0, 1]), x, atol=1e-2)
    assert not torch.allclose(edit(flow, x, a, a, null, seeds=[0, 1], guidance=2.0), x, atol=1e-2)


def test_at_strength_1_nothing_of_the_latent_is_left(flow: Flow) -> None:
    a, b, null = some(1, 2, 5, seed=1), some(1, 2, 5, seed=2), some(1, 2, 5, seed=3)
    drawn = edit(flow, some(1, 2, 4, 4), a, b, null, seeds=[7], strength=1.0, guidance=1.5)
    noise = Random(7, drawn).normal(1)
    assert torch.allclose(drawn, sample(flow, noise, b, null, 1.5), atol=1e-5)
    assert torch.equal(drawn, edit(flow, some(1, 2, 4, 4, seed=9), a, b, null, seeds=[7], strength=1.0, guidance=1.5))


def test_the_noise_keeps_its_share_and_a_row_does_not_know_its_batch(flow: Flow) -> None:
    x, a = some(3, 2, 4, 4), some(3, 2, 5, seed=1)
    together = edit(flow, x, a, a, seeds=[4, 5, 6], strength=0.6)
    alone = edit(flow, x[1:2], a[1:2], a[1:2], seeds=[5], strength=0.6)
    assert torch.equal(together[1:2], alone)
    density = GuidedFlow(flow, a[1:2])
    moved = density.encode(alone)[0] - 0.8 * density.encode(x[1:2])[0]
    assert torch.allclose(moved, 0.6 * Random(5, alone).normal(1), atol=1e-3)


def test_the_way_between_two_latents_starts_and_ends_at_them(flow: Flow) -> None:
    x, a = some(2, 2, 4, 4), some(2, 2, 5, seed=1)
    way = interpolate(flow, x[:1], x[1:], a[:1], a[1:], steps=5)
    assert torch.allclose(way[0], x[0], atol=1e-4)
    assert torch.allclose(way[-1], x[1], atol=1e-4)
    middle = GuidedFlow(flow, (a[:1] + a[1:]) / 2).encode(way[2:3])[0]
    first, last = (GuidedFlow(flow, a[row : row + 1]).encode(x[row : row + 1])[0] for row in range(2))
    assert torch.allclose(middle, slerp(first, last, 0.5), atol=1e-3)


def test_the_great_circle_keeps_the_length_and_meets_the_angle() -> None:
    a, b = torch.tensor([[2.0, 0]]), torch.tensor([[0, 2.0]])
    assert torch.allclose(slerp(a, b, 1 / 3), torch.tensor([[3**0.5, 1.0]]), atol=1e-6)
    assert torch.allclose(slerp(a, a, 0.3), a)
    assert float(slerp(a, 2 * b, 0.5).norm()) == pytest.approx(3)


def test_a_wrong_strength_count_or_way_is_told(flow: Flow) -> None:
    x, a = some(1, 2, 4, 4), some(1, 2, 5)
    with pytest.raises(UserError, match="strength is 1.5, expected 0"):
        edit(flow, x, a, a, seeds=[0], strength=1.5)
    with pytest.raises(UserError, match="2 seeds for 1 latents"):
        edit(flow, x, a, a, seeds=[0, 1])
    with pytest.raises(UserError, match="steps is 1, expected at least 2"):
        interpolate(flow, x, x, a, a, steps=1)
