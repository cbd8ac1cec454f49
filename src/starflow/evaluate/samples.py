"""Samples and reconstructions of a pipeline are compared with held-out images: distances, decibels, nearest images.

Beside the distances of samples stand those of training images (the floor) and of the autoencoder alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from starflow.data.images import from_pil, to_float, to_pil
from starflow.data.views import TrainingViews
from starflow.errors import UserError
from starflow.evaluate.dataset import (
    BATCH,
    EvaluationSet,
    concept_of,
    evenly_spaced,
    gather_rows,
    image_batches,
    is_first,
    own_rows,
    prompts_of,
    select_rows,
)
from starflow.evaluate.distances import (
    NEIGHBOURS,
    Moments,
    frechet_distance,
    frechet_of_moments,
    inception_score,
    kernel_distance,
    load_moments,
    moments,
    precision_recall,
)
from starflow.evaluate.features import ExtractedFeatures, FeatureExtractor, extract_features, nearest_references
from starflow.pipeline.config import PipelineConfig, own_guidance, with_sampling_options
from starflow.pipeline.pipeline import Generated, StarFlowPipeline
from starflow.sampling.sampler import noise_from_seeds
from starflow.sampling.student import StudentConfig

if TYPE_CHECKING:
    from PIL.Image import Image

SMALLEST_ERROR = 1e-10
"""The mean square error that stands for an exact copy: 100 dB."""


@dataclass(frozen=True)
class Reconstruction:
    """The mean over images of each image's PSNR, and their number."""

    psnr: float
    """dB."""
    count: int


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB, of pictures (B, 3, H, W) in [-1, 1]; images are clamped first.

    10 log10(2^2 / mean square error), the peak being the range's width. At most 100 dB, for an exact copy.

    Raises:
        UserError: two shapes.

    >>> psnr(torch.full((1, 3, 4, 4), 0.2), torch.zeros(1, 3, 4, 4)).round(decimals=3).tolist()
    [20.0]
    """
    if images.shape != references.shape:
        raise UserError(f"pictures of shapes {tuple(images.shape)} and {tuple(references.shape)}: expected equal ones")
    error = ((images.double().clamp(-1, 1) - references.double()) / 2).square().flatten(1).mean(1)
    return -10 * error.clamp_min(SMALLEST_ERROR).log10()


@torch.no_grad()
def measure_reconstruction(batches: Iterable[Tensor], reconstruct: Callable[[Tensor], Tensor]) -> Reconstruction:
    """Mean PSNR of `reconstruct` over pictures (B, 3, H, W) in [-1, 1] that come in batches.

    Raises:
        UserError: no pictures, or a reconstruction of another shape.
    """
    found = [psnr(reconstruct(batch), batch).cpu() for batch in batches]
    if not found:
        raise UserError("no pictures to measure: expected at least one batch")
    values = torch.cat(found)
    return Reconstruction(float(values.mean()), len(values))


def noisy_reconstruction(
    encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], noise_std: float, generator: Generator
) -> Callable[[Tensor], Tensor]:
    """A function that encodes, adds noise of `noise_std` to the latents and decodes them, as samples are decoded.

    The noise is drawn on the generator's device, so one on the CPU gives the same numbers anywhere.
    """

    def reconstruct(images: Tensor) -> Tensor:
        latents = encode(images)
        noise = torch.randn(latents.shape, generator=generator, dtype=torch.float32, device=generator.device)
        return decode(latents + noise_std * noise.to(latents))

    return reconstruct


@dataclass(frozen=True)
class SamplingOptions:
    """How samples are drawn, beside prompt, guidance and seed: options of a pipeline's call."""

    sampler: Literal["flow", "student"] = "flow"
    temperature: float | None = None
    """None is the model's own, or its student's."""
    candidates: int | None = None
    """Drawn for each sample that is kept; None is the model's own, and 1 of a student."""

    def draw(self, pipeline: StarFlowPipeline, prompts: Sequence[str], guidance: float, seed: int = 0) -> Generated:
        """One picture of each prompt, picture i with the seed `seed + i`; those that are not finite are kept.

        Raises:
            UserError: a model without a student, or a weight above those of its training.
        """
        return pipeline(
            prompts,
            guidance=guidance,
            seed=seed,
            sampler=self.sampler,
            temperature=self.temperature,
            candidates=self.candidates,
            batch_size=BATCH,
            not_finite="keep",
        )

    def student_of(self, pipeline: StarFlowPipeline) -> StudentConfig | None:
        """The configuration of the student that draws, None where the flow does.

        Raises:
            UserError: a student is asked for and the model has none.
        """
        if self.sampler == "flow":
            return None
        if pipeline.student is None:
            raise UserError(
                f"'{pipeline.config.name}' has no student to sample with: train one by `starflow train-student`, or "
                "leave the sampler out"
            )
        return pipeline.student.config

    def guidance(self, pipeline: StarFlowPipeline) -> float:
        """The weight that is drawn at by default."""
        return own_guidance(pipeline.config, pipeline.student if self.sampler == "student" else None)

    def config(self, pipeline: StarFlowPipeline) -> PipelineConfig:
        """The model's configuration with the temperature and the candidates that samples are drawn with."""
        return with_sampling_options(pipeline.config, self.temperature, self.candidates, self.student_of(pipeline))


