"""All measures of a text-to-image pipeline on a set of pictures, in one report.

Protocol, the same for every model: held-out pictures are plain (white background, caption with the style); distances
are kernel distances on MobileNetV2 features (`kid_mobilenetv2`, not comparable with any FID); samples take the held-out
captions in turn, sample i with seed i; the best guidance weight is chosen on fewer samples with other seeds, and the
reported distance is measured at that weight alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from starflow.data.pictures import from_pil, to_pil, to_unit
from starflow.data.records import Record
from starflow.data.views import ViewConfig, Views, make_views
from starflow.errors import UserError
from starflow.evaluate import (
    extract_features,
    kernel_distance,
    load_mobilenet,
    measure_reconstruction,
    nearest,
    through_noise,
)
from starflow.pipeline import StarFlowPipeline

if TYPE_CHECKING:
    from PIL.Image import Image

BATCH = 64
TUNING_SEED = 1_000_000
"""First seed of the samples that choose the guidance weight: none of them is measured again."""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    samples: int = 1000
    tuning_samples: int = 250
    """Samples per guidance weight when the best is chosen."""
    guidance: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 4.0)
    prompts: tuple[str, ...] = ()
    """Prompts of the grid; prompt i has seed i."""


@dataclass(frozen=True)
class Likelihood:
    """Of noised latents, in nats per dimension (smaller is better), and how many pictures it is the mean of."""

    nats_per_dim: float
    bits_per_dim: float
    count: int


@dataclass(frozen=True)
class Report:
    """What was measured; `grid` and `nearest` are pictures for the sheet and stay out of the JSON."""

    reconstruction: dict[str, float]
    """Mean PSNR in dB of held-out pictures by latent noise."""
    likelihood: dict[str, Likelihood]
    """By split."""
    kid_mobilenetv2: dict[str, float]
    """Against held-out pictures: the floor (training pictures), reconstructions, samples with and without guidance."""
    tuning: dict[str, float]
    """kid_mobilenetv2 by guidance weight, on fewer samples."""
    guidance: float
    """The best weight, at which samples and grid are made."""
    retrieval: dict[str, float]
    """Share whose nearest training picture shows the prompted concept."""
    counts: dict[str, int]
    grid: list[Image]
    nearest: list[Image]

    def as_json(self) -> dict[str, Any]:
        """Everything but the pictures."""
        values = {**vars(self), "likelihood": {split: asdict(found) for split, found in self.likelihood.items()}}
        return {key: value for key, value in values.items() if key not in ("grid", "nearest")}


Say = Callable[[str], None]


def measure(pipeline: StarFlowPipeline, records: Sequence[Record], plan: Plan, say: Say) -> Report:
    """Every measure of `Report`.

    Args:
        pipeline: reads texts or classes, or takes no prompt.
        records: pictures of both splits.
        plan: how much.
        say: told what happens next.

    Raises:
        UserError: a split is empty, or the features' package is not installed.
    """
    pictures = _Pictures.of(records, pipeline.config.image_size)
    say("reconstructions")
    reconstruction = measure_reconstructions(pipeline, pictures.heldout)
    say("likelihoods")
    likelihood = measure_likelihoods(pipeline, pictures)
    say("features of the pictures")
    features = _Features.of(pipeline, pictures)
    say("guidance")
    tuning = {
        weight: features.distance(_sample(pipeline, pictures, plan.tuning_samples, weight, TUNING_SEED))
        for weight in (plan.guidance if pipeline.conditioner else (0.0,))
    }
    best = min(tuning, key=lambda weight: tuning[weight])
    say(f"{plan.samples} samples at guidance {best:g}")
    distances = features.references()
    distances["samples"] = features.distance(_sample(pipeline, pictures, plan.samples, best, 0))
    if best:
        distances["samples, no guidance"] = features.distance(_sample(pipeline, pictures, plan.samples, 0.0, 0))
    say("grid")
    grid = pipeline(list(plan.prompts), guidance=best).images if plan.prompts else []
    found, retrieval = features.retrieve(grid, plan.prompts)
    return Report(
        reconstruction=reconstruction,
        likelihood=likelihood,
        kid_mobilenetv2=distances,
        tuning={f"{weight:g}": value for weight, value in tuning.items()},
        guidance=best,
        retrieval=retrieval,
        counts={"train": len(pictures.train), "heldout": len(pictures.heldout), "samples": plan.samples},
        grid=grid,
        nearest=found,
    )


@dataclass(frozen=True)
class _Pictures:
    """Plain pictures of both splits, uint8, with what each shows."""

    train: Views
    heldout: Views
    concepts: dict[str, str]
    """By the picture's name."""

    @staticmethod
    def of(records: Sequence[Record], size: int) -> _Pictures:
        views = ViewConfig(size=size, views=1, heldout_views=1)
        splits = {split: [record for record in records if record.split == split] for split in ("train", "heldout")}
        for split, some in splits.items():
            if not some:
                raise UserError(f"no {split} pictures among {len(records)}: both splits are needed")
        train, heldout = (make_views(some, views, progress=False)[0] for some in splits.values())
        return _Pictures(train, heldout, {record.name: record.caption.lower() for record in records})

    def shown(self, views: Views) -> list[str]:
        """The concept of each view."""
        return [self.concepts[name] for name in views.names]


