"""Filling of a latent cache: every image through the autoencoder, every caption through the text encoder.

The work is cut into parts, each a file, written whole. The processes of a run share the parts that are missing, so that
a killed run goes on with the next one, at any number of processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from starflow.conditioning.base import Conditioner
from starflow.data.images import to_float
from starflow.data.index import ImageDataset, ImageEntry, split_indices
from starflow.data.latent_cache import (
    PART_SIZE,
    LatentEntry,
    finish_cache,
    latents_path,
    read_latents_header,
    states_path,
    write_latents,
    write_null,
    write_states,
)
from starflow.errors import UserError
from starflow.io.files import read_json, write_json
from starflow.latents.base import Autoencoder
from starflow.train.distributed import World
from starflow.train.loader import normal, read_batches

BATCH = 64

TIMES_NAME = "times.json"
"""The file that adds up images and seconds over all runs that worked on a cache."""


@dataclass(frozen=True)
class CacheJob:
    """Which images are encoded, by which networks, and into which folder."""

    dataset: ImageDataset
    autoencoder: Autoencoder
    conditioner: Conditioner | None
    folder: Path
    flipped: bool = False
    """Encode every training image turned around as well."""
    workers: int = 0
    """Processes that read; 0 is a thread."""


@dataclass(frozen=True)
class CachePart:
    """Images of one bucket and split, plain or turned around, which one file holds."""

    indices: Tensor
    flipped: bool = False


def cache_parts(job: CacheJob) -> list[CachePart]:
    """All parts of a cache in their order, a function of the images alone."""
    parts = []
    for flipped, heldout in ((False, False), (False, True), (True, False)):
        if flipped and not job.flipped:
            continue
        for indices in split_indices(job.dataset, heldout=heldout):
            parts += [CachePart(part, flipped) for part in indices.split(PART_SIZE) if len(part)]
    return parts


def cache_latents(
    job: CacheJob,
    info: dict[str, Any],
    world: World,
    *,
    show_progress: bool = True,
    notify: Callable[[str], None] = print,
) -> None:
    """Encode what is missing in the cache's folder; collective. What cannot be read is named and counted.

    Args:
        job: see `CacheJob`.
        info: what is written into info.json beside what this function finds.
        world: the processes, which share the parts.
        show_progress: draw bars.
        notify: called with one line about each image that cannot be read, and one at the end.

    Raises:
        UserError: the folder cannot be written or the disk is full (finished parts stay), or nothing could be read.
    """
    parts, texts, folder = cache_parts(job), distinct_texts(job), job.folder
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    world.barrier()
    latents = [n for n in range(len(parts)) if not latents_path(folder, n).is_file()]
    states = [n for n in range(-(-len(texts) // PART_SIZE)) if not states_path(folder, n).is_file()]
    world.barrier()  # until all have seen the same
    started = time.perf_counter()
    count = _encode_parts(job, parts, latents[world.rank :: world.size], show_progress)
    if job.conditioner is not None:
        _encode_texts(job.conditioner, list(texts), states[world.rank :: world.size], folder, show_progress)
    encoded = world.all_reduce(torch.tensor([float(count)], dtype=torch.float64, device=world.device))[0]
    world.barrier()
    if world.is_main:
        _add_time(folder, encoded, time.perf_counter() - started)
        _finish(job, parts, texts, info, notify)
    world.barrier()


def distinct_texts(job: CacheJob) -> dict[str, int]:
    """The texts that the conditioner reads, each once, with its row in the cache; empty without a conditioner."""
    if job.conditioner is None:
        return {}
    entries = (job.dataset.entry(index) for index in range(len(job.dataset)))
    texts = dict.fromkeys(condition_text(entry, job.conditioner) for entry in entries)
    return {text: row for row, text in enumerate(texts)}


def condition_text(entry: ImageEntry, conditioner: Conditioner) -> str:
    """What a conditioner reads of an image: its class name or its caption."""
    return (entry.label or "") if conditioner.spec.kind == "class" else entry.caption


@torch.no_grad()
def _encode_parts(job: CacheJob, parts: Sequence[CachePart], own: Sequence[int], show_progress: bool) -> int:
    """Encode and write these parts; returns how many images they hold."""
    requests = [batch.tolist() for n in own for batch in parts[n].indices.split(BATCH)]
    batches = read_batches(job.dataset, requests, job.workers, replace=False)
    done = 0
    with tqdm(total=sum(map(len, requests)), unit="picture", desc="latents", disable=not show_progress) as bar:
        for n in own:
            means, stds, indices, skipped = [], [], [], []
            for asked in parts[n].indices.split(BATCH):
                images, found, unread = next(batches)
                skipped += unread
                if len(found):
                    images = images.flip(-1) if parts[n].flipped else images
                    mean, std = encode_images(job.autoencoder, images)
                    _check_finite(mean, found, job.dataset)
                    means.append(mean)
                    stds += [] if std is None else [std]
                    indices.append(found)
                bar.update(len(asked))
            if indices:
                std = torch.cat(stds) if stds else None
                write_latents(job.folder, n, torch.cat(means), std, torch.cat(indices), skipped)
            else:
                nothing = torch.empty(0, dtype=torch.long)
                write_latents(job.folder, n, torch.empty(0), None, nothing, skipped)
            done += sum(map(len, indices))
    return done


def _check_finite(latents: Tensor, indices: Tensor, dataset: ImageDataset) -> None:
    """Raises UserError: latents that are not finite, which no flow can be trained on."""
    bad = (~latents.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist()
    if bad:
        name = dataset.entry(int(indices[bad[0]])).name
        raise UserError(
            f"the latents of {len(bad)} of {len(latents)} pictures are not finite, {name} first: the autoencoder is "
            "damaged or has diverged; train or choose another one"
        )


def encode_images(autoencoder: Autoencoder, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Images (B, 3, H, W) uint8 -> mean and deviation of their latents, on the CPU; None without a posterior."""
    parameter = next(autoencoder.network.parameters(), None)
    batch = to_float(images.to(parameter.device if parameter is not None else "cpu", non_blocking=True))
    posterior = getattr(autoencoder, "posterior", None)
    if posterior is None:
        return autoencoder.encode(batch).cpu(), None
    mean, std = posterior(batch)
    return mean.cpu(), std.cpu()


