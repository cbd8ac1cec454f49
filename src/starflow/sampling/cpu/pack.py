"""Packs a block's weights in the order in which step.cpp reads them, and mirrors its structs field by field.

Contract: packed weights are the only copies that are made: in the format of the block, as many bytes again as its own,
and while they are made those of one layer more. The matrices may lie in a file, which is mapped: `write_matrices` and
`map_matrices`. They hold for the parameters as they were; `parameter_versions` and checksums of their values tell
whether they have changed.

Shapes: D width, K inputs and N outputs of a linear layer, R rows (B pictures, twice with guidance).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from starflow.flow.block import AutoregressiveBlock
from starflow.nn.attention import Layer
from starflow.nn.layers import MLP, GatedMLP, LayerSpec, RMSNorm
from starflow.nn.quantize import GROUP_INPUTS, ROWS_AT_ONCE, IntegerFormat, WeightFormat, quantize

FORMAT_NUMBERS = {"float32": 0, "bfloat16": 1, "bfloat16 products": 2, "int8": 3, "int4": 4}
"""The formats of matrices as step.cpp numbers them; number 2 multiplies with inputs in bfloat16."""

MATRICES = ("qkv", "proj", "up", "down")
"""The matrices of a layer, by the names of `LAYER_POINTERS`."""

LAYER_POINTERS = (
    *("qkv", "proj", "up", "down", "qkv_bias", "proj_bias", "up_bias", "down_bias"),
    *("norm1", "norm1_bias", "norm2", "norm2_bias", "query_norm", "key_norm", "post1", "post2", "keys", "values"),
)

BLOCK_INTEGERS = (
    *("pictures", "rows", "width", "heads", "kv_heads", "head_dim", "hidden", "layers"),
    *("channels", "length", "tokens", "first", "prefix", "threads"),
    *("rms", "gated", "half_split", "softplus", "rule", "weights", "half_cache"),
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
    """How the library reads weights: in panels of `panel` outputs.

    >>> layout = PanelLayout(panel=4)
    >>> layout.padded(6)
    8
    >>> layout.pack_matrix(torch.arange(6.0).view(3, 2)).tolist()  # of each input the values of 4 outputs
    [[[0.0, 2.0, 4.0, 0.0], [1.0, 3.0, 5.0, 0.0]]]
    """

    panel: int

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

    def pack_matrix(self, weight_NK: Tensor, form: WeightFormat = "float32") -> Tensor:
        """A linear layer's weight as panels, (N / panel, ...); step.cpp has the layout of each format.

        float32 is (K, panel), bfloat16 (K / 2, panel, 2), and integers are bytes, (groups of inputs, bytes of a group).
        """
        outputs, inputs = weight_NK.shape
        whole = nn.functional.pad(weight_NK.detach(), (0, 0, 0, self.padded(outputs) - outputs))
        if form == "float32":
            return whole.view(-1, self.panel, inputs).transpose(1, 2).float().contiguous()
        if form == "bfloat16":
            pairs = nn.functional.pad(whole.bfloat16(), (0, inputs % 2)).unflatten(1, (-1, 2))
            words: Tensor = pairs.unflatten(0, (-1, self.panel)).transpose(1, 2).contiguous()
            return words
        some = whole.split(self.padded(ROWS_AT_ONCE))
        return torch.cat([self._pack_integers(rows_NK, form) for rows_NK in some])

    def _pack_integers(self, whole_NK: Tensor, form: IntegerFormat) -> Tensor:
        found = quantize(whole_NK, form)
        panels = found.codes_NGS.unflatten(0, (-1, self.panel)).transpose(1, 2)  # of panels, groups, outputs, inputs
        if form == "int4":  # of four inputs the first two, and above them the other two
            four = panels.unflatten(3, (-1, 2, 2)) + 8
            panels = (four[..., 0, :] + four[..., 1, :] * 16).flatten(3)
        codes = panels.unflatten(3, (-1, 2)).transpose(2, 3).flatten(2).view(torch.uint8)
        scales = found.scales_NG.unflatten(0, (-1, self.panel)).transpose(1, 2).contiguous().view(torch.uint8)
        return torch.cat((codes, scales), dim=2)

    def matrix_shape(self, outputs: int, inputs: int, form: WeightFormat) -> tuple[int, ...]:
        """The shape of a packed matrix."""
        panels = self.padded(outputs) // self.panel
        if form == "float32":
            return panels, inputs, self.panel
        if form == "bfloat16":
            return panels, (inputs + 1) // 2, self.panel, 2
        size = GROUP_INPUTS[form]
        return panels, -(-inputs // size), self.panel * (size * (8 if form == "int8" else 4) // 8 + 2)


@dataclass(frozen=True)
class PackedBlock:
    """The weights that one block's token loop reads; a layer's tensors by the names of `LAYER_POINTERS`."""

    layers: tuple[dict[str, Tensor], ...]
    other: dict[str, Tensor]
    """The block's other weights, by the names of `BLOCK_POINTERS`."""
    versions: tuple[tuple[int, int], ...]
    """Of the parameters when they were packed; see `parameter_versions`."""
    form: WeightFormat
    """Of the layers' matrices."""
    mapped: bool = False
    """Whether the matrices lie in a file, whose pages the system may drop."""
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
    form: WeightFormat | None = None,
    place: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    file: Path | None = None,
) -> PackedBlock:
    """Copies of a block's weights in the layout of the library.

    Args:
        block: whose weights are copied.
        panels: of the library.
        form: of the layers' matrices; None is the block's own.
        place: called with each matrix; what it returns is kept.
        file: that holds the matrices already, to be mapped; None packs them.
    """
    versions = parameter_versions(block)  # before anything is copied: who writes meanwhile makes the copies obsolete
    form = form or block.weight_form
    found = pack_matrices(block, panels, form) if file is None else map_matrices(file, block, panels, form)
    layers = tuple(
        {name: place(matrix) for name, matrix in matrices.items()} | _layer_vectors(layer, panels)
        for layer, matrices in zip(layers_of(block), found, strict=True)
    )
    width, channels = block.spec.layer.width, block.spec.token_channels
    other = {
        "proj_in": panels.pack_matrix(block.proj_in.weight),
        "proj_in_bias": panels.pack_vector(block.proj_in.bias, width),
        "proj_out": panels.pack_matrix(block.proj_out.weight),
        "proj_out_bias": panels.pack_vector(block.proj_out.bias, 2 * channels),
    }
    if isinstance(block.final_norm, RMSNorm):
        other["final_norm"] = panels.pack_vector(_scale(block.final_norm), width)
    if block.pos_embed is not None:
        table = block.pos_embed.flip(0) if block.spec.backwards else block.pos_embed
        other["table"] = panels.pack_rows(table)
    if block.sos_embed is not None:
        other["start"] = block.sos_embed.detach().float().flatten().contiguous()
    return PackedBlock(layers, other, versions, form, mapped=file is not None)


