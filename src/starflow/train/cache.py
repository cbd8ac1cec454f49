"""The stage that fills a latent cache: every view through the autoencoder, every caption through the text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from starflow.conditioning.base import Conditioner
from starflow.data.latent_cache import (
    PART,
    CachedPicture,
    finish_cache,
    part_path,
    write_conditions,
    write_part,
)
from starflow.data.pictures import to_unit
from starflow.data.views import Views
from starflow.latents.base import Autoencoder
from starflow.train.randomness import normal

BATCH = 64


def cache_latents(
    views: Views,
    autoencoder: Autoencoder,
    conditioner: Conditioner | None,
    folder: Path,
    info: dict[str, Any],
    device: torch.device,
    show_progress: bool = True,
) -> None:
    """Encode `views` into `folder`, part by part; parts that are there are kept.

    Raises:
        UserError: the folder cannot be written or the disk is full (finished parts stay).
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = len(views.captions)
    with tqdm(total=count, unit="picture", desc="latents", disable=not show_progress) as bar:
        for part, start in enumerate(range(0, count, PART)):
            images = views.images[start : start + PART]
            if not part_path(folder, part).is_file():
                write_part(folder, part, *_encode(images, autoencoder, device, bar))
            else:
                bar.update(len(images))
    rows = _cache_conditions(views, conditioner, folder, show_progress)
    pictures = [
        CachedPicture(name, caption, split, row)
        for name, caption, split, row in zip(views.names, views.captions, views.splits, rows, strict=True)
    ]
    finish_cache(folder, pictures, info)


@torch.no_grad()
def _encode(
    images: Tensor, autoencoder: Autoencoder, device: torch.device, bar: tqdm[Any]
) -> tuple[Tensor, Tensor | None]:
    means, stds = [], []
    for start in range(0, len(images), BATCH):
        batch = to_unit(images[start : start + BATCH].to(device))
        posterior = getattr(autoencoder, "posterior", None)
        if posterior is None:
            means.append(autoencoder.encode(batch).cpu())
        else:
            mean, std = posterior(batch)
            means.append(mean.cpu())
            stds.append(std.cpu())
        bar.update(len(batch))
    return torch.cat(means), torch.cat(stds) if stds else None


def _condition_keys(views: Views, conditioner: Conditioner) -> Sequence[str]:
    """What the conditioner reads: captions, or class names."""
    if conditioner.spec.kind == "class":
        return [label or "" for label in views.labels]
    return views.captions


@torch.no_grad()
def _cache_conditions(views: Views, conditioner: Conditioner | None, folder: Path, show_progress: bool) -> list[int]:
    """Write the distinct conditions and return each picture's row."""
    if conditioner is None:
        return [0] * len(views.captions)
    keys = _condition_keys(views, conditioner)
    distinct = {key: row for row, key in enumerate(dict.fromkeys(keys))}
    texts = list(distinct)
    states = []
    starts = range(0, len(texts), BATCH)
    for start in tqdm(starts, desc="captions", unit="batch", disable=not show_progress):
        states.append(conditioner.encode(texts[start : start + BATCH]).to("cpu", torch.float16))
    write_conditions(folder, torch.cat(states), conditioner.null(1)[0].cpu())
    return [distinct[key] for key in keys]


def posterior_sample(mean: Tensor, std: Tensor | None, seed: int, step: int, rows: range) -> Tensor:
    """Latents (B, C, h, w) of these rows of a batch, float32: the mean, or a draw where the posterior has a spread."""
    latents = mean.float()
    if std is None:
        return latents
    return latents + std.float() * normal(rows, latents.shape[1:], seed, "posterior", step)