def draw_samples(
    pipeline: StarFlowPipeline,
    heldout: TrainingViews,
    count: int,
    guidance: float,
    seed: int,
    options: SamplingOptions | None = None,
) -> Iterator[Tensor]:
    """This process's share of `count` pictures of the held-out prompts in turn, as batches (B, 3, H, W) in [-1, 1].

    Sample i has the seed `seed + i`, and `options` None draws as the model does by default. A sample whose latent is
    not finite comes as NaN, so that it is counted as such rather than measured as the black picture that it would be
    saved as.
    """
    options = options or SamplingOptions()
    wanted = list(islice(cycle(prompts_of(pipeline, heldout, range(len(heldout)))), count))
    own = own_rows(count)
    bar = tqdm(
        total=len(own),
        desc=f"samples at guidance {guidance:g}",
        unit="picture",
        disable=None if is_first() else True,
        leave=False,
    )
    for start in range(own.start, own.stop, BATCH):
        some = wanted[start : min(start + BATCH, own.stop)]
        made = options.draw(pipeline, some, guidance, seed + start)
        pictures = torch.cat([from_pil(image) for image in made.images])
        bar.update(len(some))
        pictures[~made.latents.isfinite().flatten(1).all(1).cpu()] = torch.nan
        yield pictures
    bar.close()


@torch.no_grad()
def reconstruct(pipeline: StarFlowPipeline, images: Tensor, rows: Sequence[int], noise: float) -> Tensor:
    """Some rows of uint8 pictures through the autoencoder, with noise on their latents; row r has the seed r."""
    latents = pipeline.autoencoder.encode(to_float(images[list(rows)]).to(pipeline.device))
    return pipeline.autoencoder.decode(latents + noise * noise_from_seeds(rows, tuple(latents.shape[1:])).to(latents))


