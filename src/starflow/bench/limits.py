"""What sampling is measured against: this machine's limits, the work that is needed, memory, and other decoders.

- `measure_limits`: bytes a second of a large read and operations a second of a large product, both by torch on the
  threads that everything else has. The read is of more memory than any cache holds. They are limits of a kind of work,
  not of the hardware: weights that stay in a processor's cache are read faster, and a kernel may beat torch's product.
- `sampling_work`: what going token by token has to read and to compute. Counted are, for every token of every block,
  one read of the block's weights and of the keys and values before it, and the matrix products: 2 operations per weight
  and row, 4 per query, key and channel of the heads. The condition is one pass more. Norms, activations and writes do
  not count.
- `measure_footprint`: memory of sampling a batch beside what `starflow.flow.memory` predicts. Weights, packed copies,
  caches and autoencoder are counted tensor by tensor. The peak is what is held before a batch is sampled and decoded,
  and the most that the memory of the process rose by meanwhile: the system's record on Linux, the allocator's on a CUDA
  device. Nothing else may run in the process.
- `load_baselines`: other ways to draw a picture, kept outside of the package: files of a folder, each with a function
  `baselines(task)` that returns what can be timed beside our own sampling in the same run. What it loads, it loads
  before it returns.

Shapes: R rows (the batch, twice with guidance), S condition tokens.
"""

from __future__ import annotations

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
from starflow.nn.attention import CachePool
from starflow.nn.cpu import return_freed_memory
from starflow.nn.quantize import STORED_BYTES, stored_bytes
from starflow.sampling.calibrate import synchronize
from starflow.sampling.cpu.engine import cpu_engine_of
from starflow.train.run import MatrixProduct

READ_BYTES = {"cpu": 2**30}
"""Size of the large read by type of device; on others it is `DEFAULT_READ_BYTES`."""

DEFAULT_READ_BYTES = 2**32

RUNS = 5
"""Of each measurement, of which the fastest counts."""


STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

RESET_PEAK = "5"
"""What Linux takes, written to `CLEAR`, as the wish to record the peak of memory anew."""


BASELINE_FILES = ("textbook", "compiled", "dit")


@dataclass(frozen=True)
class MachineLimits:
    """The two rates that no sampling in this precision is expected to pass.

    >>> slow, fast = MachineLimits(10e9, 100e9), MachineLimits(20e9, 90e9)
    >>> slow.better(fast)
    MachineLimits(bytes_per_second=20000000000.0, flops_per_second=100000000000.0)
    >>> slow.seconds(moved=20e9, operations=50e9)
    (2.0, 0.5)
    """

    bytes_per_second: float
    flops_per_second: float

    def better(self, other: MachineLimits) -> MachineLimits:
        """The higher of each rate: other work on the machine can only lower them."""
        return MachineLimits(
            max(self.bytes_per_second, other.bytes_per_second), max(self.flops_per_second, other.flops_per_second)
        )

    def seconds(self, moved: float, operations: float) -> tuple[float, float]:
        """The least time of reading so many bytes, and of computing so many operations."""
        return moved / self.bytes_per_second, operations / self.flops_per_second


def measure_limits(device: torch.device, dtype: torch.dtype, read_bytes: int = 0) -> MachineLimits:
    """The limits of a device, each the best of a few runs.

    Args:
        device: to measure.
        dtype: of the product.
        read_bytes: size of the large read; 0 is more than any cache holds.
    """
    product = MatrixProduct(device, dtype, 2048 if device.type == "cpu" else 0)
    size = read_bytes or READ_BYTES.get(device.type, DEFAULT_READ_BYTES)
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


@dataclass(frozen=True)
class SamplingWork:
    """What one batch has to read and to compute."""

    bytes: float
    flops: float


def sampling_work(model: Flow, batch: int, tokens: int, *, guided: bool) -> SamplingWork:
    """The work of one batch of pictures of so many tokens, whatever computes it token by token."""
    parts = [
        _block_work(block, batch * (2 if guided and model.guided_blocks[number] else 1), tokens, model.condition_length)
        for number, block in enumerate(model.iter_blocks())
    ]
    return SamplingWork(sum(part.bytes for part in parts), sum(part.flops for part in parts))


def _block_work(block: AutoregressiveBlock, rows: int, tokens: int, condition: int) -> SamplingWork:
    inputs, prefix = tokens - block.first_predicted, condition if block.proj_txt is not None else 0
    layer, layers = block.spec.layer, block.spec.layers
    seen = inputs * prefix + inputs * (inputs + 1) // 2  # keys that all tokens together attend to
    seen_before = prefix * (prefix + 1) // 2
    stack, ends = _matrix_entries(block.attn_blocks), _matrix_entries(block.proj_in) + _matrix_entries(block.proj_out)
    size, form = block.proj_in.weight.element_size(), block.weight_form
    cache = 2 * layers * rows * layer.kv_heads * layer.head_dim * size
    weights = sum(map(stored_bytes, block.attn_blocks.parameters()))
    weights += int(stack * (STORED_BYTES[form] - size))
    read = (inputs + bool(prefix)) * weights + inputs * ends * size + seen * cache
    attention = 4 * layers * layer.heads * layer.head_dim * (seen + seen_before)
    return SamplingWork(float(read), float(rows * (2 * (inputs + prefix) * stack + 2 * inputs * ends + attention)))


