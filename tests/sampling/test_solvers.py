"""Solvers agree with the forward pass, with one another, and with themselves at another batch size. In float32."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from starflow.flow.config import STARFlowConfig
from starflow.flow.model import Flow
from starflow.flow.tokens import in_order
from starflow.nn.attention import CachePool
from starflow.sampling.policy import BlockPolicy, SampleSettings
from starflow.sampling.predictor import Predictor, SolverOptions
from starflow.sampling.sampler import SamplingResult, run
from starflow.sampling.solvers import solve_jacobi, solve_sequential
from tests.registry import Case, cases, randomised

DRAWN = settings(max_examples=20, derandomize=True)


def assert_close(ours: Tensor, expected: Tensor) -> None:
    """Equal up to rounding in float32 through all blocks."""
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)


@DRAWN
@given(case=cases(torch.float32), piece=st.integers(1, 5))
def test_cached_predictions_equal_the_uncached_ones(device: torch.device, case: Case, piece: int) -> None:
    """mu and log sigma of every block, given the true tokens in pieces, against one parallel pass."""
    case = case.to(device)
    model, batch = case.model, len(case.x)
    with torch.no_grad():
        trace = model.trace(case.x, case.condition)
        condition, rotary = model.check_condition(case.condition, batch), model.rotary(_grid(case))
        for number, block in enumerate(model.iter_blocks()):
            own = [in_order(trace.states[number + side], backwards=block.spec.backwards) for side in (0, 1)]
            x, z, tokens = own[0], own[1], own[0].shape[1]
            table = model.block_rotary(block, rotary)
            predictor = Predictor.of(block, batch, tokens, [condition], table, None, CachePool())
            predictor.prefill()
            for start in range(predictor.first, tokens, piece):
                stop = min(start + piece, tokens)
                mu, log_sigma = predictor.predict(predictor.inputs(x, start, stop), start)
                assert_close(log_sigma, trace.log_sigmas[number][:, start:stop])
                assert_close(mu + log_sigma.exp() * z[:, start:stop], x[:, start:stop])


def _grid(case: Case) -> tuple[int, int]:
    patch = case.model.config.patch_size
    return case.x.shape[2] // patch, case.x.shape[3] // patch


def guided_run(case: Case, settings: SampleSettings, rows: slice | None = None) -> SamplingResult:
    """Sample with the case's x as noise; models without a condition run unguided."""
    rows = rows or slice(None)
    condition, null = (None if given is None else given[rows] for given in (case.condition, case.null_condition))
    return run(case.model, case.x[rows], condition, null, settings)


def weight_of(case: Case) -> float:
    return 0.0 if case.condition is None else 1.5


@DRAWN
@given(case=cases(torch.float32), segment=st.sampled_from([None, 1, 3]), rule=st.sampled_from(["gaussian", "linear"]))
def test_jacobi_run_to_convergence_equals_sequential(
    device: torch.device, case: Case, segment: int | None, rule: str
) -> None:
    case, weight = case.to(device), weight_of(case)
    exact = guided_run(case, SampleSettings(weight, guidance_rule=rule)).x  # type: ignore[arg-type]
    for tolerance in (0.0, 1e-6):
        settings = SampleSettings(weight, "jacobi", rule, tolerance=tolerance, segment=segment)  # type: ignore[arg-type]
        parallel = guided_run(case, settings)
        assert_close(parallel.x, exact)
        assert all((solution.residual_B <= tolerance).all() for solution in parallel.solutions)


@DRAWN
@given(case=cases(torch.float32), solver=st.sampled_from(["sequential", "jacobi", "auto"]))
def test_a_picture_is_what_it_would_be_alone(device: torch.device, case: Case, solver: str) -> None:
    """Even at a loose tolerance: a sequence stops at its own convergence, not at its batch's."""
    case = case.to(device)
    settings = SampleSettings(weight_of(case), solver, tolerance=1e-2)  # type: ignore[arg-type]
    together = guided_run(case, settings).x
    alone = torch.cat([guided_run(case, settings, slice(row, row + 1)).x for row in range(len(case.x))])
    assert_close(together, alone)


@pytest.fixture(scope="module")
def conditional(device: torch.device) -> Flow:
    config = STARFlowConfig(
        in_channels=2, img_size=4, channels=48, head_dim=24, num_blocks=3, layers_per_block=1, txt_size=3, txt_dim=5
    )
    return randomised(config, 0).to(device)


@pytest.fixture(scope="module")
def inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, condition and null condition of four pictures."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(4, 2, 4, 4, generator=generator)
    condition, null = torch.randn(2, 4, 3, 5, generator=generator)
    return noise.to(device), condition.to(device), null[:1].to(device)


