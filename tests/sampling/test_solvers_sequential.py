"""What a CUDA device replays is the eager loop: proved on any device without recording, and there with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starflow.sampling import solvers
from starflow.sampling.guidance import Schedule
from starflow.sampling.policy import SampleSettings
from starflow.sampling.solvers import solve_in_spans, solve_token_at, spans
from tests.registry import Case, cases
from tests.sampling.cpu.common import assert_close, drawn, guided, solving

DRAWN = settings(max_examples=30, derandomize=True)


@DRAWN
@given(
    case=cases(torch.float32), number=st.integers(0, 2), span=st.sampled_from([1, 3, 128]),
    schedule=st.sampled_from(["constant", "linear"]),
)  # fmt: skip
def test_a_token_at_a_tensors_index_is_that_token(case: Case, number: int, span: int, schedule: Schedule) -> None:
    number %= len(case.model.blocks)
    eager, ours = (solving(case, number, 1.5, schedule=schedule) for _ in range(2))
    recorded: list[Callable[[], None]] = []

    def record(step: Callable[[], None]) -> Callable[[], None]:
        recorded.append(step)
        return step

    x_BNC, told = ours.noise_BNC.clone(), [ours.predictor.first]
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(solvers, "TOKENS_PER_GRAPH", span)
        ours.predictor.prefill()
        solve_in_spans(ours.predictor, x_BNC, ours.noise_BNC, told.append, record)
    assert_close(x_BNC, eager.eager())
    assert sum(told) == ours.predictor.tokens
    assert len(recorded) <= 1 + ours.predictor.tokens // span


def test_spans_cover_every_token_once() -> None:
    assert list(spans(1, 300)) == [(1, 129), (129, 257), (257, 300)]
    assert list(spans(1, 1)) == []


def test_the_work_is_the_same_for_every_token() -> None:
    """As a compiler sees it: one graph without a break, traced once for all indices."""
    from tests.sampling.cpu.test_engine import text_case

    torch.compiler.reset()
    eager, ours = (solving(text_case(), 1, 2.0) for _ in range(2))
    graphs_seen = 0

    def backend(module: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
        nonlocal graphs_seen
        graphs_seen += 1
        return module.forward

    step = torch.compile(solve_token_at, fullgraph=True, backend=backend)
    x_BNC = ours.noise_BNC.clone()
    with torch.no_grad():
        ours.predictor.prefill()
        for index in range(16):
            step(ours.predictor, x_BNC, ours.noise_BNC, torch.tensor([index]), 3 + 16)
    assert_close(x_BNC, eager.eager())
    assert graphs_seen == 1


@pytest.mark.gpu
@DRAWN
@given(case=cases(torch.float32), rule=st.sampled_from(["gaussian", "linear"]), span=st.sampled_from([1, 3, 128]))
def test_recorded_equals_eager(case: Case, rule: str, span: int) -> None:
    chosen = SampleSettings(1.5 if guided(case) else 0.0, guidance_rule=rule)  # type: ignore[arg-type]
    exact = drawn(case, chosen, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solvers, "TOKENS_PER_GRAPH", span)
        torch.testing.assert_close(
            drawn(case.to(torch.device("cuda")), chosen, None).cpu(), exact, rtol=1e-3, atol=1e-3
        )


@pytest.mark.gpu
def test_the_loop_does_not_wait_for_the_device() -> None:
    from tests.sampling.cpu.test_engine import text_case

    given = solving(text_case().to(torch.device("cuda")), 1, 2.0)
    x_BNC = given.noise_BNC.clone()
    with torch.no_grad():
        given.predictor.prefill()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            solvers.solve_in_graphs(given.predictor, x_BNC, given.noise_BNC, lambda _: None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert x_BNC.isfinite().all()
