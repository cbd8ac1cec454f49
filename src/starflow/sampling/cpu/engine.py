"""Runs all layers of all tokens of a block on a CPU in compiled code, without Python in between.

Contract: the answer is that of the eager path up to rounding, and a picture's is bit for bit the same whatever its
batch and the number of threads, given the same condition. It works on the predictor's own cache, in its layout, so
either path may go on where the other stopped. What it does not cover goes the eager way: devices other than a CPU,
precisions other than float32 and bfloat16, and blocks that are no longer as they were built: torchao's weights, other
layers, forward hooks. Networks in bfloat16 have their products in bfloat16 where the processor multiplies it, and in
float32 from their bfloat16 weights elsewhere. Nothing depends on torch's default precision and device, and every
address is checked before it is handed on.

An engine belongs to a model and is kept with it (`cpu_engine_of`); it holds the packed weights. At the first use it
loads the library, which is built where it is missing, once a machine (`make` does it when it installs), unless the
model is so small that eager code draws a picture in a moment. A model stays with what was found then, so that a picture
does not change from one call to the next. Several threads may sample with one model at once.

Shapes: B pictures, R rows (B, or 2B with the null branch second), N tokens, T some of them, C token channels, D width.
"""

from __future__ import annotations

import ctypes
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from starflow.flow.block import AutoregressiveBlock
from starflow.flow.model import Flow
from starflow.nn.attention import KVCache, LayerCache
from starflow.nn.quantize import WeightFormat
from starflow.sampling.cpu.build import BuildCommand, BuildError, Library, PackedWeights, is_plain_parameter
from starflow.sampling.cpu.pack import (
    FORMAT_NUMBERS,
    STORED,
    BlockStruct,
    LayerStruct,
    PackedBlock,
    address_of,
    bytes_of,
)
from starflow.sampling.predictor import Predictor, TokenProgress, ignore_progress

WORTH_BUILDING = 0.1
"""Seconds of a picture on the eager path from which on the library is built, once a machine, in about 7 s."""

TOKEN_SECONDS, BYTES_A_SECOND = 3e-4, 8e9
"""About the time of a layer's calls at one token on the eager path, and the rate at which it reads weights."""

CALL_SECONDS = 0.2
"""About the longest that a call takes: between calls, progress is reported and Ctrl-C is heard."""

THREAD_BYTES = 2**16
"""About the bytes of weights between two barriers that are worth another thread."""

