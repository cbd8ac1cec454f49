"""Token-by-token solving on a CPU in compiled code: all layers of all tokens of a block without Python in between.

Contract: the answer is that of the eager path up to rounding, and a picture's is bit for bit the same whatever its
batch and the threads. It works on the predictor's own cache, in its layout, so either path may go on where the other
stopped. What it does not cover goes the eager way: devices other than a CPU, precisions other than float32 and
bfloat16, and linear layers that are not plain ones (quantised weights). Networks in bfloat16 are computed in float32
from their bfloat16 weights and cache.

An engine belongs to a model and is kept with it (`engine_of`): packed weights, the memory of a call, and the decision
whether to build. `extend` runs the layers over any number of tokens (a segment, or the condition) and is what an
iteration over few tokens may use instead of the block's own: from 1 to some hundred rows the panels are read once.

Shapes: B pictures, R rows (B, or 2B with the null branch second), N tokens, T some of them, C token channels, D width.
"""

from __future__ import annotations

import ctypes
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from starflow.flow.block import AutoregressiveBlock
from starflow.flow.model import Flow
from starflow.sampling.engine.build import BuildError, Library, Recipe
from starflow.sampling.engine.layout import (
    BlockStruct,
    LayerStruct,
    PackedBlock,
    layers_of,
    linears_of,
    pack,
    stamp_of,
)

if TYPE_CHECKING:
    from starflow.sampling.predictor import Predictor

BUILD_SECONDS = 5.0
"""What a build takes, about: it must be earned."""
TOKEN_SECONDS, BYTES_A_SECOND = 3e-4, 8e9
"""Of the eager path, about: a layer's calls at one token, and how fast it reads weights."""
CALL_SECONDS = 0.2
"""About how long a call may take: between calls, progress is told and Ctrl-C is heard."""
RULES = {"gaussian": 1, "linear": 2}
PRECISIONS = (torch.float32, torch.bfloat16)

Report = Callable[[int], None]


@dataclass
class Engine:
    """The compiled token loop of one model."""

    eager_seconds: float
    """What a picture takes without it, about."""
    library: Library | None = None
    closed: bool = False
    """Whether the eager path is all there is."""
    _packed: weakref.WeakKeyDictionary[AutoregressiveBlock, PackedBlock] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    _work: Tensor = field(default_factory=lambda: torch.empty(0))

    def __deepcopy__(self, _memo: dict[int, Any]) -> Engine:
        """A copied model packs its own weights."""
        return Engine(self.eager_seconds, self.library, self.closed)

    @property
    def bytes(self) -> int:
        """Memory that packed weights take."""
        return sum(packed.bytes for packed in self._packed.values())

    def ready(self, predictor: Predictor) -> bool:
        """Whether it covers a predictor and is built, or worth building for what lies ahead."""
        if self.closed or not covers(predictor):
            return False
        if self.library is None:
            self._open()
        return self.library is not None

    def _open(self) -> None:
        """Load the library; compile it only if that takes less time than it saves."""
        try:
            recipe = Recipe.here()
            if recipe.built() or self.eager_seconds > BUILD_SECONDS:
                self.library = recipe.build()
        except BuildError as error:
            self.closed = True
            if self.eager_seconds > BUILD_SECONDS:
                warnings.warn(f"sampling goes on without its compiled loop, several times slower: {error}")
        self.closed = self.closed or self.library is None

    def solve(self, predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, report: Report) -> None:
        """Tokens from the first on, in place; the condition is in the cache already."""
        assert self.library is not None
        call = self._call(predictor, x_BNC, noise_BNC, 1)
        start, count = predictor.first, 1
        while start < predictor.tokens:
            stop = min(start + count, predictor.tokens)
            began = time.perf_counter()
            self.library.solve(call.block, start, stop)
            report(stop - start)
            rate = (time.perf_counter() - began) / (stop - start)
            start, count = stop, max(1, min(4 * count, int(CALL_SECONDS / max(rate, 1e-6))))

    def extend(self, predictor: Predictor, hidden_RTD: Tensor, position: int) -> Tensor:
        """The layers for hidden states that continue the cache at `position`; as `AutoregressiveBlock.extend`."""
        assert self.library is not None
        out_RTD = hidden_RTD.float().contiguous()
        out_RTD = out_RTD.clone() if out_RTD.data_ptr() == hidden_RTD.data_ptr() else out_RTD
        count = out_RTD.shape[1]
        nothing = out_RTD.new_zeros(len(out_RTD), 0, 0)
        call = self._call(predictor, nothing, nothing, count)
        self.library.extend(call.block, out_RTD.data_ptr(), position, count)
        return out_RTD.to(hidden_RTD.dtype)

    def packed(self, block: AutoregressiveBlock) -> PackedBlock:
        """A block's packed weights, made anew where its parameters have changed."""
        assert self.library is not None
        found = self._packed.get(block)
        if found is None or found.stamp != stamp_of(block):
            found = self._packed[block] = pack(block, self.library.panels)
        return found

    def _call(self, predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, count: int) -> _Call:
        assert self.library is not None
        call = _prepare(predictor, self.packed(predictor.block), x_BNC, noise_BNC, self.library)
        needed = self.library.workspace(call.block, count)
        if self._work.numel() < needed:
            self._work = torch.empty(needed)
        call.block.work = self._work.data_ptr()
        return call


