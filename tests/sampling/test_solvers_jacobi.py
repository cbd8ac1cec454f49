"""What the parallel solver promises: a verified residual, rows that go their own way, and help where it fails."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from starflow.flow.config import STARFlowConfig
from starflow.flow.model import Flow
from starflow.flow.tokens import in_order
from starflow.nn.attention import CachePool
from starflow.sampling.guidance import Guidance
from starflow.sampling.policy import BlockPolicy, SampleSettings
from starflow.sampling.predictor import Predictor, SolverOptions, make_draft, select_pictures
from starflow.sampling.sampler import run
from starflow.sampling.solvers import Span, fixed_point_step, relative_change, solve_jacobi, solve_sequential
from tests.registry import Case, cases, randomised

DRAWN = settings(max_examples=25, derandomize=True)
POLICIES = st.builds(
    BlockPolicy,
    st.just("jacobi"),
    st.sampled_from([None, 1, 3]),
    st.sampled_from([None, 1, 2]),
    st.sampled_from(["noise", "zero", "previous", "gaussian", "int8"]),
    st.booleans(),
)


def predictors(case: Case) -> list[tuple[Predictor, Tensor]]:
    """Every block of a case with noise, unguided, each with a cache of its own."""
    model, batch = case.model, len(case.x)
    tokens, grid = model.to_tokens(case.x)
    condition, rotary = model.check_condition(case.condition, batch), model.rotary(grid)
    return [
        (
            Predictor.of(
                block, batch, tokens.shape[1], [condition], model.block_rotary(block, rotary), None, CachePool()
            ),
            in_order(tokens, backwards=block.spec.backwards),
        )
        for block in model.iter_blocks()
    ]


@DRAWN
@given(case=cases(torch.float32), policy=POLICIES, tolerance=st.sampled_from([0.3, 1e-2, 1e-3]))
@torch.no_grad()
def test_the_reported_residual_is_that_of_the_returned_values(
    case: Case, policy: BlockPolicy, tolerance: float
) -> None:
    """F evaluated anew on what came back, segment by segment: no more than reported, and that within the bound."""
    options = SolverOptions(tolerance, policy.segment, policy.max_iterations, policy.guess, policy.draft)
    for predictor, noise in predictors(case):
        solution = solve_jacobi(predictor, noise, options, lambda _: None)
        assert (solution.residual_B <= tolerance).all()
        predictor.prefill()
        length, worst = policy.segment or predictor.tokens, torch.zeros(len(noise))
        for start in range(predictor.first, predictor.tokens, length):
            span = Span(start, min(start + length, predictor.tokens))
            again = fixed_point_step(predictor, solution.x_BNC, noise, span)
            worst = torch.maximum(worst, relative_change(again, solution.x_BNC[:, span.start : span.stop]))
        torch.testing.assert_close(worst, torch.maximum(worst, solution.residual_B), rtol=1e-3, atol=1e-5)
        assert (worst <= solution.residual_B * 1.001 + 1e-5).all()


@DRAWN
@given(case=cases(torch.float32), policy=POLICIES)
def test_a_bound_of_zero_gives_the_sequential_answer(case: Case, policy: BlockPolicy) -> None:
    inputs = (case.model, case.x, case.condition, case.null_condition)
    weight = 0.0 if case.condition is None else 1.5
    exact = run(*inputs, SampleSettings(weight)).x
    ours = run(*inputs, SampleSettings(weight, [policy] * case.model.config.num_blocks, tolerance=0.0))
    torch.testing.assert_close(ours.x, exact, rtol=1e-4, atol=2e-5)
    assert all((solution.residual_B == 0).all() for solution in ours.solutions)
    auto = run(*inputs, SampleSettings(weight, "auto", tolerance=0.0)).x
    assert torch.equal(auto, exact)


@DRAWN
@given(case=cases(torch.float32), policy=POLICIES)
def test_every_picture_is_what_it_would_be_alone_however_the_others_fare(case: Case, policy: BlockPolicy) -> None:
    """The second picture's noise is small, so that it leaves earlier; loose enough for the stops to show."""
    noise = case.x * torch.tensor([1.0, 0.05]).view(-1, 1, 1, 1)
    weight = 0.0 if case.condition is None else 1.5
    chosen = SampleSettings(weight, [policy] * case.model.config.num_blocks, tolerance=1e-2)

    def draw(rows: slice) -> Tensor:
        condition = None if case.condition is None else case.condition[rows]
        null = None if case.null_condition is None else case.null_condition[rows]
        return run(case.model, noise[rows], condition, null, chosen).x

    alone = torch.cat([draw(slice(0, 1)), draw(slice(1, 2))])
    loose = 5e-2 if policy.draft else 1e-4  # a draft's rounding turns at other sums
    torch.testing.assert_close(draw(slice(None)), alone, rtol=loose, atol=loose)


