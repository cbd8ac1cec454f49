"""The parts of a Transformer layer apart from attention: norms, the MLP and the gated MLP.

Contract: every module maps (B, T, D) to (B, T, D) in its input's dtype. RMSNorm computes in float32
(float64 for float64 input). Parameter names are those of the published checkpoints.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

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


def runs_as_written(module: nn.Module) -> bool:
    """Whether a call runs the code of the classes alone: no hook and no forward of its own on any part of a module.

    >>> linear = nn.Linear(2, 2)
    >>> hook = linear.register_forward_hook(lambda module, inputs, output: 2 * output)
    >>> runs_as_written(linear), hook.remove(), runs_as_written(linear)
    (False, None, True)
    """
    everywhere = torch.nn.modules.module
    hooked = bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks)
    return not hooked and not any(
        part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in module.modules()
    )


def make_norm(spec: LayerSpec) -> nn.Module:
    """The norm that stands before attention and MLP."""
    return nn.LayerNorm(spec.width) if spec.norm_type == "layer_norm" else RMSNorm(spec.width)


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
