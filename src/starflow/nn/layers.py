"""The parts of a Transformer layer apart from attention: norms, the MLP, the gated MLP, and rotary positions.

Contract: every module maps (B, T, D) to (B, T, D) in its input's dtype. RMSNorm computes in float32
(float64 for float64 input). Parameter names are those of the published checkpoints.

Rotary positions (RoPE, arXiv 2104.09864) lie on two axes of a grid and one of a condition. A table is one tensor of
shape (T, 1, H/2, 2): for each of T positions the cosine and the sine of H/2 angles, ready to broadcast over batch and
heads. Positions are real numbers on three axes: row, column, and place in the condition (STARFlow, arXiv 2506.06276,
section on RoPE). Nothing is cached here; a caller computes a table once a pass.

Shapes: B batch, T tokens, D width, N heads, H head width, S condition tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RMS_EPS = 1e-6


@dataclass(frozen=True)
class LayerSpec:
    """The sizes and options of one Transformer layer."""

    width: int
    """D, channels of the hidden states."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads, which groups of query heads share."""
    head_dim: int
    hidden: int
    """Hidden channels of the MLP."""
    norm_type: Literal["layer_norm", "rms_norm"] = "layer_norm"
    swiglu: bool = False
    """`GatedMLP` instead of `MLP`; its gate is a tanh-GELU, the option's published name notwithstanding."""
    qk_norm: bool = False
    """RMSNorm of every head's queries and keys."""
    post_norm: bool = False
    """RMSNorm after attention and after the MLP too."""
    bias: bool = True
    """Biases of the linear layers."""
    half_split_rope: bool = False
    """Rotate the pairs (i, i + head_dim / 2) instead of adjacent ones."""
    causal: bool = True
    """Every token attends to itself and those before it, and otherwise to all; a cache is for the former alone."""


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, x / rms(x) * (1 + weight), eps 1e-6 (arXiv 1910.07467).

    The weight is stored as an offset and starts at 0.

    >>> norm = RMSNorm(4)
    >>> norm(torch.tensor([3.0, 3.0, -3.0, 3.0])).detach()
    tensor([ 1.0000,  1.0000, -1.0000,  1.0000])
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = 1 + self.weight.to(wide)
        return F.rms_norm(x.to(wide), scale.shape, scale, RMS_EPS).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """PyTorch's, which also takes inputs of more precision than its weights, as shards of bfloat16 have.

    >>> LayerNorm(4).bfloat16()(torch.ones(2, 4)).dtype
    torch.float32
    """

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (one.to(torch.promote_types(one.dtype, x.dtype)) for one in (self.weight, self.bias))
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def runs_as_written(module: nn.Module) -> bool:
    """Whether a call runs the code of the classes alone: no hook and no forward of its own on any part of a module.

    >>> linear = nn.Linear(2, 2)
    >>> hook = linear.register_forward_hook(lambda module, inputs, output: 2 * output)
    >>> runs_as_written(linear), hook.remove(), runs_as_written(linear)
    (False, None, True)
    """
    everywhere = torch.nn.modules.module
    hooked = bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks)
    return not hooked and not any(map(is_hooked, module.modules()))


def is_hooked(part: nn.Module) -> bool:
    """Whether a call of a module runs more than its class's code, its parts aside: a hook, or a forward of its own."""
    return bool(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part))


def make_norm(spec: LayerSpec) -> nn.Module:
    """The norm that stands before attention and MLP."""
    return LayerNorm(spec.width) if spec.norm_type == "layer_norm" else RMSNorm(spec.width)


class MLP(nn.Module):
    """An MLP: norm, expansion to `spec.hidden`, exact GELU, contraction, and the optional norm after."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.norm = make_norm(spec)
        self.main = nn.Sequential(
            nn.Linear(spec.width, spec.hidden, bias=spec.bias),
            nn.GELU(),
            nn.Linear(spec.hidden, spec.width, bias=spec.bias),
        )
        self.post_norm = RMSNorm(spec.width) if spec.post_norm else nn.Identity()

    def forward(self, x_BTD: Tensor) -> Tensor:
        out: Tensor = self.post_norm(self.main(self.norm(x_BTD)))
        return out


class GatedMLP(nn.Module):
    """A gated MLP: norm, down(tanh-GELU(gate) * up), and the optional norm after (arXiv 2002.05202)."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.norm = make_norm(spec)
        self.gate_proj = nn.Linear(spec.width, spec.hidden, bias=spec.bias)
        self.up_proj = nn.Linear(spec.width, spec.hidden, bias=spec.bias)
        self.down_proj = nn.Linear(spec.hidden, spec.width, bias=spec.bias)
        self.post_norm = RMSNorm(spec.width) if spec.post_norm else nn.Identity()

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD = self.norm(x_BTD)
        gated = F.gelu(self.gate_proj(y_BTD), approximate="tanh") * self.up_proj(y_BTD)
        out: Tensor = self.post_norm(self.down_proj(gated))
        return out


