"""One update, apart from the loop: what is computed again, clipping, the optimiser."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from starflow.nn.layers import MLP
from starflow.train.distributed.sharding import layers_of
from starflow.train.distributed.world import World
from starflow.train.state import TrainState
from starflow.train.tasks.flow import FlowLoss
from tests.registry import randomised
from tests.train.distributed.scenario import CONFIG, settings


def make_state(model: nn.Module | None = None, clip: float = 1.0, **parallel: object) -> TrainState:
    model = model or FlowLoss(randomised(CONFIG, 0), 0.1)
    return TrainState(model, replace(settings(**parallel), clip=clip), World())


def gradients(state: TrainState) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, condition = torch.randn(4, 2, 4, 4, generator=draw), torch.randn(4, 1, 4, generator=draw)
    state.model(x, condition)[0].backward()
    return [parameter.grad for parameter in state.model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("mlp", [False, True])
def test_attention_and_mlp_are_computed_again_each_where_it_is_asked_for(*, attention: bool, mlp: bool) -> None:
    flow = randomised(CONFIG, 0)
    layers = layers_of(flow)
    calls = {"attention": 0, "mlp": 0}

    def count(name: str, module: nn.Module) -> None:
        def note(*rest: object) -> None:
            calls[name] += 1

        module.register_forward_hook(note)

    for layer in layers:
        count("attention", layer.attention.qkv)
        assert isinstance(layer.mlp, MLP)
        count("mlp", layer.mlp.main[0])
    state = make_state(FlowLoss(flow, 0.1), checkpoint_attention=attention, checkpoint_mlp=mlp)
    found = gradients(state)
    assert calls == {"attention": len(layers) * (1 + attention), "mlp": len(layers) * (1 + mlp)}
    assert all(torch.equal(one, other) for one, other in zip(found, gradients(make_state()), strict=True))


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_an_update_is_that_of_torchs_clipped_adamw(clip: float) -> None:
    state = make_state(clip=clip)
    other = copy.deepcopy(state.model)
    gradients(state)
    for mine, theirs in zip(state.model.parameters(), other.parameters(), strict=True):
        theirs.grad = None if mine.grad is None else mine.grad.clone()
    norm = float(state.gradient_norm())
    assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(other.parameters(), clip)))
    told = state.settings
    groups = [
        {"params": [p for p in other.parameters() if (p.ndim > 1) == wide], "weight_decay": told.weight_decay * wide}
        for wide in (True, False)
    ]
    beta1, beta2 = told.betas
    torch.optim.AdamW(groups, lr=0.01, betas=(beta1, beta2), eps=told.eps).step()
    state.set_learning_rate(0.01)
    state.update(norm, 0)
    for mine, theirs in zip(state.model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_the_optimiser_is_one_kernel_for_all_weights() -> None:
    assert make_state().optimiser.defaults["fused"]
