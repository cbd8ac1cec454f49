"""Noise to data in parallel: block-wise fixed-point iteration (GS-Jacobi, arXiv 2505.12849; SeJD, arXiv 2505.24791).

Contract: a segment of tokens starts from a guess and repeats x = F(x) = mu(x) + sigma(x) z against the cache of the
segments before it. A sequence is done when its residual ||F(x) - x|| / ||F(x)|| over the segment is within the
tolerance; what is returned is that x, the one that the residual was measured at, and the cache holds the keys and
values of that x. So `residual_B` is verified and never an estimate: of the returned values, in their own scale, the
largest over the segments. A sequence that is not done within its iterations is solved token by token, which is exact,
and so are as many iterations as a segment has tokens: both report 0.

Every sequence goes its own way: those that are done leave the batch, and a picture does not depend on the others.

Shapes: B batch, P pictures of it that are still iterated, N tokens, C token channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from starflow.flow import affine
from starflow.sampling.predictor import (
    InitialGuess,
    IterationLimits,
    Predictor,
    SolverResult,
    TokenProgress,
    can_draft,
    copy_rows_back,
    draft_of,
    ignore_progress,
    select_pictures,
)
from starflow.sampling.sequential import advance, solve_sequential

DRAFT_FLOOR = 1e-3
"""Residual under which a draft's own rounding is all that is left of it."""
DRAFT_GAIN = 2.0
"""A draft need not be within the tolerance: its values are those after one more step, which brings them nearer, to less
than a half of the distance wherever iterating pays."""


def solve_jacobi(
    predictor: Predictor, noise_BNC: Tensor, effort: IterationLimits, report: TokenProgress
) -> SolverResult:
    """Invert one block, segment by segment."""
    if effort.guess == "rounded" and not predictor.can_round:
        return solve_sequential(predictor, noise_BNC, effort, report)  # exact, where no cheaper guess is to be had
    noise_BNC = noise_BNC.contiguous()
    x_BNC = noise_BNC.clone()
    predictor.prefill()
    report(predictor.first)
    draft = draft_of(predictor) if effort.draft and can_draft(predictor) else None
    tally = _Tally(noise_BNC.new_zeros(len(noise_BNC)))
    length = effort.segment or predictor.tokens
    last = Gaussian.standard(noise_BNC)
    for start in range(predictor.first, predictor.tokens, length):
        span = Span(start, min(start + length, predictor.tokens))
        _guess(predictor, x_BNC, noise_BNC, span, effort.guess, last)
        if draft is not None:
            rule = StoppingRule(max(DRAFT_GAIN * effort.tolerance, DRAFT_FLOOR), _budget(span, effort), draft=True)
            tally.drafts += iterate(draft, x_BNC, noise_BNC, span, rule).passes
        outcome = iterate(predictor, x_BNC, noise_BNC, span, StoppingRule(effort.tolerance, _budget(span, effort)))
        tally.passes += outcome.passes
        tally.residual_B = torch.maximum(tally.residual_B, outcome.residual_B)
        last = outcome.last
        if len(outcome.left_P):
            _solve_the_rest(predictor, x_BNC, noise_BNC, span, outcome.left_P)
            tally.single += span.count
        report(span.count)
    return SolverResult(x_BNC, tally.passes + tally.single, tally.residual_B, tally.drafts, tally.single)


@dataclass(frozen=True)
class Span:
    """Tokens start..stop-1."""

    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Gaussian:
    """What a token is given those before it: mu and log sigma, (B, 1, C) each."""

    mu_B1C: Tensor
    log_sigma_B1C: Tensor

    @staticmethod
    def standard(like_BNC: Tensor) -> Gaussian:
        """Of which noise is a draw."""
        zero = like_BNC.new_zeros(len(like_BNC), 1, like_BNC.shape[2])
        return Gaussian(zero, zero.clone())

    def take(self, rows_P: Tensor, mu_P1C: Tensor, log_sigma_P1C: Tensor) -> None:
        """Those of some sequences."""
        self.mu_B1C[rows_P] = mu_P1C
        self.log_sigma_B1C[rows_P] = log_sigma_P1C


@dataclass(frozen=True)
class StoppingRule:
    """When to stop iterating a sequence."""

    tolerance: float
    limit: int
    """Passes; as many as tokens are exact, whatever the residual."""
    draft: bool = False
    """The result is a guess: take the last step unverified, and stop where steps no longer shrink."""


@dataclass(frozen=True)
class Outcome:
    """What iterating did."""

    passes: int
    residual_B: Tensor
    """Of the values that the sequences are left with; 0 for those in `left_P`."""
    left_P: Tensor
    """Sequences that are not done."""
    last: Gaussian
    """Of the span's last token; the standard one for those in `left_P`."""


@dataclass
class _Tally:
    """Sums over the segments."""

    residual_B: Tensor
    passes: int = 0
    drafts: int = 0
    single: int = 0


def _budget(span: Span, effort: IterationLimits) -> int:
    return min(span.count, effort.max_iterations or span.count)


