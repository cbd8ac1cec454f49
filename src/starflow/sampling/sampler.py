"""Noise to data through all blocks: `sample`, and `run`, which also says what the solvers did.

Contract: deterministic; all randomness is in the noise that the caller drew. Every picture of a batch is
what it would be alone. Needs no autograd.

Shapes: B pictures, C x H x W data, N tokens, D token channels, R rows of a guided batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from starflow.errors import UserError
from starflow.flow.model import Flow
from starflow.flow.tokens import in_order
from starflow.nn.cache import CachePool
from starflow.sampling.engine.native import engine_of
from starflow.sampling.guidance import Guidance, Rule, Schedule
from starflow.sampling.jacobi import solve_jacobi
from starflow.sampling.plan import Situation, machine_of
from starflow.sampling.planner import Planner, Question, planner_of
from starflow.sampling.predictor import Effort, Predictor, Report, Solution, Solver
from starflow.sampling.sequential import solve_sequential
from starflow.sampling.settings import BlockPolicy, CacheDtype, SampleSettings, SolverChoice
from starflow.sampling.timing import wait

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
    cache_dtype: CacheDtype = "network",
) -> Tensor:
    """Map noise to data; the inverse of `model(x, condition)` when unguided.

    Args:
        model: STARFlow or TarFlow.
        noise: (B, C, H, W), standard normal; one seed a picture makes it independent of its batch.
        condition: as for `model(x, condition)`.
        null_condition: what "no condition" is, as `condition` or one row for all; STARFlow needs it where
            guidance is above 0; TarFlow has its own and takes None.
        guidance: weight w >= 0, one for all or (B,); 0 is unguided.
        solver: "sequential" (exact), "jacobi", "auto" (see `starflow.sampling.planner`), or a BlockPolicy for
            each block from the data to the noise.
        guidance_rule: "gaussian" (STARFlow) or "linear" (TarFlow).
        guidance_schedule: "constant", or "linear": annealed, w n / (N - 1) for token n.
        attention_temperature: divides the null branch's attention logits; under 1 it guides TarFlow without a label.
        tolerance: bound on the residual ||x - F(x)|| / ||x|| that every block leaves of every sequence; 0 is the
            sequential answer.
        segment: tokens that "jacobi" and "auto" solve at once; None is all of them.
        progress: called with the tokens solved so far and in all.
        cache_dtype: precision of keys and values: the "network"'s, or "bfloat16" to halve a float32 cache.

    Returns:
        (B, C, H, W), float32 (float64 when the model is float64).

    Raises:
        UserError: shapes or values that the model or the solver cannot take.
    """
    settings = SampleSettings(
        guidance, solver, guidance_rule, guidance_schedule, attention_temperature, tolerance, segment, cache_dtype
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
    policies = settings.policies(len(model.blocks))
    guidance = settings.guidance_for(tokens_BND)
    conditions = conditions_of(model, condition, null_condition, batch, guidance)
    rotary, prior = model.rotary(grid), model.prior_log_std()
    if prior is not None:
        tokens_BND = tokens_BND * prior.exp()
    report = _counter(progress, tokens * len(model.blocks))
    caches = caches or CachePool(None if settings.cache_dtype == "network" else torch.bfloat16)
    planner = planner_of(model) if policies is None else None
    situation = _situation(tokens_BND, model, guided=guidance is not None)
    engine = engine_of(model)
    solutions = []
    for number, block in reversed(list(enumerate(model.stack()))):
        guided = model.guided[number]
        rows = conditions if guided else conditions[:1]
        block_rotary = model.block_rotary(block, rotary)
        rule = guidance if guided else None
        noise_BNC = in_order(tokens_BND, backwards=block.spec.backwards)
        with model.at_work(block):
            predictor = Predictor.of(block, batch, tokens, rows, block_rotary, rule, caches, engine)
            if policies is not None:
                solution = solve(predictor, noise_BNC, policies[number], settings.tolerance, report)
            else:
                assert planner is not None
                compiled, tolerance = engine.library is not None, settings.tolerance
                question = Question(number, len(model.blocks), situation, tolerance, settings.segment, compiled)
                solution = _solve_as_planned(planner, question, predictor, noise_BNC, report)
        tokens_BND = in_order(solution.x_BNC, backwards=block.spec.backwards)
        solutions.append(solution)
    return Sampling(model.picture(tokens_BND, grid), solutions[::-1])


def solve(predictor: Predictor, noise_BNC: Tensor, policy: BlockPolicy, tolerance: float, report: Report) -> Solution:
    """Invert one block by a policy."""
    effort = Effort(tolerance, policy.segment, policy.max_iterations, policy.guess, policy.draft)
    return SOLVERS[policy.solver](predictor, noise_BNC, effort, report)


def _solve_as_planned(
    planner: Planner, question: Question, predictor: Predictor, noise_BNC: Tensor, report: Report
) -> Solution:
    """Let the planner choose, and tell it how that went."""
    policy = planner.choose(question, predictor, noise_BNC)
    if policy.solver == "sequential":
        return solve(predictor, noise_BNC, policy, question.tolerance, report)
    device = noise_BNC.device
    wait(device)
    started = time.perf_counter()
    solution = solve(predictor, noise_BNC, policy, question.tolerance, report)
    wait(device)
    planner.learn(question, solution, time.perf_counter() - started)
    return solution


def _situation(tokens_BND: Tensor, model: Flow, *, guided: bool) -> Situation:
    batch, tokens = tokens_BND.shape[:2]
    dtype = str(model.network_dtype).removeprefix("torch.")
    return Situation(machine_of(tokens_BND.device), dtype, batch, tokens, guided)


def conditions_of(
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
