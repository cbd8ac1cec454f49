"""Likelihoods of a pipeline on pictures: bits per dimension, classification, outliers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from starflow.data.pictures import to_unit
from starflow.data.views import Views
from starflow.errors import UserError
from starflow.evaluate import (
    Bits,
    Classification,
    Outliers,
    bits,
    classify,
    gather_rows,
    log_likelihoods,
    outliers,
    own_rows,
)
from starflow.measure.pictures import BATCH, Pictures, prompts_of, spread
from starflow.pipeline import StarFlowPipeline


def measure_likelihoods(pipeline: StarFlowPipeline, pictures: Pictures, most: int, draws: int) -> dict[str, Bits]:
    """Bits of the held-out pictures, and of as many training pictures spread over the set; prompts as in training."""
    heldout = spread(len(pictures.heldout), most)
    train = spread(len(pictures.train), min(len(heldout), len(pictures.train)))
    return {
        split: _bits(pipeline, views, rows, draws)
        for split, views, rows in (("train", pictures.train, train), ("heldout", pictures.heldout, heldout))
    }


def _bits(pipeline: StarFlowPipeline, views: Views, rows: Sequence[int], draws: int) -> Bits:
    nats = log_likelihoods(
        lambda some, seeds: _nats(pipeline, views.images, some, seeds, prompts_of(pipeline, views, some)),
        rows,
        draws,
        BATCH,
    )
    return bits(nats, _dimensions(pipeline, views.images), pipeline.density_space)


def measure_classification(pipeline: StarFlowPipeline, views: Views, most: int, draws: int) -> Classification:
    """Accuracy of argmax_c log p(x | c) on labelled pictures; each class meets the same draws of the noise.

    Raises:
        UserError: the model has no classes, or a picture has no label that it knows.
    """
    conditioner = pipeline.conditioner
    if conditioner is None or conditioner.spec.kind != "class":
        raise UserError(f"'{pipeline.config.name}' has no classes to tell apart: leave out --classify")
    names = conditioner.spec.names
    numbers = {name.casefold(): number for number, name in enumerate(names)}
    rows = spread(len(views), most)
    unknown = sorted({str(views.labels[row]) for row in rows} - set(names))
    if unknown:
        raise UserError(f"the model has no class '{unknown[0]}': its classes are {', '.join(names[:8])}")
    own = [rows[index] for index in own_rows(len(rows))]
    found = torch.empty(len(own), len(names), dtype=torch.float64)
    for start in range(0, len(own), BATCH):
        some = own[start : start + BATCH]
        for number, name in enumerate(names):
            several = [
                _nats(pipeline, views.images, some, [row * draws + draw for row in some], [name] * len(some)).cpu()
                for draw in range(draws)
            ]
            found[start : start + len(some), number] = torch.stack(several).double().mean(0)
    labels = torch.tensor([numbers[str(views.labels[row]).casefold()] for row in rows])
    return classify(gather_rows(found, len(rows)), labels)


def measure_outliers(pipeline: StarFlowPipeline, pictures: Pictures, foreign: Tensor, most: int) -> Outliers:
    """Likelihood and typicality, without condition, as scores that tell foreign pictures (N, 3, H, W) uint8 apart."""

    def unconditional(images: Tensor, count: int) -> Tensor:
        rows = spread(len(images), count)
        found = log_likelihoods(
            lambda some, seeds: _nats(pipeline, images, some, seeds, [""] * len(some)), rows, 1, BATCH
        )
        return found[:, 0]

    most = most or len(pictures.heldout)
    inside, outside = unconditional(pictures.heldout.images, most), unconditional(foreign, most)
    return outliers(inside, outside, unconditional(pictures.train.images, most))


def _nats(
    pipeline: StarFlowPipeline, images: Tensor, rows: Sequence[int], seeds: Sequence[int], prompts: Sequence[str]
) -> Tensor:
    batch = to_unit(images[list(rows)]).to(pipeline.device)
    return pipeline.log_probs(batch, prompts, seeds)[0]


def _dimensions(pipeline: StarFlowPipeline, images: Tensor) -> int:
    spec = pipeline.config.autoencoder
    return int(spec.channels * (images.shape[-2] // spec.factor) * (images.shape[-1] // spec.factor))
