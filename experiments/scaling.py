"""The scaling experiment asks whether a few blocks come nearer to a density with more width and more updates.

STARFlow, section 3.1, says that three blocks approximate any continuous density. The flows of `universality`, of free
functions and of Transformers, are trained at a constant rate, each once, and measured on the way by the running
average of their weights, so that one run gives the whole curve. The width of a free function is the number of knots of
its finest table.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from experiments.densities import Density, densities
from experiments.results import Measurements, Result, Table, check_budget, measure_once
from experiments.universality import CLAIM, FreeFlow, Transformer, log_ratios, total_variation, update

NAME = "scaling"
SHARPNESS = 9
"""The weights after update t count as t^SHARPNESS in their average: most of it is of the last tenth of the updates."""
AVERAGE_EVERY = 10
FLAT = 0.95
"""A gap of which a doubling leaves more than this is called flat."""
NEAR = 0.05
"""Nats above the entropy at which a density is called reached."""
MEASURES = {"gap": "nats above the entropy", "total_variation": "total variation"}


@dataclass(frozen=True)
class Budget:
    """How much is computed."""

    steps: int = 4000
    """Updates of a free flow; a Transformer, whose updates are dear, has half as many."""
    batch: int = 256
    """Draws an update; a free flow has four times as many."""
    lr: float = 1e-3
    """Of a Transformer; of a free flow three times as much."""
    heldout: int = 20_000
    flows: tuple[str, ...] = ("free 2", "free 3", "transformer 2", "transformer 3")
    """A kind and a number of blocks."""
    knots: tuple[int, ...] = (8, 32, 128, 512)
    """Of the finest tables of a free function."""
    widths: tuple[int, ...] = (32, 64, 128)
    """Of Transformers; 2,000 updates of three blocks take 48, 83 and 174 processor seconds."""
    two_block_widths: tuple[int, ...] = (32, 64)
    """Of Transformers of two blocks."""
    seed: int = 0

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """After how many updates a flow is measured."""
        return tuple(self.steps // share for share in (8, 4, 2, 1))

    def widths_of(self, flow: str) -> tuple[int, ...]:
        """The widths that a flow is trained at."""
        if flow.startswith("free"):
            return self.knots
        return self.two_block_widths if flow == "transformer 2" else self.widths


QUICK = Budget(steps=80, batch=32, heldout=500, knots=(8, 16), widths=(32, 64), two_block_widths=(32,))
Found = dict[str, dict[str, dict[int, Measurements]]]
"""Measurements by density, by flow and by width."""


def run(folder: Path, budget: Budget, log: Callable[[str], None], command: str) -> Result:
    """Compute the cells that are missing, draw the plot, and put the numbers into tables."""
    check_budget(folder, budget)
    found: Found = {density.name: {flow: {} for flow in budget.flows} for density in densities()}
    for flow in budget.flows:
        for width in budget.widths_of(flow):
            for density in densities():
                name = f"{density.name}-{flow.replace(' ', '-')}-{width}"
                compute = partial(train, density, flow, width, budget)
                found[density.name][flow][width] = measure_once(folder, name, compute, log)
    draw_plot(folder / f"{NAME}.png", found)
    return Result(
        name=NAME,
        title="Universality: does the gap close with width and updates?",
        claim=CLAIM,
        tables=[curve_table(found, budget), verdict_table(found)],
        command=command,
        values={"cells": found, "budget": vars(budget)},
    )


def train(density: Density, flow: str, width: int, budget: Budget) -> Measurements:
    """One flow; its gap to the density's entropy and total variation at each checkpoint, on points it has not seen."""
    torch.manual_seed(budget.seed)
    draw = torch.Generator().manual_seed(1000 + budget.seed)
    unseen = density.draw(budget.heldout, torch.Generator().manual_seed(1))
    kind, blocks = flow.split()
    free = kind == "free"
    model: nn.Module = FreeFlow(int(blocks), width) if free else Transformer(density.numbers, int(blocks), width)
    average = AveragedModel(model, avg_fn=_power_average)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=budget.lr * (3 if free else 1), betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    curve: list[Measurements] = []
    started = time.process_time()
    checkpoints = budget.checkpoints if free else budget.checkpoints[:-1]
    for step in range(1, checkpoints[-1] + 1):
        update(model, optimiser, density.draw(budget.batch * (4 if free else 1), draw))
        if step % AVERAGE_EVERY == 0:
            average.update_parameters(model)
        if step in checkpoints:
            gaps = log_ratios(average, density, unseen)
            curve.append(
                {
                    "updates": step,
                    "gap": float(gaps.mean()),
                    "error": float(gaps.std() / math.sqrt(len(gaps))),
                    "total_variation": total_variation(gaps),
                }
            )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"curve": curve, "parameters": parameters, "cpu_seconds": time.process_time() - started}


