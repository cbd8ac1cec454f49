"""Noise to data in parallel: block-wise fixed-point iteration (GS-Jacobi, arXiv 2505.12849).

Contract: a segment of tokens starts from the noise and repeats x = mu(x) + sigma(x) z against the cache of
the segments before it. After i iterations its first i tokens are exact, so as many iterations as tokens
give the sequential answer up to rounding. Each sequence stops at its own convergence: a picture does not
depend on the others of its batch.

Shapes: B batch, N tokens, C token channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from starflow.flow import affine
from starflow.sampling.predictor import Effort, Predictor, Report, Solution
from starflow.sampling.sequential import advance


def solve_jacobi(predictor: Predictor, noise_BNC: Tensor, effort: Effort, report: Report) -> Solution:
    """Invert one block, segment by segment; a segment that does not converge in time is solved token by token."""
    x_BNC = noise_BNC.clone()
    predictor.prefill()
    report(predictor.first)
    tokens, iterations, residual_B = predictor.tokens, 0, noise_BNC.new_zeros(len(noise_BNC))
    length = effort.segment or tokens
    for start in range(predictor.first, tokens, length):
        stop = min(start + length, tokens)
        passes, change_B = _iterate(predictor, x_BNC, noise_BNC, start, stop, effort)
        converged_B = change_B <= effort.tolerance
        iterations += passes
        if passes < stop - start and not bool(converged_B.all()):
            _solve_the_rest(predictor, x_BNC, noise_BNC, start, stop, converged_B)
            iterations += stop - start
        residual_B = torch.maximum(residual_B, torch.where(converged_B, change_B, 0))
        if stop < tokens:  # what follows needs the keys and values of the final tokens
            predictor.write(predictor.before(x_BNC, start, stop), start)
        report(stop - start)
    return Solution(x_BNC, iterations, residual_B)


def _solve_the_rest(
    predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, start: int, stop: int, converged_B: Tensor
) -> None:
    """Tokens start..stop-1 one by one, in place, for the sequences that have not converged; the others keep theirs."""
    kept = x_BNC[:, start:stop].clone()
    for index in range(start, stop):
        advance(predictor, x_BNC, noise_BNC, index)
    x_BNC[:, start:stop] = torch.where(converged_B.view(-1, 1, 1), kept, x_BNC[:, start:stop])


def _iterate(
    predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, start: int, stop: int, effort: Effort
) -> tuple[int, Tensor]:
    """Iterate tokens start..stop-1 in place; returns the iterations and the last relative change of each sequence."""
    z = noise_BNC[:, start:stop]
    budget = min(stop - start, effort.max_iterations or stop - start)
    active = torch.ones(len(z), dtype=torch.bool, device=z.device)
    change_B = z.new_full((len(z),), torch.inf)
    for iteration in range(1, budget + 1):
        # A guess may overflow before the tokens it hangs on are right; 0 * inf would then spoil the whole segment.
        guess = torch.where(x_BNC.isfinite(), x_BNC, noise_BNC)
        new = affine.inverse(z, *predictor.predict(predictor.before(guess, start, stop), start))
        change_B = torch.where(active, _relative_change(new, x_BNC[:, start:stop]), change_B)
        x_BNC[:, start:stop] = torch.where(active.view(-1, 1, 1), new, x_BNC[:, start:stop])
        active = active & ~(change_B <= effort.tolerance)
        if not bool(active.any()):
            return iteration, change_B
    return budget, change_B


def _relative_change(new: Tensor, old: Tensor) -> Tensor:
    """||new - old|| / ||new|| of each sequence, (B,)."""
    change_B: Tensor = torch.linalg.vector_norm(new - old, dim=(1, 2))
    size_B: Tensor = torch.linalg.vector_norm(new, dim=(1, 2))
    return change_B / size_B.clamp(min=torch.finfo(new.dtype).tiny)
