"""A published checkpoint's flow into our layout, one tensor after the other.

Contract: the checkpoint is mapped and never read as a whole, and what is written goes to the disk a shard at a time:
the memory needed is that of a shard and a tensor. Keys, shapes and options are compared, and room on the disk is looked
for, before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from starflow import files
from starflow.flow import store
from starflow.weights.published import Checkpoint

SHARD_BYTES = 2**30
"""Size that a shard stays under: it waits in memory until it is full."""

Progress = Callable[[int, int], None]
"""Told the bytes written so far and in all."""


def silent(_done: int, _total: int) -> None:
    """Progress that nobody looks at."""


def convert_flow(
    found: Checkpoint,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> int:
    """Write a checkpoint's flow as `from_pretrained` reads it; returns the bytes of its weights.

    Args:
        found: the checkpoint, from `open_published`.
        folder: made where it is missing.
        dtype: of the written weights.
        shard_bytes: size that a file stays under.
        progress: told the bytes written so far and in all.

    Raises:
        UserError: the folder cannot be written, or the disk has no room.
    """
    total = sum(tensor.numel() * dtype.itemsize for tensor in found.tensors.values())
    files.check_room(folder, total + total // 100, f"{found.name} in {str(dtype).removeprefix('torch.')}")
    store.save(folder, found.config, _cast(found, dtype, total, progress), shard_bytes)
    return total


def _cast(found: Checkpoint, dtype: torch.dtype, total: int, progress: Progress) -> Iterator[tuple[str, Tensor]]:
    done = 0
    for name, tensor in found.tensors.items():
        yield name, tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if found.mapped and name not in found.added:
            files.drop_pages(tensor)
        done += tensor.numel() * dtype.itemsize
        progress(done, total)
