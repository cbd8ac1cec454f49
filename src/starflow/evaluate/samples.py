"""How well an autoencoder gives pictures back, in dB, with and without noise on its latents.

Distances of a pipeline's samples to held-out pictures, and everything they are to be read beside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from starflow.data.images import from_pil, to_float, to_pil
from starflow.data.views import TrainingViews
from starflow.errors import UserError
from starflow.evaluate.dataset import (
    BATCH,
    EvaluationSet,
    batches,
    concept_of,
    gather_rows,
    own_rows,
    part,
    prompts_of,
    spread,
)
from starflow.evaluate.distances import (
    NEIGHBOURS,
    Moments,
    fidelity,
    frechet_distance,
    frechet_of_moments,
    inception_score,
    kernel_distance,
    load_moments,
    moments,
)
from starflow.evaluate.features import Extracted, Extractor, extract
from starflow.evaluate.scores import nearest
from starflow.evaluate.settings import EvaluationSettings
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.sampling.sampler import noise_from_seeds

if TYPE_CHECKING:
    from PIL.Image import Image

FLOOR = 1e-10  # mean square error that stands for "exact": 100 dB


@dataclass(frozen=True)
class Reconstruction:
    """Mean over pictures of each picture's PSNR, and how many there were."""

    psnr: float
    """dB."""
    count: int


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB, of pictures (B, 3, H, W) in [-1, 1]; images are clamped first.

    10 log10(2^2 / mean square error), the peak being the range's width. At most 100 dB, for an exact copy.

    Raises:
        UserError: two shapes.
    """
    if images.shape != references.shape:
        raise UserError(f"pictures of shapes {tuple(images.shape)} and {tuple(references.shape)}: expected equal ones")
    error = ((images.double().clamp(-1, 1) - references.double()) / 2).square().flatten(1).mean(1)
    return -10 * error.clamp_min(FLOOR).log10()


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


def through_noise(
    encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], noise_std: float, generator: Generator
) -> Callable[[Tensor], Tensor]:
    """Encode, add noise of `noise_std` to the latents, decode: what the flow's samples meet.

    The noise is drawn on the generator's device, so one on the CPU gives the same numbers anywhere.
    """

    def reconstruct(images: Tensor) -> Tensor:
        latents = encode(images)
        noise = torch.randn(latents.shape, generator=generator, device=generator.device).to(latents)
        return decode(latents + noise_std * noise)

    return reconstruct


def draw_samples(
    pipeline: StarFlowPipeline, heldout: TrainingViews, count: int, guidance: float, seed: int
) -> Iterator[Tensor]:
    """This process's share of `count` pictures of the held-out prompts in turn, as batches (B, 3, H, W) in [-1, 1].

    Sample i has the seed `seed + i`. A sample whose latent is not finite comes as NaN, so that it is counted as such
    rather than measured as the black picture that it would be saved as.
    """
    wanted = list(islice(cycle(prompts_of(pipeline, heldout, range(len(heldout)))), count))
    own = own_rows(count)
    for start in range(own.start, own.stop, BATCH):
        some = wanted[start : min(start + BATCH, own.stop)]
        made = pipeline(some, guidance=guidance, seed=seed + start, batch_size=BATCH)
        pictures = torch.cat([from_pil(image) for image in made.images])
        pictures[~made.latents.isfinite().flatten(1).all(1).cpu()] = torch.nan
        yield pictures


@torch.no_grad()
def reconstruct(pipeline: StarFlowPipeline, images: Tensor, rows: Sequence[int], noise: float) -> Tensor:
    """Some rows of uint8 pictures through the autoencoder, with noise on their latents; row r has the seed r."""
    latents = pipeline.autoencoder.encode(to_float(images[list(rows)]).to(pipeline.device))
    return pipeline.autoencoder.decode(latents + noise * noise_from_seeds(rows, tuple(latents.shape[1:])).to(latents))


@dataclass(frozen=True)
class SampleMeasurements:
    """Features of the references, and what is measured against them."""

    pipeline: StarFlowPipeline
    extractor: Extractor
    pictures: EvaluationSet
    train_views: TrainingViews
    heldout_views: TrainingViews
    train: Extracted
    heldout: Extracted
    reference: Moments | None

    @staticmethod
    def of(
        pipeline: StarFlowPipeline, pictures: EvaluationSet, extractor: Extractor, plan: EvaluationSettings
    ) -> SampleMeasurements:
        """Features of both splits, at most `plan.references` pictures of each."""
        train, heldout = (
            part(views, spread(len(views), plan.references)) for views in (pictures.train, pictures.heldout)
        )
        extractor.network.to(pipeline.device)
        path = plan.reference_moments
        return SampleMeasurements(
            pipeline,
            extractor,
            pictures,
            train,
            heldout,
            _features(extractor, batches(_own(train.images), pipeline.device), len(train)),
            _features(extractor, batches(_own(heldout.images), pipeline.device), len(heldout)),
            load_moments(Path(path).expanduser(), extractor.name) if path else None,
        )

    def kernel(self, count: int, guidance: float, seed: int) -> float:
        """Kernel distance alone, for choosing a weight."""
        return kernel_distance(self._samples(count, guidance, seed).kept().features, self.heldout.features).value

    def samples(self, count: int, guidance: float) -> dict[str, float]:
        """Every measure of `count` samples, sample i with seed i."""
        return self.measures(self._samples(count, guidance, 0))

    def floor(self) -> dict[str, float]:
        """Training pictures against held-out ones: what a perfect model would get."""
        return self.measures(self.train)

    def autoencoder(self, noise: float) -> dict[str, float]:
        """Reconstructions of the held-out pictures, with `noise` on their latents."""
        return self.measures(self.reconstructed(noise))

    def reconstructed(self, noise: float) -> Extracted:
        """Features of the reconstructions."""
        rows = own_rows(len(self.heldout_views))
        made = (
            reconstruct(self.pipeline, self.heldout_views.images, rows[start : start + BATCH], noise)
            for start in range(0, len(rows), BATCH)
        )
        return _features(self.extractor, made, len(self.heldout_views))

    def measures(self, found: Extracted) -> dict[str, float]:
        """Distances, precision and recall of a set; pictures that are not finite are left out and counted."""
        frechet, kernel = self.extractor.names()
        kept = found.kept()
        count = len(kept.features)
        values: dict[str, float] = {"count": count, "not_finite": found.not_finite}
        if count < 2:
            return values
        values[kernel] = kernel_distance(kept.features, self.heldout.features).value
        values[frechet] = frechet_distance(kept.features, self.heldout.features).value
        if self.reference is not None:
            values[f"{frechet}_reference"] = frechet_of_moments(moments(kept.features), self.reference)
        if min(count, len(self.heldout.features)) > NEIGHBOURS:
            balls = fidelity(kept.features, self.heldout.features)
            values |= {name: getattr(balls, name) for name in ("precision", "recall", "density", "coverage")}
        if kept.logits is not None:
            name = "is" if frechet == "fid" else f"is_{self.extractor.name}"
            values[name] = inception_score(kept.logits, min(10, count)).value
        return values

    def retrieve(self, grid: Sequence[Image], prompts: Sequence[str]) -> tuple[list[Image], dict[str, float]]:
        """The nearest training picture of each picture of the grid, and how often it shows what was asked for."""
        concepts = self.pictures.shown(self.train_views)
        known = set(concepts)
        rows = nearest(self.reconstructed(self.pipeline.config.noise_std).features, self.train.features)[0][
            :, 0
        ].tolist()
        hits = [
            concepts[row] == concept
            for row, concept in zip(rows, self.pictures.shown(self.heldout_views), strict=True)
            if concept in known
        ]
        scores = {"reconstructions of held-out pictures": sum(hits) / max(1, len(hits))}
        if not grid:
            return [], scores
        features = extract(self.extractor, [torch.cat([from_pil(image) for image in grid])]).features
        rows = nearest(features, self.train.features)[0][:, 0].tolist()
        if any(prompts):
            wanted = [concept_of(prompt, known) for prompt in prompts]
            scores["grid"] = sum(concepts[row] == one for row, one in zip(rows, wanted, strict=True)) / len(grid)
        return to_pil(to_float(self.train_views.images[rows])), scores

    def _samples(self, count: int, guidance: float, seed: int) -> Extracted:
        return _features(self.extractor, draw_samples(self.pipeline, self.heldout_views, count, guidance, seed), count)


def _own(images: Tensor) -> Tensor:
    rows = own_rows(len(images))
    return images[rows.start : rows.stop]


def _features(extractor: Extractor, pictures: Iterator[Tensor], count: int) -> Extracted:
    """Features of this process's pictures, and then of everyone's."""
    found = extract(extractor, pictures)
    logits = None if found.logits is None else gather_rows(found.logits, count)
    return Extracted(gather_rows(found.features, count), logits)
