"""A small regression that the loop trains, for the tests of this folder."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from starflow.train.loop import fit
from starflow.train.run import read_log
from starflow.train.settings import TrainSettings, generator

SETTINGS = TrainSettings(
    precision="float32",
    steps=12,
    batch=4,
    lr=0.05,
    warmup=2,
    average=0.9,
    evaluate_every=5,
    sample_every=6,
    checkpoint_every=4,
)


class Regression:
    """A batch-normed regression whose data and noise are functions of the step; can be told to misbehave."""

    def __init__(self, nan_at: int | None = None, stop_at: int | None = None) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        self.nan_at, self.stop_at = nan_at, stop_at
        self.spikes: dict[int, float] = {}
        self.saved: list[Path] = []

    def _batch(self, step: int) -> Tensor:
        return torch.randn(4, 3, generator=generator(1, "data", step))

    flops = 0.0

    def batch(self, step: int, rows: range) -> tuple[Tensor, float]:
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        factor = math.nan if step == self.nan_at else self.spikes.get(step, 1.0)
        return self._batch(step)[rows.start : rows.stop], factor

    def loss(self, model: nn.Module, batch: tuple[Tensor, float]) -> tuple[Tensor, dict[str, Tensor]]:
        x, factor = batch
        error = factor * (model(x)[:, 0] - x.sum(1)).square().mean()
        return error, {"error": error}

    def batch_names(self, step: int, rows: range) -> list[str]:
        return [f"picture-{step}-{i}" for i in rows]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        x = self._batch(10_000)
        return {"loss": float((model(x)[:, 0] - x.sum(1)).square().mean())}

    def draw(self, model: nn.Module, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)

    def save(self, model: nn.Module, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), folder / "weights.pt")

    def describe(self, terms: Mapping[str, float]) -> dict[str, str]:
        return {"error": f"{terms['error']:.3f}"}


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_log(folder / "log.jsonl") if "loss" in line]


def run(task: Regression, folder: Path, settings: TrainSettings = SETTINGS) -> None:
    fit(task, settings, folder, show_progress=False)
