"""The stage that fills a latent cache: every picture through the autoencoder, every caption through the text encoder.

The work is cut into parts, each a file, written whole; the processes of a run share the parts that are missing, so
that a killed run goes on with the next, at any number of processes.
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
from starflow.train.distributed.world import World
from starflow.train.loader import normal, read_batches

BATCH = 64

TIMES = "times.json"


@dataclass(frozen=True)
class CacheJob:
    """What is encoded, by what, and where to."""

    pictures: ImageDataset
    autoencoder: Autoencoder
    conditioner: Conditioner | None
    folder: Path
    mirrored: bool = False
    """Encode every training picture mirrored as well."""
    workers: int = 0


@dataclass(frozen=True)
class CachePart:
    """Pictures of one bucket and split, plain or mirrored."""

    numbers: Tensor
    mirrored: bool = False


def plan(cache: CacheJob) -> list[CachePart]:
    """All parts in their order, a function of the pictures alone."""
    parts = []
    for mirrored, heldout in ((False, False), (False, True), (True, False)):
        if mirrored and not cache.mirrored:
            continue
        for numbers in split_indices(cache.pictures, heldout=heldout):
            parts += [CachePart(some, mirrored) for some in numbers.split(PART_SIZE) if len(some)]
    return parts


def cache_latents(
    cache: CacheJob,
    info: dict[str, Any],
    world: World,
    *,
    show_progress: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Encode what is missing in the cache's folder; collective. What cannot be read is said, by name, and counted.

    Raises:
        UserError: the folder cannot be written or the disk is full (finished parts stay), or nothing could be read.
    """
    parts, texts, folder = plan(cache), distinct_texts(cache), cache.folder
    if world.main:
        folder.mkdir(parents=True, exist_ok=True)
    world.wait()
    latents = [n for n in range(len(parts)) if not latents_path(folder, n).is_file()]
    states = [n for n in range(-(-len(texts) // PART_SIZE)) if not states_path(folder, n).is_file()]
    world.wait()  # until all have seen the same
    started = time.perf_counter()
    count = _encode_parts(cache, parts, latents[world.rank :: world.size], show_progress)
    if cache.conditioner is not None:
        _encode_texts(cache.conditioner, list(texts), states[world.rank :: world.size], folder, show_progress)
    encoded = world.total(torch.tensor([float(count)], dtype=torch.float64, device=world.device))[0]
    world.wait()
    if world.main:
        _add_time(folder, encoded, time.perf_counter() - started)
        _finish(cache, parts, texts, info, say)
    world.wait()


def distinct_texts(cache: CacheJob) -> dict[str, int]:
    """What the conditioner reads (captions, or class names), each with its row; empty without one."""
    if cache.conditioner is None:
        return {}
    entries = (cache.pictures.entry(number) for number in range(len(cache.pictures)))
    keys = dict.fromkeys(_key(entry, cache.conditioner) for entry in entries)
    return {key: row for row, key in enumerate(keys)}


def _key(entry: ImageEntry, conditioner: Conditioner) -> str:
    return (entry.label or "") if conditioner.spec.kind == "class" else entry.caption


@torch.no_grad()
def _encode_parts(cache: CacheJob, parts: Sequence[CachePart], mine: Sequence[int], show_progress: bool) -> int:
    """Encode and write these parts; returns how many pictures they hold."""
    requests = [some.tolist() for n in mine for some in parts[n].numbers.split(BATCH)]
    coming = read_batches(cache.pictures, requests, cache.workers, replace=False)
    done = 0
    with tqdm(total=sum(map(len, requests)), unit="picture", desc="latents", disable=not show_progress) as bar:
        for n in mine:
            means, stds, numbers, skipped = [], [], [], []
            for asked in parts[n].numbers.split(BATCH):
                images, found, unread = next(coming)
                skipped += unread
                if len(found):
                    images = images.flip(-1) if parts[n].mirrored else images
                    mean, std = encode(cache.autoencoder, images)
                    means.append(mean)
                    stds += [] if std is None else [std]
                    numbers.append(found)
                bar.update(len(asked))
            if numbers:
                std = torch.cat(stds) if stds else None
                write_latents(cache.folder, n, torch.cat(means), std, torch.cat(numbers), skipped)
            else:
                nothing = torch.empty(0, dtype=torch.long)
                write_latents(cache.folder, n, torch.empty(0), None, nothing, skipped)
            done += sum(map(len, numbers))
    return done


def encode(autoencoder: Autoencoder, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """uint8 pictures to mean and spread of their latents, on the CPU; no spread where there is no posterior."""
    own = next(autoencoder.network.parameters(), None)
    batch = to_float(images.to(own.device if own is not None else "cpu", non_blocking=True))
    posterior = getattr(autoencoder, "posterior", None)
    if posterior is None:
        return autoencoder.encode(batch).cpu(), None
    mean, std = posterior(batch)
    return mean.cpu(), std.cpu()


@torch.no_grad()
def _encode_texts(
    conditioner: Conditioner, texts: Sequence[str], mine: Sequence[int], folder: Path, show_progress: bool
) -> None:
    for n in tqdm(mine, desc="captions", unit="part", disable=not show_progress or not mine):
        some = texts[n * PART_SIZE : (n + 1) * PART_SIZE]
        states = [conditioner.encode(some[i : i + BATCH]).cpu() for i in range(0, len(some), BATCH)]
        write_states(folder, n, torch.cat(states))


def _add_time(folder: Path, pictures: float, seconds: float) -> None:
    """Add what this run encoded to what earlier ones did, for the report."""
    path = folder / TIMES
    before = read_json(path) if path.is_file() else {"pictures": 0, "seconds": 0.0}
    write_json(path, {"pictures": before["pictures"] + int(pictures), "seconds": before["seconds"] + seconds})


def _finish(
    cache: CacheJob, parts: Sequence[CachePart], texts: dict[str, int], info: dict[str, Any], say: Callable[[str], None]
) -> None:
    """Join the parts' heads to an index, and report."""
    if cache.conditioner is not None:
        write_null(cache.folder, cache.conditioner.null(1)[0].cpu())
    pictures, places, skipped = [], [], dict[str, str]()
    for n in range(len(parts)):
        numbers, unread = read_latents_header(cache.folder, n)
        skipped |= dict(unread)
        for row, number in enumerate(numbers.tolist()):
            entry = cache.pictures.entry(number)
            condition = texts[_key(entry, cache.conditioner)] if cache.conditioner else 0
            split = "heldout" if entry.heldout else "train"
            pictures.append(LatentEntry(entry.name, entry.caption, split, condition, entry.bucket))
            places.append((n, row))
    for name, reason in skipped.items():
        say(f"skipped {name}: {reason}")
    if not pictures:
        name, reason = next(iter(skipped.items()), ("", "the set is empty"))
        raise UserError(f"none of {len(cache.pictures)} pictures could be read, first reason: {name}: {reason}")
    side = cache.pictures.buckets.side
    facts = _facts(cache, len(pictures), len(texts), skipped)
    finish_cache(cache.folder, pictures, places, {**info, **facts, "image_size": side, "side": side // _factor(cache)})
    say(_report(facts))


def _factor(cache: CacheJob) -> int:
    return cache.autoencoder.spec.factor


def _facts(cache: CacheJob, count: int, texts: int, skipped: dict[str, str]) -> dict[str, Any]:
    """What the cache came to."""
    folder, side = cache.folder, cache.pictures.buckets.side
    times = read_json(folder / TIMES)
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


def _report(facts: dict[str, Any]) -> str:
    size = facts["latent_bytes"] + facts["state_bytes"]
    return (
        f"latents: {facts['pictures']} pictures and {facts['conditions']} conditions in {size / 1e6:.1f} MB, "
        f"{facts['bytes_per_picture']:.0f} bytes a picture (raw pixels {facts['raw_bytes'] / 1e6:.1f} MB), "
        f"{facts['pictures_per_second']:.1f} pictures/s, {facts['skipped']} skipped"
    )


def posterior_sample(mean: Tensor, std: Tensor | None, seed: int, step: int, rows: range) -> Tensor:
    """Latents (B, C, h, w) of these rows of a batch, float32: the mean, or a draw where the posterior has a spread."""
    latents = mean.float()
    if std is None:
        return latents
    return latents + std.float() * normal(rows, latents.shape[1:], seed, "posterior", step)
