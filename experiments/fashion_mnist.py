"""The Fashion-MNIST experiment measures one class-conditional flow of pixels in four ways.

One model of `recipes/fashion-mnist.yaml` is measured as a density of 8-bit pictures, as a classifier
(argmax_c log p(x | c)), as a detector of MNIST's digits and by its samples. There
is one seed: nothing is compared that its noise could decide.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.fashion_runs import heldout_curve, prepare, trained
from experiments.results import Measurements, Result, Table, check_budget, measure_once
from starflow.data.images import from_pil, png_log_prob
from starflow.data.sets.small import CLASSES
from starflow.data.views import TrainingViews
from starflow.evaluate import load_extractor
from starflow.evaluate.dataset import (
    DIGITS,
    FASHION_MNIST,
    EvaluationSet,
    evenly_spaced,
    open_evaluation_set,
    open_outliers,
)
from starflow.evaluate.likelihood import (
    Classification,
    measure_classification,
    measure_likelihoods,
    measure_one_pass,
    measure_outliers,
)
from starflow.evaluate.samples import SampleMeasurements
from starflow.pipeline.pipeline import StarFlowPipeline

NAME = "fashion-mnist"
RECIPE = Path("recipes/fashion-mnist.yaml")
SIDE = 28
GRID_SEEDS = 8
PUBLISHED = (
    ("Glow's bits/dim, test (Nalisnick et al., arXiv 1810.09136, figure 1)", "2.96"),
    ("on MNIST instead, an easier set: Real NVP, Glow, FFJORD", "1.06, 1.05, 0.99"),
    ("on MNIST instead: Residual Flow (Chen et al., arXiv 1906.02735)", "0.97"),
)
"""Bits/dim of 10,000 test pictures that others have published; where they were read is said in docs/results.md."""
CLAIM = (
    "One exact density of 8-bit pictures is a generator and a classifier as well (Bayes' rule, no classifier trained); "
    "as a detector of foreign pictures its raw likelihood is known to fail (Nalisnick et al., arXiv 1810.09136)."
)


@dataclass(frozen=True)
class Budget:
    """How much is computed."""

    steps: int = 24_000
    patch_size: int = 2
    """Side of the patch that is one token; patches of 4 take a quarter of the time."""
    pictures: int = 1000
    """Test pictures, at most, of every likelihood; 0 is all 10,000."""
    draws: int = 4
    samples: int = 500
    guidance: float = 1.0
    train: int = 60_000
    heldout: int = 1000
    """Test pictures of the curve on the way."""


QUICK = Budget(steps=4, pictures=20, draws=2, samples=8, train=256, heldout=32)


def run(
    folder: Path, budget: Budget, log: Callable[[str], None], command: str, data: Path | None, device: torch.device
) -> Result:
    """Train what is missing of the model, measure it, draw the plot, and put the numbers into tables."""
    check_budget(folder, budget)
    shared = prepare(folder, RECIPE, data, budget.train, budget.heldout, device)
    log("model")
    overrides = {
        "flow.patch_size": str(budget.patch_size),
        "train.steps": str(budget.steps),
        "train.warmup": str(min(200, budget.steps // 10)),
        "train.compile": str(budget.steps >= 1000).lower(),  # compiling takes as long as some hundred updates
        "train.evaluate_every": str(max(1, budget.steps // 24)),
    }
    pipeline = trained(shared, folder / "run", RECIPE, overrides, device)
    pictures = open_evaluation_set(str(data) if data else FASHION_MNIST, SIDE)
    parts: dict[str, Callable[[], Measurements]] = {
        "bits": lambda: bits_of(pipeline, pictures, budget),
        "classifier": lambda: classifier_of(measure_classification, pipeline, pictures, budget),
        "one-pass": lambda: classifier_of(measure_one_pass, pipeline, pictures, budget),
        "outliers": lambda: asdict(measure_outliers(pipeline, pictures, open_outliers(DIGITS, SIDE), budget.pictures)),
        "distances": lambda: distances_of(pipeline, pictures, budget),
    }
    found = {name: measure_once(folder, name, compute, log) for name, compute in parts.items()}
    curve = heldout_curve(folder / "run")
    draw_plot(folder, curve, found, sample_grid(pipeline, budget.guidance))
    title = "Fashion-MNIST: one density, four uses"
    values = {"cells": found, "curve": curve, "budget": vars(budget)}
    tables = [[*likelihood_table(found), *curve_rows(curve, budget)], distance_table(found)]
    return Result(NAME, title, CLAIM, tables, command, values)


def bits_of(pipeline: StarFlowPipeline, pictures: EvaluationSet, budget: Budget) -> Measurements:
    """Bits/dim of both splits, each picture told its class, and of the test pictures as PNG files."""
    both = measure_likelihoods(pipeline, pictures, budget.pictures, budget.draws)
    images = pictures.heldout.images
    nats = png_log_prob(images[evenly_spaced(len(images), budget.pictures)])
    png = float(-nats.mean()) / (both["heldout"].dimensions * math.log(2))
    return {**{split: asdict(found) for split, found in both.items()}, "png_bits_per_dim": png}


def distances_of(pipeline: StarFlowPipeline, pictures: EvaluationSet, budget: Budget) -> Measurements:
    """Kernel distance and its like of samples without and with guidance, beside the floor."""
    measured = SampleMeasurements.of(pipeline, pictures, load_extractor(), budget.samples)
    return {
        "floor": measured.measure_training_images(),
        "samples, unguided": measured.measure_samples(budget.samples, 0.0),
        f"samples, guidance {budget.guidance:g}": measured.measure_samples(budget.samples, budget.guidance),
    }


def sample_grid(pipeline: StarFlowPipeline, guidance: float) -> Tensor:
    """A row of `GRID_SEEDS` pictures a class, (rows * height, columns * width) in [0, 1]."""
    prompts = [name for name in CLASSES for _ in range(GRID_SEEDS)]
    images = pipeline(prompts, guidance=guidance, seed=0, not_finite="keep").images
    made = torch.cat([from_pil(image)[:, 0] for image in images])
    rows = made.view(len(CLASSES), GRID_SEEDS, SIDE, SIDE).transpose(1, 2)
    return (rows.reshape(len(CLASSES) * SIDE, GRID_SEEDS * SIDE) + 1) / 2


def classifier_of(
    measure: Callable[[StarFlowPipeline, TrainingViews, int, int], Classification],
    pipeline: StarFlowPipeline,
    pictures: EvaluationSet,
    budget: Budget,
) -> Measurements:
    """One way to classify the test pictures, with one draw of the dequantisation, and its processor seconds."""
    started = time.process_time()
    found = asdict(measure(pipeline, pictures.heldout, budget.pictures, 1))
    return found | {"seconds": time.process_time() - started}


def likelihood_table(found: dict[str, Measurements]) -> Table:
    """Bits per dimension of both splits, accuracy of the classifier, and areas under the detectors' ROC curves."""
    rows = [["measure", "pictures", "value"]]
    for split, name in (("heldout", "test"), ("train", "training")):
        bits = found["bits"][split]
        error = f"{bits['bits_per_dim']:.4f} ± {bits['error']:.4f}"
        rows.append([f"bits/dim of 8-bit pixels, {name}, {bits['draws']} draws", f"{bits['count']:,}", error])
        rows.append([f"caused by the draws alone, {name}", f"{bits['count']:,}", f"± {bits['draw_error'] or 0:.5f}"])
    png = f"{found['bits']['png_bits_per_dim']:.2f}"
    rows.append(["bits/dim of the test pictures as PNG files", f"{found['bits']['heldout']['count']:,}", png])
    rows += [[name, "10,000", value] for name, value in PUBLISHED]
    outliers = found["outliers"]
    counts = f"{outliers['count_inside']:,} and {outliers['count_outside']:,}"
    return [
        *rows,
        classifier_row("classified right by likelihood, a pass for each class", found["classifier"]),
        classifier_row("the same, one pass there and back", found["one-pass"]),
        ["digits by likelihood, AUROC", counts, f"{outliers['auroc_likelihood']:.4f}"],
        ["digits by typicality, AUROC", counts, f"{outliers['auroc_typicality']:.4f}"],
        ["digits by log p less PNG's, AUROC", counts, f"{outliers['auroc_ratio']:.4f}"],
        ["digits by PNG's size alone, AUROC", counts, f"{outliers['auroc_background']:.4f}"],
    ]


