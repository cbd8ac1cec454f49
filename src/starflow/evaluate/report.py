"""Every measure of a pipeline on a set of pictures.

Protocol, the same for every model: held-out pictures are plain (white background, caption with the style); samples take
the held-out captions in turn, sample i with seed i; the best guidance weight is chosen on fewer samples with other
seeds, and the reported distance is measured at that weight alone, beside the unguided one, the floor (training
pictures) and the autoencoder's own distance. Distances are named after their features: `kid_mobilenetv2` is not
comparable with any `kid`. Pictures that are not finite are counted, never drawn again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

from collections.abc import Sequence
from pathlib import Path

import torch

from starflow.data.images import to_float, to_pil
from starflow.evaluate.dataset import EvaluationSet, batches, is_first, open_foreign, prompts_of, spread
from starflow.evaluate.distances import moments, save_moments
from starflow.evaluate.features import Extractor, load_extractor
from starflow.evaluate.likelihood import measure_classification, measure_likelihoods, measure_outliers
from starflow.evaluate.samples import SampleMeasurements, measure_reconstruction, reconstruct, through_noise
from starflow.evaluate.settings import ContactSheets, Distances, EvaluationReport, EvaluationSettings, LogLine
from starflow.pipeline.config import PipelineConfig
from starflow.pipeline.pipeline import StarFlowPipeline

TUNING_SEED = 1_000_000
"""First seed of the samples that choose the guidance weight: none of them is measured again."""

SHEET = 16
"""Pictures on a sheet where no prompts are given."""


def measure(
    pipeline: StarFlowPipeline,
    pictures: EvaluationSet,
    plan: EvaluationSettings,
    say: LogLine,
    extractor: Extractor | None = None,
    foreign: str = "",
) -> EvaluationReport:
    """Every measure of `EvaluationReport` that the plan asks for; under torchrun every process gets the same one.

    Args:
        pipeline: reads texts or classes, or takes no prompt.
        pictures: both splits.
        plan: how much.
        say: told what happens next.
        extractor: the network of the distances; None is MobileNetV2.
        foreign: a set to tell apart by likelihood, see `open_foreign`; "" is none.

    Raises:
        UserError: the features' package is not installed, or a measure that this model cannot have.
    """
    say("likelihoods")
    likelihood = measure_likelihoods(pipeline, pictures, plan.pictures, plan.draws)
    counts = {"train": len(pictures.train), "heldout": len(pictures.heldout)}
    classification = strangers = None
    if plan.classify:
        say("classification by likelihood")
        classification = measure_classification(pipeline, pictures.heldout, plan.pictures, plan.draws)
    if foreign:
        say(f"outliers: {foreign}")
        unknown = open_foreign(foreign, pipeline.config.image_size)
        strangers = measure_outliers(pipeline, pictures, unknown, plan.pictures)
    if plan.only_likelihood:
        return EvaluationReport(likelihood, counts, classification=classification, outliers=strangers)
    say("reconstructions")
    reconstruction = measure_reconstructions(pipeline, pictures)
    say("features of the pictures")
    measured = SampleMeasurements.of(pipeline, pictures, extractor or load_extractor(), plan)
    if plan.keep_moments and is_first():
        save_moments(Path(plan.keep_moments).expanduser(), moments(measured.heldout.features), measured.extractor.name)
    distances, tuning, best = _distances(pipeline, measured, plan, say)
    say("sheets")
    sheets, retrieval = _sheets(pipeline, measured, plan, best)
    return EvaluationReport(
        likelihood=likelihood,
        counts=counts | {"samples": plan.samples},
        features=measured.extractor.name,
        reconstruction=reconstruction,
        distances=distances,
        tuning=tuning,
        guidance=best,
        retrieval=retrieval,
        classification=classification,
        outliers=strangers,
        sheets=sheets,
    )


def measure_reconstructions(pipeline: StarFlowPipeline, pictures: EvaluationSet) -> dict[str, float]:
    """Mean PSNR in dB of held-out pictures without latent noise, with 0.2 and 0.3, and with the flow's own."""
    found = {}
    images = pictures.heldout.images[spread(len(pictures.heldout), 1000)]
    for noise in sorted({0.0, 0.2, 0.3, round(pipeline.config.noise_std, 3)}):
        draw = torch.Generator().manual_seed(0)
        through = through_noise(pipeline.autoencoder.encode, pipeline.autoencoder.decode, noise, draw)
        found[f"noise {noise}"] = measure_reconstruction(batches(images, pipeline.device), through).psnr
    return found


def _distances(
    pipeline: StarFlowPipeline, measured: SampleMeasurements, plan: EvaluationSettings, say: LogLine
) -> tuple[Distances, dict[str, float], float]:
    """Distances by set, the kernel distance by weight, and the best weight."""
    weights = weights_to_try(plan.guidance) if pipeline.conditioner else [0.0]
    tuning = {}
    for weight in weights:
        say(f"{plan.tuning_samples} samples at guidance {weight:g}")
        tuning[weight] = measured.kernel(plan.tuning_samples, weight, TUNING_SEED)
    best = min(tuning, key=lambda weight: tuning[weight])
    guided = min((weight for weight in weights if weight), key=lambda weight: tuning[weight], default=None)
    distances = {"floor (training pictures)": measured.floor()}
    say("autoencoder")
    for noise in sorted({0.0, pipeline.config.noise_std}):
        distances[f"autoencoder, noise {noise:g}"] = measured.autoencoder(noise)
    for weight in [0.0] if guided is None else [0.0, guided]:
        named = f"guidance {weight:g}" + _named(pipeline.config)
        say(f"{plan.samples} samples at {named}")
        distances[f"samples, {named}"] = measured.samples(plan.samples, weight)
    return distances, {f"{weight:g}": value for weight, value in tuning.items()}, best


def _named(config: PipelineConfig) -> str:
    """What of sampling is not as the model's own distribution has it."""
    scale, candidates = config.temperature, config.candidates
    return (f", temperature {scale:g}" if scale != 1 else "") + (f", best of {candidates}" if candidates > 1 else "")


def weights_to_try(asked: Sequence[float]) -> list[float]:
    """The weights, rising, with 0 and one above it: guided and unguided are always shown together."""
    weights = {0.0, *asked}
    return sorted(weights if max(weights) else {0.0, 1.0})


def _sheets(
    pipeline: StarFlowPipeline, measured: SampleMeasurements, plan: EvaluationSettings, best: float
) -> tuple[ContactSheets, dict[str, float]]:
    """Samples, the nearest training pictures, reconstructions, and the retrieval scores."""
    views = measured.heldout_views
    rows = spread(len(views), SHEET)
    prompts = plan.prompts or tuple(prompts_of(pipeline, views, rows))
    grid = pipeline(list(prompts), guidance=best).images
    neighbours, retrieval = measured.retrieve(grid, prompts)
    again = reconstruct(pipeline, views.images, rows, pipeline.config.noise_std)
    return ContactSheets(prompts, grid, neighbours, to_pil(to_float(views.images[rows])), to_pil(again)), retrieval
