"""The universality experiment counts the blocks that a density in the plane needs (STARFlow, section 3.1).

A point is a picture of two tokens of one number. Every variant has six layers in all, shared out over 1, 2 or 3 blocks:
equal parameters (but for the blocks' own projections) and equal updates.
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
from torch import Tensor

from experiments.densities import HALF, Density, densities
from experiments.results import SEEDS, Measurements, Result, Table, check_budget, mean_over_seeds, measure_once
from starflow.flow.config import STARFlowConfig
from starflow.flow.model import STARFlow
from starflow.io.files import read_tensors, write_tensors
from starflow.sampling.sampler import sample

NAME = "universality"
BLOCKS = (1, 2, 3)
LAYERS = 6
GRID = 120
CLAIM = (
    "With one block an affine autoregressive flow is Gaussian in each conditional; with two of alternating order it is "
    "an infinite mixture of Gaussians in every coordinate but the last, and with three it approximates any continuous "
    "density (STARFlow, arXiv 2506.06276, section 3.1)."
)


@dataclass(frozen=True)
class Budget:
    """How much is computed."""

    steps: int = 1200
    batch: int = 256
    lr: float = 2e-3
    heldout: int = 20_000
    width: int = 64
    seeds: tuple[int, ...] = SEEDS


QUICK = Budget(steps=20, batch=64, heldout=500, width=32, seeds=(0, 1))


def run(folder: Path, budget: Budget, log: Callable[[str], None], command: str) -> Result:
    """Compute the cells that are missing, draw the plot, and put the numbers into tables."""
    check_budget(folder, budget)
    found: dict[str, dict[int, list[Measurements]]] = {}
    for density in densities():
        found[density.name] = {
            blocks: [
                measure_once(
                    folder,
                    f"{density.name}-{blocks}-{seed}",
                    partial(train, density, blocks, seed, budget, folder),
                    log,
                )
                for seed in budget.seeds
            ]
            for blocks in BLOCKS
        }
    limits = {density.name: density.one_block_limit() for density in densities()}
    draw_plot(folder, found, limits)
    return Result(
        name=NAME,
        title="Universality: how many blocks a density needs",
        claim=CLAIM,
        tables=[table(found, limits), variation_table(found)],
        command=command,
        values={"cells": found, "one_block_limit": limits, "budget": vars(budget)},
    )


def train(density: Density, blocks: int, seed: int, budget: Budget, folder: Path) -> Measurements:
    """One flow; its gap to the density's entropy on points that it has not seen, in nats, and its curve."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(1000 + seed)
    flow = STARFlow(
        STARFlowConfig(
            in_channels=1,
            img_size=2,
            channels=budget.width,
            num_blocks=blocks,
            layers_per_block=LAYERS // blocks,
            head_dim=32,
        )
    )
    optimiser = torch.optim.AdamW(flow.parameters(), lr=budget.lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, budget.steps))
    unseen = density.draw(budget.heldout, torch.Generator().manual_seed(1))
    curve, variation_curve, started = [], [], time.perf_counter()
    for step in range(budget.steps):
        loss = -flow.log_prob(_pictures(density.draw(budget.batch, draw))).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % max(1, budget.steps // 10) == 0:
            gaps = _gaps(flow, density, unseen)
            curve.append([step + 1, float(gaps.mean())])
            variation_curve.append([step + 1, total_variation(gaps)])
    seconds = time.perf_counter() - started
    gaps = _gaps(flow, density, unseen)
    if seed == budget.seeds[0]:
        _save_pictures(folder, density, flow, blocks)
    return {
        "gap": float(gaps.mean()),
        "error": float(gaps.std() / math.sqrt(len(gaps))),
        "total_variation": total_variation(gaps),
        "curve": curve,
        "variation_curve": variation_curve,
        "seconds": seconds,
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
    }


def total_variation(gaps: Tensor) -> float:
    """Total variation distance 1/2 integral |p - q| = E_p max(0, 1 - q / p), of log p - log q at draws of p.

    It is the distance in which the paper's claim is made (L1 is twice that), and unlike nats it is at most 1.

    >>> total_variation(torch.tensor([0.0, 0.0])), round(total_variation(torch.tensor([math.log(2), -1.0])), 3)
    (0.0, 0.25)
    """
    return float((1 - (-gaps).exp()).clamp(min=0).mean())


def _rate(step: int, steps: int) -> float:
    """Warm-up over a twentieth, then cosine to zero."""
    warm = max(1, steps // 20)
    return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


def _pictures(points: Tensor) -> Tensor:
    """(N, 2) points as pictures (N, 1, 1, 2): two tokens of one number."""
    return points.float().view(-1, 1, 1, 2)


@torch.no_grad()
def _gaps(flow: STARFlow, density: Density, points: Tensor) -> Tensor:
    """log p - log q of the density's own points: their mean is the flow's excess over the entropy, KL(p || q)."""
    parts = [flow.log_prob(_pictures(some)) for some in points.split(5000)]
    return density.log_prob(points) - torch.cat(parts).double()


@torch.no_grad()
def _save_pictures(folder: Path, density: Density, flow: STARFlow, blocks: int) -> None:
    """The flow's density on a grid, and samples, for the plot."""
    points = _grid()
    log_prob = torch.cat([flow.log_prob(_pictures(some)) for some in points.split(5000)])
    noise = torch.randn(3000, 1, 1, 2, generator=torch.Generator().manual_seed(2))
    tensors = {"density": log_prob.exp().view(GRID, GRID), "samples": sample(flow, noise).view(-1, 2)}
    write_tensors(folder / "pictures" / f"{density.name}-{blocks}.safetensors", tensors)


def _grid() -> Tensor:
    axis = (torch.arange(GRID) + 0.5) / GRID * 2 * HALF - HALF
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], -1).view(-1, 2)


