"""The two solvers of a block, noise to data: sequential, token by token, and Jacobi, by parallel iteration.

Sequential, x_n = mu_n + sigma_n z_n (STARFlow, arXiv 2506.06276, eq. 4), is exact up to rounding. The loop never waits
for the device. On a CPU it runs in compiled code where the predictor's engine covers the block; on a CUDA device the
work of a token is recorded as a graph, once for every `TOKENS_PER_GRAPH` tokens, and replayed; elsewhere it runs as
`solve_token` is written, which is the reference.

A replayed token is one launch: its index is a tensor that counts itself. A recording reads the cache up to the end of
its span of tokens, whatever the token, so spans are short. Recordings belong to one call, as they hold the addresses of
its cache.

Jacobi iterates to a fixed point, one segment of tokens after the other. A segment of tokens starts from a guess and
repeats x = F(x) = mu(x) + sigma(x) z against the cache of the segments before it. A sequence is solved when its
residual ||F(x) - x|| / ||F(x)|| over the segment is within the tolerance; what is returned is that x, at which the
residual was measured, and the cache holds the keys and values of that x. So `residual_B` is verified and never an
estimate: of the returned values, in their own scale, the largest over the segments. A sequence that is not solved
within its iterations is solved token by token, which is exact, and so are as many iterations as a segment has tokens:
both report 0. (GS-Jacobi, arXiv 2505.12849; SeJD, arXiv 2505.24791.)

Every sequence is iterated until it is solved itself, whatever the others need: those that are solved leave the batch.

Shapes: B batch, P pictures of it that are still iterated, N tokens, T those of a segment, C token channels, D width.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from starflow.flow import block
from starflow.flow import block as affine
from starflow.nn.attention import CacheIndex
from starflow.sampling.predictor import (
    ROUNDED_GUESSES,
    InitialGuess,
    Predictor,
    SolverOptions,
    SolverResult,
    TokenProgress,
    can_draft,
    copy_rows_back,
    ignore_progress,
    make_draft,
    select_pictures,
)

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
    current, side = torch.cuda.current_stream(x_BNC.device), _recording_stream(x_BNC.device, threading.get_ident())
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


@functools.cache
def _recording_stream(device: torch.device, _thread: int) -> torch.cuda.Stream:
    """One stream a thread: for each stream that it computes on, cuBLAS keeps a workspace of up to 32 MiB."""
    return torch.cuda.Stream(device)


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


DRAFT_FLOOR = 1e-3
"""Residual under which a draft is not iterated: its own rounding is as large."""

DRAFT_GAIN = 2.0
"""A draft may miss the tolerance by this factor: one more step, which is taken unverified, at least halves the distance
wherever iterating pays."""


def solve_jacobi(
    predictor: Predictor, noise_BNC: Tensor, options: SolverOptions, progress: TokenProgress
) -> SolverResult:
    """Invert one block, segment by segment.

    Args:
        predictor: of the block, with an empty cache.
        noise_BNC: in the block's own order.
        options: tolerance, segments, iterations and initial guess.
        progress: told of the tokens of each segment.
    """
    if options.guess in ROUNDED_GUESSES and options.guess not in predictor.rounded_guesses:
        return solve_sequential(predictor, noise_BNC, options, progress)  # exact, where no cheaper guess is to be had
    noise_BNC = noise_BNC.contiguous()
    x_BNC = noise_BNC.clone()
    predictor.prefill()
    progress(predictor.first)
    draft = make_draft(predictor) if options.draft and can_draft(predictor) else None
    tally = _Totals(noise_BNC.new_zeros(len(noise_BNC)))
    length = options.segment or predictor.tokens
    last = Gaussian.standard(noise_BNC)
    for start in range(predictor.first, predictor.tokens, length):
        span = Span(start, min(start + length, predictor.tokens))
        _set_initial_guess(predictor, x_BNC, noise_BNC, span, options.guess, last)
        if draft is not None:
            rule = StoppingRule(
                max(DRAFT_GAIN * options.tolerance, DRAFT_FLOOR), _max_passes(span, options), draft=True
            )
            tally.drafts += iterate(draft, x_BNC, noise_BNC, span, rule).passes
        outcome = iterate(
            predictor, x_BNC, noise_BNC, span, StoppingRule(options.tolerance, _max_passes(span, options))
        )
        tally.passes += outcome.passes
        tally.residual_B = torch.maximum(tally.residual_B, outcome.residual_B)
        last = outcome.last
        if len(outcome.unsolved_P):
            _solve_token_by_token(predictor, x_BNC, noise_BNC, span, outcome.unsolved_P)
            tally.sequential_tokens += span.count
        progress(span.count)
    return SolverResult(
        x_BNC, tally.passes + tally.sequential_tokens, tally.residual_B, tally.drafts, tally.sequential_tokens
    )


@dataclass(frozen=True)
class Span:
    """The tokens start..stop-1 of a sequence."""

    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Gaussian:
    """The distribution of a token given those before it: mu and log sigma, (B, 1, C) each."""

    mu_B1C: Tensor
    log_sigma_B1C: Tensor

    @staticmethod
    def standard(like_BNC: Tensor) -> Gaussian:
        """The one that noise is drawn from: mu and log sigma 0."""
        zero = like_BNC.new_zeros(len(like_BNC), 1, like_BNC.shape[2])
        return Gaussian(zero, zero.clone())

    def update(self, rows_P: Tensor, mu_P1C: Tensor, log_sigma_P1C: Tensor) -> None:
        """Replace those of some sequences, in place."""
        self.mu_B1C[rows_P] = mu_P1C
        self.log_sigma_B1C[rows_P] = log_sigma_P1C


@dataclass(frozen=True)
class StoppingRule:
    """When to stop iterating a sequence."""

    tolerance: float
    limit: int
    """Passes at most; as many as there are tokens are exact, whatever the residual."""
    draft: bool = False
    """Whether the result is a guess: the last step is taken unverified, and where steps no longer shrink it stops."""


@dataclass(frozen=True)
class IterationResult:
    """What iterating a segment did."""

    passes: int
    residual_B: Tensor
    """Of the values that were written; 0 for the sequences in `unsolved_P`."""
    unsolved_P: Tensor
    """Indices of the sequences that did not meet the tolerance."""
    last: Gaussian
    """That of the segment's last token; the standard one for the sequences in `unsolved_P`."""


