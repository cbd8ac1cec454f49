"""The options of sampling, the solver of every block, and policy.json, which holds what a calibration chose.

Contract: how a block is solved depends on the model, the policy.json beside its weights, the type of device and the
options of the call; never on the batch, on what was sampled before, or on a clock. With solver "auto" a model that was
calibrated on this type of device (`starflow bench calibrate`) has one choice a block; every other model goes token by
token in every block, which is exact. A policy of another model is not believed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from starflow.config import from_dict, to_dict
from starflow.errors import UserError
from starflow.flow.config import config_to_dict
from starflow.flow.model import Flow
from starflow.sampling.guidance import Guidance, Rule, Schedule
from starflow.sampling.predictor import InitialGuess

BlockSolver = Literal["sequential", "jacobi"]

CacheDtype = Literal["network", "bfloat16"]
"""Precision of keys and values: the network's own, or bfloat16 to halve a float32 cache."""

SolverName = Literal["sequential", "jacobi", "auto"]


@dataclass(frozen=True)
class BlockPolicy:
    """How one block is inverted: token by token, or by iterating segments of tokens.

    >>> BlockPolicy("jacobi", segment=32, guess="gaussian")
    BlockPolicy(solver='jacobi', segment=32, max_iterations=None, guess='gaussian', draft=False)

    Raises:
        UserError: a value that no solver can have.
    """

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
"""A solver for all blocks, what the model was calibrated for, or a policy for each block from the data to the noise."""


@dataclass(frozen=True)
class SampleSettings:
    """The options of `starflow.sample`, by the same names and with the same meaning.

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
        try:
            weight_B = torch.as_tensor(self.guidance, dtype=like.dtype, device=like.device)
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"guidance is {self.guidance!r}, expected one weight, or one for each picture") from None
        if weight_B.shape not in ((), (1,), (len(like),)):
            shape = tuple(weight_B.shape)
            raise UserError(f"guidance has shape {shape}, expected one weight, or one for each of {len(like)} pictures")
        if not bool(((weight_B >= 0) & weight_B.isfinite()).all()):
            raise UserError(f"guidance is {weight_B.tolist()}, expected weights of at least 0 (0 is unguided)")
        if not bool((weight_B > 0).any()):
            return None
        rule, schedule = self.guidance_rule, self.guidance_schedule
        return Guidance(weight_B.expand(len(like)), rule, schedule, self.attention_temperature)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")


def _check_count(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UserError(f"{name} is {value}, expected at least 1, or None")


FORMAT = 2
"""Of policy.json. Format 1 had a choice a batch size."""


@dataclass(frozen=True)
class ConvergedPolicy:
    """A parallel policy that met the tolerance on a block, and the passes that it took, all segments together."""

    policy: BlockPolicy
    passes: int
    drafts: int


@dataclass(frozen=True)
class Convergence:
    """How one block converges on data that its model makes, whatever the device.

    The figures follow the two metrics of GS-Jacobi (arXiv 2505.12849, sections 3 and 4): one that ranks the blocks by
    how hard they are to iterate, one that ranks the initial guesses. Here both are measured on the solved sequence x.
    """

    contraction: float
    """Geometric mean, over the first iterations from the best guess, of ||F(x_k) - x|| / ||x_k - x||."""
    distances: dict[str, float]
    """||x_0 - x|| / ||x|| of every initial guess."""
    converged: tuple[ConvergedPolicy, ...]
    """Those that met the tolerance in fewer passes than there are tokens, fewest first."""


@dataclass(frozen=True)
class Timing:
    """Seconds of a policy at one batch size, and of going token by token, timed in turn."""

    batch: int
    seconds: float
    sequential_seconds: float
    error: float = 0.0
    """The largest of the batch: of a block its verified residual, of whole samples ||x - x_seq|| / ||x_seq||."""

    @property
    def ratio(self) -> float:
        """Time of the policy over that of going token by token."""
        return self.seconds / self.sequential_seconds


@dataclass(frozen=True)
class BlockChoice:
    """The policy that was chosen for one block, and what was measured of it."""

    policy: BlockPolicy
    timings: tuple[Timing, ...]
    """At every batch size that was calibrated."""


@dataclass(frozen=True)
class Policy:
    """What policy.json holds: what a calibration measured and chose."""

    model: dict[str, Any]
    """The config of the model."""
    device: str
    """Type of the device for which the choices are made: "cpu" or "cuda"."""
    machine: str
    """What the times were measured on."""
    dtype: str
    """Of the network."""
    tokens: int
    guided: bool
    tolerance: float
    """The residual that every choice met; a call that asks for less goes token by token."""
    convergence: tuple[Convergence, ...]
    """Of each block, from the data to the noise, as are the choices."""
    choices: tuple[BlockChoice, ...]
    samples: tuple[Timing, ...] = ()
    """Of whole samples by the choices; none where every block goes token by token."""
    format: int = FORMAT


def block_policies(model: Flow, settings: SampleSettings, device: torch.device) -> list[BlockPolicy]:
    """The policy of each block, from the data to the noise.

    Args:
        model: the flow, with what was read from its policy.json.
        settings: whose solver is resolved.
        device: that the model is on.

    Raises:
        UserError: not one policy a block, or a policy.json that cannot be read.
    """
    solver, blocks = settings.solver, len(model.blocks)
    if not isinstance(solver, str):
        policies = list(solver) if isinstance(solver, Iterable) else [solver]
        if len(policies) == blocks and all(isinstance(policy, BlockPolicy) for policy in policies):
            return policies
        raise UserError(f"the policy is {policies}, expected a BlockPolicy for each of {blocks} blocks")
    if solver == "jacobi":
        return [BlockPolicy("jacobi", settings.segment)] * blocks
    if settings.segment is not None:
        warnings.warn(f"segment is {settings.segment}, but solver {solver!r} takes none: it is for 'jacobi'")
    stored = read_policy(model) if solver == "auto" else None
    if stored is None or stored.device != device.type or settings.tolerance < stored.tolerance:
        return [BlockPolicy()] * blocks
    return [choice.policy for choice in stored.choices]


def read_policy(model: Flow) -> Policy | None:
    """The policy that lies beside a model's weights; None where there is none of this model, or one of format 1.

    Raises:
        UserError: the file holds something else.
    """
    values, known = model.policy, model.runtime_cache.get("policy")
    if isinstance(known, tuple) and known[0] is values:
        policy: Policy | None = known[1]
        return policy
    policy = None if values is None else _parse(values, model)
    model.runtime_cache["policy"] = values, policy
    return policy


def _parse(values: dict[str, Any], model: Flow) -> Policy | None:
    if values.get("model") != config_to_dict(model.config):
        return None
    if values.get("format") == 1:
        warnings.warn("policy.json has format 1, with a choice a batch size, and is not used: calibrate again")
        return None
    if values.get("format") != FORMAT:
        raise UserError(f"policy.json has format {values.get('format')}, expected {FORMAT}: calibrate again")
    policy = from_dict(Policy, values, "policy.json: ")
    if len(policy.choices) != len(model.blocks):
        counts = f"{len(policy.choices)} choices, expected one for each of {len(model.blocks)} blocks"
        raise UserError(f"policy.json has {counts}: calibrate again")
    return policy


def keep_policy(model: Flow, policy: Policy) -> None:
    """Put the policy where solver "auto" and `model.save_pretrained` take it from."""
    model.policy = to_dict(policy)