RULE_NUMBERS = {"gaussian": 1, "linear": 2}
"""The guidance rules as step.cpp numbers them; 0 is none."""

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class CpuEngine:
    """The compiled token loop of one model."""

    eager_seconds: float
    """About the seconds that a picture takes on the eager path."""
    library: Library | None = None
    """None until it is found or built."""
    disabled: bool = False
    """Whether there is only the eager path: the model is too small for a build, or the build failed."""
    weights: PackedWeights = field(default_factory=PackedWeights)
    build_seconds: float = 0.0
    """What compiling and loading the library took."""
    compiled: bool = False
    """Whether it was compiled for this engine, rather than found."""
    _covered: weakref.WeakKeyDictionary[AutoregressiveBlock, bool] = field(default_factory=weakref.WeakKeyDictionary)
    """Whether the library covers a block, as it is in this call."""
    _work: list[Tensor] = field(default_factory=list)
    """Workspaces of calls that are over, for the next ones."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __reduce__(self) -> tuple[Any, ...]:
        """Make copies of a model load the library and pack weights for themselves."""
        return CpuEngine, (self.eager_seconds, None, self.disabled, self.weights)

    def without_packed(self) -> CpuEngine:
        """A new engine of the same library that has packed nothing."""
        return CpuEngine(self.eager_seconds, self.library, self.disabled, PackedWeights(self.weights.model_bytes))

    @property
    def bytes(self) -> int:
        """Memory that the packed weights take."""
        return self.weights.bytes

    def ready(self, predictor: Predictor) -> bool:
        """Whether it can compute for this predictor: it covers block and cache, and there is a library."""
        if self.disabled or not self._covers(predictor):
            return False
        if self.library is None:
            with self._lock:
                self._load(or_build=self.eager_seconds > WORTH_BUILDING)
        return self.library is not None

    def _covers(self, predictor: Predictor) -> bool:
        block = predictor.block
        with self._lock:  # another thread's call may forget it between two looks
            covered = self._covered.get(block)
            if covered is None:
                covered = self._covered[block] = covers_block(block)
        return covered and covers_cache(predictor.cache, block)

    def build(self) -> None:
        """Build the library now, whether or not that pays for this model."""
        with self._lock:
            self.disabled = False
            self._load(or_build=True)

    def _load(self, *, or_build: bool) -> None:
        """Load the library where it is there already, or build it; whatever comes of it stays so."""
        if self.disabled or self.library is not None:
            return
        try:
            command = BuildCommand.here()
            found = command.built()
            if found or or_build:
                began = time.perf_counter()
                self.library = command.build()
                self.build_seconds, self.compiled = time.perf_counter() - began, not found
        except BuildError as error:
            warnings.warn(f"sampling goes on without its compiled loop, several times slower: {error}")
        self.disabled = self.library is None

    def solve(self, predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, progress: TokenProgress) -> None:
        """Solve all predicted tokens in place; the condition is in the cache already."""
        self.solve_tokens(predictor, x_BNC, noise_BNC, range(predictor.first, predictor.tokens), progress)

    def guess(self, predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, tokens: range, form: WeightFormat) -> None:
        """Solve some tokens in place with the layers' matrices rounded to a format of fewer bytes, as a guess."""
        self.solve_tokens(predictor, x_BNC, noise_BNC, tokens, form=form)

    def solve_tokens(
        self,
        predictor: Predictor,
        x_BNC: Tensor,
        noise_BNC: Tensor,
        tokens: range,
        progress: TokenProgress = ignore_progress,
        form: WeightFormat | None = None,
    ) -> None:
        """Solve some tokens in place, given those before them, with weights in the block's own format or another."""
        assert self.library is not None
        wanted = (_pictures(predictor), predictor.tokens, predictor.block.spec.token_channels)
        inputs = predictor.prefix_length + predictor.tokens - predictor.first
        if not (x_BNC.shape == noise_BNC.shape == wanted and inputs <= _cache_length(predictor)):
            shapes = tuple(x_BNC.shape), tuple(noise_BNC.shape)
            raise ValueError(f"tokens {shapes} and {inputs} inputs, expected {wanted} and {_cache_length(predictor)}")
        with self._call(predictor, x_BNC, noise_BNC, 1, form) as call:
            start, count = tokens.start, 1
            while start < tokens.stop:
                stop = min(start + count, tokens.stop)
                began = time.perf_counter()
                self.library.solve(call.block, start, stop)
                progress(stop - start)
                rate = (time.perf_counter() - began) / (stop - start)
                start, count = stop, max(1, min(4 * count, int(CALL_SECONDS / max(rate, 1e-6))))

    def prefill(self, predictor: Predictor) -> None:
        """Write the condition's keys and values; pictures with the same condition share the work."""
        condition_RSE = predictor.condition_RSE
        assert condition_RSE is not None
        if predictor.query_scale is not None:  # the same condition is another one in the null branch
            self.extend(predictor, prefix_one_by_one(predictor.block, condition_RSE), 0)
            return
        some_KX, place_R = torch.unique(condition_RSE.flatten(1), dim=0, return_inverse=True)
        layers = predictor.cache.layers
        count, length = len(some_KX), condition_RSE.shape[1]
        first = tuple(LayerCache(layer.keys_BNLH[:count], layer.values_BNLH[:count]) for layer in layers)
        prefix_KSD = prefix_one_by_one(predictor.block, some_KX.unflatten(1, condition_RSE.shape[1:]))
        self.extend(replace(predictor, cache=KVCache(first), guidance=None), prefix_KSD, 0)
        for layer in layers:
            for cache_BNLH in (layer.keys_BNLH, layer.values_BNLH):
                cache_BNLH[:, :, :length] = cache_BNLH[place_R, :, :length]

    def extend(self, predictor: Predictor, hidden_RTD: Tensor, position: int) -> Tensor:
        """Run the layers over hidden states that continue the cache at `position`; as `AutoregressiveBlock.extend`."""
        assert self.library is not None
        rows, count, width = hidden_RTD.shape
        wanted = (_rows(predictor), predictor.block.spec.layer.width)
        if (rows, width) != wanted or not 0 <= position <= _cache_length(predictor) - count:
            shape, length = tuple(hidden_RTD.shape), _cache_length(predictor)
            raise ValueError(f"hidden states {shape} at {position} of {length}, expected rows and width {wanted}")
        out_RTD = hidden_RTD.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        nothing = out_RTD.new_zeros(0)
        with self._call(predictor, nothing, nothing, count) as call:
            address = address_of("hidden states", out_RTD, rows * count * width, torch.float32)
            self.library.extend(call.block, address, position, count)
        return out_RTD.to(hidden_RTD.dtype)

    def packed(self, block: AutoregressiveBlock, form: WeightFormat | None = None) -> PackedBlock:
        """A block's packed weights, in its own format or another; packed anew where its parameters have changed."""
        assert self.library is not None
        return self.weights.of_block(block, form or block.weight_form, self.library)

    def drop_changed(self) -> None:
        """Forget what a block is covered by, and drop packed weights whose parameters have been written to since."""
        with self._lock:
            self._covered.clear()
        if self.library is not None:
            self.weights.drop_changed(self.library)

    @contextmanager
    def _call(
        self,
        predictor: Predictor,
        x_BNC: Tensor,
        noise_BNC: Tensor,
        count: int,
        form: WeightFormat | None = None,
    ) -> Iterator[_Call]:
        """The struct of one call, with a workspace that goes back to the engine afterwards."""
        assert self.library is not None
        packed = self.packed(predictor.block, form)
        call = _make_call(predictor, packed, x_BNC, noise_BNC, self.library)
        needed = self.library.workspace(call.block, count)
        with self._lock:
            work = self._work.pop() if self._work else None
        if work is None or work.numel() < needed:
            work = torch.empty(needed, dtype=torch.float32, device="cpu")
        call.block.work = address_of("the workspace", work, needed, torch.float32)
        try:
            yield call
        finally:
            with self._lock:
                self._work.append(work)


