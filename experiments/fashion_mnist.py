"""The second data set: a class-conditional TarFlow on the pixels of Fashion-MNIST, for exact bits of 8-bit pictures.

One model of `recipes/fashion-mnist.yaml` is measured as a density, as a classifier (argmax_c log p(x | c)), as a
detector of MNIST's digits and by its samples. One seed: nothing is compared that its noise could decide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.cells import Cell, Result, cell, keep_budget
from experiments.fashion import heldout_curve, prepare, trained
from starflow.data.images import from_pil
from starflow.data.sets.fashion_mnist import CLASSES
from starflow.evaluate import load_extractor
from starflow.evaluate.dataset import DIGITS, FASHION_MNIST, EvaluationSet, open_evaluation_set, open_foreign
from starflow.evaluate.likelihood import measure_classification, measure_likelihoods, measure_outliers
from starflow.evaluate.samples import SampleMeasurements
from starflow.evaluate.settings import EvaluationSettings
from starflow.pipeline.pipeline import StarFlowPipeline

NAME = "fashion-mnist"
RECIPE = Path("recipes/fashion-mnist.yaml")
SIDE = 28
GRID_SEEDS = 8
CLAIM = (
    "One exact density of 8-bit pictures is a generator and a classifier as well (Bayes' rule, no classifier trained); "
    "as a detector of foreign pictures its raw likelihood is known to fail (Nalisnick et al., arXiv 1810.09136)."
)


@dataclass(frozen=True)
class Budget:
    """How much is computed."""

    steps: int = 4500
    pictures: int = 0
    """Test pictures, at most, of every likelihood; 0 is all 10,000."""
    draws: int = 4
    samples: int = 500
    guidance: float = 1.0
    train: int = 60_000
    heldout: int = 1000
    """Test pictures of the curve on the way."""


QUICK = Budget(steps=4, pictures=20, draws=2, samples=8, train=256, heldout=32)


def run(
    folder: Path, budget: Budget, say: Callable[[str], None], command: str, data: Path | None, device: torch.device
) -> Result:
    """Train what is missing of the model, measure it, draw the plot, and say what the numbers say."""
    keep_budget(folder, budget)
    shared = prepare(folder, RECIPE, data, budget.train, budget.heldout, device)
    say("model")
    overrides = {
        "train.steps": str(budget.steps),
        "train.warmup": str(min(200, budget.steps // 10)),
        "train.compile": str(budget.steps >= 1000).lower(),  # compiling takes as long as some hundred updates
        "train.evaluate_every": str(max(1, budget.steps // 6)),
    }
    pipeline = trained(shared, folder / "run", RECIPE, overrides, device)
    pictures = open_evaluation_set(str(data) if data else FASHION_MNIST, SIDE)
    parts: dict[str, Callable[[], Cell]] = {
        "bits": lambda: bits_of(pipeline, pictures, budget),
        "classifier": lambda: asdict(measure_classification(pipeline, pictures.heldout, budget.pictures, 1)),
        "outliers": lambda: asdict(measure_outliers(pipeline, pictures, open_foreign(DIGITS, SIDE), budget.pictures)),
        "distances": lambda: distances_of(pipeline, pictures, budget),
    }
    found = {name: cell(folder, name, compute, say) for name, compute in parts.items()}
    curve = heldout_curve(folder / "run")
    draw_plot(folder, curve, found, sample_grid(pipeline, budget.guidance))
    title = "Fashion-MNIST: one density, four uses"
    values = {"cells": found, "curve": curve, "budget": vars(budget)}
    return Result(NAME, title, CLAIM, verdict(found, curve), table(found), command, values)


def bits_of(pipeline: StarFlowPipeline, pictures: EvaluationSet, budget: Budget) -> Cell:
    """Bits/dim of both splits, each picture told its class."""
    both = measure_likelihoods(pipeline, pictures, budget.pictures, budget.draws)
    return {split: asdict(found) for split, found in both.items()}


def distances_of(pipeline: StarFlowPipeline, pictures: EvaluationSet, budget: Budget) -> Cell:
    """Kernel distance and its like of samples without and with guidance, beside the floor."""
    plan = EvaluationSettings(samples=budget.samples, references=budget.samples)
    measured = SampleMeasurements.of(pipeline, pictures, load_extractor(), plan)
    return {
        "floor": measured.floor(),
        "samples, unguided": measured.samples(budget.samples, 0.0),
        f"samples, guidance {budget.guidance:g}": measured.samples(budget.samples, budget.guidance),
    }


def sample_grid(pipeline: StarFlowPipeline, guidance: float) -> Tensor:
    """A row of `GRID_SEEDS` pictures a class, (rows * height, columns * width) in [0, 1]."""
    prompts = [name for name in CLASSES for _ in range(GRID_SEEDS)]
    made = torch.cat([from_pil(image)[:, 0] for image in pipeline(prompts, guidance=guidance, seed=0).images])
    rows = made.view(len(CLASSES), GRID_SEEDS, SIDE, SIDE).transpose(1, 2)
    return (rows.reshape(len(CLASSES) * SIDE, GRID_SEEDS * SIDE) + 1) / 2


def verdict(found: dict[str, Cell], curve: list[tuple[int, float, float]]) -> str:
    """Plain sentences from the numbers alone."""
    test, train = found["bits"]["heldout"], found["bits"]["train"]
    classifier, outliers = found["classifier"], found["outliers"]
    raw, typical = outliers["auroc_likelihood"], outliers["auroc_typicality"]
    if raw < 0.5:
        known = "the known failure: the model finds the digits likelier than its own test pictures"
    else:
        known = "the known failure does not show here"
    last = curve[-2][1] - curve[-1][1] if len(curve) > 1 else 1.0
    return (
        f"Test pictures take {test['bits_per_dim']:.4f} ± {test['error']:.4f} bits/dim (8-bit pixels, "
        f"{test['count']:,} pictures, {test['draws']} draws of the dequantisation, which alone cause "
        f"± {test['draw_error'] or 0:.5f}), training pictures {train['bits_per_dim']:.4f} ± {train['error']:.4f}. The "
        f"likelihood classifier is right on {100 * classifier['accuracy']:.2f} % of {classifier['count']:,} test "
        f"pictures. Against MNIST's digits raw likelihood has an AUROC of {raw:.4f} ({known}), typicality "
        f"{typical:.4f}. After {curve[-1][0]:,} updates the held-out curve "
        f"{'still fell' if last > 0.005 else 'was flat'}."
    )


def table(found: dict[str, Cell]) -> list[list[str]]:
    """Distances of the samples beside their floor."""
    rows = [["set", "pictures", "not finite", "kid_mobilenetv2 x 1000", "precision", "recall", "density", "coverage"]]
    for name, one in found["distances"].items():
        shares = [f"{one[key]:.3f}" if key in one else "" for key in rows[0][4:]]
        kernel = f"{1000 * one['kid_mobilenetv2']:.1f}" if "kid_mobilenetv2" in one else "none finite"
        rows.append([name, f"{one['count']:,}", f"{one['not_finite']}", kernel, *shares])
    return rows


def draw_plot(folder: Path, curve: list[tuple[int, float, float]], found: dict[str, Cell], grid: Tensor) -> None:
    """The curve, the classifier's confusions and samples by class."""
    from experiments.plots import figure, save

    made, axes = figure(1, 3, 3.8)
    bits, confusion, samples = axes[0]
    for place, label in ((1, "test"), (2, "training")):
        bits.plot([one[0] for one in curve], [one[place] / 0.6931471805599453 for one in curve], label=label)
    bits.set(title="bits/dim by update", xlabel="update")
    bits.legend(fontsize=8)
    counts = torch.tensor(found["classifier"]["confusion"]).double()
    confusion.imshow(counts / counts.sum(1, keepdim=True).clamp_min(1), cmap="Blues", vmin=0, vmax=1)
    confusion.set(title="likelihood classifier: class by guess", xticks=range(len(CLASSES)), yticks=range(len(CLASSES)))
    confusion.set_xticklabels(CLASSES, rotation=90, fontsize=7)
    confusion.set_yticklabels(CLASSES, fontsize=7)
    samples.imshow(grid, cmap="gray", vmin=0, vmax=1)
    samples.set(title="samples, a class a row", xticks=[], yticks=[])
    save(made, folder / f"{NAME}.png")