@dataclass
class _Totals:
    """Sums over the segments."""

    residual_B: Tensor
    passes: int = 0
    drafts: int = 0
    sequential_tokens: int = 0


def _max_passes(span: Span, options: SolverOptions) -> int:
    return min(span.count, options.max_iterations or span.count)


def _set_initial_guess(
    predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, span: Span, guess: InitialGuess, last: Gaussian
) -> None:
    """Write a segment's initial guess in place; until then x holds the noise."""
    x_BTC, z_BTC = x_BNC[:, span.start : span.stop], noise_BNC[:, span.start : span.stop]
    if guess == "zero" or (guess == "previous" and span.start == 0):
        x_BTC.zero_()
    elif guess == "previous":
        x_BTC.copy_(x_BNC[:, span.start - 1 : span.start].expand_as(x_BTC))
    elif guess == "gaussian":
        x_BTC.copy_(block.inverse(z_BTC, last.mu_B1C, last.log_sigma_B1C))
    elif guess in ROUNDED_GUESSES:
        assert predictor.engine is not None
        predictor.engine.guess(predictor, x_BNC, noise_BNC, range(span.start, span.stop), guess)


def iterate(predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, span: Span, rule: StoppingRule) -> IterationResult:
    """Iterate the span's tokens in place, each sequence until it is solved; the cache takes their keys and values."""
    unsolved_P = torch.arange(len(x_BNC), device=x_BNC.device)
    residual_B = x_BNC.new_zeros(len(x_BNC))
    before_P, last = x_BNC.new_full((len(x_BNC),), torch.inf), Gaussian.standard(x_BNC)
    some, passes = predictor, 0
    while len(unsolved_P) and passes < rule.limit:
        x_PNC, z_PNC = x_BNC[unsolved_P], noise_BNC[unsolved_P]
        new_PTC, mu_PTC, log_sigma_PTC = _evaluate(some, x_PNC, z_PNC, span)
        change_P = relative_change(new_PTC, x_PNC[:, span.start : span.stop])
        passes += 1
        exact = passes == span.count and not rule.draft
        solved_P = (change_P <= rule.tolerance) | exact
        if rule.draft:
            solved_P |= change_P > 0.5 * before_P
        solved = unsolved_P[solved_P]
        last.update(solved, mu_PTC[solved_P, -1:], log_sigma_PTC[solved_P, -1:])
        if not rule.draft and not exact:
            residual_B[solved] = change_P[solved_P]
            new_PTC[solved_P] = x_PNC[solved_P, span.start : span.stop]  # the values that were verified
        x_BNC[unsolved_P, span.start : span.stop] = new_PTC
        before_P = change_P[~solved_P]
        some, unsolved_P = _remove_solved(predictor, some, unsolved_P, solved_P, span)
    return IterationResult(passes, residual_B, unsolved_P, last)


