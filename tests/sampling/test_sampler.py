"""`sample` itself: what it passes on, what it reports, and what it refuses."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from starflow import STARFlow, TarFlow, sample
from starflow.errors import UserError
from starflow.flow.config import STARFlowConfig, TarFlowConfig
from starflow.nn.attention import CachePool
from starflow.sampling.cpu.engine import cpu_engine_of
from starflow.sampling.policy import BlockPolicy, SampleSettings
from starflow.sampling.sampler import run, sample_block
from tests.registry import randomised


def starflow(**options: Any) -> STARFlow:
    defaults: dict[str, Any] = {"txt_size": 3, "txt_dim": 5, "num_blocks": 2}
    config = STARFlowConfig(
        in_channels=2, img_size=4, channels=48, head_dim=24, layers_per_block=1, **{**defaults, **options}
    )
    model = randomised(config, 0)
    assert isinstance(model, STARFlow)
    return model


def tarflow(num_classes: int = 3) -> TarFlow:
    config = TarFlowConfig(
        in_channels=2, img_size=4, patch_size=2, channels=48, num_blocks=2, layers_per_block=1, head_dim=24,
        num_classes=num_classes,
    )  # fmt: skip
    model = randomised(config, 0)
    assert isinstance(model, TarFlow)
    return model


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


NOISE, CONDITION, NULL = draw(2, 2, 4, 4), draw(2, 3, 5), draw(2, 3, 5) * 0.5


def test_guidance_moves_the_sample_and_the_null_condition_may_be_one_row() -> None:
    model = starflow()
    plain = sample(model, NOISE, CONDITION)
    guided = sample(model, NOISE, CONDITION, NULL, 2.0)
    assert not torch.allclose(plain, guided, atol=1e-3)
    assert torch.equal(sample(model, NOISE, CONDITION, NULL, 0.0), plain)
    one = sample(model, NOISE, CONDITION, NULL[:1], 2.0)
    torch.testing.assert_close(one, sample(model, NOISE, CONDITION, NULL[:1].expand(2, -1, -1), 2.0))


@pytest.mark.parametrize("part", ["", "blocks.1"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_that_sampling_never_calls_is_said(part: str, kind: str) -> None:
    """It acts on densities alone, so that samples would silently be another model's."""
    model, x = starflow(), draw(2, 2, 4, 4)
    plain, module = model.log_prob(x, CONDITION), model.get_submodule(part)
    calls: list[str] = []
    hook = getattr(module, kind)(lambda *_: calls.append(part))
    assert torch.equal(model.log_prob(x, CONDITION), plain)
    assert calls == [part]
    with pytest.warns(UserWarning, match=f"^{part or 'the flow'} has a forward hook .* which sampling never calls"):
        sample(model, NOISE, CONDITION)
    with pytest.warns(UserWarning, match="remove it, or hook parts such as blocks.0.attn_blocks.0"):
        sample_block(model, 0, NOISE, CONDITION, None, SampleSettings(), None, lambda _: None)
    assert calls == [part]
    hook.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(model, NOISE, CONDITION)


@pytest.mark.parametrize(
    "changes",
    [{"guidance_rule": "linear"}, {"guidance_schedule": "linear"}, {"attention_temperature": 0.5}],
)
def test_every_option_of_guidance_is_heeded(changes: dict[str, Any]) -> None:
    model = starflow()
    constant = sample(model, NOISE, CONDITION, NULL, 2.0)
    assert not torch.allclose(sample(model, NOISE, CONDITION, NULL, 2.0, **changes), constant, atol=1e-4)


def test_only_blocks_with_a_condition_are_guided() -> None:
    """With the condition in the last block only, the others get the same null rows: none."""
    top, every = starflow(), starflow(cond_top_only=False)
    assert top.guided_blocks == [False, True]
    assert every.guided_blocks == [True, True]
    assert tarflow().guided_blocks == [True, True]
    pool = CachePool()
    run(top, NOISE, CONDITION, NULL, SampleSettings(2.0), caches=pool)
    assert sorted(shape.batch for shape, _, _ in pool._caches) == [2, 4]


def test_kept_caches_change_nothing() -> None:
    model, pool = starflow(), CachePool()
    first = run(model, NOISE, CONDITION, NULL, SampleSettings(2.0), caches=pool).x
    run(model, NOISE.flip(0), NULL, CONDITION, SampleSettings(1.0), caches=pool)
    again = run(model, NOISE, CONDITION, NULL, SampleSettings(2.0), caches=pool).x
    assert torch.equal(first, again)