def curve_rows(curve: list[tuple[int, float, float]], budget: Budget) -> Table:
    """The last two evaluations on the way, which say whether training had become flat."""
    return [
        [f"test pictures on the way, {step:,} updates", f"{budget.heldout:,}", f"{heldout / math.log(2):.4f}"]
        for step, heldout, _ in curve[-2:]
    ]


def classifier_row(name: str, found: Measurements) -> list[str]:
    """Accuracy with its standard error, and processor time a picture."""
    share, count = found["accuracy"], found["count"]
    error = math.sqrt(share * (1 - share) / count)
    accuracy = f"{100 * share:.1f} ± {100 * error:.1f} %"
    return [name, f"{count:,}", f"{accuracy}, {1000 * found['seconds'] / count:.0f} ms each"]


def distance_table(found: dict[str, Measurements]) -> Table:
    """Distances of the samples beside their floor."""
    rows = [["set", "pictures", "not finite", "kid_mobilenetv2 x 1000", "precision", "recall", "density", "coverage"]]
    for name, one in found["distances"].items():
        shares = [f"{one[key]:.3f}" if key in one else "" for key in rows[0][4:]]
        kernel = f"{1000 * one['kid_mobilenetv2']:.1f}" if "kid_mobilenetv2" in one else "none finite"
        rows.append([name, f"{one['count']:,}", f"{one['not_finite']}", kernel, *shares])
    return rows


def draw_plot(
    folder: Path, curve: list[tuple[int, float, float]], found: dict[str, Measurements], grid: Tensor
) -> None:
    """The curve, the classifier's confusions and samples by class."""
    from experiments.plots import figure, save

    drawn, axes = figure(1, 3, 3.8)
    bits, confusion, samples = axes[0]
    for place, label in ((1, "test"), (2, "training")):
        bits.plot([one[0] for one in curve], [one[place] / math.log(2) for one in curve], label=label)
    bits.set(title="bits/dim by update", xlabel="update")
    bits.legend(fontsize=8)
    counts = torch.tensor(found["classifier"]["confusion"]).double()
    confusion.imshow(counts / counts.sum(1, keepdim=True).clamp_min(1), cmap="Blues", vmin=0, vmax=1)
    confusion.set(title="likelihood classifier: class by guess", xticks=range(len(CLASSES)), yticks=range(len(CLASSES)))
    confusion.set_xticklabels(CLASSES, rotation=90, fontsize=7)
    confusion.set_yticklabels(CLASSES, fontsize=7)
    samples.imshow(grid, cmap="gray", vmin=0, vmax=1)
    samples.set(title="samples, a class a row", xticks=[], yticks=[])
    save(drawn, folder / f"{NAME}.png")
