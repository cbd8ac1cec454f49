"""How to sample: guidance, and a solver policy for every block; checked on construction.

What is known of how a model's blocks converge, and which policy won where it was timed: policy.json.

Contract: how a block converges belongs to its weights and holds on every device; how long a pass or a token takes
belongs to a machine, and is believed only on that machine. A policy of another model is refused, one of another
machine gives its candidates and no more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from starflow.config import from_dict, to_dict
from starflow.errors import UserError
from starflow.flow.config import config_to_dict
from starflow.flow.model import Flow
from starflow.nn.cpu import cpu_name
from starflow.sampling.guidance import Guidance, Rule, Schedule
from starflow.sampling.predictor import InitialGuess

BlockSolver = Literal["sequential", "jacobi"]

CacheDtype = Literal["network", "bfloat16"]

SolverName = Literal["sequential", "jacobi", "auto"]


@dataclass(frozen=True)
class BlockPolicy:
    """How one block is inverted."""

    solver: BlockSolver = "sequential"
    segment: int | None = None
    """Tokens that Jacobi solves at once; None is all of them."""
    max_iterations: int | None = None
    """Jacobi iterations a segment before it is solved token by token; None is no limit, which is exact."""
    guess: InitialGuess = "noise"
    """What Jacobi starts from."""
    draft: bool = False
    """Whether Jacobi's first passes run their products in bfloat16; the residual is that of the network itself."""

    def __post_init__(self) -> None:
        _check_choice("a block's solver", self.solver, get_args(BlockSolver))
        _check_count("segment", self.segment)
        _check_count("max_iterations", self.max_iterations)
        _check_choice("guess", self.guess, get_args(InitialGuess))


SolverChoice = SolverName | Sequence[BlockPolicy]


@dataclass(frozen=True)
class SampleSettings:
    """The options of `starflow.sample`, by the same names.

    Raises:
        UserError: a value that no sampler can have.
    """

    guidance: float | Tensor = 0.0
    solver: SolverChoice = "sequential"
    guidance_rule: Rule = "gaussian"
    guidance_schedule: Schedule = "constant"
    attention_temperature: float = 1.0
    tolerance: float = 1e-3
    segment: int | None = None
    cache_dtype: CacheDtype = "network"

    def __post_init__(self) -> None:
        if isinstance(self.solver, str):
            _check_choice("solver", self.solver, get_args(SolverName))
        _check_choice("guidance_rule", self.guidance_rule, get_args(Rule))
        _check_choice("guidance_schedule", self.guidance_schedule, get_args(Schedule))
        _check_choice("cache_dtype", self.cache_dtype, get_args(CacheDtype))
        _check_count("segment", self.segment)
        if not self.tolerance >= 0:
            raise UserError(f"tolerance is {self.tolerance}, expected at least 0")
        if not (self.attention_temperature > 0 and math.isfinite(self.attention_temperature)):
            raise UserError(f"attention_temperature is {self.attention_temperature}, expected above 0")

    def guidance_for(self, like: Tensor) -> Guidance | None:
        """Guidance of a batch, in the precision and on the device of `like`, (B, ...); None where all weights are 0.

        Raises:
            UserError: negative weights, or not one for all or one a picture.
        """
        weight_B = torch.as_tensor(self.guidance, dtype=like.dtype, device=like.device)
        if weight_B.shape not in ((), (1,), (len(like),)):
            shape = tuple(weight_B.shape)
            raise UserError(f"guidance has shape {shape}, expected one weight, or one for each of {len(like)} pictures")
        if not bool(((weight_B >= 0) & weight_B.isfinite()).all()):
            raise UserError(f"guidance is {weight_B.tolist()}, expected weights of at least 0 (0 is unguided)")
        if not bool((weight_B > 0).any()):
            return None
        rule, schedule = self.guidance_rule, self.guidance_schedule
        return Guidance(weight_B.expand(len(like)), rule, schedule, self.attention_temperature)

    def policies(self, blocks: int) -> list[BlockPolicy] | None:
        """The policy of each block, from the data to the noise; None where a planner is to choose ("auto").

        Raises:
            UserError: not one policy a block.
        """
        if not isinstance(self.solver, str):
            policies = list(self.solver)
            if len(policies) != blocks or not all(isinstance(policy, BlockPolicy) for policy in policies):
                raise UserError(f"the policy is {policies}, expected a BlockPolicy for each of {blocks} blocks")
            return policies
        if self.solver == "auto":
            return None
        return [BlockPolicy(self.solver, self.segment if self.solver == "jacobi" else None)] * blocks


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")


