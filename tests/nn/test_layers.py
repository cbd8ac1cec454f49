"""Norms and MLPs against their formulas."""

from __future__ import annotations

import math

import torch
from torch import nn

from starflow.nn.layers import MLP, GatedMLP, LayerSpec, RMSNorm, make_norm


def spec(**options: object) -> LayerSpec:
    return LayerSpec(width=8, heads=2, kv_heads=2, head_dim=4, hidden=12, **options)  # type: ignore[arg-type]


def test_rms_norm_is_its_formula_with_the_weight_as_an_offset() -> None:
    norm = RMSNorm(8).double()
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(3, 5, 8, dtype=torch.float64) * 1e-3  # small, so that eps counts
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + norm.weight)
    torch.testing.assert_close(norm(x), expected)


def test_rms_norm_of_bfloat16_is_rounded_once() -> None:
    norm = RMSNorm(64)
    x = torch.randn(7, 64).bfloat16()
    expected = (x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-6).sqrt()).bfloat16()
    assert torch.equal(norm.bfloat16()(x), expected)


def test_layer_norm_epsilon() -> None:
    norm = make_norm(spec())
    x = torch.randn(4, 8) * 1e-3
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(norm(x), centred / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt())


def test_mlp_uses_the_exact_gelu_and_the_gated_one_its_tanh_form() -> None:
    y = torch.linspace(-3, 3, 8).repeat(2, 1, 1)
    mlp, gated = MLP(spec()), GatedMLP(spec(swiglu=True))
    hidden = mlp.main[0](mlp.norm(y))
    exact = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(mlp(y), mlp.main[2](exact))
    z = gated.norm(y)
    gate = gated.gate_proj(z)
    tanh = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    torch.testing.assert_close(gated(y), gated.down_proj(tanh * gated.up_proj(z)))


def test_post_norm_comes_last_and_biases_go() -> None:
    for mlp in (MLP(spec(post_norm=True, bias=False)), GatedMLP(spec(post_norm=True, bias=False, swiglu=True))):
        out = mlp(torch.randn(2, 3, 8))
        torch.testing.assert_close(out.square().mean(-1), torch.ones(2, 3), rtol=1e-2, atol=0)
        linears = [module for module in mlp.modules() if isinstance(module, nn.Linear)]
        assert linears
        assert all(linear.bias is None for linear in linears)
