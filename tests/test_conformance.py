"""Agreement with the published implementation's numbers, at the tolerances of their README."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from starflow import denoise, load_published, sample
from starflow.flow.model import Flow
from starflow.io import files
from tests.conftest import SHARED

FORWARD, SAMPLES = 1e-5, 1e-4  # of the largest absolute value
OWN = Path(__file__).parent / "conformance"
"""Three of the vectors, which stand for all of them where there is no folder of shared data."""
FOLDER = SHARED / "conformance" if (SHARED / "conformance").is_dir() else OWN


@dataclass(frozen=True)
class Vectors:
    """One case: the model that its weights make, and its named inputs and outputs."""

    model: Flow
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    def agree(self, name: str, ours: Tensor, tolerance: float) -> None:
        theirs = self.outputs[name]
        assert ours.shape == theirs.shape
        error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        assert error < tolerance, f"{name} differs by {error:.2e} of its largest value"


def names(kind: str) -> list[str]:
    described = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
    return [name for name, case in described.items() if case["kind"] == kind]


@pytest.fixture(scope="module")
def read(device: torch.device) -> Callable[[str], Vectors]:
    def read_case(name: str) -> Vectors:
        groups: dict[str, dict[str, Tensor]] = {"weights": {}, "inputs": {}, "outputs": {}}
        for key, tensor in files.read_tensors(FOLDER / f"{name}.safetensors").items():
            group, _, rest = key.partition("/")
            groups[group][rest] = tensor.to(device)
        options: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
        return Vectors(load_published(groups["weights"], options), groups["inputs"], groups["outputs"])

    return read_case


@pytest.mark.parametrize("name", names("starflow"))
def test_starflow_forward(name: str, read: Callable[[str], Vectors]) -> None:
    case = read(name)
    x, condition = case.inputs["x"], case.inputs.get("condition")
    with torch.no_grad():
        trace = case.model.trace(x, condition)
        z, logdet = case.model(x, condition)
    case.agree("z", z, FORWARD)
    for number, state in enumerate(trace.states):
        theirs = case.outputs[f"after_block_{number}"]
        case.agree(f"after_block_{number}", state.view_as(theirs), FORWARD)
    for number, log_sigma in enumerate(trace.log_sigmas):
        case.agree(f"logdet_block_{number}", -log_sigma, FORWARD)
    case.agree("loss", (0.5 * z.square().mean() - logdet.mean() / z[0].numel()).view(1), FORWARD)


@pytest.mark.parametrize("name", names("starflow"))
def test_starflow_forward_of_a_bfloat16_network(name: str, read: Callable[[str], Vectors]) -> None:
    """Eight bits of mantissa in the network, and none lost around it."""
    case = read(name)
    with torch.no_grad():
        z, logdet = case.model.bfloat16()(case.inputs["x"], case.inputs.get("condition"))
    assert z.dtype == logdet.dtype == torch.float32
    case.agree("z", z, 0.05)
    case.agree("loss", (0.5 * z.square().mean() - logdet.mean() / z[0].numel()).view(1), 0.02)


@pytest.mark.parametrize("name", names("starflow"))
def test_starflow_samples_at_every_guidance_weight(name: str, read: Callable[[str], Vectors]) -> None:
    case = read(name)
    noise, condition, null = (case.inputs.get(key) for key in ("noise", "condition", "null_condition"))
    assert noise is not None
    wanted = [key for key in case.outputs if key.startswith("sample_")]
    assert wanted
    for key in wanted:
        match = re.fullmatch(r"sample_w(\d+)(_jacobi)?", key)
        assert match, key
        solver = "jacobi" if match[2] else "sequential"
        ours = sample(case.model, noise, condition, null, float(match[1]), solver, tolerance=1e-6)  # type: ignore[arg-type]
        case.agree(key, ours, SAMPLES)


@pytest.mark.parametrize("name", names("starflow"))
def test_starflow_tweedie_step(name: str, read: Callable[[str], Vectors]) -> None:
    case = read(name)
    if "denoised_sigma0.3" in case.outputs:
        ours = denoise(case.model, case.inputs["x"], case.inputs["condition"], sigma=0.3)
        case.agree("denoised_sigma0.3", ours, FORWARD)


@pytest.mark.parametrize("name", names("tarflow"))
def test_tarflow_forward(name: str, read: Callable[[str], Vectors]) -> None:
    case = read(name)
    x, label = case.inputs["x"], case.inputs.get("label")
    with torch.no_grad():
        z, logdet = case.model(x, label)
        unconditional, _ = case.model(x)
    dimensions = z[0].numel()
    case.agree("z_tokens", case.model.to_tokens(z)[0], FORWARD)
    case.agree("logdet_mean_per_dim", logdet / dimensions, FORWARD)
    case.agree("loss", (0.5 * z.square().mean() - logdet.mean() / dimensions).view_as(case.outputs["loss"]), FORWARD)
    if label is not None:
        case.agree("z_tokens_unconditional", case.model.to_tokens(unconditional)[0], FORWARD)


@pytest.mark.parametrize("name", names("tarflow"))
def test_tarflow_samples(name: str, read: Callable[[str], Vectors]) -> None:
    case = read(name)
    side = case.model.config.grid_side
    noise, label = case.model.from_tokens(case.inputs["noise_tokens"], (side, side)), case.inputs.get("label")
    case.agree("sample_w0", sample(case.model, noise, label), SAMPLES)
    unconditional = sample(case.model, noise, None, None, 1.0, guidance_rule="linear", attention_temperature=0.5)
    case.agree("sample_uncond_attn_temp0.5_w1", unconditional, SAMPLES)
    if label is not None:
        annealed = sample(case.model, noise, label, None, 1.0, guidance_rule="linear", guidance_schedule="linear")
        case.agree("sample_w1_annealed_linear", annealed, SAMPLES)
