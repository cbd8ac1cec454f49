"""Noise to data through all blocks: `sample`, and `run`, which also says what the solvers did.

Contract: deterministic; all randomness is in the noise that the caller drew. Every picture of a batch is
what it would be alone. Needs no autograd.

Shapes: B pictures, C x H x W data, N tokens, D token channels, R rows of a guided batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from starflow.errors import UserError
from starflow.flow.model import Flow
from starflow.flow.tokens import in_order
from starflow.nn.cache import CachePool
from starflow.sampling.guidance import Guidance, Rule, Schedule
from starflow.sampling.jacobi import solve_jacobi
from starflow.sampling.predictor import Effort, Predictor, Report, Solution, Solver
from starflow.sampling.sequential import solve_sequential
from starflow.sampling.settings import SampleSettings, SolverChoice

SOLVERS: dict[str, Solver] = {"sequential": solve_sequential, "jacobi": solve_jacobi}

Progress = Callable[[int, int], None]
"""Called with the tokens solved so far and in all, over every block."""


def sample(
    model: Flow,
    noise: Tensor,
    condition: Tensor | None = None,
    null_condition: Tensor | None = None,
    guidance: float | Tensor = 0.0,
    solver: SolverChoice = "sequential",
    guidance_rule: Rule = "gaussian",
    guidance_schedule: Schedule = "constant",
    attention_temperature: float = 1.0,
    tolerance: float = 1e-3,
    segment: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Map noise to data; the inverse of `model(x, condition)` when unguided.

    Args:
        model: STARFlow or TarFlow.
        noise: (B, C, H, W), standard normal; one seed a picture makes it independent of its batch.
        condition: as for `model(x, condition)`.
        null_condition: what "no condition" is, as `condition` or one row for all; STARFlow needs it where
            guidance is above 0; TarFlow has its own and takes None.
        guidance: weight w >= 0, one for all or (B,); 0 is unguided.
        solver: "sequential" (exact), "jacobi", "auto" (see `SampleSettings.policies`), or a BlockPolicy for
            each block from the data to the noise.
        guidance_rule: "gaussian" (STARFlow) or "linear" (TarFlow).
        guidance_schedule: "constant", or "linear": annealed, w n / (N - 1) for token n.
        attention_temperature: divides the null branch's attention logits; under 1 it guides TarFlow without a label.
        tolerance: relative change of a sequence under which Jacobi stops; 0 iterates to the sequential answer.
        segment: tokens that "jacobi" and "auto" solve at once; None is all of them.
        progress: called with the tokens solved so far and in all.

    Returns:
        (B, C, H, W), float32 (float64 when the model is float64).

    Raises:
        UserError: shapes or values that the model or the solver cannot take.
    """
    settings = SampleSettings(
        guidance, solver, guidance_rule, guidance_schedule, attention_temperature, tolerance, segment
    )
    return run(model, noise, condition, null_condition, settings, progress).x


@dataclass(frozen=True)
class Sampling:
    """Pictures, and what each block's solver did: `solutions[i]` is that of `blocks[i]`."""

    x: Tensor
    solutions: list[Solution]


@torch.no_grad()
def run(
    model: Flow,
    noise: Tensor,
    condition: Tensor | None,
    null_condition: Tensor | None,
    settings: SampleSettings,
    progress: Progress | None = None,
    caches: CachePool | None = None,
) -> Sampling:
    """As `sample`, and what the solvers did; a caller that samples again may keep the caches."""
    tokens_BND, grid = model.tokens(noise)
    batch, tokens = tokens_BND.shape[:2]
    policies = settings.policies(len(model.blocks), tokens)
    guidance = settings.guidance_for(tokens_BND)
    conditions = _conditions(model, condition, null_condition, batch, guidance)
    rotary, prior = model.rotary(grid), model.prior_log_std()
    if prior is not None:
        tokens_BND = tokens_BND * prior.exp()
    report = _counter(progress, tokens * len(policies))
    caches = caches or CachePool()
    solutions = []
    for block, policy, guided in reversed(list(zip(model.stack(), policies, model.guided, strict=True))):
        rows = conditions if guided else conditions[:1]
        block_rotary = model.block_rotary(block, rotary)
        predictor = Predictor.of(block, batch, tokens, rows, block_rotary, guidance if guided else None, caches)
        effort = Effort(settings.tolerance, policy.segment, policy.max_iterations)
        backwards = block.spec.backwards
        solution = SOLVERS[policy.solver](predictor, in_order(tokens_BND, backwards=backwards), effort, report)
        tokens_BND = in_order(solution.x_BNC, backwards=backwards)
        solutions.append(solution)
    return Sampling(model.picture(tokens_BND, grid), solutions[::-1])


def _conditions(
    model: Flow, condition: Tensor | None, null_condition: Tensor | None, batch: int, guidance: Guidance | None
) -> list[Tensor | None]:
    """The condition as the blocks take it, and with guidance the null condition after it."""
    given = model.check_condition(condition, batch)
    if guidance is None:
        return [given]
    if not any(model.guided):
        raise UserError("guidance is above 0, but this model has no condition to guide with: use guidance 0")
    if null_condition is None and not model.has_own_null:
        raise UserError(
            "guidance is above 0, but null_condition is None: pass what the model was trained with for no condition "
            f"(the empty caption's encoding, or the class for none), {model.condition_help}"
        )
    if condition is None and guidance.temperature == 1:
        raise UserError("guidance is above 0, but there is no label: pass one, or an attention_temperature under 1")
    if null_condition is not None and len(null_condition) == 1:
        null_condition = null_condition.expand(batch, *null_condition.shape[1:])
    return [given, model.check_condition(null_condition, batch)]


def _counter(progress: Progress | None, total: int) -> Report:
    """Turn "so many more" into "so many of the total"."""
    done = 0

    def report(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    return report