ROPE_BASE = 10_000.0


def grid_positions(rows: int, columns: int, span: float, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Positions (rows * columns, 3) of a grid in raster order, rescaled so that any shape covers `span`.

    Row r sits at r * span / sqrt(rows * columns), columns alike, and the third axis is 0.

    >>> grid_positions(2, 2, 8.0, dtype=torch.float32, device=torch.device("cpu"))
    tensor([[0., 0., 0.],
            [0., 4., 0.],
            [4., 0., 0.],
            [4., 4., 0.]])
    """
    step = span / math.sqrt(rows * columns)
    index = torch.arange(rows * columns, device=device)
    row = torch.div(index, columns, rounding_mode="floor").to(dtype) * step
    return torch.stack((row, (index % columns).to(dtype) * step, torch.zeros_like(row)), dim=1)


def condition_positions(length: int, span: float, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Positions (length, 3) of condition tokens: token s sits at (0, 0, s * span / length)."""
    place = torch.arange(length, dtype=dtype, device=device) * (span / length)
    zero = torch.zeros_like(place)
    return torch.stack((zero, zero, place), dim=1)


def rotary_table(positions_T3: Tensor, head_dim: int, condition_angles: int) -> Tensor:
    """Table (T, 1, head_dim / 2, 2) of the angles of each position.

    With q = head_dim / 2 - condition_angles: q/2 angles for the row and q/2 for the column, of frequency
    10000^(-2i/q), then `condition_angles` for the third axis, of frequency 10000^(-i/condition_angles).
    """
    planar = head_dim // 2 - condition_angles
    row, column, place = positions_T3.unbind(1)
    plane = _frequencies(planar // 2, positions_T3)
    angles = [torch.outer(row, plane), torch.outer(column, plane)]
    if condition_angles:
        angles.append(torch.outer(place, _frequencies(condition_angles, positions_T3)))
    angle = torch.cat(angles, dim=1).unsqueeze(1)
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def rotate(x_BTNH: Tensor, table: Tensor, *, half_split: bool) -> Tensor:
    """Rotate the pairs of channels of every head by the table's angles; the result has the shape and dtype of x.

    Args:
        x_BTNH: queries or keys.
        table: (T, 1, H/2, 2), from `rotary_table`.
        half_split: pair i is (i, i + H/2); otherwise (2i, 2i + 1).

    >>> quarter_turn = torch.tensor([[[[0.0, 1.0]]]])
    >>> rotate(torch.tensor([[[[1.0, 0.0]]]]), quarter_turn, half_split=False)
    tensor([[[[0., 1.]]]])
    """
    if half_split:
        first, second = x_BTNH.chunk(2, dim=-1)
        return torch.cat(_rotate_pairs(first, second, table), dim=-1).to(x_BTNH.dtype)
    pairs = torch.unflatten(x_BTNH, -1, (-1, 2))
    if torch.compiler.is_compiling():  # a compiler fuses the plain form, and knows no complex numbers
        first, second = pairs.unbind(-1)
        rotated = torch.stack(_rotate_pairs(first, second, table), dim=-1)
    else:  # one vectorised pass instead of seven strided ones: eight times faster on a CPU
        wide = torch.view_as_complex(pairs.to(table.dtype))
        rotated = torch.view_as_real(wide * torch.view_as_complex(table))
    return rotated.flatten(-2).to(x_BTNH.dtype)


def _rotate_pairs(first: Tensor, second: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = table.unbind(-1)
    return first * cos - second * sin, first * sin + second * cos


def _frequencies(count: int, like: Tensor) -> Tensor:
    """10000^(-i / count) for i = 0 .. count - 1."""
    exponent = torch.arange(count, dtype=like.dtype, device=like.device) / max(count, 1)
    return torch.exp(exponent * -math.log(ROPE_BASE))
