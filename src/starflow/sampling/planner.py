"""Seconds of tokens and passes, measured with the very predictor that is about to be used.

Contract: what is timed runs twice and the faster run counts, so that packing, compiling and first touches do not; the
device is waited for. The cache is left as a solver may find it.

Shapes: B batch, N tokens, C token channels.

The solver "auto": for every block the policy that is fastest here, and never one slower than token by token.

Contract: the first time that a block meets a situation (machine, precision, batch, tokens, guidance) a few tokens and
a pass are timed, unless policy.json has a plan for it. Iterating is chosen where its predicted time is clearly less; it
is given up for good where it then takes longer than going token by token, or does not converge in the passes that are
worth it. What is decided stays with the planner, and the planner with its model (`planner_of`). With a tolerance of 0
every block goes token by token. Choices differ between machines and batch sizes, so what "auto" gives is the same
everywhere to within the tolerance, not bit for bit; name a policy where that matters.

Shapes: B batch, N tokens, C token channels.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from starflow.flow.block import BlockSpec
from starflow.flow.model import Flow
from starflow.sampling.jacobi import Span, step
from starflow.sampling.policy import BlockPolicy, Candidate, Policy, Situation, read_policy
from starflow.sampling.predictor import IterationLimits, Predictor, SolverResult, draft_of, worth_drafting
from starflow.sampling.sequential import solve_sequential

TOKENS = 8
"""Tokens that are solved to know the price of all: the first ones, whose caches are the shortest, so never too dear."""


class Meter(Protocol):
    """What tells the planner how long things take."""

    def tokens(self, predictor: Predictor, noise_BNC: Tensor, *, rounded: bool = False) -> float:
        """Seconds of solving a block token by token, with its weights as they are or rounded."""
        ...

    def step(self, predictor: Predictor, noise_BNC: Tensor, segment: int | None, *, draft: bool) -> float:
        """Seconds of one pass over a segment, the block's last."""
        ...


class Clock:
    """The meter that measures."""

    def tokens(self, predictor: Predictor, noise_BNC: Tensor, *, rounded: bool = False) -> float:
        few = min(predictor.first + TOKENS, predictor.tokens)
        start, noise = dataclasses.replace(predictor, tokens=few), noise_BNC[:, :few].contiguous()

        def once() -> None:
            if rounded:
                assert start.engine is not None
                start.engine.draft(start, noise.clone(), noise, range(start.first, few))
            else:
                solve_sequential(start, noise, IterationLimits(), lambda _: None)

        seconds = fastest(once, predictor)
        return seconds * (predictor.tokens - predictor.first) / max(1, few - predictor.first)

    def step(self, predictor: Predictor, noise_BNC: Tensor, segment: int | None, *, draft: bool) -> float:
        length = min(segment or predictor.tokens, predictor.tokens - predictor.first)
        span = Span(predictor.tokens - length, predictor.tokens)
        block = draft_of(predictor) if draft else predictor
        return fastest(lambda: step(block, noise_BNC, noise_BNC, span), predictor)


def fastest(action: Callable[[], object], predictor: Predictor, times: int = 2) -> float:
    """Seconds of the fastest of some runs."""
    return in_turn([action], predictor.block.proj_in.weight.device, times)[0]


def in_turn(actions: Sequence[Callable[[], object]], device: torch.device, rounds: int) -> list[float]:
    """Seconds of the fastest run of each, one after the other in every round: what else runs slows all of them."""
    times = [[seconds_of(action, device) for action in actions] for _ in range(rounds)]
    return [min(found) for found in zip(*times, strict=True)]


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """Of one run, the device waited for."""
    wait(device)
    started = time.perf_counter()
    action()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


MARGIN = 1.1
"""Iterating must promise to be faster by this factor; what has been chosen keeps its place without it."""

WORTH_MEASURING = 0.1
"""Seconds of a block, token by token, below which nothing is measured: there is little to gain, and small times lie."""

USUAL_PASSES, USUAL_DRAFTS = 6, 5
"""To a residual of 1e-3 a trained block far from the noise takes so many passes, or so many drafts and one pass."""

SLACK = 2
"""Passes above the expected ones before a sequence is solved token by token."""


@dataclass(frozen=True)
class Question:
    """One block in one situation."""

    number: int
    """Index of the block, counted from the data."""
    blocks: int
    situation: Situation
    tolerance: float
    segment: int | None
    """The one that the caller asks for, if any."""
    compiled: bool = False
    """Whether the compiled loop is there: what was chosen without it is asked again once it is."""


@dataclass
class Decision:
    """What was chosen, and the seconds of going token by token."""

    policy: BlockPolicy
    sequential_seconds: float


