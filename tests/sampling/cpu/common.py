"""Blocks and models with an engine of the tests' own build, or with none."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from starflow.flow.model import Flow
from starflow.flow.tokens import in_order
from starflow.nn.attention import CachePool
from starflow.sampling.cpu.build import Library
from starflow.sampling.cpu.engine import CpuEngine
from starflow.sampling.guidance import Schedule
from starflow.sampling.policy import SampleSettings
from starflow.sampling.predictor import Predictor, SolverOptions
from starflow.sampling.sampler import branch_conditions, run
from starflow.sampling.solvers import solve_sequential
from tests.registry import Case


def engine_for(library: Library | None) -> CpuEngine:
    """One that is built, or one that never will be."""
    return CpuEngine(1.0, library, disabled=library is None)


def drawn(case: Case, settings: SampleSettings, library: Library | None, rows: slice | None = None) -> Tensor:
    """Samples of a case, its x as the noise, compiled or eagerly; with a library it must have been used."""
    rows = rows or slice(None)
    condition, null = (None if one is None else one[rows] for one in (case.condition, case.null_condition))
    engine = case.model.runtime_cache["engine"] = engine_for(library)
    x = run(case.model, case.x[rows], condition, null, settings).x
    assert len(engine.weights.blocks) == (len(case.model.blocks) if library else 0)
    return x


def guided(case: Case) -> bool:
    return case.condition is not None


@dataclass(frozen=True)
class Solving:
    """One block on its own, and the noise for it in its order."""

    predictor: Predictor
    noise_BNC: Tensor

    @torch.no_grad()
    def eager(self) -> Tensor:
        """The answer without an engine, unless the predictor has one."""
        return solve_sequential(self.predictor, self.noise_BNC, SolverOptions(), lambda _: None).x_BNC

    def compiled(self, library: Library) -> Tensor:
        """The same by an engine."""
        with_engine = dataclasses.replace(self.predictor, engine=engine_for(library))
        return dataclasses.replace(self, predictor=with_engine).eager()


@torch.no_grad()
def solving(
    case: Case,
    number: int,
    weight: float | Tensor = 0.0,
    pool: CachePool | None = None,
    schedule: Schedule = "constant",
) -> Solving:
    """Block `number` of a case with a cache of its own."""
    model: Flow = case.model
    tokens_BND, grid = model.to_tokens(case.x)
    block = list(model.iter_blocks())[number]
    guidance = (
        SampleSettings(weight, guidance_schedule=schedule).guidance_for(tokens_BND)
        if model.guided_blocks[number] and guided(case)
        else None
    )
    conditions = branch_conditions(model, case.condition, case.null_condition, len(case.x), guidance)
    table = model.block_rotary(block, model.rotary(grid))
    batch, tokens = tokens_BND.shape[:2]
    predictor = Predictor.of(block, batch, tokens, conditions, table, guidance, pool or CachePool())
    return Solving(predictor, in_order(tokens_BND, backwards=block.spec.backwards).contiguous())


def assert_close(ours: Tensor, expected: Tensor) -> None:
    """Equal up to rounding in float32 through all blocks."""
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)
