"""Layers in bfloat16 that are cast for long passes: nearer to the stored weights, one at a time, never in training."""

from __future__ import annotations

import pytest
import torch
from tests.registry import randomised
from torch import nn

from starflow import STARFlow, denoise, sample
from starflow.flow import block as blocks
from starflow.model_config import STARFlowConfig
from starflow.nn import widen

CONFIG = STARFlowConfig(
    in_channels=2, img_size=8, channels=48, head_dim=24, num_blocks=2, layers_per_block=(1, 3), txt_size=3, txt_dim=5
)
X, CONDITION = torch.randn(2, 2, 8, 8), torch.randn(2, 3, 5)


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> STARFlow:
    """A model in bfloat16, on a processor without it."""
    monkeypatch.setattr(widen, "has_bfloat16", lambda: False)
    model = randomised(CONFIG, 0)
    assert isinstance(model, STARFlow)
    return model.requires_grad_(False).to(torch.bfloat16)


def exact(model: STARFlow) -> STARFlow:
    """The same numbers in float32."""
    twin = randomised(CONFIG, 0)
    assert isinstance(twin, STARFlow)
    twin.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    return twin.requires_grad_(False)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@torch.no_grad()
def test_a_long_pass_is_nearer_to_the_stored_weights(half: STARFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = exact(half)(X, CONDITION)[0]
    wide = distance(half(X, CONDITION)[0], expected)
    monkeypatch.setattr(widen, "has_bfloat16", lambda: True)
    narrow = distance(half(X, CONDITION)[0], expected)
    assert 0 < wide < 0.7 * narrow
    assert half.network_dtype == torch.bfloat16


@torch.no_grad()
def test_one_layer_is_wide_at_a_time_and_a_few_tokens_are_not(half: STARFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    most, made = 0, 0

    def counted(*given: object) -> nn.Module:
        nonlocal most, made
        layer = widen.widened(*given)  # type: ignore[arg-type]
        alive.add(layer)
        most, made = max(most, len(alive)), made + 1
        return layer

    monkeypatch.setattr(blocks, "widened", counted)
    half(X, CONDITION)
    assert (most, made) == (1, 4)
    half(X[:1, :, :4, :4], CONDITION[:1])  # 16 tokens
    assert made == 4


def test_training_and_other_precisions_stay_as_they_are(half: STARFlow) -> None:
    block, hidden = half.blocks[1], torch.zeros(2, 64, 48, dtype=torch.bfloat16)
    assert widen.runs_wide(block, hidden)
    assert not widen.runs_wide(block, hidden.float())
    half.requires_grad_(True)
    assert not widen.runs_wide(block, hidden)
    with torch.no_grad():
        assert widen.runs_wide(block, hidden)


def test_the_score_goes_through_the_cast(half: STARFlow) -> None:
    expected = denoise(exact(half), X, CONDITION)
    assert distance(denoise(half, X, CONDITION), expected) < 1e-2


def test_solvers_agree(half: STARFlow) -> None:
    drawn = sample(half, X, CONDITION, solver="jacobi", tolerance=0)
    assert distance(drawn, sample(exact(half), X, CONDITION)) < 5e-2
