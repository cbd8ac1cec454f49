"""Two experiments count the blocks that a density needs, and ask what stands in the way (STARFlow, section 3.1).

`universality` fits flows of free functions to densities in the plane: tables stand in the place of networks, so that
the number of blocks and the optimisation alone limit them. `transformers` fits Transformers to the same densities, and
to sequences of 16 numbers in which each has two modes that depend on the one before. A number enters them by a linear
map, and by sines and cosines of many frequencies beside it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from experiments.densities import HALF, Density, densities, two_way_series
from experiments.results import SEEDS, Measurements, Result, Table, check_budget, mean_over_seeds, measure_once
from starflow.flow.config import STARFlowConfig
from starflow.flow.model import STARFlow
from starflow.io.files import read_tensors, write_tensors

LAYERS = 6
"""Of a Transformer in all, shared out over its blocks."""
WAVES = 16
"""Frequencies of a block's input."""
KNOTS = (4, 8, 16, 32, 64, 128, 256, 512)
"""Of the tables that are added up to a free function: coarse ones learn fast, fine ones make it exact."""
FINEST = 128
"""Knots of a free function's finest table, unless it is told otherwise."""
GRID = 120
CLAIM = (
    "With one block an affine autoregressive flow is Gaussian in each conditional; with two of alternating order it is "
    "an infinite mixture of Gaussians in every coordinate but the last, and with three it approximates any continuous "
    "density (STARFlow, arXiv 2506.06276, section 3.1)."
)


@dataclass(frozen=True)
class Budget:
    """How much is computed."""

    steps: int = 600
    """Updates of a Transformer; a free flow has twice as many."""
    batch: int = 256
    """Draws an update; a free flow has four times as many, and of the longer sequences there are a quarter."""
    lr: float = 2e-3
    """Of a Transformer; of a free flow three times as much."""
    heldout: int = 20_000
    width: int = 64
    seeds: tuple[int, ...] = SEEDS


QUICK = Budget(steps=10, batch=32, heldout=500, width=32, seeds=(0, 1))
Found = dict[str, dict[str, list[Measurements]]]
"""Measurements of all seeds by density and by flow, such as "free 3"."""


class HasLogProb(Protocol):
    """What is fitted."""

    def __call__(self, points: Tensor, /) -> Tensor:
        """(B, N) to log-densities (B,) in nats."""
        ...


@dataclass(frozen=True)
class Experiment:
    """Which flows are fitted to which densities."""

    title: str
    flows: tuple[str, ...]
    """A kind, "free" or "waves", and a number of blocks; of one block the limit is known."""
    densities: tuple[Density, ...]


EXPERIMENTS = {
    "universality": Experiment(
        "Universality: how many blocks a density needs", ("free 2", "free 3", "free 6"), densities()
    ),
    "transformers": Experiment(
        "Universality of Transformers, in the plane and on sequences",
        ("waves 2", "waves 3"),
        (*densities(), two_way_series()),
    ),
}


def run(folder: Path, budget: Budget, log: Callable[[str], None], command: str, name: str) -> Result:
    """Compute the cells that are missing, draw the plot, and put the numbers into tables."""
    check_budget(folder, budget)
    experiment = EXPERIMENTS[name]
    found: Found = {density.name: {} for density in experiment.densities}
    for flow in experiment.flows:
        for density in experiment.densities:
            found[density.name][flow] = _measured(folder, density, flow, budget, log)
    limits = {density.name: density.one_block_limit() for density in experiment.densities}
    draw_plot(folder / f"{name}.png", experiment, found, limits)
    return Result(
        name=name,
        title=experiment.title,
        claim=CLAIM,
        tables=[
            table(found, "gap", "nats above the entropy", limits),
            table(found, "total_variation", "total variation", None),
        ],
        command=command,
        values={"cells": found, "one_block_limit": limits, "budget": vars(budget)},
    )


def _measured(
    folder: Path, density: Density, flow: str, budget: Budget, log: Callable[[str], None]
) -> list[Measurements]:
    kind, blocks = flow.split()
    return [
        measure_once(
            folder,
            f"{density.name}-{kind}-{blocks}-{seed}",
            partial(train, density, kind, int(blocks), seed, budget, folder),
            log,
        )
        for seed in budget.seeds
    ]


