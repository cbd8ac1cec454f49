"""Other ways to draw a picture, kept outside of the package: files of a folder, each with a function `baselines`.

Contract: `baselines(task)` returns what can be timed beside our own sampling, in the same run: the same pictures by
other code, or as many pictures of another model. What it loads, it loads before it returns.

What this machine can do at most, measured now: bytes a second of a large read, operations a second of a product.

Contract: the read is of far more memory than any cache holds, the product large enough to run at its best; both run in
torch on the threads that everything else has. They are ceilings of a kind of work, not of the hardware: weights that
stay in a processor's cache are read faster than any large read, and a kernel may beat torch's own product.

Memory of sampling a batch: what is held, the most that was in use at once, and what `starflow.flow.memory` predicts.

Contract: weights, packed copies, caches and autoencoder are counted tensor by tensor. The peak is what is held before a
batch is sampled and decoded, and the most that the memory of the process rose by meanwhile: the system's own record on
Linux, the allocator's on a CUDA device. Nothing else may run in the process.

What sampling token by token has to read and to compute, counted.

Counted are, for every token of every block, one read of the block's weights and of the keys and values before it, and
the matrix products: 2 operations per weight and row, 4 per query, key and channel of the heads. The condition is one
pass more. Norms, activations, and what is written count nothing.

Shapes: R rows (the batch, twice with guidance), S condition tokens.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from starflow.errors import UserError
from starflow.flow import memory
from starflow.flow.block import AutoregressiveBlock
from starflow.flow.memory import AUTOENCODERS, Precision, SamplingMemory
from starflow.flow.model import Flow
from starflow.latents import Autoencoder
from starflow.nn.kv_cache import CachePool
from starflow.sampling.calibrate import synchronize
from starflow.sampling.cpu.engine import CpuEngine, cpu_engine_of
from starflow.sampling.cpu.pack import bytes_of
from starflow.train.log import MatrixProduct

NAMES = ("textbook", "dit")


@dataclass(frozen=True)
class DrawTask:
    """What is to be drawn."""

    model: Flow
    noise: Tensor
    """(B, C, H, W)"""
    condition: Tensor | None
    null_condition: Tensor | None
    guidance: float


@dataclass(frozen=True)
class Baseline:
    """One other way."""

    name: str
    action: Callable[[], object]
    """Draws the batch, or a part of the way."""
    scale: float
    """The whole over that part; 1 is the batch itself."""
    note: str


def tree_folder() -> Path | None:
    """benchmarks/ of the source tree that this package runs from, if it does."""
    folder = Path(__file__).parents[3] / "benchmarks"
    return folder if (folder / f"{NAMES[0]}.py").is_file() else None


def load_baselines(folder: Path, task: DrawTask) -> list[Baseline]:
    """Those of the files `NAMES`.py that are in the folder.

    Raises:
        UserError: none of them is.
    """
    paths = [folder / f"{name}.py" for name in NAMES]
    found = [path for path in paths if path.is_file()]
    if not found:
        raise UserError(f"{folder} has none of {', '.join(path.name for path in paths)}: name a folder of baselines")
    return [one for path in found for one in _load(path, task)]


def _load(path: Path, task: DrawTask) -> list[Baseline]:
    spec = importlib.util.spec_from_file_location(f"starflow_baseline_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look themselves up
    spec.loader.exec_module(module)
    found: list[Baseline] = module.baselines(task)
    return found


READ_BYTES = {"cpu": 2**30}
"""Of the large read; elsewhere `READ_ELSEWHERE`."""

READ_ELSEWHERE = 2**32

RUNS = 5


@dataclass(frozen=True)
class MachineLimits:
    """The two rates that no sampling in this precision is expected to pass."""

    bytes_per_second: float
    flops_per_second: float

    def better(self, other: MachineLimits) -> MachineLimits:
        """The higher of each: whatever else the machine does can only lower them."""
        return MachineLimits(
            max(self.bytes_per_second, other.bytes_per_second), max(self.flops_per_second, other.flops_per_second)
        )

    def seconds(self, moved: float, operations: float) -> tuple[float, float]:
        """What reading so many bytes and computing so many operations take at least."""
        return moved / self.bytes_per_second, operations / self.flops_per_second


def measure_limits(device: torch.device, dtype: torch.dtype, read_bytes: int = 0) -> MachineLimits:
    """The best of a few runs each; `read_bytes` 0 is as much as no cache holds."""
    product = MatrixProduct(device, dtype, 2048 if device.type == "cpu" else 0)
    size = read_bytes or READ_BYTES.get(device.type, READ_ELSEWHERE)
    flops = max(product.rate() for _ in range(RUNS))
    return MachineLimits(_read_rate(device, size), flops)


def _read_rate(device: torch.device, size: int) -> float:
    large = torch.ones(size // 4, device=device)
    best = 0.0
    for _ in range(RUNS + 1):
        synchronize(device)
        started = time.perf_counter()
        large.sum()
        synchronize(device)
        best = max(best, size / (time.perf_counter() - started))
    return best


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
class MemoryRise:
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

    parameter, engine = next(model.parameters()), cpu_engine_of(model)
    if engine.library is not None:  # without the rounded copies of other solvers
        model.kept["engine"] = CpuEngine(engine.eager_seconds, engine.library)
    picture(CachePool())  # packs weights, and makes what stays
    caches = CachePool()
    with rise(parameter.device) as found:
        picture(caches)
    weights, packed = sum(map(bytes_of, model.parameters())), cpu_engine_of(model).bytes
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
def rise(device: torch.device) -> Iterator[MemoryRise]:
    """What is filled in once it is over."""
    found = MemoryRise()
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


@dataclass(frozen=True)
class SamplingWork:
    """Of one batch."""

    bytes: float
    flops: float


def sampling_work(model: Flow, batch: int, tokens: int, *, guided: bool) -> SamplingWork:
    """What one batch of pictures needs, whoever computes it token by token."""
    parts = [
        _block_work(block, batch * (2 if guided and model.guided[number] else 1), tokens, model.condition_length)
        for number, block in enumerate(model.stack())
    ]
    return SamplingWork(sum(part.bytes for part in parts), sum(part.flops for part in parts))


def _block_work(block: AutoregressiveBlock, rows: int, tokens: int, condition: int) -> SamplingWork:
    inputs, prefix = tokens - block.first_predicted, condition if block.proj_txt is not None else 0
    layer, layers = block.spec.layer, block.spec.layers
    seen = inputs * prefix + inputs * (inputs + 1) // 2  # keys that all tokens together attend to
    seen_before = prefix * (prefix + 1) // 2
    stack, ends = _entries(block.attn_blocks), _entries(block.proj_in) + _entries(block.proj_out)
    size = block.proj_in.weight.element_size()
    cache = 2 * layers * rows * layer.kv_heads * layer.head_dim * size
    read = (inputs + bool(prefix)) * _bytes(block.attn_blocks) + inputs * ends * size + seen * cache
    attention = 4 * layers * layer.heads * layer.head_dim * (seen + seen_before)
    return SamplingWork(float(read), float(rows * (2 * (inputs + prefix) * stack + 2 * inputs * ends + attention)))


def _entries(module: nn.Module) -> int:
    """Of the matrices inside."""
    return sum(one.in_features * one.out_features for one in module.modules() if isinstance(one, nn.Linear))


def _bytes(module: nn.Module) -> int:
    return sum(one.numel() * one.element_size() for one in module.parameters())
