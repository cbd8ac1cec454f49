"""Measure once how each block of a trained model converges, and choose one policy a block for this device.

Contract: figures of convergence are of the given noise and conditions, against the exact sequential answer, the worst
picture's; they belong to the weights and hold on every device. Every parallel policy is judged on them. A policy is a
block's choice only if at every batch size it met the tolerance for every picture, without help token by token, and was
no slower than going token by token; of those the fastest on the mean. The choices of all blocks together are then timed
in whole samples, in turn with token by token: where they are not clearly faster, every block goes token by token.
Sampling itself measures nothing: it reads what was chosen here. (GS-Jacobi, arXiv 2505.12849, sections 3 and 4; SeJD,
arXiv 2505.24791.)

Shapes: B batch, N tokens, C token channels.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from starflow.flow import block as affine
from starflow.flow.config import config_to_dict
from starflow.flow.model import Flow
from starflow.nn.attention import CachePool
from starflow.nn.cpu import cpu_name
from starflow.sampling.cpu.engine import cpu_engine_of
from starflow.sampling.policy import (
    BlockChoice,
    BlockPolicy,
    ConvergedPolicy,
    Convergence,
    Policy,
    SampleSettings,
    SolverChoice,
    Timing,
)
from starflow.sampling.predictor import (
    ROUNDED_GUESSES,
    InitialGuess,
    Predictor,
    SolverResult,
    ignore_progress,
    worth_drafting,
)
from starflow.sampling.sampler import run, solve_blocks, solve_by_policy
from starflow.sampling.solvers import Span, fixed_point_step, relative_change

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
    tried += [BlockPolicy("jacobi", None, None, form) for form in block.predictor.rounded_guesses]
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


BLOCK_MARGIN, SAMPLE_MARGIN = 1.1, 1.05
"""A block's policy, and whole samples, must be faster than token by token by these factors."""

WORTH_TIMING = 1.5
"""Policies whose first run takes more than this many times that of going token by token are not timed further."""

ROUNDS = 3
"""Times in turn that whole samples are drawn at least: small gains are smaller than what else a machine does."""

T = TypeVar("T")

Note = Callable[[str], None]
"""Told what is being done."""

Timings = dict[BlockPolicy, tuple[Timing, ...]]
"""Of the policies of a block that lost at no batch size so far; going token by token is always among them."""


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
        """Whether any picture has a guidance weight above 0."""
        return self.settings.guidance_for(self.noise) is not None


def calibrate(
    model: Flow, data: CalibrationData, batches: Sequence[int], repeats: int = 3, note: Note = print
) -> Policy:
    """The policy of a model on the device that it is on.

    Args:
        model: trained; random weights converge at once or never and say nothing.
        data: pictures of the kind that will be sampled, with the guidance that they will have.
        batches: sizes to time; one choice a block must do for all of them.
        repeats: runs of which the fastest counts.
        note: told of every step.

    Raises:
        UserError: noise or conditions that the model cannot take.
    """
    device, tolerance = data.noise.device, data.settings.tolerance
    if device.type == "cpu":
        cpu_engine_of(model).build()  # what is chosen must hold against the compiled loop too, whenever that comes
    note("how each block converges")
    convergence = visit_blocks(model, data, lambda _, block: converge(block, tolerance))
    timings: list[Timings] = [
        dict.fromkeys((BlockPolicy(), *(one.policy for one in known.converged)), ()) for known in convergence
    ]
    for batch in batches:
        note(f"batch {batch}: the fastest policy of each block")
        timings = visit_blocks(model, data.first(batch), functools.partial(race, timings, tolerance, repeats))
    choices = tuple(map(fastest, timings))
    samples: tuple[Timing, ...] = ()
    if any(choice.policy != BlockPolicy() for choice in choices):
        note("whole samples")
        samples = tuple(time_samples(model, data.first(batch), choices, max(ROUNDS, repeats)) for batch in batches)
        if not clearly_faster(samples, SAMPLE_MARGIN):
            choices = tuple(BlockChoice(BlockPolicy(), found[BlockPolicy()]) for found in timings)
            samples = ()
    return Policy(
        model=config_to_dict(model.config),
        device=device.type,
        machine=machine_of(device),
        dtype=str(model.network_dtype).removeprefix("torch."),
        tokens=model.to_tokens(data.noise)[0].shape[1],
        guided=data.guided,
        tolerance=tolerance,
        convergence=tuple(convergence),
        choices=choices,
        samples=samples,
    )


