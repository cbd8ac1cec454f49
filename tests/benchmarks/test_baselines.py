"""The baselines of benchmarks/ are fair: the decoders draw our pictures, the DiT has our parameters."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings

from starflow.bench.limits import DrawTask, load_baselines
from starflow.flow.config import STARFlowConfig
from starflow.sampling.sampler import sample
from tests.registry import Case, cases, randomised

FOLDER = Path(__file__).parents[2] / "benchmarks"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"baseline_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


TEXTBOOK, COMPILED = module("textbook"), module("compiled")


@settings(max_examples=30, derandomize=True)
@given(case=cases(torch.float32))
def test_both_decoders_draw_the_same_pictures(case: Case) -> None:
    weight = 0.0 if case.condition is None else 1.5
    null = torch.full((2,), -1) if case.null_condition is None and case.condition is not None else case.null_condition
    task = DrawTask(case.model, case.x, case.condition, null, weight)
    ours = sample(case.model, case.x, case.condition, null, weight)
    torch.testing.assert_close(TEXTBOOK.decode(task), ours, rtol=1e-4, atol=2e-5)
    if case.null_condition is not None or case.condition is None:
        static = COMPILED.CompiledDecoder(task, compile=False)
        for _ in range(2):  # the second batch finds the caches of the first
            torch.testing.assert_close(static.decode(), ours, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_compiling_changes_nothing() -> None:
    config = STARFlowConfig(in_channels=2, img_size=4, channels=48, head_dim=24, num_blocks=2, layers_per_block=1)
    task = DrawTask(randomised(config, 0).requires_grad_(False), torch.randn(2, 2, 4, 4), None, None, 0.0)
    compiled, eager = (COMPILED.CompiledDecoder(task, compile=one).decode() for one in (True, False))
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=2e-5)


def test_both_are_found_and_the_dit_is_as_large_as_the_model() -> None:
    pytest.importorskip("diffusers")
    config = STARFlowConfig(
        in_channels=4, img_size=8, channels=64, num_blocks=3, layers_per_block=(2, 2, 24), txt_size=2, txt_dim=4
    )
    model = randomised(config, 0)
    task = DrawTask(model, torch.randn(2, 4, 8, 8), torch.randn(2, 2, 4), torch.zeros(2, 2, 4), 2.0)
    found = {one.name: one for one in load_baselines(FOLDER, task)}
    assert list(found) == ["textbook decoder", "compiled static-cache decoder", "DiT, 50 steps", "DiT, 250 steps"]
    assert found["DiT, 250 steps"].scale == pytest.approx(5 * found["DiT, 50 steps"].scale)
    drawn = found["DiT, 50 steps"].action()
    assert isinstance(drawn, torch.Tensor)
    assert drawn.shape == task.noise.shape
    dit = module("dit").network_like(model, __import__("diffusers"))
    wanted, layer = (sum(one.numel() for one in part.parameters()) for part in (model, dit.transformer_blocks[0]))
    assert abs(sum(one.numel() for one in dit.parameters()) - wanted) <= layer
