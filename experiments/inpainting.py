"""Filling holes in held-out pictures: every method's log p, distance, diversity, acceptance and seconds.

A cell is some pictures of one mask by one method; its fillings lie beside its numbers. Seconds are of the process's own
CPU time, on one thread, so that they mean the same on a busy machine.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.results import Measurements, Result, check_budget, measure_once
from starflow.data.images import from_pil, make_grid, save_png, to_float, to_pil, to_uint8
from starflow.edit.inpainting import InpaintSettings, Method
from starflow.evaluate import extract_features, kernel_distance, load_extractor
from starflow.io.files import read_tensors, write_tensors
from starflow.pipeline.editing import inpaint_picture
from starflow.pipeline.likelihood import add_training_noise
from starflow.pipeline.pipeline import StarFlowPipeline

NAME = "inpainting"
CLAIM = (
    "A flow fills holes without being trained to, by Metropolis-Hastings steps in its noise (STARFlow, arXiv "
    "2506.06276, appendix D.1)."
)
FEATURE = "kid_mobilenetv2"
MASKS = ("half", "centre", "strokes", "corner")
"""The right half; a square; two thin strokes; all but a quarter."""

EVENLY, STRIDE = 48, 19
"""Pictures that lie evenly over the split, and the step that takes the first few of them evenly too."""

REACH = 4
"""Pixels over which a seam is measured: more than the feather."""


@dataclass(frozen=True)
class Budget:
    """How much is computed."""

    pictures: int = 48
    references: int = 480
    chunk: int = 3
    """Pictures a cell."""
    pairs: int = 1
    """Pictures of a cell that are filled under a second seed too, for diversity."""


QUICK = Budget(pictures=2, references=4, chunk=2)

GUIDANCE, TEMPERATURE = 3.0, 0.5
"""Of the density that every method draws from: what the bundled model draws at."""


def _settings(method: Method, steps: int = 0, candidates: int = 16, guidance: float = GUIDANCE) -> InpaintSettings:
    return InpaintSettings(method, guidance, TEMPERATURE if guidance else 1.0, candidates, steps)


# The draws of "resample" take no less than the seconds of "auto"; the chains take two and three times as long.
METHODS = {
    "auto": _settings("auto"),
    "resample": _settings("resample", candidates=18),
    "paper": _settings("paper", steps=18),
    "likeliest of 16": dataclasses.replace(_settings("resample", candidates=16), keep="likeliest"),
    "hmc": _settings("hmc", steps=14, candidates=8),
    "chain": _settings("chain", steps=18, candidates=8),
    "auto, unguided": _settings("auto", guidance=0.0),
    "resample, unguided": _settings("resample", candidates=20, guidance=0.0),
}


def mask_of(name: str, side: int) -> Tensor:
    """One of `MASKS`, (1, 1, side, side)."""
    hole = torch.zeros(1, 1, side, side, dtype=torch.bool)
    unit = side // 16
    if name == "half":
        hole[..., side // 2 :] = True
    elif name == "centre":
        hole[..., side // 4 : -side // 4, side // 4 : -side // 4] = True
    elif name == "corner":
        hole[:] = True
        hole[..., : side // 2, : side // 2] = False
    else:
        for start in (3, 12):
            hole[..., start * unit : start * unit + max(unit // 2, 1), unit:-unit] = True
    return hole


@dataclass(frozen=True)
class Material:
    """What is filled, and what the fillings are compared with."""

    pipeline: StarFlowPipeline
    images: Tensor
    """(N, 3, H, W) uint8, held out."""
    captions: list[str]
    references: Tensor
    """(M, 3, H, W) uint8, of the training split."""

    @staticmethod
    def read(budget: Budget, data: Path) -> Material:
        """The bundled model and the glyphs, some of both splits, evenly over each.

        Raises:
            UserError: no glyphs there.
        """
        from starflow.data.sources.folder import read_folder
        from starflow.data.views import ViewConfig, make_views
        from starflow.evaluate.dataset import evenly_spaced

        pipeline = StarFlowPipeline.from_pretrained("glyphs")
        size, found = pipeline.config.image_size, []
        records = read_folder(data)
        for split, count in (("heldout", budget.pictures), ("train", budget.references)):
            some = [record for record in records if record.split == split]
            chosen = evenly_spaced(len(some), budget.references if split == "train" else EVENLY)
            kept = [some[chosen[STRIDE * row % len(chosen)]] for row in range(min(count, len(chosen)))]
            found.append(make_views(kept, ViewConfig(size=size, views=1, heldout_views=1), progress=False)[0])
        return Material(pipeline, found[0].images, found[0].captions, found[1].images)


def run(
    folder: Path, budget: Budget, log: Callable[[str], None], command: str, data: Path, device: torch.device
) -> Result:
    """Compute what is missing, draw the sheet, and return the tables.

    Raises:
        UserError: no glyphs there, or the folder was started with another budget.
    """
    check_budget(folder, dataclasses.replace(budget, pictures=0))  # more pictures may come later
    torch.set_num_threads(1)
    material = Material.read(budget, data)
    material.pipeline.to(device)
    starts = range(0, budget.pictures, budget.chunk)
    for start in starts:
        for mask in MASKS:
            for method in METHODS:
                name = cell_name(method, mask, start)
                measure_once(folder, name, lambda: _fill(folder, name, material, budget, (method, mask, start)), log)  # noqa: B023
    numbers, against = collect(folder, material, starts)
    draw_sheet(folder, material, budget)
    values = {"measures": numbers, "crops of all masks": against}
    return Result(NAME, "Inpainting", CLAIM, [table(numbers), mean_table(against)], command, values)


def cell_name(method: str, mask: str, start: int) -> str:
    return f"{start:02d}-{mask}-{method.replace(',', '').replace(' ', '-')}"


def _fill(folder: Path, name: str, material: Material, budget: Budget, which: tuple[str, str, int]) -> Measurements:
    """Fill some pictures; the number of picture i is also its seed."""
    method, mask, start = which
    pipeline, hole = material.pipeline, mask_of(mask, material.images.shape[-1])
    rows: list[dict[str, float]] = []
    made, again = [], []
    for row in range(start, min(start + budget.chunk, len(material.images))):
        image, count = to_pil(to_float(material.images[row : row + 1]))[0], 2 if row - start < budget.pairs else 1
        started = time.process_time()
        out = inpaint_picture(
            pipeline, image, hole, material.captions[row], count, 1000 * row, METHODS[method], 2, None, None
        )
        seconds = (time.process_time() - started) / count
        true = float(pipeline.log_prob(image, material.captions[row], seed=1000 * row).nats)
        found = {"nats": out.log_prob[0], "acceptance": out.acceptance[0], "effective": out.effective_samples[0]}
        finite = {key: value for key, value in found.items() if math.isfinite(value)}
        rows.append({"true": true, "dimensions": out.dimensions, "seconds": seconds, **finite})
        pictures = [to_uint8(from_pil(one)) for one in out.images]
        made.append(pictures[0])
        if count > 1:
            gap = (pictures[0].float() - pictures[1].float())[hole.expand(1, 3, -1, -1)]
            again.append(float(gap.square().mean().sqrt()))
    write_tensors(folder / "fillings" / f"{name}.safetensors", {"images": torch.cat(made)}, {})
    return {"rows": rows, "diversity": again}


Numbers = dict[str, dict[str, Any]]
"""By the name of what was measured."""


def collect(folder: Path, material: Material, starts: Sequence[int]) -> tuple[Numbers, Numbers]:
    """By mask and method, all numbers; the true pictures and what the autoencoder makes of them as methods too.

    Returns:
        Those numbers, and by method the distance of crops averaged over the masks, alone and against `auto`.
    """
    extractor = load_extractor()
    numbers: Numbers = {}
    crops: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def features(images: Tensor) -> Tensor:
        return extract_features(extractor, (to_float(some) for some in images.split(32))).features

    side = material.images.shape[-1]
    with torch.no_grad():
        coded = [_reconstructed(material.pipeline, row, one) for row, one in enumerate(material.images.split(1))]
    for mask in MASKS:
        hole = mask_of(mask, side)
        rows, columns = (hole[0, 0].any(axis).nonzero().flatten() for axis in (1, 0))
        part = (..., slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
        real, real_part = features(material.references), features(material.references[part])
        pasted = torch.where(hole, torch.cat(coded), material.images)
        found: dict[str, tuple[list[Measurements], Tensor]] = {
            "true pictures": ([], material.images),
            "autoencoder": ([], pasted),
        }
        for method in METHODS:
            names = [cell_name(method, mask, start) for start in starts]
            parts = [read_tensors(folder / "fillings" / f"{name}.safetensors")["images"] for name in names]
            found[method] = ([measure_once(folder, name, dict, lambda _: None) for name in names], torch.cat(parts))
        for method, (cells, images) in found.items():
            crops.setdefault(method, []).append((features(images[part]), real_part))
            measured = {"whole": jackknife([(features(images), real)]), "crops": jackknife(crops[method][-1:])}
            numbers[f"{mask}/{method}"] = {**measured, "seam": seam(images, hole), **_summary(cells)}
    against = {method: {"mean": jackknife(of), "minus": jackknife(of, crops["auto"])} for method, of in crops.items()}
    return numbers, against


def seam(images: Tensor, hole: Tensor) -> float:
    """How much pictures change over the edge of the hole (1, 1, H, W): the mean over pixels of known colour and those
    REACH further, across the edge, in 8-bit levels. The feather and the autoencoder's own blur lie between them.

    >>> images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    >>> hole = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    >>> images[..., 4:], hole[..., 4:] = 60, True
    >>> seam(images, hole)
    60.0
    """
    changes = []
    for axis in (-1, -2):
        count = images.shape[axis] - REACH
        (one, other), (inside, beyond) = (
            (every.narrow(axis, 0, count), every.narrow(axis, REACH, count)) for every in (images.float(), hole)
        )
        changes.append((one - other).abs()[(inside != beyond).expand_as(one)])
    return float(torch.cat(changes).mean())


def _reconstructed(pipeline: StarFlowPipeline, row: int, image: Tensor) -> Tensor:
    latents = pipeline.autoencoder.encode(to_float(image).to(pipeline.device))
    return to_uint8(pipeline.autoencoder.decode(add_training_noise(latents, pipeline.config, [1000 * row])))


Pair = tuple[Tensor, Tensor]
"""Features of samples (N, D) and of references (M, D)."""


def jackknife(pairs: Sequence[Pair], minus: Sequence[Pair] = (), groups: int = 8) -> tuple[float, float]:
    """The mean kernel distance of some pairs, less that of others, and its standard error.

    The error is over groups of pictures, which are left out of every pair at a time, so that what two ways of filling
    the same pictures share falls out of their difference.
    """
    count = len(pairs[0][0])
    groups = min(groups, count)

    def value(rows: Tensor) -> float:
        means = [
            sum(kernel_distance(samples[rows], references).value for samples, references in some) / len(some)
            for some in (pairs, minus)
            if some
        ]
        return means[0] - sum(means[1:])

    every = torch.arange(count)
    if count < groups + 2:
        return value(every), math.nan
    left = [value(every[every % groups != one]) for one in range(groups)]
    mean = sum(left) / groups
    return value(every), math.sqrt((groups - 1) / groups * sum((one - mean) ** 2 for one in left))


def _summary(cells: Sequence[Measurements]) -> dict[str, float]:
    rows = [row for one in cells for row in one["rows"]]
    if not rows:
        return {}

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values) if values else math.nan

    gaps = [(row["nats"] - row["true"]) / row["dimensions"] for row in rows]
    return {
        "log_prob": mean([row["nats"] / row["dimensions"] for row in rows]),
        "true": mean([row["true"] / row["dimensions"] for row in rows]),
        "gap": mean([abs(gap) for gap in gaps]),
        "diversity": mean([value for one in cells for value in one["diversity"]]),
        "acceptance": mean([row["acceptance"] for row in rows if "acceptance" in row]),
        "effective": mean([row["effective"] for row in rows if "effective" in row]),
        "seconds": mean([row["seconds"] for row in rows]),
    }


def table(numbers: Numbers) -> list[list[str]]:
    """Every method and mask."""
    heads = ["mask", "method", "log p/dim", "its distance from true", f"crops, {FEATURE} x 1000", "whole", "seam"]
    rows = [[*heads, "diversity", "acceptance", "effective samples", "seconds"]]
    for name, one in numbers.items():
        mask, method = name.split("/")
        distances = [f"{1000 * one[key][0]:.0f} ± {1000 * one[key][1]:.0f}" for key in ("crops", "whole")]
        values = [
            _shown(one.get(key))
            for key in ("log_prob", "gap", "seam", "diversity", "acceptance", "effective", "seconds")
        ]
        rows.append([mask, method, *values[:2], *distances, *values[2:]])
    return rows


def mean_table(against: Numbers) -> list[list[str]]:
    """Every method's distance of crops over all masks, and how far it is from that of `auto` on the same pictures."""
    rows = [["method", f"crops of all masks, {FEATURE} x 1000", "less that of auto"]]
    for method, one in against.items():
        rows.append([method, *(f"{1000 * one[key][0]:.0f} ± {1000 * one[key][1]:.0f}" for key in ("mean", "minus"))])
    return rows


def _shown(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3g}"


def draw_sheet(folder: Path, material: Material, budget: Budget) -> None:
    """Columns are pictures, three of each mask; rows are the hole, each method, and the truth."""
    count = min(3, budget.chunk)
    rows: list[list[Tensor]] = [[] for _ in range(len(METHODS) + 2)]
    for number, mask in enumerate(MASKS):
        start = number * budget.chunk % max(budget.pictures - budget.chunk + 1, 1) // budget.chunk * budget.chunk
        true = material.images[start : start + count]
        rows[0].append(torch.where(mask_of(mask, true.shape[-1]), 255, true))
        for row, method in enumerate(METHODS, 1):
            name = cell_name(method, mask, start)
            rows[row].append(read_tensors(folder / "fillings" / f"{name}.safetensors")["images"][:count])
        rows[-1].append(true)
    sheet = to_float(torch.cat([torch.cat(row) for row in rows]))
    columns = count * len(MASKS)
    made = make_grid(sheet, columns)
    save_png(made.resize((2 * made.width, 2 * made.height)), folder / f"{NAME}.png")
