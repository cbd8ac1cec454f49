"""How to sample: guidance, and a solver policy for every block; checked on construction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from starflow.errors import UserError
from starflow.sampling.guidance import Guidance, Rule, Schedule
from starflow.sampling.predictor import Guess

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
    guess: Guess = "noise"
    """What Jacobi starts from."""
    draft: bool = False
    """Whether Jacobi's first passes run their products in bfloat16; the residual is that of the network itself."""

    def __post_init__(self) -> None:
        _check_choice("a block's solver", self.solver, get_args(BlockSolver))
        _check_count("segment", self.segment)
        _check_count("max_iterations", self.max_iterations)
        _check_choice("guess", self.guess, get_args(Guess))


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
