"""Four experiments on how a flow is put together; each changes one thing about one small class-conditional flow.

`latents`: latents or pixels, at equal arithmetic. `condition`: which blocks see it. `depth`: how many of the layers the
block next to the noise has. `noise`: what is added to latents before the flow sees them. They share pictures of
coloured shapes, an autoencoder, a cache, and the flow that they all compare with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from experiments.fashion_runs import heldout_curve, trained, update_seconds
from experiments.results import SEEDS, Measurements, Result, Table, check_budget, mean_over_seeds, measure_once
from starflow.data.images import from_pil, to_float
from starflow.data.sets.small import SHAPES, draw_shapes
from starflow.evaluate import FeatureExtractor, extract_features, kernel_distance, load_extractor
from starflow.io import files
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.train.recipe import load_recipe
from starflow.train.run import start_run, training_flops
from starflow.train.stages import Stages

RECIPE = Path("recipes/claims/shapes.yaml")
PIXELS = {"autoencoder.kind": "pixels", "objective.noise_std": "0.05"}
"""Noise of TarFlow for pixels in [-1, 1] (arXiv 2412.06329, section 3)."""


@dataclass(frozen=True)
class Variant:
    """One flow: its name in tables, what it changes of the recipe, and the share of the updates that it gets."""

    name: str
    overrides: dict[str, str]
    share: float = 1.0


BASE = Variant("latents, noise 0.15, layers 1 1 4, condition in the deep block", {})


@dataclass(frozen=True)
class Experiment:
    """What is compared, and what the paper says of it."""

    title: str
    claim: str
    base: str
    """What the shared flow is called here."""
    variants: tuple[Variant, ...]
    one_space: bool = True
    """Whether all densities are of the same noised latents, so that their nats can be compared."""


EXPERIMENTS = {
    "latents": Experiment(
        "Latents against pixels at equal arithmetic",
        "A flow on an autoencoder's latents draws better than one on pixels (STARFlow, arXiv 2506.06276, section 3).",
        "latents, patches of 1",
        (
            Variant("pixels, patches of 8", {**PIXELS, "flow.patch_size": "8"}),
            # Four times the tokens, of which attention costs more: a quarter of the updates, less what it adds.
            Variant("pixels, patches of 4", {**PIXELS, "flow.patch_size": "4"}, 0.25),
        ),
        one_space=False,
    ),
    "condition": Experiment(
        "The condition in the deep block alone, or in every block",
        "It is enough that the deep block, next to the noise, sees the condition (STARFlow, arXiv 2506.06276, "
        "section 3.2).",
        "deep block alone",
        (Variant("every block", {"flow.cond_top_only": "false"}),),
    ),
    "depth": Experiment(
        "The depth of the deep block at a fixed number of layers",
        "With the number of layers fixed, more of them in the block next to the noise are better (STARFlow, arXiv "
        "2506.06276, figure 10, e and f).",
        "layers 1 1 4",
        (
            Variant("layers 2 2 2", {"flow.layers_per_block": "[2, 2, 2]"}),
            Variant("layers 3 2 1", {"flow.layers_per_block": "[3, 2, 1]"}),
        ),
    ),
    "noise": Experiment(
        "The noise that latents get, and the samples",
        "Latents need noise: with too little of it the density is nearly singular and samples are bad, with too much "
        "the decoder has to guess (STARFlow, arXiv 2506.06276, section 3.3).",
        "noise 0.15",
        tuple(Variant(f"noise {level}", {"objective.noise_std": level}) for level in ("0.03", "0.3", "0.45")),
        one_space=False,
    ),
}


@dataclass(frozen=True)
class Budget:
    """How much is computed."""

    steps: int = 300
    autoencoder: int = 300
    shapes: int = 4000
    samples: int = 240
    references: int = 600
    seeds: tuple[int, ...] = SEEDS


QUICK = Budget(steps=4, autoencoder=4, shapes=120, samples=12, references=24, seeds=(0, 1))


def run(
    folder: Path, budget: Budget, log: Callable[[str], None], command: str, name: str, device: torch.device
) -> Result:
    """Compute the cells that are missing, draw the plot, and put the numbers into tables."""
    check_budget(folder, budget)
    experiment = EXPERIMENTS[name]
    extractor = load_extractor()
    extractor.network.to(device)
    found: dict[str, list[Measurements]] = {}
    for variant in (BASE, *experiment.variants):
        label = experiment.base if variant is BASE else variant.name
        found[label] = [
            measure_once(
                folder,
                f"{'base' if variant is BASE else _file_name(variant)}-{seed}",
                partial(measure, variant, seed, budget, folder, extractor, device),
                log,
            )
            for seed in budget.seeds
        ]
    floors = {
        label: measure_once(folder, floor_name(variant), partial(floor, variant, budget, folder, extractor), log)
        for label, variant in zip(found, (BASE, *experiment.variants), strict=True)
    }
    draw_plot(folder / f"{name}.png", experiment, found, floors)
    values = {"cells": found, "budget": vars(budget)}
    return Result(name, experiment.title, experiment.claim, [table(experiment, found, floors)], command, values)


def _file_name(variant: Variant) -> str:
    return variant.name.replace(" ", "-").replace(",", "")


def _run_folder(folder: Path, variant: Variant, seed: int) -> Path:
    return folder / "runs" / f"{_file_name(variant)}-{seed}"


def prepared(folder: Path, variant: Variant, budget: Budget, device: torch.device) -> Path:
    """The folder with the cache that a variant trains from, made once for all of a kind."""
    space = variant.overrides.get("autoencoder.kind", "latents")
    overrides = {
        "data.shapes": str(budget.shapes),
        **({} if space == "pixels" else {"autoencoder.train.steps": str(budget.autoencoder)}),
        **{key: value for key, value in variant.overrides.items() if key.startswith("autoencoder")},
    }
    shared = folder / "data" / space
    Stages(start_run(load_recipe(RECIPE, overrides), shared, device, progress=False)).cache_latents()
    return shared


def measure(
    variant: Variant, seed: int, budget: Budget, folder: Path, extractor: FeatureExtractor, device: torch.device
) -> Measurements:
    """Train one flow and measure it."""
    shared = prepared(folder, variant, budget, device)
    steps = max(1, round(budget.steps * variant.share))
    where = _run_folder(folder, variant, seed)
    overrides = {
        **variant.overrides,
        "data.shapes": str(budget.shapes),
        "train.seed": str(seed),
        "train.steps": str(steps),
        "train.warmup": str(max(1, steps // 12)),
        "train.evaluate_every": str(max(1, steps // 5)),
    }
    pipeline = trained(shared, where, RECIPE, overrides, device)
    prompts = [SHAPES[number % len(SHAPES)] for number in range(budget.samples)]
    made = pipeline(prompts, guidance=0.0, seed=1000 * seed, batch_size=100)
    pictures = torch.cat([from_pil(one) for one in made.images])[made.latents.isfinite().flatten(1).all(1).cpu()]
    features = extract_features(extractor, pictures.split(100)).features
    references = reference_features(folder, budget, pictures.shape[-1], extractor)
    curve = heldout_curve(where)
    return {
        "nats_per_dim": curve[-1][1],
        "train_nats_per_dim": curve[-1][2],
        "curve": curve,
        "kid_mobilenetv2": kernel_distance(features, references).value,
        "not_finite": budget.samples - len(pictures),
        "updates": steps,
        "teraflop": training_flops(pipeline.flow) * steps * load_recipe(RECIPE).train.batch / 1e12,
        "update_seconds": update_seconds(where, load_recipe(RECIPE).train.batch),
        "parameters": sum(parameter.numel() for parameter in pipeline.flow.parameters()),
    }


def floor_name(variant: Variant) -> str:
    """Of the cell with what an autoencoder and a level of noise allow, which variants share."""
    space = variant.overrides.get("autoencoder.kind", "latents")
    return f"floor-{space}-{variant.overrides.get('objective.noise_std', '0.15')}"


@torch.no_grad()
def floor(variant: Variant, budget: Budget, folder: Path, extractor: FeatureExtractor) -> Measurements:
    """The distance of other shapes that were only encoded, noised and decoded: what no flow can improve on."""
    pipeline = StarFlowPipeline.from_pretrained(_run_folder(folder, variant, budget.seeds[0]) / "model")
    real = to_float(draw_shapes(budget.samples, pipeline.config.image_size, seed=2).images)
    latents = pipeline.autoencoder.encode(real)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    if variant.overrides.get("autoencoder.kind") != "pixels":  # whose noise a Tweedie step takes away, and no decoder
        latents = latents + pipeline.config.noise_std * noise
    features = extract_features(extractor, pipeline.autoencoder.decode(latents).split(100)).features
    references = reference_features(folder, budget, pipeline.config.image_size, extractor)
    return {"kid_mobilenetv2": kernel_distance(features, references).value}


def reference_features(folder: Path, budget: Budget, side: int, extractor: FeatureExtractor) -> Tensor:
    """Features (N, F) of shapes that are drawn anew, computed once; the held-out ones are of three kinds alone."""
    path = folder / "data" / "references.safetensors"
    if not path.is_file():
        real = to_float(draw_shapes(budget.references, side, seed=1).images)
        files.write_tensors(path, {"features": extract_features(extractor, real.split(100)).features})
    return files.read_tensors(path)["features"]


def table(experiment: Experiment, found: dict[str, list[Measurements]], floors: dict[str, Measurements]) -> Table:
    """Means and standard errors over seeds."""
    likelihoods = ["held-out nats/dim", "training nats/dim"] if experiment.one_space else []
    distances = ["kid_mobilenetv2 x 1000", "of shapes encoded, noised and decoded", "not finite"]
    rows = [["flow", "parameters", "updates", "10^12 operations", *likelihoods, *distances]]
    for name, cells in found.items():
        nats = [str(mean_over_seeds(cells, key)) for key in ("nats_per_dim", "train_nats_per_dim")]
        rows.append(
            [
                name,
                f"{cells[0]['parameters']:,}",
                f"{cells[0]['updates']:,}",
                f"{cells[0]['teraflop']:.3g}",
                *(nats if experiment.one_space else []),
                str(mean_over_seeds(cells, "kid_mobilenetv2", 1000)),
                f"{1000 * floors[name]['kid_mobilenetv2']:.4g}",
                str(sum(one["not_finite"] for one in cells)),
            ]
        )
    return rows


def draw_plot(
    path: Path, experiment: Experiment, found: dict[str, list[Measurements]], floors: dict[str, Measurements]
) -> None:
    """Held-out curves, and the samples' distances, every seed a mark; a line is what no flow can improve on."""
    from experiments.plots import figure, save

    drawn, axes = figure(1, 2, 4.2)
    curves, distances = axes[0]
    for number, (name, cells) in enumerate(found.items()):
        for one in cells:
            steps, heldout, _ = zip(*one["curve"], strict=True)
            done = [step / one["updates"] * one["teraflop"] for step in steps]
            curves.plot(done, heldout, color=f"C{number}", linewidth=1, label=name if one is cells[0] else None)
        distances.plot([number] * len(cells), [1000 * one["kid_mobilenetv2"] for one in cells], "o", color=f"C{number}")
        distances.plot(number, 1000 * floors[name]["kid_mobilenetv2"], "k_", markersize=18)
    note = "" if experiment.one_space else ", each of its own noised data"
    curves.set_title(f"held-out nats/dim{note}", fontsize=9)
    curves.set(xlabel="10^12 operations of training")
    curves.legend(fontsize=8)
    distances.set(xticks=range(len(found)), xlim=(-0.5, len(found) - 0.5))
    distances.set_xticklabels([name.replace(", ", ",\n") for name in found], fontsize=8)
    distances.set_title("samples, kid_mobilenetv2 x 1000", fontsize=9)
    save(drawn, path)