def _check_count(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UserError(f"{name} is {value}, expected at least 1, or None")


FORMAT = 1

REACH = 2
"""A plan holds for batches up to this factor from the one it was measured at."""


@dataclass(frozen=True)
class Situation:
    """What a plan's times hold for."""

    machine: str
    """The device's name and, for a CPU, the threads."""
    dtype: str
    """Of the network."""
    batch: int
    tokens: int
    guided: bool

    def near(self, other: Situation) -> bool:
        """Whether what was measured in the other holds here: all equal, and a batch not far from it."""
        same = all(
            getattr(self, field.name) == getattr(other, field.name) for field in fields(self) if field.name != "batch"
        )
        return same and max(self.batch, other.batch) <= REACH * min(self.batch, other.batch)


@dataclass(frozen=True)
class Candidate:
    """A parallel policy of a block, and the passes it took to meet the tolerance, all segments together."""

    policy: BlockPolicy
    passes: int
    drafts: int


@dataclass(frozen=True)
class Convergence:
    """How one block converges on data that its model makes, whatever the device.

    The figures follow the two metrics of GS-Jacobi (arXiv 2505.12849, sections 3 and 4): one that ranks the blocks by
    how hard they are to iterate, one that ranks the starts. Here both are measured on the solved sequence x itself.
    """

    contraction: float
    """Geometric mean, over the first iterations from the best start, of ||F(x_k) - x|| / ||x_k - x||."""
    starts: dict[str, float]
    """||x_0 - x|| / ||x|| of every start."""
    candidates: tuple[Candidate, ...]
    """Those that met the tolerance in fewer passes than there are tokens, fewest first."""


@dataclass(frozen=True)
class Choice:
    """What won for one block in one situation, and the seconds it took against those of going token by token."""

    policy: BlockPolicy
    seconds: float
    sequential_seconds: float
    residual: float = 0.0
    """The largest of any sequence, verified."""


@dataclass(frozen=True)
class Plan:
    """A choice for every block, from the data to the noise."""

    situation: Situation
    choices: tuple[Choice, ...]
    deviation: float = 0.0
    """||x - x_sequential|| / ||x_sequential|| of the samples, the largest of the batch."""
    seconds: float = 0.0
    """Of whole samples as planned, timed in turn with the next; 0 for both where all blocks go token by token."""
    sequential_seconds: float = 0.0
    """Of whole samples token by token."""


@dataclass(frozen=True)
class Policy:
    """What policy.json holds."""

    model: dict[str, Any]
    """The config of the model it is of."""
    tolerance: float
    """The residual that every candidate met."""
    convergence: tuple[Convergence, ...]
    """Of each block, from the data to the noise."""
    plans: tuple[Plan, ...]
    format: int = FORMAT

    def plan(self, situation: Situation) -> Plan | None:
        """The plan whose batch is nearest, if any holds here."""
        near = [plan for plan in self.plans if plan.situation.near(situation)]
        return min(near, key=lambda plan: abs(plan.situation.batch - situation.batch), default=None)


def read_policy(model: Flow) -> Policy | None:
    """The policy that lies beside a model's weights, if it is of this model.

    Raises:
        UserError: the file holds something else.
    """
    if model.policy is None or model.policy.get("model") != config_to_dict(model.config):
        return None
    if model.policy.get("format") != FORMAT:
        raise UserError(f"policy.json has format {model.policy.get('format')}, expected {FORMAT}: calibrate again")
    return from_dict(Policy, model.policy, "policy.json: ")


def keep_policy(model: Flow, policy: Policy) -> None:
    """Put the policy where `model.save_pretrained` takes it from; what a planner had decided is forgotten."""
    model.policy = to_dict(policy)
    model.runtime_cache.pop("planner", None)


def machine_of(device: torch.device) -> str:
    """The name under which times of a device are kept."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{cpu_name()}, {torch.get_num_threads()} threads"
