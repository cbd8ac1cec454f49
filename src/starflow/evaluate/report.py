"""The report of an evaluation: every measure of a pipeline on a set of images.

Protocol, the same for every model: held-out images are plain (white background, caption with the style); samples take
the held-out captions in turn, sample i with seed i; the best guidance weight is chosen on fewer samples with other
seeds, and the reported distance is measured at that weight alone, beside the unguided one, the floor (training
images) and the autoencoder's own distance. Distances are named after their features: `kid_mobilenetv2` is not
comparable with any `kid`. Images that are not finite are counted, never drawn again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from starflow.conditioning import ClassLabels
from starflow.data.images import to_float, to_pil
from starflow.errors import UserError
from starflow.evaluate.dataset import EvaluationSet, evenly_spaced, image_batches, is_first, open_outliers, prompts_of
from starflow.evaluate.distances import load_moments, moments, save_moments
from starflow.evaluate.features import FeatureExtractor, load_extractor
from starflow.evaluate.judge import JudgeReport, judge_features, load_judge, measure_judge, open_judge
from starflow.evaluate.likelihood import (
    BitsPerDim,
    Classification,
    Outliers,
    check_classes,
    measure_classification,
    measure_likelihoods,
    measure_outliers,
)
from starflow.evaluate.samples import (
    SampleMeasurements,
    SamplingOptions,
    measure_reconstruction,
    noisy_reconstruction,
    reconstruct,
)
from starflow.io.files import check_output_folder
from starflow.pipeline.config import PipelineConfig, default_size
from starflow.pipeline.inputs import example_prompts
from starflow.pipeline.pipeline import StarFlowPipeline

if TYPE_CHECKING:
    from PIL.Image import Image

TUNING_SEED = 1_000_000
"""The first seed of the samples that choose the guidance weight: none of them is measured again."""

SHEET_SIZE = 16
"""Images on a sheet where no prompts are given."""


JUDGED = 200
"""Samples that a judge is shown, at most."""

FEW = 50
"""Fewer pictures than these, on either side, and a distance says little."""

LogLine = Callable[[str], None]
"""A function that is told the next step, for whoever waits."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How much of a pipeline is measured."""

    samples: int = 1000
    tuning_samples: int = 250
    """Samples per guidance weight when the best is chosen."""
    guidance: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 4.0)
    prompts: tuple[str, ...] = ()
    """Prompts of the sheet, prompt i with seed i; if empty, those of some held-out images."""
    references: int = 5000
    """Pictures of each split, at most, that distances are measured to."""
    pictures: int = 0
    """Pictures of each split, at most, whose likelihood is measured; 0 is all held out, and as many of training."""
    draws: int = 1
    """Draws of the noise a likelihood is averaged over."""
    only_likelihood: bool = False
    """Leave out reconstructions, samples and distances."""
    classify: bool = False
    """Measure argmax_c log p(x | c) as a classifier, on a model with classes."""
    reference_moments: str = ""
    """A file of feature moments, such as ADM's .npz, to measure a Frechet distance to as well."""
    keep_moments: str = ""
    """A .safetensors file for the feature moments of the held-out pictures, to measure others to."""
    judge: str = ""
    """A .safetensors file with a judge, made from the training pictures where there is none; "" is no judge."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """What draws the samples, and how."""

    def __post_init__(self) -> None:
        if min(self.samples, self.tuning_samples, self.references) < 2 or self.pictures < 0 or self.draws < 1:
            raise UserError(
                f"samples {self.samples}, tuning_samples {self.tuning_samples}, references {self.references}, pictures "
                f"{self.pictures}, draws {self.draws}: expected at least 2, 2, 2, 0 and 1"
            )
        if not self.guidance or not all(0 <= weight < math.inf for weight in self.guidance):
            raise UserError(f"guidance weights {self.guidance}: expected at least one, none below 0 or infinite")


Distances = dict[str, dict[str, float]]
"""By set (floor, autoencoder, samples with and without guidance), then by measure; `count` and `not_finite` too."""


@dataclass(frozen=True)
class ContactSheets:
    """Images for a person to look at."""

    prompts: tuple[str, ...] = ()
    samples: list[Image] = field(default_factory=list)
    nearest: list[Image] = field(default_factory=list)
    """Per sample, the nearest training picture."""
    originals: list[Image] = field(default_factory=list)
    reconstructions: list[Image] = field(default_factory=list)
    """Of the originals, with the flow's noise on their latents."""


