"""Guesses with rounded weights: half the bytes, near the answer, verified by the block itself, and never in its way."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from starflow.flow.config import STARFlowConfig
from starflow.sampling.cpu.build import Library
from starflow.sampling.predictor import ROUNDED_GUESSES, RoundedGuess, SolverOptions, SolverResult
from starflow.sampling.solvers import Span, fixed_point_step, relative_change, solve_jacobi
from tests.registry import Case, randomised
from tests.sampling.cpu.common import Solving, engine_for, solving

CONFIG = STARFlowConfig(
    in_channels=4, img_size=6, channels=64, head_dim=32, num_blocks=2, layers_per_block=2, txt_size=3, txt_dim=5
)


@pytest.fixture(params=[0, 1], ids=["plain", "guided"])
def given(request: pytest.FixtureRequest) -> Solving:
    """A block without guidance, and one with it."""
    draw = torch.Generator().manual_seed(0)
    noise, condition = torch.randn(3, 4, 6, 6, generator=draw), torch.randn(3, 3, 5, generator=draw)
    return solving(Case(randomised(CONFIG, 0), noise, condition, condition * 0), request.param, 2.0)


def rounded(
    given: Solving,
    library: Library | None,
    tolerance: float,
    segment: int | None = None,
    form: RoundedGuess = "bfloat16",
) -> SolverResult:
    predictor = dataclasses.replace(given.predictor, engine=engine_for(library))
    return solve_jacobi(predictor, given.noise_BNC, SolverOptions(tolerance, segment, guess=form), lambda _: None)


@pytest.mark.parametrize("form", ROUNDED_GUESSES)
@pytest.mark.parametrize("segment", [None, 12])
@torch.no_grad()
def test_the_answer_is_verified_and_near(
    library: Library, given: Solving, segment: int | None, form: RoundedGuess
) -> None:
    exact, found = given.eager(), rounded(given, library, 2e-2, segment, form)
    assert found.sequential_tokens == 0
    if form != "int4":
        assert found.iterations == (3 if segment else 1), "rounding alone was off by more than the bound"
    assert (found.residual_B > 0).all()
    given.predictor.prefill()
    whole = Span(0, given.predictor.tokens)
    again = fixed_point_step(given.predictor, found.x_BNC, given.noise_BNC, whole)
    assert (relative_change(again, found.x_BNC) <= found.residual_B * 1.01 + 1e-5).all()
    apart = relative_change(exact, found.x_BNC)
    assert (apart > 0).all()
    assert (apart < 5e-2).all()


@torch.no_grad()
def test_a_bound_of_zero_is_the_sequential_answer(library: Library, given: Solving) -> None:
    found = rounded(given, library, 0.0)
    assert (found.residual_B == 0).all()
    torch.testing.assert_close(found.x_BNC, given.eager(), rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_without_the_compiled_loop_it_goes_token_by_token(given: Solving) -> None:
    found = rounded(given, None, 1e-3)
    assert torch.equal(found.x_BNC, given.eager())
    assert found.iterations == given.predictor.tokens


@torch.no_grad()
def test_rounded_copies_take_half_and_are_forgotten_with_the_others(library: Library, given: Solving) -> None:
    block, engine = given.predictor.block, engine_for(library)
    whole, half = engine.packed(block), engine.packed(block, "bfloat16")
    assert (whole.form, half.form) == ("float32", "bfloat16")
    assert engine.bytes == whole.bytes + half.bytes
    matrices = [sum(layer[name].nbytes for name in ("qkv", "proj", "up", "down")) for layer in whole.layers]
    halved = [sum(layer[name].nbytes for name in ("qkv", "proj", "up", "down")) for layer in half.layers]
    assert matrices == [2 * one for one in halved]
    block.proj_in.weight.data.add_(1.0)
    engine.drop_changed()
    assert engine.bytes == 0