@pytest.fixture(scope="module")
def model() -> Flow:
    config = STARFlowConfig(
        in_channels=2, img_size=4, channels=48, head_dim=24, num_blocks=3, layers_per_block=1, txt_size=3, txt_dim=5
    )
    return randomised(config, 0)


def test_rows_are_really_removed(model: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    """With prompts, weights and noise of their own, pictures leave one by one and later passes hold fewer rows."""
    sizes: list[int] = []
    predict = Predictor.predict

    def counted(self: Predictor, before: Tensor, start: int) -> tuple[Tensor, Tensor]:
        sizes.append(len(before))
        return predict(self, before, start)

    monkeypatch.setattr(Predictor, "predict", counted)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 2, 4, 4, generator=generator) * torch.tensor([1.0, 0.3, 0.1, 0.01]).view(-1, 1, 1, 1)
    condition, null = torch.randn(2, 4, 3, 5, generator=generator)
    weights = torch.tensor([0.0, 1.0, 2.5, 4.0])
    together = run(model, noise, condition, null, SampleSettings(weights, "jacobi", segment=5))
    assert set(sizes) >= {4, 1}
    for row in range(4):
        one, chosen = slice(row, row + 1), SampleSettings(float(weights[row]), "jacobi", segment=5)
        alone = run(model, noise[one], condition[one], null[one], chosen)
        torch.testing.assert_close(together.x[one], alone.x, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_a_narrowed_predictor_predicts_what_the_whole_one_does(model: Flow) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, grid = model.to_tokens(torch.randn(4, 2, 4, 4, generator=generator))
    condition, null = torch.randn(2, 4, 3, 5, generator=generator)
    guidance = Guidance(torch.tensor([0.0, 1.0, 2.5, 4.0]), "gaussian", "constant", 0.7)
    block = list(model.iter_blocks())[-1]
    table = model.block_rotary(block, model.rotary(grid))
    whole = Predictor.of(block, 4, 16, [condition, null], table, guidance, CachePool())
    whole.prefill()
    whole.predict(whole.inputs(tokens, 0, 6), 0)
    rows = torch.tensor([3, 1])
    some = select_pictures(whole, rows, 3 + 6)
    before = whole.inputs(tokens, 6, 16)
    for ours, theirs in zip(some.predict(before[rows], 6), whole.predict(before, 6), strict=True):
        torch.testing.assert_close(ours, theirs[rows], rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_a_draft_is_near_its_block_and_leaves_it_alone(model: Flow) -> None:
    tokens, grid = model.to_tokens(torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)))
    block = next(model.iter_blocks())
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    predictor = Predictor.of(block, 2, 16, [None], model.block_rotary(block, model.rotary(grid)), None, CachePool())
    exact, rounded = (fixed_point_step(one, tokens, tokens, Span(0, 16)) for one in (predictor, make_draft(predictor)))
    assert 0 < relative_change(rounded, exact).max() < 2e-2
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())


@torch.no_grad()
def test_drafts_replace_passes(model: Flow) -> None:
    tokens, grid = model.to_tokens(torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.3)
    block = next(model.iter_blocks())
    table = model.block_rotary(block, model.rotary(grid))
    found = []
    for draft in (False, True):
        predictor = Predictor.of(block, 2, 16, [None], table, None, CachePool())
        found.append(solve_jacobi(predictor, tokens, SolverOptions(1e-2, draft=draft), lambda _: None))
    plain, drafted = found
    assert plain.drafts == 0 < drafted.drafts
    assert drafted.iterations < plain.iterations
    exact = solve_sequential(predictor, tokens, SolverOptions(), lambda _: None).x_BNC
    assert relative_change(drafted.x_BNC, exact).max() < 5e-2