@dataclass(frozen=True)
class _Call:
    """The struct of one call, and the objects that its pointers point into."""

    block: BlockStruct
    alive: list[Any]


def cpu_engine_of(model: Flow) -> CpuEngine:
    """The engine that is kept with a model; weights that have changed since it packed them are packed anew."""
    found = model.runtime_cache.get("engine")
    if not isinstance(found, CpuEngine):
        tokens = model.config.grid_side**2
        weights = PackedWeights(sum(map(bytes_of, model.parameters())))
        found = CpuEngine(tokens * sum(map(_pass_seconds, model.iter_blocks())), weights=weights)
        model.runtime_cache["engine"] = found
    found.drop_changed()
    return found


def prefix_one_by_one(block: AutoregressiveBlock, condition_RSE: Tensor) -> Tensor:
    """`block.prefix`, row by row: the rounding of one product of all rows depends on their number and alignment."""
    rows = [block.prefix(row_1SE.clone()) for row_1SE in condition_RSE.split(1)]
    return torch.cat([row_1SD for row_1SD in rows if row_1SD is not None])


def _pass_seconds(block: AutoregressiveBlock) -> float:
    """About the seconds that the eager path takes for a pass over a few tokens."""
    calls = len(block.attn_blocks) * TOKEN_SECONDS
    return calls + sum(map(bytes_of, block.parameters())) / BYTES_A_SECOND


def _rows(predictor: Predictor) -> int:
    return predictor.cache.layers[0].keys_BNLH.shape[0]


def _cache_length(predictor: Predictor) -> int:
    """Positions in the cache."""
    return predictor.cache.layers[0].keys_BNLH.shape[2]


def _pictures(predictor: Predictor) -> int:
    return _rows(predictor) if predictor.guidance is None else len(predictor.guidance.weight_B)


def _format_number(block: AutoregressiveBlock, packed: PackedBlock, library: Library) -> int:
    """How step.cpp is to multiply: a network in bfloat16 has its products in bfloat16, where the processor can."""
    if packed.form == "bfloat16" and block.proj_in.weight.dtype == torch.bfloat16 and library.multiplies_bfloat16:
        return FORMAT_NUMBERS["bfloat16 products"]
    return FORMAT_NUMBERS[packed.form]


def covers_block(block: AutoregressiveBlock) -> bool:
    """Whether the compiled loop knows every part of a block."""
    dtype = block.proj_in.weight.dtype
    return (
        dtype in SUPPORTED_DTYPES
        and block.spec.layer.head_dim % 2 == 0
        and block.as_built
        and all(is_plain_parameter(parameter) and parameter.dtype == dtype for parameter in block.parameters())
    )


