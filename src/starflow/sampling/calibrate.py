"""Measure once how each block of a trained model converges, and which policy is the fastest here.

Contract: every candidate is judged on what the model itself makes of the given noise and conditions, against the exact
sequential answer; a policy is a plan's choice only if it met the tolerance for every picture, without help token by
token, in less time than going token by token: alone, and together with the other choices in whole samples, which are
timed in turn. Where the whole is not clearly faster, the plan is token by token. (GS-Jacobi, arXiv 2505.12849; SeJD,
arXiv 2505.24791.)

Shapes: B batch, N tokens, C token channels.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from starflow.flow import affine
from starflow.flow.block import AutoregressiveBlock
from starflow.flow.config import config_to_dict
from starflow.flow.model import Flow
from starflow.flow.tokens import in_order
from starflow.nn.kv_cache import CachePool
from starflow.sampling.cpu.engine import cpu_engine_of
from starflow.sampling.guidance import Guidance
from starflow.sampling.jacobi import Span, relative_change, step
from starflow.sampling.planner import MARGIN, SLACK, Clock, in_turn
from starflow.sampling.policy import (
    BlockPolicy,
    Candidate,
    Choice,
    Convergence,
    Plan,
    Policy,
    SampleSettings,
    Situation,
    SolverName,
    machine_of,
)
from starflow.sampling.predictor import InitialGuess, Predictor, SolverResult, worth_drafting
from starflow.sampling.sampler import conditions_of, run, solve

SEGMENTS = (4, 8, 16, 32, 64, 128)
STARTS: tuple[InitialGuess, ...] = ("noise", "zero", "previous", "gaussian")
"""Guesses that cost nothing."""
HOPELESS = 0.6
"""Contraction above which whole sequences are not tried: a residual of 1e-3 would take over 13 passes."""
WHOLE_MARGIN = 1.05
"""Whole samples as planned must be faster by this factor than token by token."""
ROUNDS = 3
"""At least so many times in turn are the two timed: small gains are smaller than what else a machine does."""
LONG = 1.5
"""Candidates whose predicted time is above this many times that of going token by token are not run."""

Note = Callable[[str], None]
"""Told what is being done."""


@dataclass(frozen=True)
class CalibrationData:
    """What to calibrate with; the more pictures, the surer."""

    noise: Tensor
    """(B, C, H, W)"""
    condition: Tensor | None
    null_condition: Tensor | None
    settings: SampleSettings
    """Guidance, its rule, and the tolerance."""

    def first(self, batch: int) -> CalibrationData:
        """`batch` pictures of it, repeated where there are fewer."""
        index = torch.arange(batch, device=self.noise.device) % len(self.noise)
        null = self.null_condition
        return CalibrationData(
            self.noise[index],
            None if self.condition is None else self.condition[index],
            null if null is None or len(null) == 1 else null[index],
            self.settings,
        )

    @property
    def guided(self) -> bool:
        return self.settings.guidance_for(self.noise) is not None

    def guided_and_not(self) -> tuple[CalibrationData, ...]:
        """It, and where it is guided also without guidance."""
        plain = dataclasses.replace(self, settings=dataclasses.replace(self.settings, guidance=0.0))
        return (self, plain) if self.guided else (self,)


@dataclass(frozen=True)
class Solved:
    """One block with its exact answer."""

    number: int
    predictor: Predictor
    noise_BNC: Tensor
    x_BNC: Tensor

    @property
    def span(self) -> Span:
        return Span(self.predictor.first, self.predictor.tokens)


@torch.no_grad()
def calibrate(
    model: Flow, material: CalibrationData, batches: Sequence[int], repeats: int = 3, note: Note = print
) -> Policy:
    """The policy of a model on the device that it is on.

    Args:
        model: trained; random weights converge at once or never and say nothing.
        material: pictures of the kind that will be sampled.
        batches: sizes to time, each with the material's guidance and without any.
        repeats: runs of which the fastest counts.
        note: told of every block.

    Raises:
        UserError: noise or conditions that the model cannot take.
    """
    if material.noise.device.type == "cpu":
        cpu_engine_of(model).build()  # what is chosen must hold against the compiled loop too, whenever that comes
    solved = solve_exactly(model, material)
    convergence = []
    for block in solved:
        note(f"block {block.number}: how it converges")
        convergence.append(converge(block, material.settings.tolerance))
    plans = []
    for batch in batches:
        for given in material.first(batch).guided_and_not():
            note(f"batch {batch}{'' if given.guided else ', unguided'}: what is fastest")
            plans.append(_plan(model, given, convergence, repeats))
    tolerance = material.settings.tolerance
    return Policy(config_to_dict(model.config), tolerance, tuple(convergence), tuple(plans))


def solve_exactly(model: Flow, material: CalibrationData) -> list[Solved]:
    """Every block with the noise that reaches it and its exact answer, from the data to the noise."""
    tokens_BND, grid = model.to_tokens(material.noise)
    guidance = material.settings.guidance_for(tokens_BND)
    conditions = conditions_of(model, material.condition, material.null_condition, len(tokens_BND), guidance)
    rotary, prior = model.rotary(grid), model.prior_log_std()
    if prior is not None:
        tokens_BND = tokens_BND * prior.exp()
    found = []
    for number, block in reversed(list(enumerate(model.iter_blocks()))):
        guided = model.guided_blocks[number]
        predictor = _predictor(model, block, tokens_BND, conditions, rotary, guidance if guided else None)
        noise = in_order(tokens_BND, backwards=block.spec.backwards)
        x = solve(predictor, noise, BlockPolicy(), 0.0, _silent).x_BNC
        found.append(Solved(number, predictor, noise, x))
        tokens_BND = in_order(x, backwards=block.spec.backwards)
    return found[::-1]


def _predictor(
    model: Flow,
    block: AutoregressiveBlock,
    tokens_BND: Tensor,
    conditions: list[Tensor | None],
    rotary: Tensor | None,
    guidance: Guidance | None,
) -> Predictor:
    batch, tokens = tokens_BND.shape[:2]
    rows = conditions if guidance is not None else conditions[:1]
    block_rotary = model.block_rotary(block, rotary)
    return Predictor.of(block, batch, tokens, rows, block_rotary, guidance, CachePool(), cpu_engine_of(model))


def converge(block: Solved, tolerance: float) -> Convergence:
    """How a block converges, and the parallel policies that meet the tolerance."""
    starts: dict[str, float] = {guess: _distance(start(block, guess), block) for guess in STARTS}
    whole: InitialGuess = "noise" if starts["noise"] <= starts["zero"] else "zero"
    contraction = contraction_of(block, start(block, whole))
    tried = [BlockPolicy("jacobi", None, None, whole)] if contraction < HOPELESS else []
    within = min(STARTS, key=lambda guess: starts[guess])
    length = block.predictor.tokens
    tried += [BlockPolicy("jacobi", segment, None, within) for segment in SEGMENTS if segment < length]
    tried += [BlockPolicy("jacobi", None, None, "rounded")] if block.predictor.can_round else []
    found = []
    for policy in tried:
        drafts = worth_drafting(block.predictor) and policy.guess != "rounded"
        for draft in (False, True) if drafts else (False,):
            candidate = _try(block, dataclasses.replace(policy, draft=draft), tolerance)
            found += [] if candidate is None else [candidate]
    return Convergence(contraction, starts, tuple(sorted(found, key=lambda one: one.passes)))


def start(block: Solved, guess: InitialGuess) -> Tensor:
    """x_0 of a whole sequence; "previous" and "gaussian" as if every token were the first of a segment."""
    if guess == "noise":
        return block.noise_BNC
    if guess == "zero":
        return torch.zeros_like(block.x_BNC)
    if guess == "gaussian":
        predictor, first = block.predictor, block.span.start
        predictor.prefill()
        found = predictor.predict(predictor.before(block.x_BNC, first, predictor.tokens), first)
        mu, log_sigma = (torch.nn.functional.pad(one, (0, 0, first + 1, 0))[:, :-1] for one in found)
        return affine.inverse(block.noise_BNC, mu, log_sigma)
    return torch.nn.functional.pad(block.x_BNC, (0, 0, 1, 0))[:, :-1]


def contraction_of(block: Solved, guess_BNC: Tensor, steps: int = 4) -> float:
    """Geometric mean of ||F(x_k) - x|| / ||x_k - x|| over the first steps, the worst picture's."""
    block.predictor.prefill()
    x_BNC, errors = guess_BNC.clone(), [relative_change(block.x_BNC, guess_BNC)]
    for _ in range(steps):
        x_BNC[:, block.span.start :] = step(block.predictor, x_BNC, block.noise_BNC, block.span)
        errors.append(relative_change(block.x_BNC, x_BNC))
    floor = torch.finfo(errors[0].dtype).eps
    ratios = (errors[-1].clamp(min=floor) / errors[0].clamp(min=floor)) ** (1 / steps)
    value = float(ratios.max())
    return value if math.isfinite(value) else math.inf


