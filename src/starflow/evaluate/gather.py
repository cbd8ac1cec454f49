"""The rows of all processes in their own order, so that a measure under torchrun is that of one process.

A set's rows are cut in as many runs as there are processes; each computes its own, and all get them all. Without a
process group there is one process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes that torchrun started, for the length of a block; alone, do nothing."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _world() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return _world()[0] == 0


def own_rows(count: int) -> range:
    """The rows of `count` that this process computes."""
    rank, size = _world()
    share = -(-count // size)
    return range(min(count, rank * share), min(count, (rank + 1) * share))


def gather_rows(rows: Tensor, count: int) -> Tensor:
    """All `count` rows in order, in every process, of each process's own (n, ...), on `rows`' device.

    Shards of unequal length are padded for the exchange and cut again: no row is dropped or counted twice.
    """
    import torch.distributed as dist

    _, size = _world()
    assert len(rows) == len(own_rows(count)), f"{len(rows)} rows, expected {len(own_rows(count))} of {count}"
    if size == 1:
        return rows
    # gloo exchanges memory of the CPU, nccl that of the GPU.
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    padded = torch.zeros(-(-count // size), *rows.shape[1:], dtype=rows.dtype, device=device)
    padded[: len(rows)] = rows.to(device)
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded)
    return torch.cat(parts)[:count].to(rows.device)  # only the last shards are short, so their padding ends the list
