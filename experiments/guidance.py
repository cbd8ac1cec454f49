"""Claim: guidance by the product of Gaussians stays good at large weights where linear extrapolation breaks.

One class-conditional flow a seed is sampled at every weight by both rules, from the same noise. Samples are judged by
the distance of their features to held-out pictures and by whether a likelihood classifier, the flow of the next
seed (never the one that drew them), finds the class that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from experiments.cells import SEEDS, Cell, Mean, Result, cell, keep_budget
from experiments.fashion import heldout_curve, prepare, reference_features, trained
from starflow.data.images import from_pil
from starflow.data.sets.fashion_mnist import CLASSES
from starflow.evaluate import Extractor, classify, extract, kernel_distance, load_extractor
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
Found = dict[Rule, dict[float, list[Cell]]]


def run(
    folder: Path, budget: Budget, say: Callable[[str], None], command: str, data: Path | None, device: torch.device
) -> Result:
    """Compute the cells that are missing, draw the plot, and say what the numbers say."""
    keep_budget(folder, budget)
    shared = prepare(folder, RECIPE, data, budget.train, budget.heldout, device)
    extractor = load_extractor()
    extractor.network.to(device)
    pipelines = {}
    for seed in budget.seeds:
        say(f"model {seed}")
        overrides = {"train.seed": str(seed), "train.steps": str(budget.steps)}
        pipelines[seed] = trained(shared, folder / "runs" / str(seed), RECIPE, overrides, device)
    found: Found = {rule: {weight: [] for weight in budget.weights} for rule in RULES}
    for place, seed in enumerate(budget.seeds):
        judge = pipelines[budget.seeds[(place + 1) % len(budget.seeds)]]
        for weight in budget.weights:
            for rule in RULES:
                name = f"{rule if weight else 'unguided'}-{weight:g}-{seed}"
                found[rule][weight].append(
                    cell(
                        folder,
                        name,
                        lambda seed=seed, weight=weight, rule=rule, judge=judge: compute(  # type: ignore[misc]
                            pipelines[seed], judge, weight, rule, budget, shared, extractor
                        ),
                        say,
                    )
                )
    curves = [heldout_curve(folder / "runs" / str(seed)) for seed in budget.seeds]
    draw_plot(folder, found, curves)
    title = "Gaussian against linear guidance"
    values = {
        "cells": {rule: {f"{weight:g}": cells for weight, cells in found[rule].items()} for rule in RULES},
        "curves": curves,
        "budget": vars(budget),
    }
    return Result(NAME, title, CLAIM, verdict(found, curves), table(found), command, values)


def compute(
    pipeline: StarFlowPipeline,
    judge: StarFlowPipeline,
    weight: float,
    rule: Rule,
    budget: Budget,
    shared: Path,
    extractor: Extractor,
) -> Cell:
    """Samples at one weight by one rule: distance, and agreement with the class asked for."""
    wanted = [index % len(CLASSES) for index in range(budget.samples)]
    prompts = [CLASSES[number] for number in wanted]
    made = pipeline(prompts, guidance=weight, guidance_rule=rule, seed=0, batch_size=50)
    finite = made.latents.isfinite().flatten(1).all(1).cpu()
    pictures = torch.cat([from_pil(image) for image in made.images])[finite]
    labels = torch.tensor(wanted)[finite]
    values: Cell = {
        "not_finite": int((~finite).sum()),
        "largest": float(made.latents[finite.to(made.latents.device)].abs().amax()),
    }
    if len(pictures) < 2:
        return {**values, "kid_mobilenetv2": None, "agreement": 0.0}
    features = extract(extractor, pictures.split(50)).features
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


def _mean(cells: list[Cell], key: str) -> Mean:
    values = [float(found[key]) for found in cells if found[key] is not None]
    return Mean.of(values or [float("inf")])


def shape_of(values: list[tuple[float, float]]) -> dict[str, Any]:
    """Where a curve over weights dips, and how high it rises after: (weight, distance), weights rising."""
    best = min(values, key=lambda pair: pair[1])
    after = [pair for pair in values if pair[0] >= best[0]]
    worst = max(after, key=lambda pair: pair[1])
    return {"best_weight": best[0], "best": best[1], "worst_after": worst[0], "worst": worst[1], "last": values[-1][1]}


def verdict(found: Found, curves: list[list[tuple[int, float, float]]]) -> str:
    """Plain sentences from the numbers alone."""
    shapes, sentences = {}, []
    for rule in RULES:
        distances = {weight: _mean(cells, "kid_mobilenetv2") for weight, cells in found[rule].items()}
        one = shapes[rule] = shape_of([(weight, mean.value) for weight, mean in distances.items()])
        last = max(distances)
        broken = sum(int(cell["not_finite"]) for cells in found[rule].values() for cell in cells)
        end = distances[last]
        agreement = [100 * _mean(found[rule][weight], "agreement").value for weight in (0.0, last)]
        sentences.append(
            f"{rule.capitalize()}: the distance (kid_mobilenetv2 x 1000) is lowest at w = {one['best_weight']:g} with "
            f"{1000 * one['best']:.1f}, and {1000 * end.value:.1f} ± {1000 * end.error:.1f} at w = {last:g}; agreement "
            f"with the class goes from {agreement[0]:.0f} % unguided to {agreement[1]:.0f} %; {broken} samples in all "
            "were not finite."
        )
    head = _head(shapes, {rule: _mean(found[rule][max(found[rule])], "kid_mobilenetv2") for rule in RULES})
    fell = [curve[-2][1] - curve[-1][1] for curve in curves if len(curve) > 1]
    state = "still fell" if not fell or max(fell) > 0.005 else "were flat"
    return " ".join([head, *sentences, f"The held-out curves of the models {state} at the end."])


def _head(shapes: dict[Rule, dict[str, Any]], ends: dict[Rule, Mean]) -> str:
    """Whether the claim shows; `ends` are the distances at the largest weight."""
    noise = 2 * (ends["linear"].error + ends["gaussian"].error)
    lead = ends["linear"].value - ends["gaussian"].value
    if lead < -noise:
        return "The claim does not show at this size: at the largest weight the gaussian rule is the worse one."
    if lead <= noise:
        return "The claim does not show at this size: at the largest weight the two rules are not told apart."
    if shapes["linear"]["worst"] > 2 * max(shapes["linear"]["best"], 1e-4):
        return "The claim shows: the linear rule dips and then spikes, and the gaussian one ends lower."
    rises = {rule: 100 * (ends[rule].value / max(shapes[rule]["best"], 1e-4) - 1) for rule in RULES}
    return (
        "The claim shows, but for the height of the spike: at the largest weight the linear rule is "
        f"{rises['linear']:.0f} % above its lowest distance (a spike would be twice it), the gaussian one "
        f"{rises['gaussian']:.0f} %, and it ends lower."
    )


def table(found: Found) -> list[list[str]]:
    """Distance and agreement by weight and rule."""
    rows = [["w", *(f"{what}, {rule}" for rule in RULES for what in ("kid_mobilenetv2 x 1000", "agreement, %"))]]
    for weight in found["gaussian"]:
        cells = [f"{weight:g}"]
        for rule in RULES:
            some = found[rule][weight]
            distances = [1000 * float(one["kid_mobilenetv2"]) for one in some if one["kid_mobilenetv2"] is not None]
            cells.append(str(Mean.of(distances)) if distances else "none finite")
            cells.append(str(Mean.of([100 * float(one["agreement"]) for one in some])))
        rows.append(cells)
    return rows


def draw_plot(folder: Path, found: Found, curves: list[list[tuple[int, float, float]]]) -> None:
    """Distance and agreement over the weight, and the models' held-out curves."""
    from experiments.plots import figure, save

    made, axes = figure(1, 3, 3.4)
    for number, rule in enumerate(RULES):
        weights = list(found[rule])
        for axis, key, scale in ((axes[0][0], "kid_mobilenetv2", 1000), (axes[0][1], "agreement", 100)):
            means = [_mean(found[rule][weight], key) for weight in weights]
            values, errors = [scale * one.value for one in means], [scale * one.error for one in means]
            axis.errorbar(weights, values, errors, color=f"C{number}", label=rule, capsize=2, linewidth=1)
    axes[0][0].set(title="kid_mobilenetv2 x 1000", xlabel="guidance weight", yscale="symlog")
    axes[0][1].set(title="agreement with the class, %", xlabel="guidance weight")
    axes[0][0].legend(fontsize=8)
    for curve in curves:
        axes[0][2].plot([one[0] for one in curve], [one[1] for one in curve], color="grey", linewidth=1)
    axes[0][2].set(title="held-out nats/dim by update", xlabel="update")
    save(made, folder / f"{NAME}.png")