@pytest.mark.parametrize("solver", ["sequential", "jacobi", "auto", [BlockPolicy("jacobi", 3), BlockPolicy()]])
@pytest.mark.parametrize("sos", [True, False])
def test_progress_counts_every_token_of_every_block_once(solver: Any, sos: bool) -> None:
    calls: list[tuple[int, int]] = []
    sample(starflow(sos=sos), NOISE, CONDITION, solver=solver, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (32, 32)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_no_autograd_no_global_state_and_normal_tensors() -> None:
    model = starflow()
    state = torch.random.get_rng_state()
    x = sample(model, NOISE, CONDITION)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not x.requires_grad
    assert torch.is_grad_enabled()
    assert not x.is_inference()
    with torch.inference_mode():
        torch.testing.assert_close(sample(model, NOISE, CONDITION), x)


def test_noise_and_condition_are_left_as_they_were() -> None:
    noise, condition = NOISE.clone(), CONDITION.clone()
    for solver in ("sequential", "jacobi"):
        sample(starflow(sos=False), noise, condition, NULL, 1.0, solver=solver)
    assert torch.equal(noise, NOISE)
    assert torch.equal(condition, CONDITION)


def test_a_bfloat16_network_keeps_the_affine_steps_in_float32() -> None:
    model = starflow().bfloat16()
    x = sample(model, NOISE, CONDITION, NULL, 1.0)
    assert x.dtype == torch.float32
    z, logdet = model(x, CONDITION)
    assert z.dtype == logdet.dtype == torch.float32
    assert x.bfloat16().float().ne(x).any(), "values that bfloat16 could hold were rounded somewhere"
    unguided = sample(model, NOISE, CONDITION)
    torch.testing.assert_close(model(unguided, CONDITION)[0], NOISE, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("solver", ["sequential", "jacobi"])
def test_a_bfloat16_cache_takes_half_and_changes_little(solver: Any) -> None:
    model = starflow()
    exact = sample(model, NOISE, CONDITION, NULL, 1.0, solver)
    close = sample(model, NOISE, CONDITION, NULL, 1.0, solver, cache_dtype="bfloat16")
    assert not torch.equal(close, exact)
    assert close.dtype == torch.float32
    torch.testing.assert_close(close, exact, rtol=5e-2, atol=5e-2)


def test_tarflow_guides_with_the_mean_of_its_classes() -> None:
    model, label = tarflow(), torch.tensor([0, 2])
    guided = sample(model, NOISE, label, guidance=1.0)
    assert torch.equal(guided, sample(model, NOISE, label, torch.tensor([-1, -1]), guidance=1.0))
    assert not torch.allclose(guided, sample(model, NOISE, label), atol=1e-4)


def test_tarflow_without_a_label_guides_by_temperature() -> None:
    for model in (tarflow(), tarflow(num_classes=0)):
        plain = sample(model, NOISE)
        assert not torch.allclose(sample(model, NOISE, guidance=1.0, attention_temperature=0.5), plain, atol=1e-4)
        same = sample(model, NOISE, guidance=1.0, attention_temperature=1 - 1e-6)
        torch.testing.assert_close(same, plain, rtol=1e-3, atol=1e-3)


def test_tarflows_variance_scales_the_noise() -> None:
    plain, scaled = tarflow(), tarflow()
    variance = torch.rand(scaled.var.shape, generator=torch.Generator().manual_seed(0)) + 0.5
    scaled.var.copy_(variance)
    tokens, grid = plain.to_tokens(NOISE)
    noise = plain.from_tokens(tokens * variance.sqrt(), grid)
    torch.testing.assert_close(sample(scaled, NOISE), sample(plain, noise))
    z, _ = scaled(sample(scaled, NOISE))
    torch.testing.assert_close(z, NOISE, rtol=1e-4, atol=1e-4)
    x = draw(1, 2, 4, 4)
    prior = torch.distributions.Normal(0.0, variance.sqrt())
    unscaled, logdet = plain(x)
    expected = prior.log_prob(plain.to_tokens(unscaled)[0]).sum((1, 2)) + logdet
    torch.testing.assert_close(scaled.log_prob(x), expected)


@pytest.mark.parametrize("solver", ["sequential", "jacobi"])
def test_a_single_token_without_a_start_token_is_the_noise(solver: Any) -> None:
    model = starflow(sos=False, txt_size=0)
    one = draw(2, 2, 1, 1)
    assert torch.equal(sample(model, one, solver=solver), one)
    z, logdet = model(one)
    assert torch.equal(z, one)
    assert (logdet == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance": -1.0}, "guidance is -1.0, expected weights of at least 0"),
        ({"guidance": float("nan")}, "guidance is nan, expected weights of at least 0"),
        ({"guidance": torch.tensor([1.0, -2.0])}, "guidance is [1.0, -2.0], expected weights of at least 0"),
        ({"guidance": torch.ones(3)}, "guidance has shape (3,), expected one weight, or one for each of 2 pictures"),
        ({"guidance": 1.0}, "null_condition is None: pass what the model was trained with for no condition"),
        ({"guidance": 1.0, "null_condition": NULL[:, :2]}, "shape is (2, 2, 5), expected (2, 3, 5)"),
        ({"condition": None}, "the condition's shape is None, expected (2, 3, 5)"),
        ({"noise": draw(2, 3, 4, 4)}, "the input has shape (2, 3, 4, 4), expected (batch, 2, height, width)"),
        ({"solver": "euler"}, "solver is 'euler', expected one of 'sequential', 'jacobi', 'auto'"),
        ({"solver": [BlockPolicy()]}, "expected a BlockPolicy for each of 2 blocks"),
        ({"guidance_rule": "cubic"}, "guidance_rule is 'cubic', expected one of 'gaussian', 'linear'"),
        ({"guidance_schedule": "cosine"}, "guidance_schedule is 'cosine', expected one of 'constant', 'linear'"),
        ({"attention_temperature": 0.0}, "attention_temperature is 0.0, expected above 0"),
        ({"tolerance": -1e-3}, "tolerance is -0.001, expected at least 0"),
        ({"segment": 0}, "segment is 0, expected at least 1, or None"),
        ({"cache_dtype": "int4"}, "cache_dtype is 'int4', expected one of 'network', 'bfloat16'"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    given = {"noise": NOISE, "condition": CONDITION, **arguments}
    with pytest.raises(UserError, match=re.escape(message)):
        sample(starflow(), **given)


def test_guidance_needs_something_to_guide_with() -> None:
    with pytest.raises(UserError, match="no condition to guide with: use guidance 0"):
        sample(starflow(txt_size=0), NOISE, guidance=1.0)
    with pytest.raises(UserError, match="there is no label: pass one, or an attention_temperature under 1"):
        sample(tarflow(), NOISE, guidance=1.0)


def test_tarflow_refuses_other_sizes_and_labels() -> None:
    model = tarflow()
    with pytest.raises(UserError, match="is 2 x 8, but this model's learned positions are for 4 x 4 alone"):
        sample(model, draw(1, 2, 2, 8))
    with pytest.raises(UserError, match=re.escape("the labels are [0, 3]: pass labels of shape (batch,) from 0 to 2")):
        sample(model, NOISE, torch.tensor([0, 3]))
    with pytest.raises(UserError, match=re.escape("float32 of shape (2, 3, 5) for a batch of 2")):
        sample(model, NOISE, CONDITION)
    with pytest.raises(UserError, match=re.escape("pass no label (None)")):
        sample(tarflow(num_classes=0), NOISE, torch.tensor([0, 1]))


@pytest.mark.parametrize("guidance", [0.0, 2.0])
@pytest.mark.parametrize("make", [starflow, tarflow])
def test_blocks_one_by_one_are_the_whole(make: Any, guidance: float) -> None:
    """Also where the batch changes between blocks: a picture joins those that are already on their way."""
    model = make()
    given, null = (CONDITION, NULL) if isinstance(model, STARFlow) else (torch.tensor([0, 2]), None)
    settings, engine = SampleSettings(guidance), cpu_engine_of(model)
    solved: list[int] = []
    engine.build()
    wanted = sample(model, NOISE, given, null, guidance)
    late = sample_block(model, 1, NOISE[1:], given[1:], None if null is None else null[1:], settings, engine, print)
    early = sample_block(model, 1, NOISE[:1], given[:1], None if null is None else null[:1], settings, engine, print)
    x = sample_block(model, 0, torch.cat((early, late)), given, null, settings, engine, solved.append)
    assert torch.equal(x, wanted)
    assert sum(solved) == model.to_tokens(NOISE)[0].shape[1]
