"""The exact solver: noise to data token by token, x_n = mu_n + sigma_n z_n (STARFlow, arXiv 2506.06276, eq. 4).

Contract: exact up to rounding. The loop never waits for the device. On a CPU it runs in compiled code where the
predictor's engine covers the block; on a CUDA device the work of a token is recorded as a graph, once for every
`TOKENS_PER_GRAPH` tokens, and replayed; elsewhere it runs as `solve_token` is written, which is the reference.

A replayed token is one launch: its index is a tensor that counts itself. A recording reads the cache up to the end of
its span of tokens, whatever the token, so spans are short. Recordings belong to one call, as they hold the addresses of
its cache.

Shapes: B pictures, N tokens, C token channels, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from starflow.flow import affine
from starflow.nn.attention import CacheIndex
from starflow.sampling.predictor import Predictor, SolverOptions, SolverResult, TokenProgress

TOKENS_PER_GRAPH = 128
"""Tokens of a recording: it costs about two tokens to make, and each of its tokens reads half a span too much."""

RecordGraph = Callable[[Callable[[], None]], Callable[[], object]]
"""Turns work that has run once into a function that repeats it."""


def solve_sequential(
    predictor: Predictor, noise_BNC: Tensor, _options: SolverOptions, progress: TokenProgress
) -> SolverResult:
    """Invert one block, one pass a token.

    Args:
        predictor: of the block, with an empty cache.
        noise_BNC: in the block's own order.
        _options: those of other solvers; none applies.
        progress: told of every token.
    """
    noise_BNC = noise_BNC.contiguous()
    x_BNC = noise_BNC.clone()  # without a start token the first one stays the noise itself
    predictor.prefill()
    progress(predictor.first)
    engine = predictor.engine
    if engine is not None and noise_BNC.dtype == torch.float32 and engine.ready(predictor):
        engine.solve(predictor, x_BNC, noise_BNC, progress)
    elif noise_BNC.device.type == "cuda":
        solve_in_graphs(predictor, x_BNC, noise_BNC, progress)
    else:
        for index in range(predictor.first, predictor.tokens):
            solve_token(predictor, x_BNC, noise_BNC, index)
            progress(1)
    return SolverResult(x_BNC, predictor.tokens - predictor.first, noise_BNC.new_zeros(len(noise_BNC)))


def solve_token(predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, index: int) -> None:
    """Solve token `index` in place, given those before it."""
    after = index + 1
    mu, log_sigma = predictor.predict(predictor.inputs(x_BNC, index, after), index)
    x_BNC[:, index:after] = affine.inverse(noise_BNC[:, index:after], mu, log_sigma)


def solve_in_graphs(predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, progress: TokenProgress) -> None:
    """Solve all predicted tokens in place, on a stream of their own; the condition is in the cache already."""
    current, side = torch.cuda.current_stream(x_BNC.device), torch.cuda.Stream(x_BNC.device)
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

    side.wait_stream(current)
    with torch.cuda.device(x_BNC.device), torch.cuda.stream(side):
        solve_in_spans(predictor, x_BNC, noise_BNC, progress, record)
    current.wait_stream(side)


def solve_in_spans(
    predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, progress: TokenProgress, record: RecordGraph
) -> None:
    """Solve all predicted tokens in place: the first of a span runs, and its recording is replayed for the others."""
    index_1 = torch.full((1,), predictor.first, dtype=torch.long, device=x_BNC.device)
    for start, stop in spans(predictor.first, predictor.tokens):
        limit = predictor.prefix_length + stop - predictor.first
        step = functools.partial(_solve_next, predictor, x_BNC, noise_BNC, index_1, limit)
        step()
        if stop - start > 1:
            replay = record(step)
            for _ in range(start + 1, stop):
                replay()
        progress(stop - start)


def spans(first: int, tokens: int) -> Iterator[tuple[int, int]]:
    """Starts and ends of spans of `TOKENS_PER_GRAPH` tokens that cover first..tokens-1.

    >>> list(spans(1, 300))
    [(1, 129), (129, 257), (257, 300)]
    """
    for start in range(first, tokens, TOKENS_PER_GRAPH):
        yield start, min(start + TOKENS_PER_GRAPH, tokens)


def _solve_next(predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, index_1: Tensor, limit: int) -> None:
    solve_token_at(predictor, x_BNC, noise_BNC, index_1, limit)
    index_1.add_(1)


def solve_token_at(predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, index_1: Tensor, limit: int) -> None:
    """Solve the token whose index a tensor holds, in place, given those before it.

    `limit` is above its position in the cache. As `sequential.advance`, but the same work for every token.
    """
    block, number_1 = predictor.block, index_1 - predictor.first
    before_B1C = x_BNC.index_select(1, (index_1 - 1).clamp(min=0))
    if block.sos_embed is not None:
        before_B1C = torch.where(index_1 == 0, block.sos_embed.to(x_BNC.dtype), before_B1C)
    position_1 = number_1 + predictor.prefix_length
    hidden_R1D = predictor.repeat_for_branches(block.embed_at(before_B1C, number_1))
    rotary = None if predictor.rotary is None else predictor.rotary.index_select(0, position_1)
    index = CacheIndex.at(predictor.cache, position_1, limit, predictor.query_scale)
    weight = None if predictor.guidance is None else predictor.guidance.weights_at(index_1, predictor.tokens)
    mu, log_sigma = predictor.gaussian(block.extend(hidden_R1D, rotary, index), weight)
    x_BNC.index_copy_(1, index_1, affine.inverse(noise_BNC.index_select(1, index_1), mu, log_sigma))
