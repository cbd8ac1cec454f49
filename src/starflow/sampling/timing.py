"""Seconds of tokens and passes, measured with the very predictor that is about to be used.

Contract: what is timed runs twice and the faster run counts, so that packing, compiling and first touches do not; the
device is waited for. The cache is left as a solver may find it.

Shapes: B batch, N tokens, C token channels.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from starflow.sampling.draft import draft_of
from starflow.sampling.jacobi import Span, step
from starflow.sampling.predictor import Effort, Predictor
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
                solve_sequential(start, noise, Effort(), lambda _: None)

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
