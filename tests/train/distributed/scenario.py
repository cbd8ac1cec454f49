"""A small flow on a small cache, trained by any number of processes, and settings to fail where a test wants it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starflow.data.latent_cache import InMemoryLatents, LatentEntry
from starflow.flow.config import STARFlowConfig
from starflow.flow.model import Flow, STARFlow
from starflow.train.checkpoint import TrainProgress
from starflow.train.distributed import World, initialise
from starflow.train.loop import fit
from starflow.train.recipe import Objective
from starflow.train.run import read_log
from starflow.train.settings import ParallelSettings, TrainSettings
from starflow.train.tasks.flow import FlowTask

CONFIG = STARFlowConfig(
    in_channels=2,
    img_size=4,
    channels=32,
    num_blocks=3,
    layers_per_block=(1, 1, 2),
    head_dim=32,
    txt_size=1,
    txt_dim=4,
)
SETTINGS = TrainSettings(
    precision="float32",
    steps=8,
    batch=8,
    lr=0.02,
    warmup=2,
    average=0.9,
    evaluate_every=4,
    sample_every=100,
    checkpoint_every=3,
    parallel=ParallelSettings(timeout=30),
)


class Stopped(Exception):
    """As if the process had been killed here."""


class FlakyTask(FlowTask):
    """Fails at one update: `stop_at` in all processes, `nan_at` in the one that sees the last picture."""

    stop_at = nan_at = -1

    def batch(self, step: int, rows: range) -> tuple[Tensor, Tensor | None]:
        if step == self.stop_at:
            raise Stopped
        x, condition = super().batch(step, rows)
        if step == self.nan_at and rows.stop == self.settings.batch:
            x[-1] = math.nan
        return x, condition


def make_cache() -> InMemoryLatents:
    draw = torch.Generator().manual_seed(1)
    mean = torch.randn(80, 2, 4, 4, generator=draw).half()
    pictures = [LatentEntry(f"p{i}", f"c{i % 3}", "heldout" if i < 70 and i % 2 else "train", i % 3) for i in range(80)]
    return InMemoryLatents(
        mean, torch.full_like(mean, 0.3), torch.eye(4)[:3, None].half(), torch.eye(4)[3:].half(), pictures, {}
    )


def settings(**parallel: Any) -> TrainSettings:
    return replace(SETTINGS, parallel=replace(SETTINGS.parallel, **parallel))


def train(
    folder: Path,
    settings: TrainSettings,
    world: World | None = None,
    *,
    stop_at: int = -1,
    nan_at: int = -1,
    real: bool = False,
) -> TrainProgress:
    """One run, or what is left of it. Built on the meta device, as recipes are."""
    with torch.device("meta"):
        flow = STARFlow(CONFIG)
    if real:  # as after train.init_from
        initialise(flow.to_empty(device="cpu"), settings.seed)
    world = world or World()
    task = FlakyTask(flow, make_cache(), Objective(), settings, draw=_nothing, save=_save, world=world)
    task.stop_at, task.nan_at = stop_at, nan_at
    return fit(task, settings, folder, show_progress=False, world=world)


def _nothing(flow: Flow, path: Path) -> None:
    pass


def _save(flow: Flow, folder: Path) -> None:
    flow.save_pretrained(folder)


def numbers(folder: Path) -> list[dict[str, float]]:
    """A log's lines without what depends on the clock or the machine."""
    timed = ("pictures_per_second", "data_wait", "memory_gib", "tflops", "utilisation")
    return [{k: v for k, v in line.items() if k not in timed} for line in read_log(folder / "log.jsonl")]