def visit_blocks(model: Flow, data: CalibrationData, visit: Callable[[int, SolvedBlock], T]) -> list[T]:
    """Solve every block exactly, and call `visit` on each; what it returns, from the data to the noise."""
    found: list[T] = []

    def solve_block(number: int, predictor: Predictor, noise_BNC: Tensor) -> SolverResult:
        solution = solve_by_policy(predictor, noise_BNC, BlockPolicy(), 0.0, ignore_progress)
        found.append(visit(number, SolvedBlock(predictor, noise_BNC, solution.x_BNC)))
        return solution

    solve_blocks(model, data.noise, data.condition, data.null_condition, data.settings, solve_block)
    return found[::-1]


def race(timings: Sequence[Timings], tolerance: float, repeats: int, number: int, block: SolvedBlock) -> Timings:
    """Time a block's policies at one more batch size; those that are slower there than token by token drop out."""
    so_far, sequential = timings[number], BlockPolicy()
    device, batch = block.noise_BNC.device, len(block.noise_BNC)
    solutions: dict[BlockPolicy, SolverResult] = {}

    def solve_by(policy: BlockPolicy) -> None:
        solutions[policy] = solve_by_policy(block.predictor, block.noise_BNC, policy, tolerance, ignore_progress)

    actions = {policy: functools.partial(solve_by, policy) for policy in so_far}
    once = {policy: seconds_of(action, device) for policy, action in actions.items()}
    limit = WORTH_TIMING * once[sequential]  # a rounded guess may have packed weights in its first run
    promising = [policy for policy in so_far if once[policy] <= limit or policy.guess in ROUNDED_GUESSES]
    left = [policy for policy in promising if not solutions[policy].sequential_tokens]
    times = dict(zip(left, in_turn([actions[policy] for policy in left], device, repeats), strict=True))
    return {
        policy: (*so_far[policy], Timing(batch, seconds, times[sequential], float(solutions[policy].residual_B.max())))
        for policy, seconds in times.items()
        if seconds <= times[sequential]
    }


def fastest(timings: Timings) -> BlockChoice:
    """The policy of the least time, if it is clearly less than that of going token by token."""
    clear = {policy: found for policy, found in timings.items() if clearly_faster(found, BLOCK_MARGIN)}
    best = min(clear, key=lambda policy: _mean_ratio(clear[policy]), default=BlockPolicy())
    return BlockChoice(best, timings[best])


def clearly_faster(timings: Sequence[Timing], margin: float) -> bool:
    """Whether a policy is slower than token by token at no batch size, and faster by the margin on the mean.

    >>> clearly_faster([Timing(1, 0.5, 1.0), Timing(4, 0.9, 1.0)], 1.1)
    True
    >>> clearly_faster([Timing(1, 0.1, 1.0), Timing(4, 1.01, 1.0)], 1.1)
    False
    """
    return all(one.ratio <= 1 for one in timings) and _mean_ratio(timings) * margin <= 1


def _mean_ratio(timings: Sequence[Timing]) -> float:
    """Geometric mean of time over that of going token by token."""
    return math.prod(one.ratio for one in timings) ** (1 / len(timings))


def time_samples(model: Flow, data: CalibrationData, choices: Sequence[BlockChoice], rounds: int) -> Timing:
    """Whole samples by the choices, in turn with token by token."""
    caches = CachePool()

    def draw(solver: SolverChoice) -> Tensor:
        settings = dataclasses.replace(data.settings, solver=solver)
        return run(model, data.noise, data.condition, data.null_condition, settings, caches=caches).x.flatten(2)

    policies = [choice.policy for choice in choices]
    error = float(relative_change(draw("sequential"), draw(policies)).max())  # and what is paid once is not timed
    turns = [functools.partial(draw, "sequential"), functools.partial(draw, policies)]
    before, after = in_turn(turns, data.noise.device, rounds)
    return Timing(len(data.noise), after, before, error)


def in_turn(actions: Sequence[Callable[[], object]], device: torch.device, rounds: int) -> list[float]:
    """Seconds of the fastest run of each, one after the other in every round: what else runs slows all of them."""
    times = [[seconds_of(action, device) for action in actions] for _ in range(rounds)]
    return [min(found) for found in zip(*times, strict=True)]


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run, the device waited for."""
    synchronize(device)
    started = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def machine_of(device: torch.device) -> str:
    """The name under which times of a device are kept."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{cpu_name()}, {torch.get_num_threads()} threads"