def pack_matrices(block: AutoregressiveBlock, panels: PanelLayout, form: WeightFormat) -> Iterator[dict[str, Tensor]]:
    """The matrices of one layer after another, by the names of `MATRICES`."""
    for layer in layers_of(block):
        linears = _linears(layer)
        yield {
            name: torch.stack([panels.pack_matrix(one.weight, form) for one in linears[name]], dim=1).flatten(0, 1)
            for name in MATRICES
        }


def write_matrices(file: Path, block: AutoregressiveBlock, panels: PanelLayout, form: WeightFormat) -> None:
    """Write the matrices of all layers, one after the other, to a file.

    Raises:
        OSError: it cannot be written.
    """
    with file.open("wb") as opened:
        for matrices in pack_matrices(block, panels, form):
            for matrix in matrices.values():
                opened.write(matrix.flatten().view(torch.uint8).numpy().data)


def matrices_bytes(block: AutoregressiveBlock, panels: PanelLayout, form: WeightFormat) -> int:
    """The size of the file that `write_matrices` writes."""
    shapes = matrix_shapes(block.spec.layer, panels, form).values()
    return block.spec.layers * sum(math.prod(shape) for shape in shapes) * STORED[form].itemsize


def map_matrices(
    file: Path, block: AutoregressiveBlock, panels: PanelLayout, form: WeightFormat
) -> Iterator[dict[str, Tensor]]:
    """The matrices that `write_matrices` wrote, mapped: memory is taken as they are read."""
    whole = torch.from_file(str(file), shared=False, size=matrices_bytes(block, panels, form), dtype=torch.uint8)
    shapes, start = matrix_shapes(block.spec.layer, panels, form), 0
    for _ in range(block.spec.layers):
        found = {}
        for name, shape in shapes.items():
            stop = start + math.prod(shape) * STORED[form].itemsize
            found[name] = whole[start:stop].view(STORED[form]).view(shape)
            start = stop
        yield found


STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8, "int4": torch.uint8}


def matrix_shapes(spec: LayerSpec, panels: PanelLayout, form: WeightFormat) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's packed matrices, in their order."""
    inner, heads = spec.heads * spec.head_dim, (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    up, *rest = panels.matrix_shape(spec.hidden, spec.width, form)
    return {
        "qkv": panels.matrix_shape(heads, spec.width, form),
        "proj": panels.matrix_shape(spec.width, inner, form),
        "up": (up * (2 if spec.swiglu else 1), *rest),
        "down": panels.matrix_shape(spec.width, spec.hidden, form),
    }


def layers_of(block: AutoregressiveBlock) -> Iterator[Layer]:
    """The Transformer layers of a block."""
    for layer in block.attn_blocks:
        assert isinstance(layer, Layer)
        yield layer


def _linears(layer: Layer) -> dict[str, list[Any]]:
    """The linear maps of each of `MATRICES`: one, or two of one shape whose panels alternate."""
    attention, mlp = layer.attention, _mlp(layer)
    return {
        "qkv": [attention.qkv],
        "proj": [attention.proj],
        "up": [mlp.gate_proj, mlp.up_proj] if isinstance(mlp, GatedMLP) else [_first(mlp)],
        "down": [mlp.down_proj if isinstance(mlp, GatedMLP) else _last(mlp)],
    }


def _layer_vectors(layer: Layer, panels: PanelLayout) -> dict[str, Tensor]:
    """Biases and norms."""
    attention, mlp = layer.attention, _mlp(layer)
    width = attention.proj.out_features
    found = {**_norm("norm1", attention.norm, width, panels), **_norm("norm2", mlp.norm, width, panels)}
    for name, linears in _linears(layer).items():
        biases = [panels.pack_vector(one.bias, one.out_features).view(-1, panels.panel) for one in linears]
        found[f"{name}_bias"] = torch.stack(biases, dim=1).flatten()
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


def _norm(name: str, norm: nn.Module, width: int, panels: PanelLayout) -> dict[str, Tensor]:
    if isinstance(norm, RMSNorm):
        return {name: panels.pack_vector(_scale(norm), width)}
    assert isinstance(norm, nn.LayerNorm)
    return {name: panels.pack_vector(norm.weight, width), f"{name}_bias": panels.pack_vector(norm.bias, width)}


def _scale(norm: RMSNorm) -> Tensor:
    return 1 + norm.weight.detach().float()
