"""Norms, MLPs and the pre-norm Transformer layer.

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
    """Shape and options of one Transformer layer."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    norm_type: Literal["layer_norm", "rms_norm"] = "layer_norm"
    swiglu: bool = False
    qk_norm: bool = False
    post_norm: bool = False
    bias: bool = True
    half_split_rope: bool = False


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), eps 1e-6; the weight is stored as an offset and starts at 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = 1 + self.weight.to(wide)
        return F.rms_norm(x.to(wide), scale.shape, scale, RMS_EPS).to(x.dtype)


def make_norm(spec: LayerSpec) -> nn.Module:
    """The norm before attention and MLP."""
    return nn.LayerNorm(spec.width) if spec.norm_type == "layer_norm" else RMSNorm(spec.width)


class MLP(nn.Module):
    """Norm, expansion, GELU, contraction, and the optional norm after."""

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
    """Norm, down(tanh-GELU(gate) * up), and the optional norm after."""

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
