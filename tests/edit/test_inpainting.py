"""Fillings keep what is known, depend on their seed alone, and are drawn as each method says."""

from __future__ import annotations

import dataclasses
import math
from typing import get_args

import hypothesis
import pytest
import torch
from hypothesis.strategies import integers
from torch import Tensor

from starflow.edit.chains import Problem
from starflow.edit.density import GuidedFlow
from starflow.edit.inpainting import ROUNDS, InpaintSettings, Method, Random, inpaint
from starflow.edit.masks import spread_known
from starflow.errors import UserError
from starflow.flow.config import STARFlowConfig
from starflow.flow.finite import NotFiniteError
from starflow.flow.model import Flow, STARFlow
from starflow.sampling.sampler import candidate_noise
from tests.edit.conftest import STANDARD_ERRORS, histogram_apart
from tests.registry import randomised

SHORT = InpaintSettings(candidates=3, steps=6, leapfrogs=2)
METHODS = get_args(Method)


@pytest.fixture(scope="module")
def flow() -> Flow:
    config = STARFlowConfig(
        2, 4, channels=48, patch_size=2, num_blocks=2, layers_per_block=1, head_dim=24, txt_size=2, txt_dim=5
    )
    return randomised(config, 0).requires_grad_(False)


def given(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, holes, conditions and null conditions."""
    generator = torch.Generator().manual_seed(0)
    hole = torch.zeros(count, 1, 4, 4, dtype=torch.bool)
    hole[..., 1:3, 2:] = True
    hole[-1] = True
    both = torch.randn(2, count, 2, 5, generator=generator)
    return torch.randn(count, 2, 4, 4, generator=generator), hole, *both


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_a_filling_keeps_what_is_known_and_does_not_know_its_batch(flow: Flow, method: Method, guidance: float) -> None:
    x, hole, condition, null = given(3)
    settings = dataclasses.replace(SHORT, method=method, guidance=guidance, temperature=0.8)
    together = inpaint(flow, x, hole, condition, null, seeds=[5, 6, 7], settings=settings)
    assert torch.equal(together.x[~hole.expand_as(x)], x[~hole.expand_as(x)])
    row = slice(1, 2)
    alone = inpaint(flow, x[row], hole[row], condition[row], null[row], seeds=[6], settings=settings)
    assert torch.equal(alone.x, together.x[row])
    assert torch.equal(alone.log_prob, together.log_prob[row])
    assert torch.allclose(together.log_prob, flow.log_prob(together.x, condition), atol=1e-3)
    other = inpaint(flow, x[row], hole[row], condition[row], null[row], seeds=[8], settings=settings)
    assert not torch.equal(other.x, alone.x)


@pytest.mark.parametrize("method", METHODS)
def test_what_lies_in_the_hole_counts_for_nothing(flow: Flow, method: Method) -> None:
    x, hole, condition, _ = given(1)
    hole[:] = False
    hole[..., 1, 1] = True
    settings = dataclasses.replace(SHORT, method=method)
    one, two = (
        inpaint(flow, torch.where(hole, value, x), hole, condition, seeds=[3], settings=settings)
        for value in (0.0, 100.0)
    )
    assert torch.equal(one.x, two.x)


def test_the_likeliest_is_the_likeliest_and_the_weighted_one_is_a_draw(flow: Flow) -> None:
    x, hole, condition, _ = given(2)
    row = slice(0, 1)
    density = GuidedFlow(flow, condition[row])
    problem = Problem(density, x[row], hole[row], 0.3)
    draws = problem.paste(density.decode(Random(5, x).normal(8)))
    likeliest, weighted = (
        inpaint(
            flow,
            x[row],
            hole[row],
            condition[row],
            seeds=[5],
            settings=InpaintSettings("resample", candidates=8, keep=keep),
        )
        for keep in ("likeliest", "weighted")
    )
    assert torch.allclose(likeliest.x[0], draws[problem.log_hole(draws).argmax()], atol=1e-5)
    assert min(float((weighted.x[0] - draw).abs().max()) for draw in draws) < 1e-5
    assert 1 <= weighted.effective_samples.item() <= 8
    assert math.isnan(weighted.acceptance.item())


def hole_of(tokens: int) -> Tensor:
    """The first of four tokens of 2 x 2 latents, (1, 1, 4, 4)."""
    return (torch.arange(4) < tokens).view(1, 1, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)


def filled_by_rounds(problem: Problem, seed: int, count: int, *, by_draws: bool) -> Tensor:
    """All that the rounds of `auto` give, `count` particles or draws each, (B, C, H, W)."""
    random, made = Random(seed, problem.known), []
    assert isinstance(problem.density, GuidedFlow)
    for _ in range(ROUNDS):
        if by_draws:
            made.append(problem.density.decode(random.normal(count)))
            continue
        first = spread_known(problem.known, ~problem.hole)
        uniform = random.log_uniform(4).exp()
        found = problem.density.particles(first, random.normal(count), problem.hole, uniform)
        made.append(found.x[random.choose(found.log_weight)])
    return problem.paste(torch.cat(made))


WIDE = ((torch.arange(4)[:, None] < 3) & (torch.arange(4) < 3)).view(1, 1, 4, 4)
"""Nine cells, one of them in the middle of the others."""


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize(("hole", "by_draws"), [(hole_of(3), False), (WIDE, True), (hole_of(4), True)])
def test_auto_takes_the_likeliest_of_its_rounds_under_the_plain_density(
    flow: Flow, guidance: float, hole: Tensor, by_draws: bool
) -> None:
    """Draws of a wide hole, fillings of filters otherwise; where nothing is known (four tokens) too."""
    x, _, condition, null = given(1)
    density, count = GuidedFlow(flow, condition, null, guidance, 0.6), 3
    problem = Problem(density, x, hole, 0.3)
    plain = dataclasses.replace(problem, density=GuidedFlow(flow, condition))
    settings, places, guided_places = InpaintSettings(guidance=guidance, temperature=0.6, candidates=count), [], []
    for seed in range(12):
        filled = inpaint(flow, x, hole, condition, null, seeds=[seed], settings=settings)
        drawn = filled_by_rounds(problem, seed, count, by_draws=by_draws)
        places.append(int(plain.log_hole(drawn).argmax()))
        guided_places.append(int(problem.log_hole(drawn).argmax()))
        assert torch.allclose(filled.x[0], drawn[places[-1]], atol=1e-5)
        assert math.isnan(filled.acceptance.item())
        assert math.isnan(filled.effective_samples.item())
    each = len(drawn) // ROUNDS
    assert {place // each for place in places} == set(range(ROUNDS)), "one round always won: the test tells nothing"
    assert guidance == 0 or places != guided_places, "the guided density chose the same: the test tells nothing"


def test_each_filling_of_many_is_a_draw_of_the_conditional_distribution(banana: STARFlow) -> None:
    """With many draws, against quadrature."""
    known = torch.full((40, 1, 1, 2), 0.7, dtype=torch.float64)
    hole = torch.tensor([False, True]).view(1, 1, 1, 2).expand(40, -1, -1, -1)
    settings = InpaintSettings("resample", candidates=32, spread=0.6)
    filled = inpaint(banana, known, hole, seeds=range(40), settings=settings)
    assert histogram_apart(GuidedFlow(banana), filled.x, 0.7, 1) < STANDARD_ERRORS


def test_wrong_settings_and_holes_are_told_in_a_line(flow: Flow) -> None:
    x, hole, condition, _ = given(1)
    wrong = [
        ({"method": "magic"}, "method is 'magic', expected one of auto, resample"),
        ({"keep": "best"}, "keep is 'best'"),
        ({"candidates": 0}, "candidates is 0, expected at least 1"),
        ({"steps": -1}, "steps is -1, expected at least 0"),
        ({"spread": 0.0}, "spread is 0.0, expected above 0"),
        ({"temperature": math.inf}, "temperature is inf, expected above 0"),
        ({"guidance": -1.0}, "guidance is -1.0, expected at least 0"),
    ]
    for values, message in wrong:
        with pytest.raises(UserError, match=message):
            InpaintSettings(**values)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a hole is empty"):
        inpaint(flow, x, hole & False, condition, seeds=[0])
    with pytest.raises(UserError, match=r"expected bool of shape \(1, 1, 4, 4\)"):
        inpaint(flow, x, hole.float(), condition, seeds=[0])
    with pytest.raises(UserError, match="2 seeds for 1 latents"):
        inpaint(flow, x, hole, condition, seeds=[0, 1])
    with pytest.raises(UserError, match="expected 0 to"):
        inpaint(flow, x, hole, condition, seeds=[-1])


def test_what_is_not_finite_is_never_chosen_and_where_nothing_is_finite_that_is_said() -> None:
    random = Random(0, torch.zeros(1, 1, 2, 2))
    some = torch.tensor([math.nan, -math.inf, -700.0, math.nan])
    assert [int(random.choose(some)) for _ in range(5)] == [2] * 5
    with pytest.raises(NotFiniteError, match="no filling came out finite"):
        random.choose(torch.full((3,), math.nan))


@hypothesis.given(integers(0, 2**63 - 1))
def test_no_seed_draws_what_a_picture_of_that_seed_is_made_from(seed: int) -> None:
    """Otherwise a hole in a picture that the model drew is filled by the picture itself."""
    pictures, drawn = candidate_noise([seed], (2, 4, 4), 16)[0], Random(seed, torch.zeros(1, 2, 4, 4)).normal(16)
    assert not bool((pictures[:, None] == drawn).flatten(2).all(2).any())