def measure_reconstructions(pipeline: StarFlowPipeline, views: Views) -> dict[str, float]:
    """Mean PSNR in dB without latent noise, and with 0.2 and 0.3."""
    found = {}
    for noise in (0.0, 0.2, 0.3):
        draw = torch.Generator().manual_seed(0)
        through = through_noise(pipeline.autoencoder.encode, pipeline.autoencoder.decode, noise, draw)
        found[f"noise {noise}"] = measure_reconstruction(_batches(pipeline, views), through).psnr
    return found


def measure_likelihoods(pipeline: StarFlowPipeline, pictures: _Pictures) -> dict[str, Likelihood]:
    """Held-out likelihood, and that of as many training pictures spread over the set."""
    stride = max(1, len(pictures.train) // len(pictures.heldout))
    found = {}
    for split, views, step in (("train", pictures.train, stride), ("heldout", pictures.heldout, 1)):
        rows = list(range(0, len(views), step))
        nats, dimensions = [], 1
        for start in range(0, len(rows), BATCH):
            some = rows[start : start + BATCH]
            images = to_unit(views.images[some]).to(pipeline.device)
            density, dimensions = pipeline.log_probs(images, _prompts(pipeline, views, some), seeds=some)
            nats.append(density)
        per_dim = -float(torch.cat(nats).mean()) / dimensions
        found[split] = Likelihood(per_dim, per_dim / math.log(2), len(rows))
    return found


def _prompts(pipeline: StarFlowPipeline, views: Views, rows: Sequence[int]) -> list[str]:
    """What the pipeline is told about these pictures: captions, class names or nothing."""
    if pipeline.conditioner is None:
        return [""] * len(rows)
    by_class = pipeline.conditioner.spec.kind == "class"
    return [(views.labels[row] or "") if by_class else views.captions[row] for row in rows]


def _sample(
    pipeline: StarFlowPipeline, pictures: _Pictures, count: int, guidance: float, seed: int
) -> Iterator[Tensor]:
    """`count` pictures of the held-out prompts in turn, as batches (B, 3, H, W) in [-1, 1]."""
    prompts = _prompts(pipeline, pictures.heldout, range(len(pictures.heldout)))
    wanted = list(islice(cycle(prompts), count))
    for start in range(0, count, BATCH):
        made = pipeline(wanted[start : start + BATCH], guidance=guidance, seed=seed + start, batch_size=BATCH)
        yield torch.cat([from_pil(image) for image in made.images])


def _batches(pipeline: StarFlowPipeline, views: Views) -> Iterator[Tensor]:
    for start in range(0, len(views), BATCH):
        yield to_unit(views.images[start : start + BATCH]).to(pipeline.device)


@dataclass(frozen=True)
class _Features:
    """MobileNetV2 features of the pictures, and what is measured with them."""

    network: torch.nn.Module
    pictures: _Pictures
    train: Tensor
    heldout: Tensor
    reconstructed: Tensor

    @staticmethod
    def of(pipeline: StarFlowPipeline, pictures: _Pictures) -> _Features:
        network = load_mobilenet().to(pipeline.device)
        autoencoder = pipeline.autoencoder
        draw = torch.Generator().manual_seed(0)
        through = through_noise(autoencoder.encode, autoencoder.decode, pipeline.config.noise_std, draw)
        with torch.no_grad():
            reconstructed = extract_features(network, map(through, _batches(pipeline, pictures.heldout)))
        return _Features(
            network,
            pictures,
            extract_features(network, _batches(pipeline, pictures.train)),
            extract_features(network, _batches(pipeline, pictures.heldout)),
            reconstructed,
        )

    def distance(self, batches: Iterator[Tensor]) -> float:
        """Kernel distance of some pictures to the held-out ones."""
        return kernel_distance(extract_features(self.network, batches), self.heldout).value

    def references(self) -> dict[str, float]:
        """What the samples' distance is to be read beside."""
        return {
            "floor (training pictures)": kernel_distance(self.train, self.heldout).value,
            "reconstructions with noise": kernel_distance(self.reconstructed, self.heldout).value,
        }

    def retrieve(self, grid: Sequence[Image], prompts: Sequence[str]) -> tuple[list[Image], dict[str, float]]:
        """The nearest training picture of each picture of the grid, and how often it shows what was asked for."""
        shown = self.pictures.shown(self.pictures.train)
        known = set(shown)
        rows, _ = nearest(self.reconstructed, self.train)
        concepts = self.pictures.shown(self.pictures.heldout)
        hits = [
            shown[row] == concept
            for row, concept in zip(rows[:, 0].tolist(), concepts, strict=True)
            if concept in known
        ]
        scores = {"reconstructions of held-out pictures": sum(hits) / max(1, len(hits))}
        if not grid:
            return [], scores
        features = extract_features(self.network, [torch.cat([from_pil(image) for image in grid])])
        rows, _ = nearest(features, self.train)
        wanted = [concept_of(prompt, known) for prompt in prompts]
        hits = [shown[row] == concept for row, concept in zip(rows[:, 0].tolist(), wanted, strict=True)]
        scores["grid"] = sum(hits) / len(hits)
        return to_pil(to_unit(self.pictures.train.images[rows[:, 0]])), scores


def concept_of(prompt: str, known: set[str]) -> str:
    """The longest known concept whose words stand in the prompt one after the other; "" where there is none."""
    words = f" {' '.join(prompt.lower().replace(',', ' ').split())} "
    return max((concept for concept in known if f" {concept} " in words), key=len, default="")
