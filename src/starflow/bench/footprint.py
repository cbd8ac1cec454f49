"""Memory of sampling a batch: what is held, the most that was in use at once, and what `starflow.memory` predicts.

Contract: weights, packed copies, caches and autoencoder are counted tensor by tensor. The peak is what is held before a
batch is sampled and decoded, and the most that the memory of the process rose by meanwhile: the system's own record on
Linux, the allocator's on a CUDA device. Nothing else may run in the process.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from starflow import memory
from starflow.flow.model import Flow
from starflow.latents import Autoencoder
from starflow.memory import AUTOENCODERS, Precision, SamplingMemory
from starflow.nn.cache import CachePool
from starflow.sampling.engine.layout import bytes_of
from starflow.sampling.engine.native import Engine, engine_of

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"


@dataclass(frozen=True)
class Footprint:
    """Bytes of one batch."""

    batch: int
    weights: int
    packed: int
    """Copies that the compiled loop of a CPU reads."""
    cache: int
    autoencoder: int
    peak: int | None
    """None where the system does not tell."""
    predicted: SamplingMemory

    @property
    def predicted_peak(self) -> int:
        return self.predicted.peak + (self.predicted.packed if self.packed else 0)


@dataclass
class Rise:
    """How far above its start the memory in use went; None where nobody knows."""

    bytes: int | None = None


def measure_footprint(
    model: Flow,
    autoencoder: Autoencoder | None,
    batch: int,
    draw: Callable[[CachePool], Tensor],
    *,
    guided: bool,
) -> Footprint:
    """Of a batch, after another that does not count.

    Args:
        model: what is sampled from.
        autoencoder: what decodes, if anything.
        batch: pictures at once.
        draw: samples the batch, with the caches of a pool, token by token.
        guided: whether that is with guidance.
    """

    def picture(caches: CachePool) -> None:
        latents = draw(caches)
        if autoencoder is not None:
            autoencoder.decode(latents)

    parameter, engine = next(model.parameters()), engine_of(model)
    if engine.library is not None:  # without the rounded copies of other solvers
        model.kept["engine"] = Engine(engine.eager_seconds, engine.library)
    picture(CachePool())  # packs weights, and makes what stays
    caches = CachePool()
    with rise(parameter.device) as found:
        picture(caches)
    weights, packed = sum(map(bytes_of, model.parameters())), engine_of(model).bytes
    coder = 0 if autoencoder is None else sum(map(bytes_of, autoencoder.network.parameters()))
    dtype: Precision = "bfloat16" if parameter.dtype == torch.bfloat16 else "float32"
    shape = None
    if autoencoder is not None:
        known = AUTOENCODERS[autoencoder.spec.kind]
        shape = memory.AutoencoderShape(coder // 4, known.factor, known.pixel_bytes, known.reach)
    predicted = memory.sampling_memory(
        model.config, batch, guided=guided, dtype=dtype, iterated=False, autoencoder=shape
    )
    peak = None if found.bytes is None else weights + packed + coder + found.bytes
    return Footprint(batch, weights, packed, caches.bytes, coder, peak, predicted)


@contextmanager
def rise(device: torch.device) -> Iterator[Rise]:
    """What is filled in once it is over."""
    found = Rise()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    if device.type != "cpu" or not CLEAR.exists():
        yield found
        return
    _give_back()
    CLEAR.write_text(RESET_PEAK)
    before = _status("VmRSS")
    yield found
    found.bytes = _status("VmHWM") - before


def _give_back() -> None:
    """What the C library keeps of freed memory goes back to the system, so that its use again shows."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def _status(name: str) -> int:
    """Bytes of a line such as `VmRSS:  123 kB`."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise AssertionError(f"{STATUS} has no {name}")
