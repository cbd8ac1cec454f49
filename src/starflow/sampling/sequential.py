"""Token-by-token solving on a CUDA device: the work of a token is recorded once a span, and replayed.

Contract: the answer is that of the eager loop up to rounding. A token is one launch, and nothing in the loop waits for
the device: the index of the token is a tensor that counts itself. A recording reads the cache up to the end of its span
whatever the token, so that spans are short. Recordings belong to one call; they hold the addresses of its cache.

Shapes: B pictures, N tokens, C token channels, D width.

Noise to data, token by token with a static cache: x_n = mu_n + sigma_n z_n (STARFlow, arXiv 2506.06276, eq. 4).

Contract: exact up to rounding, whatever the effort. The loop never waits for the device. On a CPU it runs in compiled
code where the predictor's engine covers the block, on a CUDA device as recorded graphs; what is written here is the
reference, and goes everywhere.

Shapes: B batch, N tokens, C token channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from starflow.flow import affine
from starflow.nn.attention import CacheIndex

if TYPE_CHECKING:
    from starflow.sampling.predictor import Predictor, TokenProgress

from starflow.sampling.predictor import IterationLimits, Predictor, SolverResult, TokenProgress

SPAN = 128
"""Tokens a recording is for: it costs about two tokens to make, and each of its tokens reads half a span too much."""

Record = Callable[[Callable[[], None]], Callable[[], object]]
"""Turns work that has run once into what repeats it."""


def solve_in_graphs(predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, report: TokenProgress) -> None:
    """Tokens from the first on, in place, on a stream of their own; the condition is in the cache already."""
    here, side = torch.cuda.current_stream(x_BNC.device), torch.cuda.Stream(x_BNC.device)
    pool, graphs = torch.cuda.graph_pool_handle(), []

    def record(step: Callable[[], None]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            step()
        finally:
            graph.capture_end()
        graphs.append(graph)  # until all have run
        return graph.replay

    side.wait_stream(here)
    with torch.cuda.device(x_BNC.device), torch.cuda.stream(side):
        solve_in_spans(predictor, x_BNC, noise_BNC, report, record)
    here.wait_stream(side)


def solve_in_spans(
    predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, report: TokenProgress, record: Record
) -> None:
    """The same with any way of recording."""
    index_1 = torch.full((1,), predictor.first, device=x_BNC.device)
    for start, stop in spans(predictor.first, predictor.tokens):
        limit = predictor.prefixed + stop - predictor.first
        step = functools.partial(_next, predictor, x_BNC, noise_BNC, index_1, limit)
        step()
        if stop - start > 1:
            replay = record(step)
            for _ in range(start + 1, stop):
                replay()
        report(stop - start)


def spans(first: int, tokens: int) -> Iterator[tuple[int, int]]:
    """first .. tokens-1 in pieces of `SPAN`."""
    for start in range(first, tokens, SPAN):
        yield start, min(start + SPAN, tokens)


def _next(predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, index_1: Tensor, limit: int) -> None:
    advance_at(predictor, x_BNC, noise_BNC, index_1, limit)
    index_1.add_(1)


def advance_at(predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, index_1: Tensor, limit: int) -> None:
    """Solve the token whose index a tensor holds, in place, given those before it.

    `limit` is above its position in the cache. As `sequential.advance`, but the same work for every token.
    """
    block, number_1 = predictor.block, index_1 - predictor.first
    before_B1C = x_BNC.index_select(1, (index_1 - 1).clamp(min=0))
    if block.sos_embed is not None:
        before_B1C = torch.where(index_1 == 0, block.sos_embed.to(x_BNC.dtype), before_B1C)
    position_1 = number_1 + predictor.prefixed
    hidden_R1D = predictor.in_rows(block.embed_at(before_B1C, number_1))
    rotary = None if predictor.rotary is None else predictor.rotary.index_select(0, position_1)
    spot = CacheIndex.at(predictor.cache, position_1, limit, predictor.query_scale)
    weight = None if predictor.guidance is None else predictor.guidance.weights_at(index_1, predictor.tokens)
    mu, log_sigma = predictor.gaussian(block.extend(hidden_R1D, rotary, spot), weight)
    x_BNC.index_copy_(1, index_1, affine.inverse(noise_BNC.index_select(1, index_1), mu, log_sigma))


def solve_sequential(
    predictor: Predictor, noise_BNC: Tensor, _effort: IterationLimits, report: TokenProgress
) -> SolverResult:
    """Invert one block; one pass a token."""
    noise_BNC = noise_BNC.contiguous()
    x_BNC = noise_BNC.clone()  # without a start token the first one stays the noise itself
    predictor.prefill()
    report(predictor.first)
    engine = predictor.engine
    if engine is not None and noise_BNC.dtype == torch.float32 and engine.ready(predictor):
        engine.solve(predictor, x_BNC, noise_BNC, report)
    elif noise_BNC.device.type == "cuda":
        solve_in_graphs(predictor, x_BNC, noise_BNC, report)
    else:
        for index in range(predictor.first, predictor.tokens):
            advance(predictor, x_BNC, noise_BNC, index)
            report(1)
    return SolverResult(x_BNC, predictor.tokens - predictor.first, noise_BNC.new_zeros(len(noise_BNC)))


def advance(predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, index: int) -> None:
    """Solve token `index` in place, given those before it."""
    after = index + 1
    mu, log_sigma = predictor.predict(predictor.before(x_BNC, index, after), index)
    x_BNC[:, index:after] = affine.inverse(noise_BNC[:, index:after], mu, log_sigma)
