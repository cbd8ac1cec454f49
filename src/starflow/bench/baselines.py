"""Other ways to draw a picture, kept outside of the package: files of a folder, each with a function `baselines`.

Contract: `baselines(task)` returns what can be timed beside our own sampling, in the same run: the same pictures by
other code, or as many pictures of another model. What it loads, it loads before it returns.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from starflow.errors import UserError
from starflow.flow.model import Flow

NAMES = ("textbook", "dit")


@dataclass(frozen=True)
class Task:
    """What is to be drawn."""

    model: Flow
    noise: Tensor
    """(B, C, H, W)"""
    condition: Tensor | None
    null_condition: Tensor | None
    guidance: float


@dataclass(frozen=True)
class Baseline:
    """One other way."""

    name: str
    action: Callable[[], object]
    """Draws the batch, or a part of the way."""
    scale: float
    """The whole over that part; 1 is the batch itself."""
    note: str


def tree_folder() -> Path | None:
    """benchmarks/ of the source tree that this package runs from, if it does."""
    folder = Path(__file__).parents[3] / "benchmarks"
    return folder if (folder / f"{NAMES[0]}.py").is_file() else None


def load_baselines(folder: Path, task: Task) -> list[Baseline]:
    """Those of the files `NAMES`.py that are in the folder.

    Raises:
        UserError: none of them is.
    """
    paths = [folder / f"{name}.py" for name in NAMES]
    found = [path for path in paths if path.is_file()]
    if not found:
        raise UserError(f"{folder} has none of {', '.join(path.name for path in paths)}: name a folder of baselines")
    return [one for path in found for one in _load(path, task)]


def _load(path: Path, task: Task) -> list[Baseline]:
    spec = importlib.util.spec_from_file_location(f"starflow_baseline_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look themselves up
    spec.loader.exec_module(module)
    found: list[Baseline] = module.baselines(task)
    return found
