"""The decoder experiment fine-tunes a decoder on noisy latents, by the squared error alone and by the full loss.

Both runs start from the same autoencoder and see the same crops of the glyphs with the same noise, in the same order;
held-out pictures are measured whole, before and after. A third run may show what more updates of the squared
error give.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.results import Result, Table, check_budget
from starflow.train.run import read_log
from starflow.train.settings import TrainSettings
from starflow.train.tasks.decoder import DecoderLoss
from starflow.train.tasks.decoder_run import DecoderReport, DecoderSettings, run_decoder

NAME = "decoder"
BAR = 25.0
"""dB that the squared error alone should reach, for TAESD at noise 0.3 and 128 px, from 21.3."""
CLAIM = (
    "A decoder fine-tuned on noisy latents, the encoder frozen, takes the noise of a flow's samples away at no cost in "
    "sampling (STARFlow, arXiv 2506.06276, section 3.3)."
)
Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Budget:
    """How much is computed."""

    steps: int = 640
    batch: int = 4
    lr: float = 1e-3
    size: int = 128
    crop: int = 96
    noise: float = 0.3
    pictures: int = 800
    report: int = 96
    heldout: int = 16
    longer: int = 0
    """Updates of one more run, by the squared error alone; 0 is none."""


QUICK = Budget(steps=4, longer=6, batch=2, size=32, crop=16, pictures=4, report=4, heldout=2)
LOSSES = {"L2": DecoderLoss(perceptual=0, adversarial=0), "full loss": DecoderLoss()}
LONGER = "L2, longer"
FOLDERS = {"L2": "l2", "full loss": "full", LONGER: "longer"}


def run(
    folder: Path,
    budget: Budget,
    log: Callable[[str], None],
    command: str,
    autoencoder: str,
    data: Path,
    device: torch.device,
) -> Result:
    """Train what is missing, draw the curves, and say what the numbers say.

    Raises:
        UserError: no such autoencoder or glyphs, or the folder was started with another budget.
    """
    check_budget(folder, dataclasses.replace(budget, longer=0))  # a longer run may come later, or grow
    reports: dict[str, DecoderReport] = {}
    curves: dict[str, Curve] = {}
    runs = {name: settings(budget, loss, autoencoder, data) for name, loss in LOSSES.items()}
    if budget.longer:
        more = dataclasses.replace(budget, steps=budget.longer)
        runs[LONGER] = settings(more, LOSSES["L2"], autoencoder, data)
    for name, one in runs.items():
        log(f"decoder by {name}")
        where = folder / FOLDERS[name]
        _link_shared(folder / FOLDERS["L2"], where)
        reports[name] = run_decoder(one, where, device)
        curves[name] = curve_of(where, budget.noise)
    draw_plot(folder, curves, reports, budget.heldout)
    values = {
        "measures": {name: one.measures for name, one in reports.items()},
        "curves": curves,
        "budget": vars(budget),
    }
    title = "A decoder for noisy latents"
    return Result(NAME, title, CLAIM, [table(reports, budget)], command, values)


def settings(budget: Budget, loss: DecoderLoss, autoencoder: str, data: Path) -> DecoderSettings:
    """One run, as `starflow train-decoder` would make it; the critic starts half-way."""
    return DecoderSettings(
        model=autoencoder,
        data=str(data),
        noise_std=budget.noise,
        size=budget.size,
        crop=budget.crop,
        pictures=budget.pictures,
        report=budget.report,
        heldout=budget.heldout,
        loss=dataclasses.replace(loss, adversarial_from=budget.steps // 2) if loss.adversarial else loss,
        train=TrainSettings(
            steps=budget.steps,
            batch=budget.batch,
            lr=budget.lr,
            warmup=min(100, budget.steps // 10),
            evaluate_every=max(1, budget.steps // 8),
            sample_every=max(1, budget.steps // 8),
            checkpoint_every=40,
            average=max(0.0, min(0.995, 1 - 20 / budget.steps)),
        ),
    )


def _link_shared(first: Path, other: Path) -> None:
    """Link what all runs compute alike: pictures, their latents, and the old decoder's measures."""
    other.mkdir(parents=True, exist_ok=True)
    for name in ("views.safetensors", "views.jsonl", "latents.safetensors", "before.json"):
        if (first / name).is_file() and not (other / name).exists():
            os.link(first / name, other / name)


def curve_of(folder: Path, noise: float) -> Curve:
    """Update and dB at the noise of every evaluation on the way."""
    key = f"heldout_psnr_noise_{noise:g}"
    return [(line["step"], line[key]) for line in read_log(folder / "log.jsonl") if key in line]


def table(reports: dict[str, DecoderReport], budget: Budget) -> Table:
    """Every measure before, and after each run."""
    rows = [["measure", "before", *reports]]
    for name, (before, _) in reports["L2"].measures.items():
        rows.append([name, f"{before:.2f}", *(f"{report.measures[name][1]:.2f}" for report in reports.values())])
    rows.append(["updates", "0", *(f"{budget.longer if name == LONGER else budget.steps:,}" for name in reports)])
    rows.append(["held-out pictures", f"{reports['L2'].count}", *(f"{one.count}" for one in reports.values())])
    return rows


def draw_plot(folder: Path, curves: dict[str, Curve], reports: dict[str, DecoderReport], heldout: int) -> None:
    """dB over the updates, and the last samples' sheet of each run."""
    from PIL import Image

    from experiments.plots import figure, save

    drawn, axes = figure(1, 1 + len(reports), 3.8)
    first: Any = axes[0][0]
    for name, curve in curves.items():
        first.plot([step for step, _ in curve], [value for _, value in curve], label=name)
    first.axhline(BAR, color="grey", linestyle=":", linewidth=1)
    first.set(title=f"dB at the noise of {heldout} held-out pictures", xlabel="update", xscale="log")
    first.legend(fontsize=8)
    for axis, name in zip(axes[0][1:], reports, strict=True):
        sheet = sorted((folder / FOLDERS[name] / "samples").glob("*.png"))[-1]
        axis.imshow(Image.open(sheet))
        axis.set(title=f"{name}: held out, decoded, with noise", xticks=[], yticks=[])
    save(drawn, folder / f"{NAME}.png")
