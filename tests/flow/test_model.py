"""Models: shapes, precision and what they refuse; token maps, which add up to the log-density, and its closed forms."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from starflow import sample
from starflow.errors import UserError
from starflow.flow.config import STARFlowConfig, TarFlowConfig
from starflow.flow.model import Flow, STARFlow, TarFlow, Trace, condition_scores, token_log_prob
from tests.registry import randomised

SMALL = STARFlowConfig(
    in_channels=2, img_size=4, channels=48, head_dim=24, num_blocks=2, layers_per_block=1, txt_size=3, txt_dim=5
)
PIXELS = TarFlowConfig(
    in_channels=2, img_size=4, patch_size=2, channels=48, num_blocks=2, layers_per_block=1, head_dim=24, num_classes=3
)
X, CONDITION = torch.randn(2, 2, 4, 4), torch.randn(2, 3, 5)


def test_log_prob_adds_the_gaussian_with_its_constant() -> None:
    model = randomised(SMALL, 0)
    z, logdet = model(X, CONDITION)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum((1, 2, 3)) + logdet
    torch.testing.assert_close(model.log_prob(X, CONDITION), expected)


@pytest.mark.parametrize(
    ("network", "results"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_results_are_never_less_than_float32(network: torch.dtype, results: torch.dtype) -> None:
    trace = randomised(SMALL, 0).to(network).trace(X, CONDITION)
    assert {trace.z.dtype, trace.logdet.dtype} == {results}
    assert {tensor.dtype for tensor in (*trace.states, *trace.log_sigmas)} == {results}


def test_under_autocast_the_affine_steps_stay_in_float32() -> None:
    model = randomised(SMALL, 0)
    with torch.autocast("cpu", torch.bfloat16):
        z, logdet = model(X, CONDITION)
    assert z.dtype == logdet.dtype == torch.float32
    exact, exact_logdet = model(X, CONDITION)
    assert not torch.equal(z, exact), "autocast did nothing"
    torch.testing.assert_close(z, exact, rtol=0.1, atol=0.1)
    torch.testing.assert_close(logdet, exact_logdet, rtol=0.1, atol=0.5)


EVERY_LAYER_OPTION = replace(
    SMALL, hf_style_rope=True, use_swiglu=True, use_qk_norm=True, use_post_norm=True, num_heads=4, num_kv_heads=2,
    norm_type="rms_norm", sos=False, cond_top_only=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "condition"),
    [(SMALL, CONDITION), (EVERY_LAYER_OPTION, CONDITION), (PIXELS, torch.tensor([0, -1])), (PIXELS, None)],
)
def test_a_compiler_takes_it_whole(config: STARFlowConfig | TarFlowConfig, condition: Tensor | None) -> None:
    """No graph break and no control flow that hangs on data."""
    model = randomised(config, 0)
    torch.compiler.reset()
    compiled = torch.compile(model.trace, backend="aot_eager", fullgraph=True)
    ours, eager = compiled(X, condition), model.trace(X, condition)
    torch.testing.assert_close(ours.z, eager.z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.logdet, eager.logdet, rtol=1e-4, atol=1e-4)


def test_the_order_of_the_blocks_alternates() -> None:
    def orders(**options: Any) -> list[bool]:
        config = STARFlowConfig(in_channels=1, img_size=2, channels=64, layers_per_block=1, **options)
        return [block.spec.backwards for block in STARFlow(config).iter_blocks()]

    assert orders(num_blocks=6) == [True, False, True, False, True, False]
    assert orders(num_blocks=3, seq_order="L2R") == [True, False, True]
    assert orders(num_blocks=3, seq_order="R2L") == [False, True, False]
    assert [block.spec.backwards for block in TarFlow(PIXELS).iter_blocks()] == [False, True]


def test_positions_make_any_aspect_ratio_a_valid_input() -> None:
    model = randomised(SMALL, 0)
    for height, width in ((4, 4), (2, 8), (8, 2), (3, 5)):
        x = torch.randn(2, 2, height, width)
        assert model(x, CONDITION)[0].shape == x.shape


def test_a_learned_table_has_one_size() -> None:
    config = STARFlowConfig(in_channels=2, img_size=4, channels=48, head_dim=24, num_blocks=1, layers_per_block=1,
                            rope=False)  # fmt: skip
    with pytest.raises(UserError, match="the input is 2 x 8, but this model's learned positions are for 4 x 4 alone"):
        STARFlow(config)(torch.randn(1, 2, 2, 8))


def test_labels_of_no_class_are_the_mean_of_the_classes() -> None:
    model = randomised(PIXELS, 0)
    none, _ = model(X)
    assert torch.equal(model(X, torch.tensor([-1, -1]))[0], none)
    mixed, _ = model(X, torch.tensor([-1, 2]))
    torch.testing.assert_close(mixed[0], none[0])
    assert not torch.allclose(mixed[1], none[1], atol=1e-4)


def test_the_priors_variance_divides_the_noise_and_counts_in_the_density() -> None:
    """A new TarFlow is the identity before its `var`, so its density is log N(x; 0, var)."""
    model = TarFlow(PIXELS).double()
    model.var.uniform_(0.25, 4.0)
    x = X.double()
    std = model.from_tokens(model.var.sqrt()[None], (2, 2))[0].double()
    torch.testing.assert_close(model(x)[0], x / std)
    expected = torch.distributions.Normal(0.0, std).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(model.log_prob(x), expected)


def test_a_condition_of_another_shape_is_refused() -> None:
    with pytest.raises(UserError, match=re.escape("shape is (2, 2, 5), expected (2, 3, 5)")):
        STARFlow(SMALL)(X, CONDITION[:, :2])
    free = STARFlow(STARFlowConfig(in_channels=2, img_size=4, channels=64, num_blocks=1, layers_per_block=1))
    with pytest.raises(UserError, match=re.escape("expected None: pass no condition (None)")):
        free(X, CONDITION)


def starflow() -> STARFlow:
    return STARFlow(
        STARFlowConfig(
            in_channels=2, img_size=4, channels=16, patch_size=2, num_blocks=3, layers_per_block=1, head_dim=16
        )
    )


def tarflow() -> TarFlow:
    return TarFlow(
        TarFlowConfig(
            in_channels=2, img_size=4, channels=16, patch_size=2, num_blocks=3, layers_per_block=1, head_dim=16
        )
    )


def randomised_maps(flow: Flow) -> Flow:
    torch.manual_seed(0)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if isinstance(flow, TarFlow):
        flow.var.uniform_(0.5, 2.0)
    return flow.double()


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("make", [starflow, tarflow])
def test_a_map_adds_up_to_the_log_density(make: object) -> None:
    flow = randomised_maps(make())  # type: ignore[operator]
    x = data(3, 2, 4, 4)
    maps = token_log_prob(flow, x)
    assert maps.shape == (3, 2, 2)
    torch.testing.assert_close(maps.sum((1, 2)), flow.log_prob(x), rtol=0, atol=1e-10)


def test_a_new_flow_gives_each_token_the_gaussians_density() -> None:
    flow = starflow().double()
    x = data(2, 2, 4, 4)
    expected = (-0.5 * (x**2 + math.log(2 * math.pi))).sum(1).unfold(1, 2, 2).unfold(2, 2, 2).sum((-1, -2))
    torch.testing.assert_close(token_log_prob(flow, x), expected, rtol=0, atol=1e-12)


def test_a_strange_token_stands_out() -> None:
    """The sharpest cell is where the picture was changed: an identity flow reads every token by itself."""
    x = torch.zeros(1, 2, 4, 4)
    x[0, :, 2:, :2] = 5.0
    assert int(token_log_prob(starflow(), x).flatten().argmin()) == 2


def test_an_affine_flows_density_is_the_closed_form() -> None:
    """Constant mu and sigma in one block: log N(x; mu, sigma^2), whichever token."""
    flow = STARFlow(
        STARFlowConfig(
            in_channels=2, img_size=4, channels=16, num_blocks=1, layers_per_block=1, head_dim=16, soft_clip=0,
            use_softplus=False, use_final_norm=False,
        )
    ).double()  # fmt: skip
    log_sigma, mu = torch.tensor([0.3, -0.7]).double(), torch.tensor([1.5, -0.25]).double()
    block = next(flow.iter_blocks())
    with torch.no_grad():
        block.proj_out.bias.copy_(torch.cat([log_sigma, mu]))  # weights are zero: outputs do not depend on the input
    x = data(3, 2, 4, 4)
    gaussian = torch.distributions.Normal(mu.view(2, 1, 1), log_sigma.exp().view(2, 1, 1))
    torch.testing.assert_close(token_log_prob(flow, x), gaussian.log_prob(x).sum(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(flow.log_prob(x), gaussian.log_prob(x).sum((1, 2, 3)), rtol=0, atol=1e-12)


def test_weights_of_one_class_are_its_label_and_equal_ones_are_no_class() -> None:
    model = randomised(PIXELS, 0).double()
    one, equal = torch.eye(3, dtype=torch.float64)[[2, 0]], torch.full((2, 3), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(model.log_prob(X, one), model.log_prob(X, torch.tensor([2, 0])))
    torch.testing.assert_close(model.log_prob(X, equal), model.log_prob(X, torch.tensor([-1, -1])))
    drawn = [sample(model, X.double(), given, guidance=1.5) for given in (one, torch.tensor([2, 0]))]
    torch.testing.assert_close(*drawn)
    with pytest.raises(UserError, match=r"weights \(batch, 3\)"):
        model.log_prob(X, torch.ones(2, 4))


@pytest.mark.parametrize("around", ["mean", "first"])
def test_scores_are_the_derivatives_of_log_prob_by_the_weight_of_each_condition(around: str) -> None:
    """Central differences in float64, for tokens and for classes."""
    step = 1e-5
    for config, conditions in ((SMALL, torch.randn(4, 3, 5, dtype=torch.float64)), (PIXELS, torch.eye(3).double())):
        model = randomised(config, 0).double()
        at = None if around == "mean" else conditions[:1]
        start = conditions.mean(0, keepdim=True) if at is None else at
        scores = condition_scores(model, X, conditions, at)
        for number, condition in enumerate(conditions):
            ends = [
                model.log_prob(X, (start + sign * step * (condition - start)).expand(2, *condition.shape))
                for sign in (1, -1)
            ]
            torch.testing.assert_close(scores[:, number], (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-5)


def test_scores_of_labels_are_those_of_their_weights_and_cost_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, passes = randomised(PIXELS, 0), 0
    forward = model.trace

    def counted(x: Tensor, condition: Tensor | None) -> Trace:
        nonlocal passes
        passes += 1
        return forward(x, condition)

    monkeypatch.setattr(model, "trace", counted)
    with torch.no_grad():
        scores = condition_scores(model, X, torch.tensor([2, 0, 1, 2]))
    assert passes == 1
    torch.testing.assert_close(scores[:, 0], scores[:, 3])
    weights = condition_scores(model, X, torch.eye(3)[[2, 0, 1, 2]])
    torch.testing.assert_close(scores, weights)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_score_of_no_class_is_that_of_all_classes_alike() -> None:
    """Around the mean it is 0, and no label counts as another one's."""
    model = randomised(PIXELS, 0)
    around = torch.tensor([[1.0, 0.0, 0.0]])
    found = condition_scores(model, X, torch.tensor([-1, 2]), around)
    expected = condition_scores(model, X, torch.tensor([[1 / 3] * 3, [0.0, 0.0, 1.0]]), around)
    torch.testing.assert_close(found, expected)
    with pytest.raises(UserError, match=r"the labels are \[0, 3\]"):
        condition_scores(model, X, torch.tensor([0, 3]))
