"""Packs a block's weights in the order in which step.cpp reads them, and mirrors its structs field by field.

Contract: packed weights are the only copies that are made: as many bytes again as the block's own, and while they are
made those of one layer more. They hold for the parameters as they were; `parameter_versions` and checksums of their
values tell whether they have changed.

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

LAYER_POINTERS = (
    *("qkv", "proj", "up", "down", "qkv_bias", "proj_bias", "up_bias", "down_bias"),
    *("norm1", "norm1_bias", "norm2", "norm2_bias", "query_norm", "key_norm", "post1", "post2", "keys", "values"),
)

BLOCK_INTEGERS = (
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

    _fields_ = [(name, ctypes.c_void_p) for name in LAYER_POINTERS]


class BlockStruct(ctypes.Structure):
    """`Block` of step.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in BLOCK_INTEGERS),
        ("clip", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in BLOCK_POINTERS),
    ]


@dataclass(frozen=True)
class PanelLayout:
    """How the library reads weights: in panels of `panel` outputs, `vector` numbers at a time.

    >>> layout = PanelLayout(panel=4, vector=2)
    >>> layout.padded(6)
    8
    >>> layout.pack_matrix(torch.arange(6.0).view(3, 2)).tolist()  # of each input the values of 4 outputs
    [[[0.0, 2.0, 4.0, 0.0], [1.0, 3.0, 5.0, 0.0]]]
    """

    panel: int
    vector: int

    def padded(self, count: int) -> int:
        """`count` rounded up to whole panels."""
        return -(-count // self.panel) * self.panel

    def pack_vector(self, values: Tensor | None, count: int) -> Tensor:
        """A bias or norm in float32, filled up to whole panels with zeros; None is all zeros."""
        out = torch.zeros(self.padded(count), dtype=torch.float32, device="cpu")
        if values is not None:
            out[:count] = values.detach().float()
        return out

    def pack_rows(self, values_TD: Tensor) -> Tensor:
        """Rows in float32, each filled up to whole panels with zeros."""
        count = values_TD.shape[-1]
        return nn.functional.pad(values_TD.detach().float(), (0, self.padded(count) - count)).contiguous()

    def pack_matrix(self, weight_NK: Tensor) -> Tensor:
        """A linear layer's weight as panels (N / panel, K, panel), in float32.

        A bfloat16 weight stays so, its panels as pairs of numbers that one word of 32 bits holds.
        """
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
    """The weights that one block's token loop reads; a layer's tensors by the names of `LAYER_POINTERS`."""

    layers: tuple[dict[str, Tensor], ...]
    other: dict[str, Tensor]
    """The block's other weights, by the names of `BLOCK_POINTERS`."""
    versions: tuple[tuple[int, int], ...]
    """Of the parameters when they were packed; see `parameter_versions`."""
    in_bfloat16: bool
    """Whether the layers' matrices are in bfloat16."""
    checksums: tuple[int, ...] = ()
    """Of the parameters' values when they were packed."""

    @property
    def bytes(self) -> int:
        """Memory that the packed weights take."""
        return sum(bytes_of(tensor) for tensors in (*self.layers, self.other) for tensor in tensors.values())


def address_of(name: str, tensor: Tensor, count: int, *dtypes: torch.dtype) -> int:
    """The address of a tensor's values, checked to be what the library takes them for.

    Args:
        name: for the message.
        tensor: at least `count` values, contiguous, in the memory of a CPU.
        count: values that the library may read or write.
        dtypes: that it may have.

    Raises:
        TypeError: anything else, which the library would read as other numbers or beyond the end.
    """
    given = tensor.device.type, tensor.dtype, tensor.numel()
    if given[0] != "cpu" or given[1] not in dtypes or given[2] < count or not tensor.is_contiguous():
        raise TypeError(f"{name} is {given} for the compiled loop, expected {count} contiguous {dtypes} on the CPU")
    return tensor.data_ptr()


def bytes_of(tensor: Tensor) -> int:
    """Memory of a tensor's values."""
    return tensor.numel() * tensor.element_size()


def parameter_versions(block: AutoregressiveBlock) -> tuple[tuple[int, int], ...]:
    """Address and version counter of each parameter, which tell that it was replaced or written to.

    They cost nothing, but miss writes to `parameter.data`, and inference tensors count no writes.
    """
    return tuple((one.data_ptr(), 0 if one.is_inference() else one._version) for one in block.parameters())


def pack(
    block: AutoregressiveBlock,
    panels: PanelLayout,
    place: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    *,
    rounded: bool = False,
) -> PackedBlock:
    """Copies of a block's weights in the layout of the library.

    Args:
        block: whose weights are copied.
        panels: of the library.
        place: called with each tensor of a layer; what it returns is kept.
        rounded: make the layers' matrices bfloat16, whatever the block's precision.
    """
    versions = parameter_versions(block)  # before anything is copied: who writes meanwhile makes the copies obsolete
    in_bfloat16 = rounded or block.proj_in.weight.dtype == torch.bfloat16
    layers = tuple(
        {name: place(tensor) for name, tensor in _layer(layer, panels, in_bfloat16=in_bfloat16).items()}
        for layer in layers_of(block)
    )
    width, channels = block.spec.layer.width, block.spec.token_channels
    other = {
        "proj_in": panels.pack_matrix(block.proj_in.weight.float()),
        "proj_in_bias": panels.pack_vector(block.proj_in.bias, width),
        "proj_out": panels.pack_matrix(block.proj_out.weight.float()),
        "proj_out_bias": panels.pack_vector(block.proj_out.bias, 2 * channels),
    }
    if isinstance(block.final_norm, RMSNorm):
        other["final_norm"] = panels.pack_vector(_scale(block.final_norm), width)
    if block.pos_embed is not None:
        table = block.pos_embed.flip(0) if block.spec.backwards else block.pos_embed
        other["table"] = panels.pack_rows(table)
    if block.sos_embed is not None:
        other["start"] = block.sos_embed.detach().float().flatten().contiguous()
    return PackedBlock(layers, other, versions, in_bfloat16)


def layers_of(block: AutoregressiveBlock) -> Iterator[Layer]:
    """The Transformer layers of a block."""
    for layer in block.attn_blocks:
        assert isinstance(layer, Layer)
        yield layer


def _layer(layer: Layer, panels: PanelLayout, *, in_bfloat16: bool) -> dict[str, Tensor]:
    attention, mlp = layer.attention, _mlp(layer)
    width = attention.proj.out_features
    found = {
        **_linear("qkv", [attention.qkv], panels, in_bfloat16),
        **_linear("proj", [attention.proj], panels, in_bfloat16),
        **_linear(
            "up", [mlp.gate_proj, mlp.up_proj] if isinstance(mlp, GatedMLP) else [_first(mlp)], panels, in_bfloat16
        ),
        **_linear("down", [mlp.down_proj if isinstance(mlp, GatedMLP) else _last(mlp)], panels, in_bfloat16),
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
            found[name] = panels.pack_vector(_scale(norm), len(norm.weight))
    return found


def _mlp(layer: Layer) -> MLP | GatedMLP:
    """The MLP itself: with activation checkpointing it is wrapped, which hides its type but not its attributes."""
    found: MLP | GatedMLP = getattr(layer.mlp, "_checkpoint_wrapped_module", layer.mlp)
    return found


def _first(mlp: MLP) -> Any:
    return mlp.main[0]


def _last(mlp: MLP) -> Any:
    return mlp.main[2]


def _linear(name: str, linears: Sequence[Any], panels: PanelLayout, in_bfloat16: bool) -> dict[str, Tensor]:
    """One linear layer, or two of one shape whose panels alternate."""
    outputs, dtype = linears[0].out_features, torch.bfloat16 if in_bfloat16 else torch.float32
    weight = torch.stack([panels.pack_matrix(linear.weight.to(dtype)) for linear in linears], dim=1).flatten(0, 1)
    biases = [panels.pack_vector(linear.bias, outputs).view(-1, panels.panel) for linear in linears]
    return {name: weight, f"{name}_bias": torch.stack(biases, dim=1).flatten()}


def _norm(name: str, norm: nn.Module, width: int, panels: PanelLayout) -> dict[str, Tensor]:
    if isinstance(norm, RMSNorm):
        return {name: panels.pack_vector(_scale(norm), width)}
    assert isinstance(norm, nn.LayerNorm)
    return {name: panels.pack_vector(norm.weight, width), f"{name}_bias": panels.pack_vector(norm.bias, width)}


def _scale(norm: RMSNorm) -> Tensor:
    return 1 + norm.weight.detach().float()