def _matrix_entries(module: nn.Module) -> int:
    """Numbers in the weight matrices of a module."""
    return sum(one.in_features * one.out_features for one in module.modules() if isinstance(one, nn.Linear))


@dataclass(frozen=True)
class Footprint:
    """Bytes of memory that sampling one batch takes, measured and predicted."""

    batch: int
    weights: int
    packed: int
    """Packed copies that the compiled loop of a CPU reads."""
    cache: int
    autoencoder: int
    peak: int | None
    """None where the system does not tell."""
    predicted: SamplingMemory

    @property
    def predicted_peak(self) -> int:
        """The predicted peak, of a CPU where the compiled loop packed weights."""
        return self.predicted.cpu_peak if self.packed else self.predicted.peak


@dataclass
class MemoryRise:
    """How far the memory in use rose above its start; None until it is known, or where the system does not tell."""

    bytes: int | None = None


def measure_footprint(
    model: Flow,
    autoencoder: Autoencoder | None,
    batch: int,
    draw: Callable[[CachePool], Tensor],
    *,
    guided: bool,
) -> Footprint:
    """The memory of sampling a batch, measured on the second of two.

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
        model.runtime_cache["engine"] = engine.without_packed()
    picture(CachePool())  # packs weights, and makes what stays
    caches = CachePool()
    with track_memory(parameter.device) as found:
        picture(caches)
    weights, packed = sum(map(stored_bytes, model.parameters())), cpu_engine_of(model).bytes
    coder = 0 if autoencoder is None else sum(map(stored_bytes, autoencoder.network.parameters()))
    dtype: Precision = "bfloat16" if parameter.dtype == torch.bfloat16 else "float32"
    shape = None
    if autoencoder is not None:
        known = AUTOENCODERS[autoencoder.spec.kind]
        shape = memory.AutoencoderShape(coder // 4, known.factor, known.pixel_bytes, known.reach)
    form = next(iter(model.iter_blocks())).weight_form
    predicted = memory.sampling_memory(
        model.config,
        batch,
        guided=guided,
        dtype=dtype,
        weights=None if form == dtype else form,
        iterated=False,
        autoencoder=shape,
    )
    peak = None if found.bytes is None else weights + packed + coder + found.bytes
    return Footprint(batch, weights, packed, caches.bytes, coder, peak, predicted)


@contextmanager
def track_memory(device: torch.device) -> Iterator[MemoryRise]:
    """Record the peak of memory inside a `with` block; the result is filled in at its end."""
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
    return_freed_memory()
    CLEAR.write_text(RESET_PEAK)
    before = _status("VmRSS")
    yield found
    found.bytes = _status("VmHWM") - before


def _status(name: str) -> int:
    """Bytes of a line such as `VmRSS:  123 kB`."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise AssertionError(f"{STATUS} has no {name}")


@dataclass(frozen=True)
class DrawTask:
    """The pictures that a baseline is to draw, and the model that draws them."""

    model: Flow
    noise: Tensor
    """(B, C, H, W)"""
    condition: Tensor | None
    null_condition: Tensor | None
    guidance: float


@dataclass(frozen=True)
class Baseline:
    """Another way to draw a batch, ready to be timed."""

    name: str
    action: Callable[[], object]
    """Draws the batch, or does a part of that work."""
    scale: float
    """Time of the whole batch over that of the action; 1 where the action draws all of it."""
    note: str
    """What a reader must know of it."""


def find_baselines_folder() -> Path | None:
    """The folder benchmarks/ of the source tree that this package runs from; None where it is installed."""
    folder = Path(__file__).parents[3] / "benchmarks"
    return folder if (folder / f"{BASELINE_FILES[0]}.py").is_file() else None


def load_baselines(folder: Path, task: DrawTask) -> list[Baseline]:
    """The baselines of those files of `BASELINE_FILES` that are in the folder.

    Raises:
        UserError: none of them is.
    """
    paths = [folder / f"{name}.py" for name in BASELINE_FILES]
    found = [path for path in paths if path.is_file()]
    if not found:
        raise UserError(f"{folder} has none of {', '.join(path.name for path in paths)}: name a folder of baselines")
    return [one for path in found for one in _load(path, task)]


def _load(path: Path, task: DrawTask) -> list[Baseline]:
    spec = importlib.util.spec_from_file_location(f"starflow_baseline_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look for their module there
    spec.loader.exec_module(module)
    found: list[Baseline] = module.baselines(task)
    return found