def _power_average(average: Tensor, new: Tensor, count: Tensor | int) -> Tensor:
    """The mean of all weights so far, those of the t-th counted t^SHARPNESS times (Karras et al., arXiv 2312.02696)."""
    return average + (new - average) * ((SHARPNESS + 1) / (count + SHARPNESS + 1))


def curve_table(found: Found, budget: Budget) -> Table:
    """Nats and total variation at every checkpoint, a row for each density, flow and width."""
    heads = [f"{name}, {updates:,}" for name in ("nats", "TV") for updates in budget.checkpoints]
    rows = [["density", "flow", "width", *heads]]
    for density, by_flow in found.items():
        for flow, by_width in by_flow.items():
            for width, cell in by_width.items():
                parts = []
                for key in MEASURES:
                    values = [f"{point[key]:.3f}" for point in cell["curve"]]
                    parts += values + [""] * (len(budget.checkpoints) - len(values))
                rows.append([density, f"{flow} blocks", str(width), *parts])
    return rows


def verdict_table(found: Found) -> Table:
    """The best width at the end, what twice its updates and its step in width left of the gap, and what follows."""
    rows = [
        ["density", "flow", "smallest gap", "width", "its TV", "left by twice the updates", "by the width", "verdict"]
    ]
    for density, by_flow in found.items():
        for flow, by_width in by_flow.items():
            ends = {width: cell["curve"][-1] for width, cell in by_width.items()}
            best = min(ends, key=lambda width: float(ends[width]["gap"]))
            narrower = max((width for width in ends if width < best), default=best)
            last, before = ends[best], by_width[best]["curve"][-2]
            gap, updates, by = last["gap"], last["gap"] / before["gap"], last["gap"] / ends[narrower]["gap"]
            numbers = [f"{gap:.3f} ± {last['error']:.3f}", str(best), f"{last['total_variation']:.3f}"]
            rows.append([density, f"{flow} blocks", *numbers, f"{updates:.2f}", f"{by:.2f}", verdict(gap, updates, by)])
    return rows


def verdict(gap: float, updates: float, width: float) -> str:
    """In words, from a gap in nats and the shares of it that twice the updates and the last step in width leave.

    >>> verdict(0.5, 0.99, 1.0)
    'flat'
    >>> verdict(0.4, 0.5, 1.0)
    'closing: 0.05 nats after 3 more doublings of updates, if it went on so'
    """
    if gap <= NEAR:
        return "closed"
    if updates > 1 / FLAT:
        return "rose at the last doubling of updates"
    if min(updates, width) > FLAT:
        return "flat"
    if updates > FLAT:
        return "flat in updates, not in width"
    doublings = math.ceil(math.log(NEAR / gap) / math.log(updates) - 1e-9)
    return f"closing: {NEAR} nats after {doublings} more doublings of updates, if it went on so"


def draw_plot(path: Path, found: Found) -> None:
    """Nats above, total variation below, a column for each density; a colour for each flow, darker where wider."""
    from experiments.plots import figure, save

    drawn, axes = figure(len(MEASURES), len(found), 3.2)
    for row, (key, title) in zip(axes, MEASURES.items(), strict=True):
        for axis, (density, by_flow) in zip(row, found.items(), strict=True):
            _curves(axis, by_flow, key)
            axis.set_title(f"{density}: {title}", fontsize=8)
            axis.set_xlabel("updates", fontsize=7)
    axes[0][-1].legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.02, 1))  # beside the curves, which fill all axes
    save(drawn, path)


def _curves(axis: Any, by_flow: dict[str, dict[int, Measurements]], key: str) -> None:
    for number, (flow, by_width) in enumerate(by_flow.items()):
        for place, (width, cell) in enumerate(by_width.items()):
            updates = [point["updates"] for point in cell["curve"]]
            values = [point[key] for point in cell["curve"]]
            strength = (place + 1) / len(by_width)
            axis.plot(updates, values, f"C{number}o-", alpha=strength, markersize=2, label=f"{flow}, {width}")
    axis.set(xscale="log", yscale="log")
    axis.tick_params(which="both", labelsize=6)
