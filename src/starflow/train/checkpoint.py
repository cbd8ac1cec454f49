"""Checkpoints of one process: a safetensors file a checkpoint, whole or not at all, the newest two kept.

Holds the model, its average, the optimiser's moments, and in the header the step and the settings. Random numbers
need no state: data order is a function of (seed, epoch) and noise of (seed, step), so a resumed run repeats the
uninterrupted one bit for bit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from starflow.errors import UserError
from starflow.files import read_tensors, write_tensors
from starflow.train.optimiser import AveragedWeights


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    """Updates done."""
    best: float | None = None
    """Lowest held-out loss of the averaged weights so far."""


def save_checkpoint(
    folder: Path, progress: Progress, model: nn.Module, average: AveragedWeights, optimiser: torch.optim.Optimizer
) -> Path:
    """Write `folder/step_XXXXXXXX.safetensors` and drop all but the newest two."""
    tensors: dict[str, Tensor] = {f"model/{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"average/{k}": v for k, v in average.state.items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser/{index}/{name}": torch.as_tensor(value) for name, value in state.items()}
    path = folder / f"step_{progress.step:08d}.safetensors"
    write_tensors(path, tensors, {"progress": json.dumps({"step": progress.step, "best": progress.best})})
    for old in checkpoints(folder)[:-2]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step_*.safetensors"))


def load_checkpoint(
    path: Path, model: nn.Module, average: AveragedWeights, optimiser: torch.optim.Optimizer
) -> Progress:
    """Restore everything that `save_checkpoint` wrote.

    Raises:
        UserError: the file is damaged, or belongs to a model of another shape.
    """
    from safetensors import safe_open

    tensors = read_tensors(path)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimiser": {}}
    for name, tensor in tensors.items():
        part, _, key = name.partition("/")
        parts[part][key] = tensor
    _check_same_shapes(path, model.state_dict(), parts["model"])
    model.load_state_dict(parts["model"])
    for name, tensor in parts["average"].items():
        average.state[name].copy_(tensor)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts["optimiser"].items():
        index, _, key = name.partition("/")
        moments.setdefault(int(index), {})[key] = tensor
    state: dict[str, Any] = optimiser.state_dict()
    optimiser.load_state_dict({"state": moments, "param_groups": state["param_groups"]})
    _lay_out_as_parameters(optimiser)
    with safe_open(path, "pt") as header:
        progress = json.loads(header.metadata()["progress"])
    return Progress(progress["step"], progress["best"])


def _lay_out_as_parameters(optimiser: torch.optim.Optimizer) -> None:
    """Give moments the memory format of their parameters: files know none, and fused updates rely on it being equal."""
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            state = optimiser.state[parameter]
            for name, value in state.items():
                if value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter).copy_(value)


def _check_same_shapes(path: Path, expected: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    wrong = sorted(k for k in expected.keys() & got.keys() if expected[k].shape != got[k].shape)
    wrong += sorted(expected.keys() ^ got.keys())
    if wrong:
        shown = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise UserError(
            f"{path} belongs to another model ({len(wrong)} tensors differ: {shown}): "
            "undo the change in the recipe or choose another --output"
        )
