"""Conversion of a published checkpoint's flow to our layout, and the published releases that are known by name.

Contract: the checkpoint is mapped and never read as a whole, and what is written goes to the disk a shard at a time:
the memory needed is that of a shard and a tensor. Keys, shapes and options are compared, and room on the disk is looked
for, before anything is written.

The options of a release are its published configuration's (STARFlow, arXiv 2506.06276); the repository itself does not
hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starflow.flow import checkpoint
from starflow.io import files
from starflow.nn.cpu import drop_file_pages
from starflow.published.checkpoint import OpenCheckpoint, check_finite

SHARD_BYTES = 2**30
"""Bytes that a shard stays under; it waits in memory until it is full."""

ByteProgress = Callable[[int, int], None]
"""A callback that is told the bytes written so far and in all."""


def no_progress(_done: int, _total: int) -> None:
    """Take no notice of the progress."""


def convert_flow(
    opened: OpenCheckpoint,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: ByteProgress = no_progress,
) -> int:
    """Write a checkpoint's flow to a folder that `from_pretrained` reads; returns the bytes of its weights.

    Args:
        opened: the checkpoint, from `open_published`.
        folder: made where it is missing.
        dtype: of the written weights.
        shard_bytes: size that a file stays under.
        progress: told the bytes written so far and in all.

    Raises:
        UserError: the folder cannot be written, or the disk has no room.
    """
    total = sum(tensor.numel() * dtype.itemsize for tensor in opened.tensors.values())
    files.check_disk_space(folder, total + total // 100, f"{opened.name} in {str(dtype).removeprefix('torch.')}")
    checkpoint.save(folder, opened.config, _cast(opened, dtype, total, progress), shard_bytes)
    return total


def _cast(
    opened: OpenCheckpoint, dtype: torch.dtype, total: int, progress: ByteProgress
) -> Iterator[tuple[str, Tensor]]:
    done = 0
    for name, tensor in opened.tensors.items():
        check_finite(name, tensor, opened.name)
        yield name, tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if opened.mapped and name not in opened.filled:
            drop_file_pages(tensor)
        done += tensor.numel() * dtype.itemsize
        progress(done, total)


@dataclass(frozen=True)
class PublishedRelease:
    """A published checkpoint in a repository of the hub, in its authors' layout."""

    file: str
    """Its name in the repository."""
    options: Mapping[str, Any]
    """The options that `load_published` takes."""
    terms: str
    """A phrase that says what its licence allows."""
    preset: str = ""
    """Name of its architecture among `starflow.flow.config.PRESETS`."""


def _arguments(**values: Any) -> dict[str, Any]:
    """Options in the YAML dialect."""
    return {"arguments": [{key: value} for key, value in values.items()]}


RELEASES: dict[str, PublishedRelease] = {
    "apple/starflow": PublishedRelease(
        "starflow_3B_t2i_256x256.pth",
        _arguments(
            img_size=256,
            channel_size=4,
            patch_size=1,
            channels=3072,
            blocks=6,
            layers_per_block="2 2 2 2 2 24",
            txt_size=128,
            rope=1,
            sos=1,
            nvp=1,
            use_softplus=1,
            cond_top_only=1,
            use_final_norm=1,
            adaln=0,
            seq_order="L2R",
            soft_clip=4,
            noise_std=0.3,
            vae="stabilityai/sd-vae-ft-ema",
            text="google/flan-t5-xl",
            cfg=2.5,
        ),
        "for research only",
        "starflow-t2i-3b",
    ),
}
"""The known releases by repository.

>>> RELEASES["apple/starflow"].preset
'starflow-t2i-3b'
"""
