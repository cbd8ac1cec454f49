"""How fast a block of a trained model converges when it is iterated, and from which initial guess.

Contract: figures are of the given noise and conditions, against the exact sequential answer, the worst picture's; they
belong to the weights and hold on every device. (GS-Jacobi, arXiv 2505.12849, sections 3 and 4.)

Shapes: B batch, N tokens, C token channels.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from starflow.flow import affine
from starflow.sampling.jacobi import Span, fixed_point_step, relative_change
from starflow.sampling.policy import BlockPolicy, ConvergedPolicy, Convergence
from starflow.sampling.predictor import InitialGuess, Predictor, ignore_progress, worth_drafting
from starflow.sampling.sampler import solve_by_policy

SEGMENTS = (4, 8, 16, 32, 64, 128)
GUESSES: tuple[InitialGuess, ...] = ("noise", "zero", "previous", "gaussian")
"""Initial guesses that cost nothing."""
MAX_CONTRACTION = 0.6
"""Above it whole sequences are not tried: a residual of 1e-3 would take over 13 passes."""
EXTRA_PASSES = 2
"""Passes above those that calibrating took before a sequence is solved token by token."""


@dataclass(frozen=True)
class SolvedBlock:
    """One block with its exact answer."""

    predictor: Predictor
    noise_BNC: Tensor
    x_BNC: Tensor

    @property
    def span(self) -> Span:
        """The tokens that are predicted."""
        return Span(self.predictor.first, self.predictor.tokens)


def converge(block: SolvedBlock, tolerance: float) -> Convergence:
    """How a block converges, and the parallel policies that meet the tolerance."""
    distances: dict[str, float] = {guess: _distance(initial_guess(block, guess), block) for guess in GUESSES}
    whole: InitialGuess = "noise" if distances["noise"] <= distances["zero"] else "zero"
    contraction = contraction_of(block, initial_guess(block, whole))
    tried = [BlockPolicy("jacobi", None, None, whole)] if contraction < MAX_CONTRACTION else []
    nearest = min(GUESSES, key=lambda guess: distances[guess])
    length = block.predictor.tokens
    tried += [BlockPolicy("jacobi", segment, None, nearest) for segment in SEGMENTS if segment < length]
    if worth_drafting(block.predictor):
        tried += [dataclasses.replace(policy, draft=True) for policy in tried]
    if block.predictor.can_solve_rounded:
        tried.append(BlockPolicy("jacobi", None, None, "rounded"))
    converged = [found for policy in tried if (found := _try(block, policy, tolerance)) is not None]
    return Convergence(contraction, distances, tuple(sorted(converged, key=lambda one: one.passes)))


def initial_guess(block: SolvedBlock, guess: InitialGuess) -> Tensor:
    """x_0 of a whole sequence; "previous" and "gaussian" as if every token were the first of a segment."""
    if guess == "noise":
        return block.noise_BNC
    if guess == "zero":
        return torch.zeros_like(block.x_BNC)
    if guess == "gaussian":
        predictor, first = block.predictor, block.span.start
        predictor.prefill()
        found = predictor.predict(predictor.inputs(block.x_BNC, first, predictor.tokens), first)
        mu, log_sigma = (F.pad(one, (0, 0, first + 1, 0))[:, :-1] for one in found)
        return affine.inverse(block.noise_BNC, mu, log_sigma)
    return F.pad(block.x_BNC, (0, 0, 1, 0))[:, :-1]


def contraction_of(block: SolvedBlock, guess_BNC: Tensor, steps: int = 4) -> float:
    """Geometric mean of ||F(x_k) - x|| / ||x_k - x|| over the first steps, the worst picture's."""
    block.predictor.prefill()
    x_BNC, errors = guess_BNC.clone(), [relative_change(block.x_BNC, guess_BNC)]
    for _ in range(steps):
        x_BNC[:, block.span.start :] = fixed_point_step(block.predictor, x_BNC, block.noise_BNC, block.span)
        errors.append(relative_change(block.x_BNC, x_BNC))
    floor = torch.finfo(errors[0].dtype).eps
    ratios = (errors[-1].clamp(min=floor) / errors[0].clamp(min=floor)) ** (1 / steps)
    value = float(ratios.max())
    return value if math.isfinite(value) else math.inf


def _distance(guess_BNC: Tensor, block: SolvedBlock) -> float:
    return float(relative_change(block.x_BNC, guess_BNC).max())


def _try(block: SolvedBlock, policy: BlockPolicy, tolerance: float) -> ConvergedPolicy | None:
    """The policy with its passes, if it meets the tolerance in fewer passes than half its tokens."""
    tokens = block.span.count
    limit = max(1, (policy.segment or tokens) // 2)
    limited = dataclasses.replace(policy, max_iterations=limit)
    found = solve_by_policy(block.predictor, block.noise_BNC, limited, tolerance, ignore_progress)
    if found.sequential_tokens or found.iterations + found.drafts >= tokens:
        return None
    most = limit if policy.segment else max(found.iterations, found.drafts) + EXTRA_PASSES
    return ConvergedPolicy(dataclasses.replace(policy, max_iterations=most), found.iterations, found.drafts)
