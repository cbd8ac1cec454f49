"""The memory of a call is predicted before it starts and compared with what is free, as a system that runs out kills.

The prediction is `starflow.flow.memory`'s, without the weights, which are there already.
"""

from __future__ import annotations

from pathlib import Path

import torch

from starflow.errors import UserError
from starflow.flow.memory import AUTOENCODERS, GIB, sampling_memory
from starflow.flow.model import Flow
from starflow.latents import AutoencoderSpec
from starflow.sampling.policy import CacheDtype

MEMINFO, CGROUPS = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def call_bytes(
    flow: Flow,
    shape: tuple[int, int, int],
    batch: int,
    cache_dtype: CacheDtype,
    decoder: AutoencoderSpec,
    tile: int | None,
) -> int:
    """About the bytes that sampling and decoding `batch` latents of a shape (C, h, w) at once take, without weights."""
    low = flow.network_dtype == torch.bfloat16
    needed = sampling_memory(
        flow.config,
        batch,
        tokens=shape[1] * shape[2] // flow.config.patch_size**2,
        dtype="bfloat16" if low else "float32",
        cache_dtype="bfloat16" if low or cache_dtype == "bfloat16" else "float32",
        iterated=False,
        autoencoder=AUTOENCODERS.get(decoder.kind),
        tile=tile,
    )
    return needed.cache + max(needed.activations, needed.decoding)


def free_bytes(device: torch.device) -> int | None:
    """Memory of a device that is free, or that the system can free; None where that cannot be asked."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
    if device.type != "cpu" or not MEMINFO.is_file():
        return None
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
    free = int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None
    limit, used = (_number(CGROUPS / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        return limit - used if free is None else min(free, limit - used)
    return free


def check_memory(
    flow: Flow,
    shape: tuple[int, int, int],
    batch: int,
    cache_dtype: CacheDtype,
    decoder: AutoencoderSpec,
    tile: int | None,
) -> None:
    """Refuse a call that does not fit; the arguments are those of `call_bytes`.

    Raises:
        UserError: it needs more memory than is free; names the ways out.
    """
    free = free_bytes(flow.device)
    needed = call_bytes(flow, shape, batch, cache_dtype, decoder, tile)
    if free is None or needed <= free:
        return
    ways = ["a smaller size", *(["fewer at once"] if batch > 1 else []), "cache_dtype bfloat16"]
    ways += ["offload", *([] if tile else ["tile"])]
    size, there = f"{shape[2] * decoder.factor}x{shape[1] * decoder.factor}", max(0, free) / GIB
    raise UserError(
        f"{batch} at once of {size} pixels need about {needed / GIB:.1f} GiB, but {there:.1f} GiB "
        f"are free on {flow.device}: use {', '.join(ways[:-1])} or {ways[-1]}"
    )


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # none there, or "max"
        return None