def table(found: dict[str, dict[int, list[Measurements]]], limits: dict[str, float]) -> Table:
    """Gap in nats by density and blocks, mean and standard error over seeds."""
    rows = [["density", "best of any single block", *(f"{blocks} block{'s' * (blocks > 1)}" for blocks in BLOCKS)]]
    for name, by_blocks in found.items():
        rows.append([name, f"{limits[name]:.4g}", *(str(mean_over_seeds(one, "gap")) for one in by_blocks.values())])
    rows.append(["parameters", "", *(f"{found['rings'][blocks][0]['parameters']:,}" for blocks in BLOCKS)])
    return rows


def variation_table(found: dict[str, dict[int, list[Measurements]]]) -> Table:
    """Total variation distance by density and blocks, mean and standard error over seeds."""
    rows = [["total variation", *(f"{blocks} block{'s' * (blocks > 1)}" for blocks in BLOCKS)]]
    for name, by_blocks in found.items():
        rows.append([name, *(str(mean_over_seeds(one, "total_variation")) for one in by_blocks.values())])
    return rows


def draw_plot(folder: Path, found: dict[str, dict[int, list[Measurements]]], limits: dict[str, float]) -> None:
    """Densities, samples and gaps, a pair of rows a density."""
    from experiments.plots import figure, save

    names = list(found)
    drawn, axes = figure(2 * len(names), len(BLOCKS) + 2, 2.1)
    for row, density in enumerate(densities()):
        points = density.draw(3000, torch.Generator().manual_seed(3))
        truth = density.log_prob(_grid()).exp().view(GRID, GRID)
        _panel(axes[2 * row][0], axes[2 * row + 1][0], truth, points, f"{density.name}, true", float(truth.max()))
        for column, blocks in enumerate(BLOCKS, start=1):
            tensors = read_tensors(folder / "pictures" / f"{density.name}-{blocks}.safetensors")
            upper, lower = axes[2 * row][column], axes[2 * row + 1][column]
            gap = mean_over_seeds(found[density.name][blocks], "gap").value
            title = f"{blocks} block{'s' * (blocks > 1)}: {gap:.3f} nats"
            _panel(upper, lower, tensors["density"], tensors["samples"], title, float(truth.max()))
        _curves(axes[2 * row][-1], axes[2 * row + 1][-1], found[density.name], limits[density.name])
    save(drawn, folder / f"{NAME}.png")


def _panel(upper: Any, lower: Any, density: Tensor, points: Tensor, title: str, most: float) -> None:
    """A density as a picture, and points below it."""
    upper.imshow(density.numpy(), origin="lower", extent=(-HALF, HALF) * 2, vmin=0, vmax=most, cmap="magma")
    upper.set_title(title, fontsize=8)
    lower.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=0.3, color="black", linewidths=0)
    lower.set(xlim=(-HALF, HALF), ylim=(-HALF, HALF), aspect="equal")
    for one in (upper, lower):
        one.set(xticks=[], yticks=[])


def _curves(upper: Any, lower: Any, by_blocks: dict[int, list[Measurements]], limit: float) -> None:
    """Gaps of all seeds, and held-out curves."""
    for blocks in BLOCKS:
        gaps = [found["gap"] for found in by_blocks[blocks]]
        upper.plot([blocks] * len(gaps), gaps, "o", markersize=3, color=f"C{blocks - 1}")
        for found in by_blocks[blocks]:
            lower.plot(*zip(*found["curve"], strict=True), color=f"C{blocks - 1}", linewidth=0.8)
    upper.axhline(limit, color="grey", linewidth=0.8, linestyle=":")
    upper.set_title("gap, nats (dotted: one block's limit)", fontsize=7)
    upper.set(xticks=BLOCKS, yscale="log")
    lower.set_title("held-out gap by update", fontsize=7)
    lower.set(yscale="log")
    for one in (upper, lower):
        one.tick_params(labelsize=6)