def _guess(
    predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, span: Span, guess: InitialGuess, last: Gaussian
) -> None:
    """Where a segment starts from, in place: it holds the noise, which is the block's before too."""
    x_BTC, z_BTC = x_BNC[:, span.start : span.stop], noise_BNC[:, span.start : span.stop]
    if guess == "zero" or (guess == "previous" and span.start == 0):
        x_BTC.zero_()
    elif guess == "previous":
        x_BTC.copy_(x_BNC[:, span.start - 1 : span.start].expand_as(x_BTC))
    elif guess == "gaussian":
        x_BTC.copy_(affine.inverse(z_BTC, last.mu_B1C, last.log_sigma_B1C))
    elif guess == "rounded":
        assert predictor.engine is not None
        predictor.engine.draft(predictor, x_BNC, noise_BNC, range(span.start, span.stop))


def iterate(predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, span: Span, rule: StoppingRule) -> Outcome:
    """Iterate the span's tokens in place, each sequence until it is done; the cache gets their keys and values."""
    left_P = torch.arange(len(x_BNC), device=x_BNC.device)
    residual_B = x_BNC.new_zeros(len(x_BNC))
    before_P, last = x_BNC.new_full((len(x_BNC),), torch.inf), Gaussian.standard(x_BNC)
    some, passes = predictor, 0
    while len(left_P) and passes < rule.limit:
        x_PNC, z_PNC = x_BNC[left_P], noise_BNC[left_P]
        new_PTC, mu_PTC, log_sigma_PTC = _step(some, x_PNC, z_PNC, span)
        change_P = relative_change(new_PTC, x_PNC[:, span.start : span.stop])
        passes += 1
        exact = passes == span.count and not rule.draft
        done_P = (change_P <= rule.tolerance) | exact
        if rule.draft:
            done_P |= change_P > 0.5 * before_P
        settled = left_P[done_P]
        last.take(settled, mu_PTC[done_P, -1:], log_sigma_PTC[done_P, -1:])
        if not rule.draft and not exact:
            residual_B[settled] = change_P[done_P]
            new_PTC[done_P] = x_PNC[done_P, span.start : span.stop]  # the values that were verified
        x_BNC[left_P, span.start : span.stop] = new_PTC
        before_P = change_P[~done_P]
        some, left_P = _leave(predictor, some, left_P, done_P, span)
    return Outcome(passes, residual_B, left_P, last)


def step(predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, span: Span) -> Tensor:
    """F(x) of the span's tokens, (B, T, C); the cache takes the keys and values of x."""
    return _step(predictor, x_BNC, noise_BNC, span)[0]


def _step(predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, span: Span) -> tuple[Tensor, Tensor, Tensor]:
    """F(x), mu and log sigma of the span's tokens."""
    # A guess may overflow before the tokens it hangs on are right; 0 * inf would then spoil the whole segment.
    guess_BNC = torch.where(x_BNC.isfinite(), x_BNC, noise_BNC)
    mu, log_sigma = predictor.predict(predictor.before(guess_BNC, span.start, span.stop), span.start)
    return affine.inverse(noise_BNC[:, span.start : span.stop], mu, log_sigma), mu, log_sigma


def relative_change(new: Tensor, old: Tensor) -> Tensor:
    """||new - old|| / ||new|| of each sequence, (B,)."""
    change_B: Tensor = torch.linalg.vector_norm(new - old, dim=(1, 2))
    size_B: Tensor = torch.linalg.vector_norm(new, dim=(1, 2))
    return change_B / size_B.clamp(min=torch.finfo(new.dtype).tiny)


def _leave(whole: Predictor, some: Predictor, left_P: Tensor, done_P: Tensor, span: Span) -> tuple[Predictor, Tensor]:
    """Take what is done out of the batch, with its keys and values; the predictor of the others, and who they are."""
    count = int(done_P.sum())  # the one place of a pass that waits for the device
    if count == 0:
        return some, left_P
    more = span.stop < whole.tokens  # what follows needs the keys and values
    if some is not whole and more:
        places = done_P.nonzero().flatten()
        copy_rows_back(some, places, whole, left_P[done_P], *_positions(whole, span))
    if count == len(left_P):
        return some, left_P[:0]
    filled = _positions(whole, span)[0]
    return select_pictures(some, (~done_P).nonzero().flatten(), filled), left_P[~done_P]


def _positions(predictor: Predictor, span: Span) -> tuple[int, int]:
    """Where the cache has the inputs that predict the span's tokens."""
    before = predictor.prefixed - predictor.first
    return before + span.start, before + span.stop


def _solve_the_rest(predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, span: Span, left_P: Tensor) -> None:
    """The span's tokens one by one, in place, for the sequences that are not done."""
    everyone = len(left_P) == len(x_BNC)
    start, stop = _positions(predictor, span)
    some = predictor if everyone else select_pictures(predictor, left_P, start)
    z_PNC = noise_BNC[left_P]
    if span == Span(predictor.first, predictor.tokens):
        x_BNC[left_P] = solve_sequential(some, z_PNC, IterationLimits(), ignore_progress).x_BNC
        return
    x_PNC = x_BNC[left_P]
    for index in range(span.start, span.stop):
        advance(some, x_PNC, z_PNC, index)
    x_BNC[left_P] = x_PNC
    if not everyone and span.stop < predictor.tokens:
        everything = torch.arange(len(left_P), device=left_P.device)
        copy_rows_back(some, everything, predictor, left_P, start, stop)
