"""The guidance experiment compares the product of Gaussians with linear extrapolation at weights from 0 to 8.

One class-conditional flow a seed is sampled at every weight by both rules, from the same noise. Samples are judged by
the distance of their features to held-out pictures and by whether a likelihood classifier, the flow of the next
seed (never the one that drew them), finds the class that was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from experiments.fashion_runs import heldout_curve, prepare, reference_features, trained
from experiments.results import SEEDS, Measurements, Result, Table, check_budget, mean_over_seeds, measure_once
from starflow.data.images import from_pil
from starflow.data.sets.small import CLASSES
from starflow.evaluate import FeatureExtractor, classify, extract_features, kernel_distance, load_extractor
from starflow.pipeline.pipeline import StarFlowPipeline

NAME = "guidance"
RECIPE = Path("recipes/claims/guidance.yaml")
Rule = Literal["gaussian", "linear"]
RULES: tuple[Rule, ...] = ("gaussian", "linear")
CLAIM = (
    "Linear extrapolation of the outputs breaks down at large weights; the Gaussian that results from "
    "p_c^(1+w) / p_u^w keeps its quality over a wide range of w (STARFlow, arXiv 2506.06276)."
)


@dataclass(frozen=True)
class Budget:
    """How much is computed."""

    steps: int = 1000
    samples: int = 250
    references: int = 1000
    weights: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
    train: int = 60_000
    heldout: int = 1000
    seeds: tuple[int, ...] = SEEDS


QUICK = Budget(steps=4, samples=10, references=16, weights=(0.0, 2.0, 8.0), train=256, heldout=32, seeds=(0, 1))
Found = dict[Rule, dict[float, list[Measurements]]]


def run(
    folder: Path, budget: Budget, log: Callable[[str], None], command: str, data: Path | None, device: torch.device
) -> Result:
    """Compute the cells that are missing, draw the plot, and put the numbers into tables."""
    check_budget(folder, budget)
    shared = prepare(folder, RECIPE, data, budget.train, budget.heldout, device)
    extractor = load_extractor()
    extractor.network.to(device)
    pipelines = {}
    for seed in budget.seeds:
        log(f"model {seed}")
        overrides = {"train.seed": str(seed), "train.steps": str(budget.steps)}
        pipelines[seed] = trained(shared, folder / "runs" / str(seed), RECIPE, overrides, device)
    found: Found = {rule: {weight: [] for weight in budget.weights} for rule in RULES}
    for place, seed in enumerate(budget.seeds):
        judge = pipelines[budget.seeds[(place + 1) % len(budget.seeds)]]
        for weight in budget.weights:
            for rule in RULES:
                name = f"{rule if weight else 'unguided'}-{weight:g}-{seed}"
                work = partial(compute, pipelines[seed], judge, weight, rule, budget, shared, extractor)
                found[rule][weight].append(measure_once(folder, name, work, log))
    curves = [heldout_curve(folder / "runs" / str(seed)) for seed in budget.seeds]
    draw_plot(folder, found, curves)
    title = "Gaussian against linear guidance"
    values = {
        "cells": {rule: {f"{weight:g}": cells for weight, cells in found[rule].items()} for rule in RULES},
        "curves": curves,
        "budget": vars(budget),
    }
    return Result(NAME, title, CLAIM, [table(found)], command, values)


def compute(
    pipeline: StarFlowPipeline,
    judge: StarFlowPipeline,
    weight: float,
    rule: Rule,
    budget: Budget,
    shared: Path,
    extractor: FeatureExtractor,
) -> Measurements:
    """Samples at one weight by one rule: distance, and agreement with the class asked for."""
    wanted = [index % len(CLASSES) for index in range(budget.samples)]
    prompts = [CLASSES[number] for number in wanted]
    made = pipeline(prompts, guidance=weight, guidance_rule=rule, seed=0, batch_size=50)
    finite = made.latents.isfinite().flatten(1).all(1).cpu()
    pictures = torch.cat([from_pil(image) for image in made.images])[finite]
    labels = torch.tensor(wanted)[finite]
    values: Measurements = {
        "not_finite": int((~finite).sum()),
        "largest": float(made.latents[finite.to(made.latents.device)].abs().amax()),
    }
    if len(pictures) < 2:
        return {**values, "kid_mobilenetv2": None, "agreement": 0.0}
    features = extract_features(extractor, pictures.split(50)).features
    references = reference_features(shared, extractor, budget.references)
    values["kid_mobilenetv2"] = kernel_distance(features, references).value
    # A sample that is not finite shows nothing, so it agrees with nothing.
    values["agreement"] = judged(judge, pictures, labels) * len(pictures) / len(wanted)
    return values


def judged(judge: StarFlowPipeline, pictures: Tensor, labels: Tensor) -> float:
    """The share of pictures whose likeliest class, under another flow, is the one asked for."""
    rows = []
    for start in range(0, len(pictures), 50):
        some = pictures[start : start + 50].to(judge.device)
        seeds = range(start, start + len(some))
        rows.append(torch.stack([judge.log_probs(some, [name] * len(some), seeds)[0].cpu() for name in CLASSES], 1))
    return classify(torch.cat(rows).double(), labels).accuracy


def table(found: Found) -> Table:
    """Distance, agreement and broken samples by weight and rule."""
    measures = ("kid_mobilenetv2 x 1000", "agreement, %", "samples not finite")
    rows = [["w", *(f"{measure}, {rule}" for rule in RULES for measure in measures)]]
    for weight in found["gaussian"]:
        cells = [f"{weight:g}"]
        for rule in RULES:
            some = found[rule][weight]
            distance = mean_over_seeds(some, "kid_mobilenetv2", 1000)
            cells.append(str(distance) if math.isfinite(distance.value) else "none finite")
            cells.append(str(mean_over_seeds(some, "agreement", 100)))
            cells.append(str(sum(one["not_finite"] for one in some)))
        rows.append(cells)
    return rows


def draw_plot(folder: Path, found: Found, curves: list[list[tuple[int, float, float]]]) -> None:
    """Distance and agreement over the weight, and the models' held-out curves."""
    from experiments.plots import figure, save

    drawn, axes = figure(1, 3, 3.4)
    for number, rule in enumerate(RULES):
        weights = list(found[rule])
        for axis, key, scale in ((axes[0][0], "kid_mobilenetv2", 1000), (axes[0][1], "agreement", 100)):
            means = [mean_over_seeds(found[rule][weight], key, scale) for weight in weights]
            values, errors = [one.value for one in means], [one.error for one in means]
            axis.errorbar(weights, values, errors, color=f"C{number}", label=rule, capsize=2, linewidth=1)
    axes[0][0].set(title="kid_mobilenetv2 x 1000", xlabel="guidance weight", yscale="symlog")
    axes[0][1].set(title="agreement with the class, %", xlabel="guidance weight")
    axes[0][0].legend(fontsize=8)
    for curve in curves:
        axes[0][2].plot([one[0] for one in curve], [one[1] for one in curve], color="grey", linewidth=1)
    axes[0][2].set(title="held-out nats/dim by update", xlabel="update")
    save(drawn, folder / f"{NAME}.png")