@dataclass(frozen=True)
class EvaluationReport:
    """Every measure; what the settings leave out is empty or None. The sheets stay out of the JSON."""

    likelihood: dict[str, BitsPerDim]
    """By split."""
    counts: dict[str, int]
    features: str = ""
    """The network of the distances."""
    reconstruction: dict[str, float] = field(default_factory=dict)
    """Mean PSNR in dB of held-out pictures by latent noise."""
    distances: Distances = field(default_factory=dict)
    tuning: dict[str, float] = field(default_factory=dict)
    """Kernel distance by guidance weight, on fewer samples."""
    guidance: float = 0.0
    """The best weight, at which the sheet is made."""
    retrieval: dict[str, float] = field(default_factory=dict)
    """Share whose nearest training picture shows the prompted concept."""
    classification: Classification | None = None
    outliers: Outliers | None = None
    judge: JudgeReport | None = None
    remarks: tuple[str, ...] = ()
    """What a reader should know before believing a number."""
    sheets: ContactSheets = field(default_factory=ContactSheets)

    def as_json(self) -> dict[str, Any]:
        """Everything but the pictures."""
        values = {name: value for name, value in vars(self).items() if name != "sheets"}
        values["likelihood"] = {split: asdict(found) for split, found in self.likelihood.items()}
        for name in ("classification", "outliers", "judge"):
            values[name] = asdict(values[name]) if values[name] else None
        return values


def evaluate_pipeline(
    pipeline: StarFlowPipeline,
    dataset: EvaluationSet,
    settings: EvaluationSettings,
    log: LogLine,
    extractor: FeatureExtractor | None = None,
    outlier_set: str = "",
) -> EvaluationReport:
    """Every measure of `EvaluationReport` that the settings ask for; under torchrun every process gets the same report.

    Args:
        pipeline: reads texts or classes, or takes no prompt.
        dataset: images of both splits.
        settings: how much is measured.
        log: told the next step.
        extractor: the network of the distances; None is MobileNetV2.
        outlier_set: a set to tell apart by likelihood, see `open_outliers`; "" is none.

    Raises:
        UserError: the features' package is not installed, or a measure that this model cannot have.
    """
    unknown = _check_first(pipeline, dataset, settings, extractor, outlier_set)
    if not settings.only_likelihood:
        log(expected_time(pipeline, settings))
    log("likelihoods")
    likelihood = measure_likelihoods(pipeline, dataset, settings.pictures, settings.draws)
    counts = {"train": len(dataset.train), "heldout": len(dataset.heldout)}
    classification = outliers = None
    if settings.classify:
        log("classification by likelihood")
        classification = measure_classification(pipeline, dataset.heldout, settings.pictures, settings.draws)
    if unknown is not None:
        log(f"outliers: {outlier_set}")
        outliers = measure_outliers(pipeline, dataset, unknown, settings.pictures)
    if settings.only_likelihood:
        return EvaluationReport(likelihood, counts, classification=classification, outliers=outliers)
    log("reconstructions")
    reconstruction = measure_reconstructions(pipeline, dataset)
    log("features of the pictures")
    measured = _measure_references(pipeline, dataset, settings, extractor or load_extractor())
    distances, tuning, best = _distances(pipeline, measured, settings, log)
    judged = _judge(pipeline, dataset, settings, log) if settings.judge else None
    log("sheets")
    sheets, retrieval = _sheets(pipeline, measured, settings, best)
    return EvaluationReport(
        likelihood=likelihood,
        counts=counts | {"samples": settings.samples},
        features=measured.extractor.name,
        reconstruction=reconstruction,
        distances=distances,
        tuning=tuning,
        guidance=best,
        retrieval=retrieval,
        classification=classification,
        outliers=outliers,
        judge=judged,
        remarks=(*by_student(settings), *few_pictures(distances, len(measured.heldout_views)), *left_out(judged)),
        sheets=sheets,
    )


