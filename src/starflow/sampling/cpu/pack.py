"""The structs of step.cpp, field by field, and a block's weights in the order in which it reads them.

Contract: packed weights are copies, the only ones that are made: as many bytes again as the block's own, and while they
are made those of one layer more. They hold for
the parameters as they were; `stamp_of` and a mark of their values tell whether they still are.

Shapes: D width, K inputs and N outputs of a linear layer, R rows (B pictures, twice with guidance).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from starflow.flow.block import AutoregressiveBlock
from starflow.nn.attention import Layer
from starflow.nn.layers import MLP, GatedMLP, RMSNorm

POINTERS = (
    *("qkv", "proj", "up", "down", "qkv_bias", "proj_bias", "up_bias", "down_bias"),
    *("norm1", "norm1_bias", "norm2", "norm2_bias", "query_norm", "key_norm", "post1", "post2", "keys", "values"),
)

INTEGERS = (
    *("pictures", "rows", "width", "heads", "kv_heads", "head_dim", "hidden", "layers"),
    *("channels", "length", "tokens", "first", "prefix", "threads"),
    *("rms", "gated", "half_split", "softplus", "rule", "half_weights", "half_cache"),
)

BLOCK_POINTERS = (
    *("layer", "proj_in", "proj_in_bias", "proj_out", "proj_out_bias", "final_norm", "rotary", "table"),
    *("class_vector", "start", "query_scale", "weight", "noise", "x", "work"),
)


class LayerStruct(ctypes.Structure):
    """`Layer` of step.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in POINTERS]


class BlockStruct(ctypes.Structure):
    """`Block` of step.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in INTEGERS),
        ("clip", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in BLOCK_POINTERS),
    ]


@dataclass(frozen=True)
class Panels:
    """How the library wants its weights: panels of `panel` outputs, read `vector` at a time."""

    panel: int
    vector: int

    def padded(self, count: int) -> int:
        """`count` outputs in whole panels."""
        return -(-count // self.panel) * self.panel

    def vector_of(self, values: Tensor | None, count: int) -> Tensor:
        """A bias or norm of whole panels, float32, zeros where there is none."""
        out = torch.zeros(self.padded(count))
        if values is not None:
            out[:count] = values.detach().float()
        return out

    def rows_of(self, values_TD: Tensor) -> Tensor:
        """Rows of whole panels, float32."""
        count = values_TD.shape[-1]
        return nn.functional.pad(values_TD.detach().float(), (0, self.padded(count) - count)).contiguous()

    def matrix(self, weight_NK: Tensor) -> Tensor:
        """A linear layer's weight as panels (N / panel, K, panel); bfloat16 as the pairs that a word holds."""
        outputs, inputs = weight_NK.shape
        whole = nn.functional.pad(weight_NK.detach(), (0, 0, 0, self.padded(outputs) - outputs))
        panels = whole.view(-1, self.panel, inputs).transpose(1, 2)
        if weight_NK.dtype != torch.bfloat16:
            return panels.float().contiguous()
        pairs = panels.unflatten(2, (-1, 2, self.vector)).transpose(3, 4)
        packed: Tensor = pairs.contiguous().flatten(2)
        return packed


@dataclass(frozen=True)
class PackedBlock:
    """What one block's token loop reads; a layer's tensors by the names of `POINTERS`."""

    layers: tuple[dict[str, Tensor], ...]
    ends: dict[str, Tensor]
    """The rest, by the names of `BLOCK_POINTERS`."""
    stamp: tuple[tuple[int, int], ...]
    """Where the parameters lay, and how often they had been written to; see `stamp_of`."""
    half: bool
    """Whether the layers' matrices are bfloat16."""
    mark: tuple[int, ...] = ()
    """Of the values that they had."""

    @property
    def bytes(self) -> int:
        """Memory that the copies take."""
        return sum(bytes_of(tensor) for tensors in (*self.layers, self.ends) for tensor in tensors.values())


def bytes_of(tensor: Tensor) -> int:
    """Memory of its values."""
    return tensor.numel() * tensor.element_size()


def stamp_of(block: AutoregressiveBlock) -> tuple[tuple[int, int], ...]:
    """Changes with the block's parameters: where they lie, and how often they were written to.

    It costs nothing, but misses what goes by `parameter.data`, and inference tensors count no writes.
    """
    return tuple((one.data_ptr(), 0 if one.is_inference() else one._version) for one in block.parameters())


