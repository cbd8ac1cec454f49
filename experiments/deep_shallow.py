"""The deep-shallow experiment compares one deep block next to the noise with blocks of equal depth.

Both variants have eight layers of one width in four blocks, so equal parameters, see the same pictures in the same
order and get equal updates. Unconditional, so that guidance plays no part.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from experiments.fashion_runs import heldout_curve, prepare, reference_features, trained, update_seconds
from experiments.results import SEEDS, Measurements, Result, Table, check_budget, mean_over_seeds, measure_once
from starflow.data.images import from_pil
from starflow.evaluate import FeatureExtractor, extract_features, kernel_distance, load_extractor
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.sampling.sampler import noise_from_seeds, sample

NAME = "deep-shallow"
RECIPE = Path("recipes/claims/deep-shallow.yaml")
VARIANTS = {"deep-shallow": "[1, 1, 1, 5]", "equal blocks": "[2, 2, 2, 2]"}
TIMED = 64
"""Pictures sampled at once for the timing."""
CLAIM = (
    "A deep block next to the noise with shallow ones next to the data does better than blocks of equal depth "
    "at equal parameters (STARFlow, arXiv 2506.06276)."
)


@dataclass(frozen=True)
class Budget:
    """How much is computed."""

    steps: int = 1000
    samples: int = 500
    references: int = 1000
    train: int = 60_000
    heldout: int = 2000
    seeds: tuple[int, ...] = SEEDS


QUICK = Budget(steps=4, samples=8, references=16, train=256, heldout=32, seeds=(0, 1))


def run(
    folder: Path, budget: Budget, log: Callable[[str], None], command: str, data: Path | None, device: torch.device
) -> Result:
    """Compute the cells that are missing, draw the plot, and put the numbers into tables."""
    check_budget(folder, budget)
    shared = prepare(folder, RECIPE, data, budget.train, budget.heldout, device)
    extractor = load_extractor()
    extractor.network.to(device)
    found: dict[str, list[Measurements]] = {}
    for variant, layers in VARIANTS.items():
        found[variant] = [
            measure_once(
                folder,
                f"{variant.replace(' ', '-')}-{seed}",
                partial(compute, shared, folder, layers, seed, budget, extractor, device),
                log,
            )
            for seed in budget.seeds
        ]
    draw_plot(folder, found)
    title = "Deep-shallow against equal blocks"
    values = {"cells": found, "budget": vars(budget)}
    return Result(NAME, title, CLAIM, [table(found)], command, values)


def compute(
    shared: Path,
    folder: Path,
    layers: str,
    seed: int,
    budget: Budget,
    extractor: FeatureExtractor,
    device: torch.device,
) -> Measurements:
    """Train one flow and measure it."""
    where = folder / "runs" / f"{layers.strip('[]').replace(', ', '-')}-{seed}"
    overrides = {
        "flow.layers_per_block": layers,
        "train.seed": str(seed),
        "train.steps": str(budget.steps),
        "train.evaluate_every": str(max(1, budget.steps // 5)),
    }
    pipeline = trained(shared, where, RECIPE, overrides, device)
    made = pipeline([""] * budget.samples, seed=1000 * seed, batch_size=64).images
    features = extract_features(
        extractor, (torch.cat([from_pil(one) for one in made[a : a + 64]]) for a in range(0, len(made), 64))
    )
    references = reference_features(shared, extractor, budget.references)
    curve = heldout_curve(where)
    return {
        "nats_per_dim": curve[-1][1],
        "train_nats_per_dim": curve[-1][2],
        "curve": curve,
        "kid_mobilenetv2": kernel_distance(features.finite_rows().features, references).value,
        "not_finite": features.not_finite,
        "update_seconds": update_seconds(where, 64),
        "sampling_seconds": sampling_seconds(pipeline, "sequential"),
        "sampling_seconds_auto": sampling_seconds(pipeline, "auto"),
        "parameters": sum(parameter.numel() for parameter in pipeline.flow.parameters()),
    }


def sampling_seconds(pipeline: StarFlowPipeline, solver: str) -> float:
    """Seconds for 64 pictures at once; the median of three after a warm-up."""
    side = pipeline.flow.config.img_size
    noise = noise_from_seeds(range(TIMED), (pipeline.flow.config.in_channels, side, side)).to(pipeline.device)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        sample(pipeline.flow, noise, solver="auto" if solver == "auto" else "sequential").cpu()
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[1]


def table(found: dict[str, list[Measurements]]) -> Table:
    """Means and standard errors over seeds."""
    heads = ["variant", "parameters", "held-out nats/dim", "training nats/dim", "kid_mobilenetv2 x 1000"]
    rows = [[*heads, "s an update", "s for 64 pictures", "the same, solver auto"]]
    for variant, cells in found.items():
        keys = ("update_seconds", "sampling_seconds", "sampling_seconds_auto")
        rows.append(
            [
                f"{variant} {VARIANTS[variant]}",
                f"{cells[0]['parameters']:,}",
                str(mean_over_seeds(cells, "nats_per_dim")),
                str(mean_over_seeds(cells, "train_nats_per_dim")),
                str(mean_over_seeds(cells, "kid_mobilenetv2", 1000)),
                *(str(mean_over_seeds(cells, key)) for key in keys),
            ]
        )
    return rows


def draw_plot(folder: Path, found: dict[str, list[Measurements]]) -> None:
    """Held-out curves, distances and times, every seed a mark."""
    from experiments.plots import figure, save

    drawn, axes = figure(1, 3, 3.4)
    curves, distances, times = axes[0]
    for number, (variant, cells) in enumerate(found.items()):
        for one in cells:
            steps, heldout, _ = zip(*one["curve"], strict=True)
            curves.plot(steps, heldout, color=f"C{number}", linewidth=1, label=variant if one is cells[0] else None)
        distances.plot([number] * len(cells), [1000 * one["kid_mobilenetv2"] for one in cells], "o", color=f"C{number}")
        for place, key in enumerate(("update_seconds", "sampling_seconds", "sampling_seconds_auto")):
            times.plot([place + 0.15 * number] * len(cells), [one[key] for one in cells], "o", color=f"C{number}")
    curves.set(title="held-out nats/dim by update", xlabel="update")
    curves.legend(fontsize=8)
    distances.set(title="kid_mobilenetv2 x 1000", xticks=range(len(found)), xticklabels=list(found), xlim=(-0.5, 1.5))
    times.set(title="seconds", yscale="log", xticks=range(3), xticklabels=["update", "64 pictures", "solver auto"])
    save(drawn, folder / f"{NAME}.png")