def fixed_point_step(predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, span: Span) -> Tensor:
    """F(x) = mu(x) + sigma(x) z of the span's tokens, (B, T, C); the cache takes the keys and values of x."""
    return _evaluate(predictor, x_BNC, noise_BNC, span)[0]


def _evaluate(predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, span: Span) -> tuple[Tensor, Tensor, Tensor]:
    """F(x), mu and log sigma of the span's tokens."""
    # A guess may overflow before the tokens that it depends on are right; 0 * inf would then spoil the whole segment.
    guess_BNC = torch.where(x_BNC.isfinite(), x_BNC, noise_BNC)
    mu, log_sigma = predictor.predict(predictor.inputs(guess_BNC, span.start, span.stop), span.start)
    return block.inverse(noise_BNC[:, span.start : span.stop], mu, log_sigma), mu, log_sigma


def relative_change(new: Tensor, old: Tensor) -> Tensor:
    """||new - old|| / ||new|| of each sequence (B, T, C), (B,).

    >>> new = torch.tensor([[[3.0], [4.0]]])
    >>> relative_change(new, torch.tensor([[[3.0], [3.0]]])).item()
    0.20000000298023224
    """
    change_B: Tensor = torch.linalg.vector_norm(new - old, dim=(1, 2))
    size_B: Tensor = torch.linalg.vector_norm(new, dim=(1, 2))
    return change_B / size_B.clamp(min=torch.finfo(new.dtype).tiny)


def _remove_solved(
    whole: Predictor, some: Predictor, unsolved_P: Tensor, solved_P: Tensor, span: Span
) -> tuple[Predictor, Tensor]:
    """Take the solved sequences out of the batch, with their keys and values; predictor and indices of the others."""
    count = int(solved_P.sum())  # the one place of a pass that waits for the device
    if count == 0:
        return some, unsolved_P
    more = span.stop < whole.tokens  # what follows needs the keys and values
    if some is not whole and more:
        places = solved_P.nonzero().flatten()
        copy_rows_back(some, places, whole, unsolved_P[solved_P], *_positions(whole, span))
    if count == len(unsolved_P):
        return some, unsolved_P[:0]
    filled = _positions(whole, span)[0]
    return select_pictures(some, (~solved_P).nonzero().flatten(), filled), unsolved_P[~solved_P]


def _positions(predictor: Predictor, span: Span) -> tuple[int, int]:
    """First position and end, in the cache, of the inputs that predict the span's tokens."""
    before = predictor.prefix_length - predictor.first
    return before + span.start, before + span.stop


def _solve_token_by_token(
    predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, span: Span, unsolved_P: Tensor
) -> None:
    """Solve the span's tokens one by one, in place, for the sequences that did not converge."""
    everyone = len(unsolved_P) == len(x_BNC)
    start, stop = _positions(predictor, span)
    some = predictor if everyone else select_pictures(predictor, unsolved_P, start)
    z_PNC = noise_BNC[unsolved_P]
    if span == Span(predictor.first, predictor.tokens):
        x_BNC[unsolved_P] = solve_sequential(some, z_PNC, SolverOptions(), ignore_progress).x_BNC
        return
    x_PNC = x_BNC[unsolved_P]
    for index in range(span.start, span.stop):
        solve_token(some, x_PNC, z_PNC, index)
    x_BNC[unsolved_P] = x_PNC
    if not everyone and span.stop < predictor.tokens:
        everything = torch.arange(len(unsolved_P), device=unsolved_P.device)
        copy_rows_back(some, everything, predictor, unsolved_P, start, stop)
