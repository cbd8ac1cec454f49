"""One update, apart from the loop: the learning rate, recomputed activations, clipping, the optimiser, averages."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from starflow.nn.layers import MLP
from starflow.train.checkpoint import AveragedWeights, TrainState, learning_rate, make_optimiser
from starflow.train.distributed import World, layers_of
from starflow.train.settings import TrainSettings
from starflow.train.tasks.flow import FlowLoss
from tests.registry import randomised
from tests.train.distributed.scenario import CONFIG, settings
from tests.train.regression import SETTINGS, Regression


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


def test_weights_in_training_are_untouched_by_evaluation() -> None:
    task = Regression()
    state = TrainState(task.model, SETTINGS, World())
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    state.average.state["0.weight"].zero_()
    with state.averaged():
        assert not task.model.state_dict()["0.weight"].any()
        assert not task.model.training
    assert task.model.training
    assert all(torch.equal(value, before[key]) for key, value in task.model.state_dict().items())


def test_learning_rate_warms_up_and_falls() -> None:
    cosine = TrainSettings(steps=110, lr=1.0, min_lr=0.1, warmup=10)
    rates = [learning_rate(cosine, step) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    trapezoid = replace(cosine, schedule="trapezoid", decay=0.5)
    assert learning_rate(trapezoid, 54) == 1.0
    assert learning_rate(trapezoid, 110) == pytest.approx(0.1)


def test_averages_follow_the_closed_form() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = AveragedWeights(model, 0.5)
    expected = float(model.weight)
    for step in range(6):
        with torch.no_grad():
            model.weight.fill_(float(step))
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert float(average.state["weight"]) == pytest.approx(expected)


def test_decay_spares_vectors() -> None:
    optimiser = make_optimiser(Regression().model, replace(SETTINGS, weight_decay=0.1))
    decays = {group["weight_decay"]: [p.ndim for p in group["params"]] for group in optimiser.param_groups}
    assert decays == {0.1: [2, 2], 0.0: [1, 1, 1, 1]}