@dataclass(frozen=True)
class _Call:
    """A filled struct, and what must live as long as its pointers."""

    block: BlockStruct
    alive: list[Any]


def engine_of(model: Flow) -> Engine:
    """The engine that is kept with the model."""
    found = model.kept.get("engine")
    if not isinstance(found, Engine):
        found = model.kept["engine"] = Engine(_eager_seconds(model))
    return found


def _eager_seconds(model: Flow) -> float:
    """What the eager path takes for one batch of pictures of the size of training, about."""
    tokens = model.config.grid_side**2
    calls = sum(len(block.attn_blocks) for block in model.stack()) * TOKEN_SECONDS
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return tokens * (calls + size / BYTES_A_SECOND)


def covers(predictor: Predictor) -> bool:
    """Whether the compiled loop can take the place of a predictor's network."""
    block, cache = predictor.block, predictor.cache.layers
    dtype = block.proj_in.weight.dtype
    tensors = [tensor for layer in cache for tensor in (layer.keys_BNLH, layer.values_BNLH)]
    caches = all(tensor.is_contiguous() and tensor.dtype == tensors[0].dtype for tensor in tensors)
    plain = all(type(linear) is nn.Linear for layer in layers_of(block) for linear in linears_of(layer))
    return (
        plain
        and caches
        and tensors[0].dtype in PRECISIONS
        and dtype in PRECISIONS
        and all(
            type(parameter) is nn.Parameter and parameter.dtype == dtype and parameter.device.type == "cpu"
            for parameter in block.parameters()
        )
        and block.spec.layer.head_dim % 2 == 0
    )


def _prepare(predictor: Predictor, packed: PackedBlock, x_BNC: Tensor, noise_BNC: Tensor, library: Library) -> _Call:
    """The struct of one block's calls."""
    block, spec = predictor.block, predictor.block.spec
    layer, guidance = spec.layer, predictor.guidance
    keys = predictor.cache.layers[0].keys_BNLH
    struct = BlockStruct(
        pictures=len(noise_BNC) if guidance is None or not noise_BNC.numel() else len(guidance.weight_B),
        rows=keys.shape[0],
        width=layer.width,
        heads=layer.heads,
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        hidden=layer.hidden,
        layers=spec.layers,
        channels=spec.token_channels,
        length=keys.shape[2],
        tokens=predictor.tokens,
        first=predictor.first,
        prefix=0 if predictor.prefix_RSD is None else predictor.prefix_RSD.shape[1],
        threads=torch.get_num_threads(),
        rms=layer.norm_type == "rms_norm",
        gated=layer.swiglu,
        half_split=layer.half_split_rope,
        softplus=spec.softplus,
        rule=0 if guidance is None else RULES[guidance.rule],
        half_weights=block.proj_in.weight.dtype == torch.bfloat16,
        half_cache=keys.dtype == torch.bfloat16,
        clip=spec.clip,
    )
    given = {**packed.ends, **_given(predictor, library), "noise": noise_BNC, "x": x_BNC}
    layers = (LayerStruct * spec.layers)(
        *(
            LayerStruct(
                **{name: tensor.data_ptr() for name, tensor in weights.items()},
                keys=cache.keys_BNLH.data_ptr(),
                values=cache.values_BNLH.data_ptr(),
            )
            for weights, cache in zip(packed.layers, predictor.cache.layers, strict=True)
        )
    )
    struct.layer = ctypes.addressof(layers)
    for name, tensor in given.items():
        assert tensor.is_contiguous()
        setattr(struct, name, tensor.data_ptr())
    return _Call(struct, [layers, given, packed])


def _given(predictor: Predictor, library: Library) -> dict[str, Tensor]:
    """The tensors of a call that are no weights, float32 and contiguous."""
    found: dict[str, Tensor] = {}
    if predictor.rotary is not None:
        found["rotary"] = predictor.rotary
    if predictor.class_R1D is not None:
        rows = predictor.cache.layers[0].keys_BNLH.shape[0]
        found["class_vector"] = library.panels.rows_of(predictor.class_R1D.flatten(1).expand(rows, -1))
    if predictor.query_scale is not None:
        found["query_scale"] = predictor.query_scale.flatten()
    if predictor.guidance is not None:
        weight_B11 = predictor.guidance.weights(0, predictor.tokens, predictor.tokens)
        pictures = len(predictor.guidance.weight_B)
        found["weight"] = weight_B11.expand(pictures, predictor.tokens, 1)
    return {name: tensor.float().contiguous() for name, tensor in found.items()}