@torch.no_grad()
def _encode_texts(
    conditioner: Conditioner, texts: Sequence[str], own: Sequence[int], folder: Path, show_progress: bool
) -> None:
    for n in tqdm(own, desc="captions", unit="part", disable=not show_progress or not own):
        part = texts[n * PART_SIZE : (n + 1) * PART_SIZE]
        states = [conditioner.encode(part[i : i + BATCH]).cpu() for i in range(0, len(part), BATCH)]
        write_states(folder, n, torch.cat(states))


def _add_time(folder: Path, images: float, seconds: float) -> None:
    """Add what this run encoded to what earlier ones did."""
    path = folder / TIMES_NAME
    before = read_json(path) if path.is_file() else {"pictures": 0, "seconds": 0.0}
    write_json(path, {"pictures": before["pictures"] + int(images), "seconds": before["seconds"] + seconds})


def _finish(
    job: CacheJob,
    parts: Sequence[CachePart],
    texts: dict[str, int],
    info: dict[str, Any],
    notify: Callable[[str], None],
) -> None:
    """Join the parts' heads to an index, and say what the cache came to."""
    if job.conditioner is not None:
        write_null(job.folder, job.conditioner.null(1)[0].cpu())
    entries, places, skipped = [], [], dict[str, str]()
    for n in range(len(parts)):
        indices, unread = read_latents_header(job.folder, n)
        skipped |= dict(unread)
        for row, index in enumerate(indices.tolist()):
            entry = job.dataset.entry(index)
            condition = texts[condition_text(entry, job.conditioner)] if job.conditioner else 0
            split = "heldout" if entry.heldout else "train"
            entries.append(LatentEntry(entry.name, entry.caption, split, condition, entry.bucket))
            places.append((n, row))
    job.dataset.add_skipped(skipped.items())
    for name, reason in skipped.items():
        notify(f"skipped {name}: {reason}")
    if not entries:
        name, reason = next(iter(skipped.items()), ("", "the set is empty"))
        raise UserError(f"none of {len(job.dataset)} pictures could be read, first reason: {name}: {reason}")
    side = job.dataset.buckets.side
    counts = _counts(job, len(entries), len(texts), skipped)
    sides = {"image_size": side, "side": side // job.autoencoder.spec.factor}
    finish_cache(job.folder, entries, places, {**info, **counts, **sides})
    notify(_summary(counts))


def _counts(job: CacheJob, count: int, texts: int, skipped: dict[str, str]) -> dict[str, Any]:
    """Numbers and sizes of what the cache holds, for info.json."""
    folder, side = job.folder, job.dataset.buckets.side
    times = read_json(folder / TIMES_NAME)
    sizes = {kind: sum(path.stat().st_size for path in folder.glob(f"{kind}-*")) for kind in ("latents", "states")}
    return {
        "pictures": count,
        "conditions": texts,
        "skipped": len(skipped),
        "latent_bytes": sizes["latents"],
        "state_bytes": sizes["states"],
        "bytes_per_picture": round(sum(sizes.values()) / count, 1),
        "raw_bytes": 3 * side * side * count,
        "pictures_per_second": round(times["pictures"] / max(times["seconds"], 1e-9), 2),
    }


def _summary(counts: dict[str, Any]) -> str:
    size = counts["latent_bytes"] + counts["state_bytes"]
    return (
        f"latents: {counts['pictures']} pictures and {counts['conditions']} conditions in {size / 1e6:.1f} MB, "
        f"{counts['bytes_per_picture']:.0f} bytes a picture (raw pixels {counts['raw_bytes'] / 1e6:.1f} MB), "
        f"{counts['pictures_per_second']:.1f} pictures/s, {counts['skipped']} skipped"
    )


def posterior_sample(mean: Tensor, std: Tensor | None, seed: int, step: int, rows: range) -> Tensor:
    """Latents (B, C, h, w) of these rows of a batch, float32: the mean, or a draw where there is a deviation.

    Example:
        >>> mean = torch.zeros(2, 1, 1, 1)
        >>> posterior_sample(mean, None, seed=0, step=0, rows=range(2)).flatten()
        tensor([0., 0.])
    """
    latents = mean.float()
    if std is None:
        return latents
    return latents + std.float() * normal(rows, latents.shape[1:], seed, "posterior", step)