@dataclass(frozen=True)
class SampleMeasurements:
    """Features of the references, and the measures against them; under torchrun each process computes its share."""

    pipeline: StarFlowPipeline
    extractor: FeatureExtractor
    dataset: EvaluationSet
    train_views: TrainingViews
    heldout_views: TrainingViews
    train: ExtractedFeatures
    heldout: ExtractedFeatures
    reference: Moments | None
    options: SamplingOptions

    @staticmethod
    def of(
        pipeline: StarFlowPipeline,
        dataset: EvaluationSet,
        extractor: FeatureExtractor,
        references: int,
        moments_file: str = "",
        options: SamplingOptions | None = None,
    ) -> SampleMeasurements:
        """Features of both splits.

        Args:
            pipeline: what is measured.
            dataset: the images that it is measured on.
            extractor: the network of the distances.
            references: images of each split, at most.
            moments_file: of other references, to measure a Frechet distance to as well; "" is none.
            options: how samples are drawn; None is as the model does by default.
        """
        train, heldout = (
            select_rows(views, evenly_spaced(len(views), references)) for views in (dataset.train, dataset.heldout)
        )
        extractor.network.to(pipeline.device)

        def features_of(images: Tensor) -> ExtractedFeatures:
            own = image_batches(_own_share(images), pipeline.device)
            return gathered_features(extractor, own, len(images), to_float(images[:1]))

        return SampleMeasurements(
            pipeline,
            extractor,
            dataset,
            train,
            heldout,
            features_of(train.images),
            features_of(heldout.images),
            load_moments(Path(moments_file).expanduser(), extractor.name) if moments_file else None,
            options or SamplingOptions(),
        )

    def sample_kernel_distance(self, count: int, guidance: float, seed: int) -> float:
        """The kernel distance of samples alone, for choosing a guidance weight."""
        return kernel_distance(self._samples(count, guidance, seed).finite_rows().features, self.heldout.features).value

    def measure_samples(self, count: int, guidance: float) -> dict[str, float]:
        """Every measure of `count` samples, sample i with seed i."""
        return self.measure(self._samples(count, guidance, 0))

    def measure_training_images(self) -> dict[str, float]:
        """Every measure of training images, which is what a perfect model would get."""
        return self.measure(self.train)

    def measure_autoencoder(self, noise: float) -> dict[str, float]:
        """Every measure of the held-out images' reconstructions, with `noise` on their latents."""
        return self.measure(self.reconstruction_features(noise))

    def reconstruction_features(self, noise: float) -> ExtractedFeatures:
        """Features of the held-out images' reconstructions, with `noise` on their latents."""
        rows = own_rows(len(self.heldout_views))
        made = (
            reconstruct(self.pipeline, self.heldout_views.images, rows[start : start + BATCH], noise)
            for start in range(0, len(rows), BATCH)
        )
        return gathered_features(self.extractor, made, len(self.heldout_views), self._example)

    def measure(self, found: ExtractedFeatures) -> dict[str, float]:
        """Distances, precision and recall of a set by name; images that are not finite are left out and counted."""
        frechet, kernel = self.extractor.distance_names()
        finite = found.finite_rows()
        count = len(finite.features)
        values: dict[str, float] = {"count": count, "not_finite": found.not_finite}
        if count < 2:
            return values
        values[kernel] = kernel_distance(finite.features, self.heldout.features).value
        values[frechet] = frechet_distance(finite.features, self.heldout.features).value
        if self.reference is not None:
            values[f"{frechet}_reference"] = frechet_of_moments(moments(finite.features), self.reference)
        if min(count, len(self.heldout.features)) > NEIGHBOURS:
            balls = precision_recall(finite.features, self.heldout.features)
            values |= {name: getattr(balls, name) for name in ("precision", "recall", "density", "coverage")}
        if finite.logits is not None:
            name = "is" if frechet == "fid" else f"is_{self.extractor.name}"
            values[name] = inception_score(finite.logits, min(10, count)).value
        return values

    def nearest_training_images(
        self, grid: Sequence[Image], prompts: Sequence[str]
    ) -> tuple[list[Image], dict[str, float]]:
        """The nearest training image of each sample of the grid, and how often it shows what was asked for."""
        concepts = self.dataset.concepts_of(self.train_views)
        known = set(concepts)
        rows = nearest_references(
            self.reconstruction_features(self.pipeline.config.noise_std).features, self.train.features
        )[0][:, 0].tolist()
        hits = [
            concepts[row] == concept
            for row, concept in zip(rows, self.dataset.concepts_of(self.heldout_views), strict=True)
            if concept in known
        ]
        scores = {"reconstructions of held-out pictures": sum(hits) / max(1, len(hits))}
        if not grid:
            return [], scores
        features = extract_features(self.extractor, [torch.cat([from_pil(image) for image in grid])]).features
        rows = nearest_references(features, self.train.features)[0][:, 0].tolist()
        if any(prompts):
            wanted = [concept_of(prompt, known) for prompt in prompts]
            scores["grid"] = sum(concepts[row] == one for row, one in zip(rows, wanted, strict=True)) / len(grid)
        return to_pil(to_float(self.train_views.images[rows])), scores

    def _samples(self, count: int, guidance: float, seed: int) -> ExtractedFeatures:
        drawn = draw_samples(self.pipeline, self.heldout_views, count, guidance, seed, self.options)
        return gathered_features(self.extractor, drawn, count, self._example)

    @property
    def _example(self) -> Tensor:
        return to_float(self.heldout_views.images[:1])


def _own_share(images: Tensor) -> Tensor:
    rows = own_rows(len(images))
    return images[rows.start : rows.stop]


def gathered_features(
    extractor: FeatureExtractor, pictures: Iterable[Tensor], count: int, example: Tensor
) -> ExtractedFeatures:
    """Features of all images, of which this process computes its own; `example` (1, 3, H, W) is one that it has.

    Where there are fewer images than processes, some have none of their own: theirs are none of the example's features.
    """
    own = own_rows(count)
    found = extract_features(extractor, pictures if own else [example])
    logits = None if found.logits is None else gather_rows(found.logits[: len(own)], count)
    return ExtractedFeatures(gather_rows(found.features[: len(own)], count), logits)