class Table1D(nn.Module):
    """Functions of one number by linear interpolation in tables over [-6, 6], constant beyond."""

    def __init__(self, functions: int, finest: int) -> None:
        super().__init__()
        self.tables = nn.ParameterList(0.05 * torch.randn(knots, functions) for knots in KNOTS if knots <= finest)

    def forward(self, u: Tensor) -> Tensor:
        """(B,) to (B, functions)."""
        total = u.new_zeros(())
        for table in self.tables:
            place = ((u + 6) / 12 * (len(table) - 1)).clamp(0, len(table) - 1.001)
            left = place.floor().long()
            share = (place - left)[:, None]
            total = total + table[left] * (1 - share) + table[left + 1] * share
        return total


class FreeFlow(nn.Module):
    """Blocks z = (x - mu) / sigma of two numbers, in which mu and log sigma are free functions of the other number."""

    def __init__(self, blocks: int, finest: int = FINEST) -> None:
        super().__init__()
        self.functions = nn.ModuleList(Table1D(2, finest) for _ in range(blocks))
        self.first = nn.Parameter(torch.zeros(blocks, 2))

    def forward(self, points: Tensor) -> Tensor:
        """(B, 2) to log-densities (B,) in nats."""
        read, moved = points[:, 1], points[:, 0]
        logdet = torch.zeros_like(read)
        for function, (shift, log_scale) in zip(self.functions, self.first, strict=True):
            mu, log_sigma = function(read).unbind(1)
            log_sigma = 4 * torch.tanh(log_sigma / 4)
            logdet = logdet - log_sigma - log_scale
            # The next block reads what this one has moved.
            read, moved = (moved - mu) * torch.exp(-log_sigma), (read - shift) * torch.exp(-log_scale)
        return logdet - 0.5 * (read.square() + moved.square()) - math.log(2 * math.pi)


class Waves(nn.Module):
    """A linear map of numbers, and of their sines and cosines at fixed random frequencies (arXiv 2006.10739)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("frequencies", 3 * torch.randn(linear.in_features, WAVES))
        self.mix = nn.Linear(2 * WAVES, linear.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        """Whose precision the block computes in."""
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., W)."""
        angles = x @ self.get_buffer("frequencies")
        mapped: Tensor = self.linear(x) + self.mix(torch.cat([angles.sin(), angles.cos()], -1))
        return mapped


class Transformer(nn.Module):
    """A STARFlow on sequences of N numbers: pictures of one row."""

    def __init__(self, numbers: int, blocks: int, width: int) -> None:
        super().__init__()
        side = math.isqrt(numbers - 1) + 1
        self.shape = (1, side, side) if side * side == numbers else (1, 1, numbers)
        self.flow = STARFlow(
            STARFlowConfig(
                in_channels=1,
                img_size=side,
                channels=width,
                num_blocks=blocks,
                layers_per_block=LAYERS // blocks,
                head_dim=32,
                seq_order="L2R" if numbers == 2 else "R2L",  # the first block reads a series as it was made
            )
        )
        for block in self.flow.iter_blocks():
            block.proj_in = Waves(block.proj_in)  # type: ignore[assignment]

    def forward(self, points: Tensor) -> Tensor:
        """(B, N) to log-densities (B,) in nats."""
        nats: Tensor = self.flow.log_prob(points.reshape(-1, *self.shape))
        return nats