class Planner:
    """Chooses, times and remembers; one a model."""

    def __init__(self, policy: Policy | None = None, meter: Meter | None = None) -> None:
        self.policy = policy
        self.meter: Meter = meter or Clock()
        self.decisions: dict[Question, Decision] = {}
        self._seconds: dict[tuple[BlockSpec, Situation, bool, int | None, str], float] = {}

    def choose(self, question: Question, predictor: Predictor, noise_BNC: Tensor) -> BlockPolicy:
        """The policy for a block; `predictor` and the noise are what it is about to be solved with."""
        if question.tolerance == 0:
            return BlockPolicy()
        question = _bucketed(question)
        if question not in self.decisions:
            stored = self._stored(question)
            self.decisions[question] = stored or self._decide(question, predictor, noise_BNC)
        return self.decisions[question].policy

    def learn(self, question: Question, solution: SolverResult, seconds: float) -> None:
        """Take in what a chosen policy did."""
        decision = self.decisions.get(_bucketed(question))
        if decision is None or decision.policy.solver == "sequential":
            return
        if solution.single or seconds > decision.sequential_seconds:
            decision.policy = BlockPolicy()

    def _stored(self, question: Question) -> Decision | None:
        """What policy.json chose in this situation, for the tolerance it was measured with or a looser one."""
        if self.policy is None or question.tolerance < self.policy.tolerance or question.segment:
            return None
        plan = self.policy.plan(question.situation)
        if plan is None:
            return None
        choice = plan.choices[question.number]
        scale = max(1.0, question.situation.batch / plan.situation.batch)
        return Decision(choice.policy, choice.sequential_seconds * scale)

    def _decide(self, question: Question, predictor: Predictor, noise_BNC: Tensor) -> Decision:
        """Time what may be worth its time, and take the fastest."""
        chosen = Decision(BlockPolicy(), float("inf"))
        candidates = self._candidates(question, predictor)
        if not candidates:
            return chosen
        chosen.sequential_seconds = self._tokens(question, predictor, noise_BNC)
        if chosen.sequential_seconds < WORTH_MEASURING:
            return chosen
        lowest = chosen.sequential_seconds / MARGIN
        for candidate in candidates:
            seconds = self._expected(candidate, question, predictor, noise_BNC)
            if seconds < lowest:
                lowest = seconds
                chosen.policy = _limited(candidate)
        return chosen

    def _candidates(self, question: Question, predictor: Predictor) -> list[Candidate]:
        """Parallel policies that may be worth their time.

        Without measured ones, the block next to the noise goes token by token, and the others are iterated as a whole
        (SeJD, arXiv 2505.24791); either may be guessed token by token with rounded weights.
        """
        rounded = [Candidate(BlockPolicy("jacobi", guess="rounded"), 1, 0)] if not question.segment else []
        if self.policy is not None and not question.segment:
            found = list(self.policy.convergence[question.number].candidates)
        elif question.number == question.blocks - 1 or predictor.guidance is not None:
            found = rounded
        else:
            found = [
                *rounded,
                Candidate(BlockPolicy("jacobi", question.segment), USUAL_PASSES, 0),
                Candidate(BlockPolicy("jacobi", question.segment, draft=True), 1, USUAL_DRAFTS),
            ]
        return [candidate for candidate in found if _possible(candidate.policy, predictor)]

    def _expected(self, candidate: Candidate, question: Question, predictor: Predictor, noise_BNC: Tensor) -> float:
        """Seconds that a candidate will take; a segment's passes are those of all segments together."""
        segment = candidate.policy.segment
        seconds = candidate.passes * self._step(question, predictor, noise_BNC, segment, draft=False)
        if candidate.drafts:
            seconds += candidate.drafts * self._step(question, predictor, noise_BNC, segment, draft=True)
        if candidate.policy.guess == "rounded":
            seconds += self._tokens(question, predictor, noise_BNC, rounded=True)
        return seconds

    def _tokens(self, question: Question, predictor: Predictor, noise_BNC: Tensor, *, rounded: bool = False) -> float:
        what = "rounded tokens" if rounded else "tokens"
        key = (_shape(predictor), question.situation, question.compiled, None, what)
        if key not in self._seconds:
            self._seconds[key] = self.meter.tokens(predictor, noise_BNC, rounded=rounded)
        return self._seconds[key]

    def _step(
        self, question: Question, predictor: Predictor, noise_BNC: Tensor, segment: int | None, *, draft: bool
    ) -> float:
        what = "draft" if draft else "step"
        key = (_shape(predictor), question.situation, question.compiled, segment, what)
        if key not in self._seconds:
            self._seconds[key] = self.meter.step(predictor, noise_BNC, segment, draft=draft)
        return self._seconds[key]


def planner_of(model: Flow) -> Planner:
    """The planner that is kept with the model, made from the policy beside its weights on first use."""
    found = model.runtime_cache.get("planner")
    if not isinstance(found, Planner):
        found = model.runtime_cache["planner"] = Planner(read_policy(model))
    return found


def _shape(predictor: Predictor) -> BlockSpec:
    """What a block's times depend on: blocks of one shape take as long, whichever way they read."""
    return dataclasses.replace(predictor.block.spec, backwards=False)


def _possible(policy: BlockPolicy, predictor: Predictor) -> bool:
    """Whether what a policy needs is there, and may be faster."""
    if policy.guess == "rounded":
        return predictor.can_round
    return not policy.draft or worth_drafting(predictor)


def _limited(candidate: Candidate) -> BlockPolicy:
    """The policy, with no more passes than were to be expected and some."""
    policy = candidate.policy
    if policy.max_iterations is not None:
        return policy
    return dataclasses.replace(policy, max_iterations=max(candidate.passes, candidate.drafts) + SLACK)


def _bucketed(question: Question) -> Question:
    """The same question for the power of two at or above the batch, so that a last, smaller batch asks nothing new."""
    batch = 1 << (question.situation.batch - 1).bit_length()
    return dataclasses.replace(question, situation=dataclasses.replace(question.situation, batch=batch))