def _check_first(
    pipeline: StarFlowPipeline,
    dataset: EvaluationSet,
    settings: EvaluationSettings,
    extractor: FeatureExtractor | None,
    outlier_set: str,
) -> Tensor | None:
    """Whatever can be refused is refused before the first measure; the outliers' images, if there are any.

    Raises:
        UserError: classes that are unknown, a prompt that the model cannot take, moments or outliers that are none, or
            too few pictures for a distance.
    """
    counts = {"training": len(dataset.train), "held-out": len(dataset.heldout)}
    for split, count in counts.items():
        if count < 2 and not settings.only_likelihood:
            raise UserError(
                f"the set has {count} {split} picture, expected at least 2 for distances: give more pictures, or only "
                "measure likelihoods (--bpd)"
            )
    settings.sampling.student_of(pipeline)
    if settings.classify:
        check_classes(pipeline, dataset.heldout, evenly_spaced(len(dataset.heldout), settings.pictures))
    if not settings.only_likelihood:
        if isinstance(pipeline.conditioner, ClassLabels):
            for prompt in settings.prompts:
                pipeline.conditioner.number(prompt)
        if settings.reference_moments:
            load_moments(Path(settings.reference_moments).expanduser(), (extractor or load_extractor()).name)
        if settings.keep_moments:
            check_output_folder(Path(settings.keep_moments).expanduser().parent)
        if settings.judge:
            _check_judge(pipeline, Path(settings.judge).expanduser(), settings.sampling)
    return open_outliers(outlier_set, default_size(pipeline.config, pipeline.flow.config)) if outlier_set else None


def _check_judge(pipeline: StarFlowPipeline, path: Path, sampling: SamplingOptions) -> None:
    if pipeline.conditioner is None:
        raise UserError("the model takes no prompts, so that a judge has nothing to compare its pictures with")
    student, weight = sampling.student_of(pipeline), sampling.guidance(pipeline)
    if student is not None and weight > student.largest_guidance:
        raise UserError(
            f"a judge is shown samples at the model's own guidance, {weight:g}, and the student was trained up to "
            f"{student.largest_guidance:g}: leave out the judge or the student"
        )
    judge_features()
    if path.exists():
        load_judge(path)
    else:
        check_output_folder(path.parent)


def _judge(
    pipeline: StarFlowPipeline, dataset: EvaluationSet, settings: EvaluationSettings, log: LogLine
) -> JudgeReport:
    features = judge_features()
    features.network.to(pipeline.device)
    judge = open_judge(Path(settings.judge).expanduser(), dataset, features, log)
    log("the judge: samples")
    return measure_judge(pipeline, dataset, judge, features, min(settings.samples, JUDGED), settings.sampling)


def by_student(settings: EvaluationSettings) -> Iterator[str]:
    """A remark on samples that the flow did not draw."""
    if settings.sampling.sampler == "student":
        yield "samples are the student's, an approximation of the flow; likelihoods are the flow's own"


def left_out(judged: JudgeReport | None) -> Iterator[str]:
    """A remark on the held-out pictures that a judge cannot judge."""
    if judged is not None and judged.unknown:
        yield (
            f"the judge chooses among {judged.names} names and cannot judge unseen concepts, or those of fewer than "
            f"three training pictures: {judged.unknown} held-out pictures are left out"
        )
    if judged is not None and judged.trained:
        yield f"the judge was trained on {judged.trained} of the held-out pictures, which are left out"


def expected_time(pipeline: StarFlowPipeline, settings: EvaluationSettings) -> str:
    """How many samples are drawn, and about how long that takes here, from the time of one picture alone."""
    weights = _weights_of(pipeline, settings)
    count = len(weights) * settings.tuning_samples + (2 if len(weights) > 1 else 1) * settings.samples
    prompt = example_prompts(pipeline.conditioner, 1)
    settings.sampling.draw(pipeline, prompt, weights[-1])  # the first may compile
    began = time.perf_counter()
    settings.sampling.draw(pipeline, prompt, weights[-1])
    minutes = (time.perf_counter() - began) * count / 60
    length = f"{minutes / 60:.1f} h" if minutes >= 90 else f"{max(1, round(minutes))} min"
    candidates = settings.sampling.config(pipeline).candidates
    of = f" of {candidates} candidates" if candidates > 1 else ""
    return f"{count} samples{of} are drawn: at most about {length} in one process here, --samples draws fewer"


def few_pictures(distances: Distances, heldout: int) -> Iterator[str]:
    """A remark on each distance that rests on fewer pictures than `FEW`.

    >>> next(few_pictures({"samples": {"count": 2, "not_finite": 0, "kid_x": 0.1}}, heldout=600))
    'samples: a distance of 2 to 600 pictures says little about the model, as 50 of each are the least to trust'
    """
    for name, measures in distances.items():
        count = int(measures["count"])
        if min(count, heldout) < FEW:
            yield (
                f"{name}: a distance of {count} to {heldout} pictures says little about the model, as {FEW} of each "
                "are the least to trust"
            )


