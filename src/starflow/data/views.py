"""Training views of a set: drawn once, kept in memory or in a file.

Contract: what is drawn does not depend on the records' order or on the number of worker processes; the
views of one picture lie side by side, in the records' order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from starflow.data.augment import View, ViewConfig, draw_views, view_count
from starflow.data.records import ImageError, Record, Skipped, open_image
from starflow.errors import UserError
from starflow.files import read_tensors, write_tensors, write_text

if TYPE_CHECKING:
    import torch

__all__ = ["ViewConfig", "Views", "load_views", "make_views", "save_views"]


@dataclass(frozen=True)
class Views:
    """N views in memory: images (N, 3, H, W) uint8 in 0..255, and one entry a view in each list."""

    images: torch.Tensor
    captions: list[str]
    labels: list[str | None]
    names: list[str]
    splits: list[str]

    def __len__(self) -> int:
        return len(self.captions)


def make_views(
    records: Sequence[Record], config: ViewConfig, *, progress: bool = True, workers: int = 1
) -> tuple[Views, list[Skipped]]:
    """Draw all views, in the records' order; pictures that cannot be read are left out and returned by name.

    Raises:
        UserError: not one picture could be read.
    """
    import torch
    from tqdm import tqdm

    total = sum(view_count(record, config) for record in records)
    images = np.empty((total, 3, config.size, config.size), dtype=np.uint8)
    kept: list[tuple[Record, str]] = []
    skipped = []
    drawn = _draw(records, config, workers)
    for record, views in zip(tqdm(records, desc="views", unit="picture", disable=not progress), drawn, strict=True):
        if isinstance(views, Skipped):
            skipped.append(views)
            continue
        for pixels, caption in views:
            images[len(kept)] = pixels.transpose(2, 0, 1)
            kept.append((record, caption))
    if not kept:
        reason = f"{skipped[0].name}: {skipped[0].reason}" if skipped else "the list of records is empty"
        raise UserError(f"none of {len(records)} pictures could be read, first reason: {reason}")
    views_made = Views(
        images=torch.from_numpy(images[: len(kept)]),
        captions=[caption for _, caption in kept],
        labels=[record.label for record, _ in kept],
        names=[record.name for record, _ in kept],
        splits=[record.split for record, _ in kept],
    )
    return views_made, skipped


def save_views(path: Path, views: Views) -> None:
    """Write `path` (safetensors) and, beside it, the same name with .jsonl: one line a view."""
    rows = zip(views.captions, views.labels, views.names, views.splits, strict=True)
    lines = (
        json.dumps({"caption": caption, "label": label, "name": name, "split": split}, ensure_ascii=False)
        for caption, label, name, split in rows
    )
    write_tensors(path, {"images": views.images})
    write_text(path.with_suffix(".jsonl"), "".join(line + "\n" for line in lines))


def load_views(path: Path) -> Views:
    """Read what `save_views` wrote.

    Raises:
        UserError: a file is missing, truncated, or the two do not belong together.
    """
    tensors = read_tensors(path)
    beside = path.with_suffix(".jsonl")
    try:
        rows = [json.loads(line) for line in beside.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {beside} ({error}): make the views again") from None
    images = tensors.get("images")
    if images is None or images.ndim != 4 or len(images) != len(rows):
        found = "no tensor 'images'" if images is None else f"images of shape {tuple(images.shape)}"
        raise UserError(f"{path} holds {found}, {beside} {len(rows)} lines: expected one a view; make the views again")
    return Views(
        images=images,
        captions=[row["caption"] for row in rows],
        labels=[row["label"] for row in rows],
        names=[row["name"] for row in rows],
        splits=[row["split"] for row in rows],
    )


def _draw(records: Sequence[Record], config: ViewConfig, workers: int) -> Iterator[list[View] | Skipped]:
    one = partial(_views_of, config=config)
    if workers <= 1:
        yield from map(one, records)
        return
    import multiprocessing

    # Not fork: the parent may hold threads (torch's), and a forked copy of their locks hangs.
    with multiprocessing.get_context("spawn").Pool(workers, _leave_interrupts_to_the_parent) as pool:
        yield from pool.imap(one, records, chunksize=16)


def _leave_interrupts_to_the_parent() -> None:
    """Ctrl-C reaches every process of a terminal; one answer to it is enough."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _views_of(record: Record, config: ViewConfig) -> list[View] | Skipped:
    """All views of one picture, or why there are none; runs in a worker."""
    try:
        image = open_image(record.file)
    except ImageError as error:
        return Skipped(record.name, error.reason)
    return draw_views(image, record, config)