@pytest.mark.parametrize("solver", ["sequential", "jacobi"])
def test_a_batch_of_four_with_its_own_weights_is_four_batches_of_one(
    conditional: Flow, inputs: tuple[Tensor, Tensor, Tensor], solver: str
) -> None:
    """Different captions, guidance weights (0 among them) and noise in one batch."""
    noise, condition, null = inputs
    weights = torch.tensor([0.0, 1.0, 2.5, 4.0])
    settings = SampleSettings(weights, solver)  # type: ignore[arg-type]
    together = run(conditional, noise, condition, null, settings).x
    for row, weight in enumerate(weights.tolist()):
        one = slice(row, row + 1)
        alone = run(conditional, noise[one], condition[one], null, SampleSettings(weight, solver)).x  # type: ignore[arg-type]
        assert_close(together[one], alone)


def test_solvers_say_what_they_did(conditional: Flow, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    noise, condition, _ = inputs
    policy = [BlockPolicy("jacobi"), BlockPolicy("jacobi", segment=4), BlockPolicy("sequential")]
    solutions = run(conditional, noise, condition, None, SampleSettings(solver=policy, tolerance=1e-3)).solutions
    assert solutions[2].iterations == 16
    assert (solutions[2].residual_B == 0).all()
    assert 2 <= solutions[0].iterations < 16
    assert 4 <= solutions[1].iterations <= 16
    assert all((solution.residual_B >= 0).all() and (solution.residual_B <= 1e-3).all() for solution in solutions)
    loose = run(conditional, noise, condition, None, SampleSettings(solver=policy, tolerance=1e-1)).solutions
    assert loose[0].iterations < solutions[0].iterations
    assert loose[0].residual_B.max() > solutions[0].residual_B.max()


def test_a_segment_that_does_not_converge_in_time_is_solved_token_by_token(
    conditional: Flow, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    noise, condition, _ = inputs
    exact = run(conditional, noise, condition, None, SampleSettings()).x
    for segment, passes in ((None, 1 + 16), (8, 2 + 16)):
        hasty = [BlockPolicy("jacobi", segment, max_iterations=1)] * 3
        fallen = run(conditional, noise, condition, None, SampleSettings(solver=hasty, tolerance=1e-7))
        assert_close(fallen.x, exact)
        assert [solution.iterations for solution in fallen.solutions] == [passes] * 3
        assert all((solution.residual_B == 0).all() for solution in fallen.solutions)


def test_later_segments_see_the_final_tokens_however_loose_the_tolerance(
    conditional: Flow, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    """The keys and values that a segment leaves are those of its last values, not of the guess before them."""
    noise, condition, _ = inputs
    block, (tokens, grid) = list(conditional.iter_blocks())[-1], conditional.to_tokens(noise)
    rotary = conditional.block_rotary(block, conditional.rotary(grid))
    with torch.no_grad():
        used, fresh = (Predictor.of(block, 4, 16, [condition], rotary, None, CachePool()) for _ in range(2))
        x = solve_jacobi(used, tokens, SolverOptions(tolerance=10.0, segment=5), lambda _: None).x_BNC
        fresh.prefill()
        fresh.hidden_states(fresh.inputs(x, 0, 15), 0)
    left, right = used.cache.layers[-1], fresh.cache.layers[-1]
    seen = slice(0, condition.shape[1] + 15)
    assert_close(left.keys_BNLH[:, :, seen], right.keys_BNLH[:, :, seen])
    assert_close(left.values_BNLH[:, :, seen], right.values_BNLH[:, :, seen])


class Explosive:
    """A stand-in for a predictor: sigma_n = exp(200 max(x_(n-1) - 1, 0)), mu = -1.7, x_-1 = 0.

    Of the noise 2, 2, .. the answer is 0.3 everywhere, but the noise itself as a guess gives infinite values;
    and as in attention, where a weight of 0 times infinity is no number, one of them spoils every token.
    """

    first, tokens = 0, 6

    engine = None

    def prefill(self) -> None:
        pass

    def inputs(self, x_BNC: Tensor, start: int, stop: int) -> Tensor:
        return torch.nn.functional.pad(x_BNC, (0, 0, 1, 0))[:, start:stop]

    def predict(self, inputs_BTC: Tensor, _start: int) -> tuple[Tensor, Tensor]:
        spoilt = 0 * inputs_BTC.sum(dim=1, keepdim=True)
        return spoilt - 1.7 + 0 * inputs_BTC, 200 * (inputs_BTC - 1).relu()


def test_guesses_that_overflow_do_not_spoil_the_answer() -> None:
    predictor, noise = cast(Predictor, Explosive()), torch.full((1, 6, 1), 2.0)
    solution = solve_jacobi(predictor, noise, SolverOptions(tolerance=0.0), lambda _: None)
    torch.testing.assert_close(solution.x_BNC, torch.full((1, 6, 1), 0.3))


def test_what_is_no_number_stays_none() -> None:
    """An answer that overflows is reported as it is by both solvers, never hidden behind a guess."""
    predictor, noise = cast(Predictor, Explosive()), torch.full((1, 6, 1), 2.0)
    noise[:, 2] = 4.0
    for solve in (solve_jacobi, solve_sequential):
        x = solve(predictor, noise, SolverOptions(tolerance=0.0), lambda _: None).x_BNC.flatten()
        assert x[:3].isfinite().all()
        assert not x[3:].isfinite().any()