def measure_reconstructions(pipeline: StarFlowPipeline, dataset: EvaluationSet) -> dict[str, float]:
    """Mean PSNR in dB of held-out pictures without latent noise, with 0.2 and 0.3, and with the flow's own."""
    found = {}
    images = dataset.heldout.images[evenly_spaced(len(dataset.heldout), 1000)]
    for noise in sorted({0.0, 0.2, 0.3, round(pipeline.config.noise_std, 3)}):
        draw = torch.Generator().manual_seed(0)
        through = noisy_reconstruction(pipeline.autoencoder.encode, pipeline.autoencoder.decode, noise, draw)
        found[f"noise {noise}"] = measure_reconstruction(image_batches(images, pipeline.device), through).psnr
    return found


def _measure_references(
    pipeline: StarFlowPipeline, dataset: EvaluationSet, settings: EvaluationSettings, extractor: FeatureExtractor
) -> SampleMeasurements:
    """The features that samples are compared with; their moments are written where the settings say so."""
    measured = SampleMeasurements.of(
        pipeline, dataset, extractor, settings.references, settings.reference_moments, settings.sampling
    )
    if settings.keep_moments and is_first():
        save_moments(Path(settings.keep_moments).expanduser(), moments(measured.heldout.features), extractor.name)
    return measured


def _distances(
    pipeline: StarFlowPipeline, measured: SampleMeasurements, settings: EvaluationSettings, log: LogLine
) -> tuple[Distances, dict[str, float], float]:
    """Distances by set, the kernel distance by weight, and the best weight."""
    weights = _weights_of(pipeline, settings)
    tuning = {}
    for weight in weights:
        log(f"{settings.tuning_samples} samples at guidance {weight:g}")
        tuning[weight] = measured.sample_kernel_distance(settings.tuning_samples, weight, TUNING_SEED)
    best = min(tuning, key=lambda weight: tuning[weight])
    guided = min((weight for weight in weights if weight), key=lambda weight: tuning[weight], default=None)
    distances = {"floor (training pictures)": measured.measure_training_images()}
    log("autoencoder")
    for noise in sorted({0.0, pipeline.config.noise_std}):
        distances[f"autoencoder, noise {noise:g}"] = measured.measure_autoencoder(noise)
    for weight in [0.0] if guided is None else [0.0, guided]:
        by = ", by the student" if settings.sampling.sampler == "student" else ""
        label = f"guidance {weight:g}" + _sampling_label(settings.sampling.config(pipeline)) + by
        log(f"{settings.samples} samples at {label}")
        distances[f"samples, {label}"] = measured.measure_samples(settings.samples, weight)
    return distances, {f"{weight:g}": value for weight, value in tuning.items()}, best


def _sampling_label(config: PipelineConfig) -> str:
    """The temperature and the candidates, where they are not those of the model's own distribution."""
    scale, candidates = config.temperature, config.candidates
    return (f", temperature {scale:g}" if scale != 1 else "") + (f", best of {candidates}" if candidates > 1 else "")


def _weights_of(pipeline: StarFlowPipeline, settings: EvaluationSettings) -> list[float]:
    """The weights that a model's samples are drawn at, rising."""
    student = settings.sampling.student_of(pipeline)
    unguided = pipeline.conditioner is None or (student is not None and not student.largest_guidance)
    return [0.0] if unguided else weights_to_try(settings.guidance)


def weights_to_try(asked: Sequence[float]) -> list[float]:
    """The weights, rising, with 0 and one above it: guided and unguided are always shown together.

    >>> weights_to_try([3.0, 1.0]), weights_to_try([])
    ([0.0, 1.0, 3.0], [0.0, 1.0])
    """
    weights = {0.0, *asked}
    return sorted(weights if max(weights) else {0.0, 1.0})


def _sheets(
    pipeline: StarFlowPipeline, measured: SampleMeasurements, settings: EvaluationSettings, best: float
) -> tuple[ContactSheets, dict[str, float]]:
    """Samples, the nearest training pictures, reconstructions, and the retrieval scores."""
    views = measured.heldout_views
    rows = evenly_spaced(len(views), SHEET_SIZE)
    prompts = settings.prompts or tuple(prompts_of(pipeline, views, rows))
    grid = settings.sampling.draw(pipeline, list(prompts), best).images
    neighbours, retrieval = measured.nearest_training_images(grid, prompts)
    again = reconstruct(pipeline, views.images, rows, pipeline.config.noise_std)
    return ContactSheets(prompts, grid, neighbours, to_pil(to_float(views.images[rows])), to_pil(again)), retrieval