def pack(
    block: AutoregressiveBlock,
    panels: Panels,
    put: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    *,
    rounded: bool = False,
) -> PackedBlock:
    """Copies of a block's weights in the layout of the library.

    Args:
        block: whose weights are copied.
        panels: of the library.
        put: is given each tensor of a layer, to move it.
        rounded: make the layers' matrices bfloat16.
    """
    half = rounded or block.proj_in.weight.dtype == torch.bfloat16
    layers = tuple(
        {name: put(tensor) for name, tensor in _layer(layer, panels, half=half).items()} for layer in layers_of(block)
    )
    width, channels = block.spec.layer.width, block.spec.token_channels
    ends = {
        "proj_in": panels.matrix(block.proj_in.weight.float()),
        "proj_in_bias": panels.vector_of(block.proj_in.bias, width),
        "proj_out": panels.matrix(block.proj_out.weight.float()),
        "proj_out_bias": panels.vector_of(block.proj_out.bias, 2 * channels),
    }
    if isinstance(block.final_norm, RMSNorm):
        ends["final_norm"] = panels.vector_of(_scale(block.final_norm), width)
    if block.pos_embed is not None:
        table = block.pos_embed.flip(0) if block.spec.backwards else block.pos_embed
        ends["table"] = panels.rows_of(table)
    if block.sos_embed is not None:
        ends["start"] = block.sos_embed.detach().float().flatten().contiguous()
    return PackedBlock(layers, ends, stamp_of(block), half)


def layers_of(block: AutoregressiveBlock) -> Iterator[Layer]:
    for layer in block.attn_blocks:
        assert isinstance(layer, Layer)
        yield layer


def _layer(layer: Layer, panels: Panels, *, half: bool) -> dict[str, Tensor]:
    attention, mlp = layer.attention, _mlp(layer)
    width = attention.proj.out_features
    found = {
        **_linear("qkv", [attention.qkv], panels, half),
        **_linear("proj", [attention.proj], panels, half),
        **_linear("up", [mlp.gate_proj, mlp.up_proj] if isinstance(mlp, GatedMLP) else [_first(mlp)], panels, half),
        **_linear("down", [mlp.down_proj if isinstance(mlp, GatedMLP) else _last(mlp)], panels, half),
        **_norm("norm1", attention.norm, width, panels),
        **_norm("norm2", mlp.norm, width, panels),
    }
    offsets = {
        "query_norm": attention.query_norm,
        "key_norm": attention.key_norm,
        "post1": attention.post_norm,
        "post2": mlp.post_norm,
    }
    for name, norm in offsets.items():
        if isinstance(norm, RMSNorm):
            found[name] = panels.vector_of(_scale(norm), len(norm.weight))
    return found


def linears_of(layer: Layer) -> list[Any]:
    """Every linear map of a layer."""
    mlp = _mlp(layer)
    inside = [mlp.gate_proj, mlp.up_proj, mlp.down_proj] if isinstance(mlp, GatedMLP) else [_first(mlp), _last(mlp)]
    return [layer.attention.qkv, layer.attention.proj, *inside]


def _mlp(layer: Layer) -> MLP | GatedMLP:
    """The MLP itself: one that training recomputes is wrapped, and passes on its attributes but not its type."""
    found: MLP | GatedMLP = getattr(layer.mlp, "_checkpoint_wrapped_module", layer.mlp)
    return found


def _first(mlp: MLP) -> Any:
    return mlp.main[0]


def _last(mlp: MLP) -> Any:
    return mlp.main[2]


def _linear(name: str, linears: Sequence[Any], panels: Panels, half: bool) -> dict[str, Tensor]:
    """One linear layer, or two of one shape whose panels alternate."""
    outputs, dtype = linears[0].out_features, torch.bfloat16 if half else torch.float32
    weight = torch.stack([panels.matrix(linear.weight.to(dtype)) for linear in linears], dim=1).flatten(0, 1)
    biases = [panels.vector_of(linear.bias, outputs).view(-1, panels.panel) for linear in linears]
    return {name: weight, f"{name}_bias": torch.stack(biases, dim=1).flatten()}


def _norm(name: str, norm: nn.Module, width: int, panels: Panels) -> dict[str, Tensor]:
    if isinstance(norm, RMSNorm):
        return {name: panels.vector_of(_scale(norm), width)}
    assert isinstance(norm, nn.LayerNorm)
    return {name: panels.vector_of(norm.weight, width), f"{name}_bias": panels.vector_of(norm.bias, width)}


def _scale(norm: RMSNorm) -> Tensor:
    return 1 + norm.weight.detach().float()