def covers_cache(cache: KVCache, block: AutoregressiveBlock) -> bool:
    """Whether keys and values have a place, a precision and a layout that the compiled loop reads."""
    first, spec = cache.layers[0].keys_BNLH, block.spec.layer
    wanted = (len(first), spec.kv_heads, first.shape[2], spec.head_dim)
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys_BNLH, layer.values_BNLH)]
    alike = all(one.dtype == first.dtype and one.shape == wanted and one.is_contiguous() for one in tensors)
    on_host = all(one.device.type == "cpu" for one in tensors)
    return alike and on_host and first.dtype in SUPPORTED_DTYPES and len(cache.layers) == block.spec.layers


def _make_call(predictor: Predictor, packed: PackedBlock, x_BNC: Tensor, noise_BNC: Tensor, library: Library) -> _Call:
    """The struct of a call for one block, without its workspace."""
    spec = predictor.block.spec
    layer, guidance = spec.layer, predictor.guidance
    keys = predictor.cache.layers[0].keys_BNLH
    struct = BlockStruct(
        pictures=_pictures(predictor),
        rows=_rows(predictor),
        width=layer.width,
        heads=layer.heads,
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        hidden=layer.hidden,
        layers=spec.layers,
        channels=spec.token_channels,
        length=_cache_length(predictor),
        tokens=predictor.tokens,
        first=predictor.first,
        prefix=predictor.prefix_length,
        threads=_threads(packed),
        rms=layer.norm_type == "rms_norm",
        gated=layer.swiglu,
        half_split=layer.half_split_rope,
        softplus=spec.softplus,
        rule=0 if guidance is None else RULE_NUMBERS[guidance.rule],
        weights=_format_number(predictor.block, packed, library),
        half_cache=keys.dtype == torch.bfloat16,
        clip=spec.clip,
    )
    given = {**packed.other, **_input_tensors(predictor, library), "noise": noise_BNC, "x": x_BNC}
    layers = (LayerStruct * spec.layers)(
        *(
            LayerStruct(
                **{name: address_of(name, tensor, 1, *STORED.values()) for name, tensor in weights.items()},
                keys=address_of("keys", cache.keys_BNLH, keys.numel(), keys.dtype),
                values=address_of("values", cache.values_BNLH, keys.numel(), keys.dtype),
            )
            for weights, cache in zip(packed.layers, predictor.cache.layers, strict=True)
        )
    )
    struct.layer = ctypes.addressof(layers)
    inputs, width = predictor.tokens - predictor.first, library.panels.padded(layer.width)
    counts = {
        "rotary": (predictor.prefix_length + inputs) * layer.head_dim,
        "table": inputs * width,
        "class_vector": struct.rows * width,
        "query_scale": struct.rows,
        "weight": struct.pictures * predictor.tokens,
    }
    for name, tensor in given.items():
        setattr(struct, name, address_of(name, tensor, counts.get(name, 0), torch.float32))
    return _Call(struct, [layers, given, packed])


def _threads(packed: PackedBlock) -> int:
    """As many threads as torch would use, if there is work for so many between two of a layer's four barriers."""
    between = sum(map(bytes_of, packed.layers[0].values())) // 4
    return max(1, min(torch.get_num_threads(), between // THREAD_BYTES))


def _input_tensors(predictor: Predictor, library: Library) -> dict[str, Tensor]:
    """The tensors of a call that are not packed weights, float32 and contiguous."""
    found: dict[str, Tensor] = {}
    if predictor.rotary is not None:
        found["rotary"] = predictor.rotary
    if predictor.class_R1D is not None:
        found["class_vector"] = library.panels.pack_rows(predictor.class_R1D.flatten(1).expand(_rows(predictor), -1))
    if predictor.query_scale is not None:
        found["query_scale"] = predictor.query_scale.flatten()
    if predictor.guidance is not None:
        weight_B11 = predictor.guidance.weights(0, predictor.tokens, predictor.tokens)
        pictures = len(predictor.guidance.weight_B)
        found["weight"] = weight_B11.expand(pictures, predictor.tokens, 1)
    return {name: tensor.float().contiguous() for name, tensor in found.items()}