def _distance(guess_BNC: Tensor, block: Solved) -> float:
    return float(relative_change(block.x_BNC, guess_BNC).max())


def _try(block: Solved, policy: BlockPolicy, tolerance: float) -> Candidate | None:
    """The policy with its passes, if it meets the tolerance in fewer passes than half its tokens."""
    tokens = block.span.count
    length = policy.segment or tokens
    limit = max(1, length // 2)
    found = solve(
        block.predictor, block.noise_BNC, dataclasses.replace(policy, max_iterations=limit), tolerance, _silent
    )
    if found.single or found.iterations + found.drafts >= tokens:
        return None
    most = limit if policy.segment else max(found.iterations, found.drafts) + SLACK
    return Candidate(dataclasses.replace(policy, max_iterations=most), found.iterations, found.drafts)


def _plan(model: Flow, material: CalibrationData, convergence: Sequence[Convergence], repeats: int) -> Plan:
    choices = tuple(
        _choose(block, known.candidates, material.settings.tolerance, repeats)
        for block, known in zip(solve_exactly(model, material), convergence, strict=True)
    )
    tokens_BND, _ = model.to_tokens(material.noise)
    situation = situation_of(model, tokens_BND, material.settings)
    if all(choice.policy == BlockPolicy() for choice in choices):
        return Plan(situation, choices)
    caches, inputs = CachePool(), (model, material.noise, material.condition, material.null_condition)

    def draw(solver: SolverName | Sequence[BlockPolicy]) -> Tensor:
        return run(*inputs, dataclasses.replace(material.settings, solver=solver), caches=caches).x.flatten(2)

    policies = [choice.policy for choice in choices]
    deviation = relative_change(draw("sequential"), draw(policies))  # and what is paid once is not timed
    turns = [functools.partial(draw, "sequential"), functools.partial(draw, policies)]
    before, after = in_turn(turns, material.noise.device, max(ROUNDS, repeats))
    if after * WHOLE_MARGIN > before:
        return Plan(situation, tuple(_token_by_token(choice) for choice in choices))
    return Plan(situation, choices, float(deviation.max()), after, before)


def _token_by_token(choice: Choice) -> Choice:
    return Choice(BlockPolicy(), choice.sequential_seconds, choice.sequential_seconds)


def situation_of(model: Flow, tokens_BND: Tensor, settings: SampleSettings) -> Situation:
    """Where and how a batch of tokens is sampled."""
    dtype = str(model.network_dtype).removeprefix("torch.")
    guided = settings.guidance_for(tokens_BND) is not None
    batch, tokens = tokens_BND.shape[:2]
    return Situation(machine_of(tokens_BND.device), dtype, batch, tokens, guided)


def _choose(block: Solved, candidates: Sequence[Candidate], tolerance: float, repeats: int) -> Choice:
    """The fastest of the candidates that may win, or going token by token."""
    solutions: dict[BlockPolicy, SolverResult] = {}

    def action(policy: BlockPolicy) -> None:
        solutions[policy] = solve(block.predictor, block.noise_BNC, policy, tolerance, _silent)

    def time(*policies: BlockPolicy) -> list[float]:
        device = block.noise_BNC.device
        return in_turn([functools.partial(action, policy) for policy in policies], device, repeats)

    sequential = time(BlockPolicy())[0]
    tried = {
        candidate.policy: time(candidate.policy)[0]
        for candidate in candidates
        if _expected(block, candidate) < LONG * sequential
    }
    met = [policy for policy in tried if not solutions[policy].single]
    best = min(met, key=lambda policy: tried[policy], default=BlockPolicy())
    if best == BlockPolicy():
        return Choice(best, sequential, sequential)
    before, after = time(BlockPolicy(), best)
    if after * MARGIN > before or solutions[best].single:
        return Choice(BlockPolicy(), before, before)
    return Choice(best, after, before, float(solutions[best].residual_B.max()))


def _expected(block: Solved, candidate: Candidate) -> float:
    """Seconds that a candidate will take."""
    clock, segment = Clock(), candidate.policy.segment
    seconds = candidate.passes * clock.step(block.predictor, block.noise_BNC, segment, draft=False)
    if candidate.drafts:
        seconds += candidate.drafts * clock.step(block.predictor, block.noise_BNC, segment, draft=True)
    if candidate.policy.guess == "rounded":
        seconds += clock.tokens(block.predictor, block.noise_BNC, rounded=True)
    return seconds


def _silent(_: int) -> None:
    pass