def train(density: Density, kind: str, blocks: int, seed: int, budget: Budget, folder: Path) -> Measurements:
    """One flow; its gap to the density's entropy on points that it has not seen, in nats, and its curve."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(1000 + seed)
    free, steps, batch, lr = kind == "free", budget.steps, budget.batch, budget.lr
    model: nn.Module
    if free:
        model, steps, batch, lr = FreeFlow(blocks), 2 * steps, 4 * batch, 3 * lr / max(1.0, blocks / 3)
    else:
        model = Transformer(density.numbers, blocks, budget.width)
        batch = batch if density.numbers == 2 else batch // 4
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps))
    unseen = density.draw(budget.heldout, torch.Generator().manual_seed(1))
    curve, started = [], time.process_time()
    for step in range(steps):
        update(model, optimiser, density.draw(batch, draw))
        schedule.step()
        if (step + 1) % max(1, steps // 10) == 0:
            gaps = log_ratios(model, density, unseen[: len(unseen) // 8])
            curve.append([(step + 1) / steps, float(gaps.mean()), total_variation(gaps)])
    gaps = log_ratios(model, density, unseen)
    if seed == budget.seeds[0] and density.numbers == 2:
        _save_picture(folder, density, model, f"{kind}-{blocks}")
    return {
        "gap": float(gaps.mean()),
        "error": float(gaps.std() / math.sqrt(len(gaps))),
        "total_variation": total_variation(gaps),
        "curve": curve,
        "cpu_seconds": time.process_time() - started,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def update(model: nn.Module, optimiser: torch.optim.Optimizer, points: Tensor) -> None:
    """One step down the mean of -log q over draws (B, N) of the density."""
    loss = -model(points.float()).mean()
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()


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


@torch.no_grad()
def log_ratios(model: HasLogProb, density: Density, points: Tensor) -> Tensor:
    """log p - log q of the density's own points: their mean is the flow's excess over the entropy, KL(p || q)."""
    parts = [model(some.float()) for some in points.split(2000)]
    return density.log_prob(points) - torch.cat(parts).double()


@torch.no_grad()
def _save_picture(folder: Path, density: Density, model: HasLogProb, name: str) -> None:
    """The flow's density on a grid, for the plot."""
    log_prob = torch.cat([model(some) for some in _grid().split(2000)])
    write_tensors(
        folder / "pictures" / f"{density.name}-{name}.safetensors", {"density": log_prob.exp().view(GRID, GRID)}
    )


def _grid() -> Tensor:
    axis = (torch.arange(GRID) + 0.5) / GRID * 2 * HALF - HALF
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], -1).view(-1, 2)


def table(found: Found, key: str, title: str, limits: dict[str, float] | None) -> Table:
    """One measure by density and flow, mean and standard error over seeds."""
    flows = list(next(iter(found.values())))
    rows = [[title, *(["best of any single block"] if limits else []), *(f"{flow} blocks" for flow in flows)]]
    for name, by_flow in found.items():
        limit = [f"{limits[name]:.4g}"] if limits else []
        rows.append([name, *limit, *(str(mean_over_seeds(by_flow[flow], key)) for flow in flows)])
    return rows


def draw_plot(path: Path, experiment: Experiment, found: Found, limits: dict[str, float]) -> None:
    """The densities a row each, all flows beside the truth where it lies in the plane, and their curves."""
    from experiments.plots import figure, save

    drawn, axes = figure(len(found), len(experiment.flows) + 2, 2.1)
    for row, density in zip(axes, experiment.densities, strict=True):
        _curves(row[-1], found[density.name], limits[density.name])
        if density.numbers > 2:
            row[0].set_title(f"{density.name} of {density.numbers}", fontsize=7)
            for axis in row[:-1]:
                axis.axis("off")
            continue
        truth = density.log_prob(_grid()).exp().view(GRID, GRID)
        _panel(row[0], truth, f"{density.name}, true", float(truth.max()))
        for axis, flow in zip(row[1:], experiment.flows, strict=False):
            name = f"{density.name}-{flow.replace(' ', '-')}"
            picture = read_tensors(path.parent / "pictures" / f"{name}.safetensors")["density"]
            gap = mean_over_seeds(found[density.name][flow], "gap").value
            _panel(axis, picture, f"{flow} blocks: {gap:.2f} nats", float(truth.max()))
    save(drawn, path)


def _panel(axis: Any, density: Tensor, title: str, most: float) -> None:
    axis.imshow(density.numpy(), origin="lower", extent=(-HALF, HALF) * 2, vmin=0, vmax=most, cmap="magma")
    axis.set_title(title, fontsize=7)
    axis.set(xticks=[], yticks=[])


def _curves(axis: Any, by_flow: dict[str, list[Measurements]], limit: float) -> None:
    """Held-out gaps over the share of the updates, all seeds; dotted is one block's limit."""
    for number, (flow, cells) in enumerate(by_flow.items()):
        for one in cells:
            shares, gaps, _ = zip(*one["curve"], strict=True)
            axis.plot(shares, gaps, color=f"C{number}", linewidth=0.8, label=flow if one is cells[0] else None)
    axis.axhline(limit, color="grey", linewidth=0.8, linestyle=":")
    axis.set_title("nats by share of updates", fontsize=7)
    axis.set(yscale="log")
    axis.legend(fontsize=5)
    axis.tick_params(which="both", labelsize=6)
