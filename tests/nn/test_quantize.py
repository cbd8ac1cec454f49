"""Integer weights: near the given ones, with scales that depend on nothing else, the same wherever they are read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starflow.nn.attention import Layer, float32_copy
from starflow.nn.layers import LayerSpec
from starflow.nn.quantize import (
    GROUP_INPUTS,
    STORED_BYTES,
    IntegerFormat,
    RoundedLinear,
    effective_weight,
    quantize,
    rounded,
)

FORMS: tuple[IntegerFormat, ...] = ("int8", "int4")
forms = st.sampled_from(FORMS)


@given(
    form=forms,
    outputs=st.integers(1, 5),
    inputs=st.integers(1, 150),
    seed=st.integers(0, 99),
    size=st.floats(1e-6, 1e6),
)
def test_no_weight_is_off_by_more_than_half_a_step(
    form: IntegerFormat, outputs: int, inputs: int, seed: int, size: float
) -> None:
    """A step is a 127th of the group's largest weight, or an 8th; 4 bits may clip the largest to make steps smaller."""
    weight = size * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    found = quantize(weight, form)
    assert found.codes_NGS.shape == (outputs, -(-inputs // GROUP_INPUTS[form]), GROUP_INPUTS[form])
    assert found.dequantize().shape == weight.shape
    padded = torch.nn.functional.pad(weight, (0, -inputs % GROUP_INPUTS[form]))
    largest = padded.unflatten(1, (-1, GROUP_INPUTS[form])).abs().amax(2)
    error = (found.codes_NGS * found.scales_NG.float().unsqueeze(2)).flatten(1) - padded
    of_group = error.unflatten(1, (-1, GROUP_INPUTS[form])).abs().amax(2)
    step = largest / (127 if form == "int8" else 8)
    assert (of_group <= step * (0.51 if form == "int8" else 1.6)).all()
    low, high = (-127, 127) if form == "int8" else (-8, 7)
    assert low <= found.codes_NGS.min() <= found.codes_NGS.max() <= high


@pytest.mark.parametrize(("form", "expected"), [("int8", 0.0060), ("int4", 0.083)])
def test_the_error_of_normal_weights_is_what_theory_gives(form: IntegerFormat, expected: float) -> None:
    """step / sqrt(12) with the mean largest of 64 and of 32 normal numbers; 4 bits gain by the choice of the scale."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    error = (rounded(weight, form) - weight).square().mean().sqrt()
    assert 0.95 * expected < error < 1.05 * expected


def test_the_scale_of_four_bits_beats_the_one_that_just_holds_the_largest_weight() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    plain = weight.unflatten(1, (-1, 32))
    scale = plain.abs().amax(2, keepdim=True) / 7
    simple = (scale * (plain / scale).round()).flatten(1)
    assert (rounded(weight, "int4") - weight).square().sum() < 0.85 * (simple - weight).square().sum()


@pytest.mark.parametrize("form", FORMS)
def test_zeros_and_numbers_that_codes_hold_stay_as_they_are(form: IntegerFormat) -> None:
    assert torch.equal(rounded(torch.zeros(2, 70), form), torch.zeros(2, 70))
    codes = torch.arange(-7, 8).repeat(2, 5).float()
    codes[:, 0] = -127.0 if form == "int8" else -8.0
    codes[:, 64] = codes[:, 32] = codes[:, 0]
    assert torch.equal(rounded(0.5 * codes, form), 0.5 * codes)


@given(form=forms, seed=st.integers(0, 20))
def test_rows_are_rounded_apart(form: IntegerFormat, seed: int) -> None:
    weight = torch.randn(70, 100, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(rounded(weight, form)[62:], rounded(weight[62:], form))


def test_the_bytes_of_a_weight_are_those_of_code_and_scale() -> None:
    found = quantize(torch.randn(3, 256), "int8")
    assert STORED_BYTES["int8"] * 3 * 256 == found.codes_NGS.numel() + 2 * found.scales_NG.numel()
    found = quantize(torch.randn(3, 256), "int4")
    assert STORED_BYTES["int4"] * 3 * 256 == found.codes_NGS.numel() / 2 + 2 * found.scales_NG.numel()


def test_a_rounded_layer_shares_its_parameters_and_a_float32_copy_holds_what_it_computes_with() -> None:
    spec = LayerSpec(width=64, heads=2, kv_heads=2, head_dim=32, hidden=96)
    layer = Layer(spec).bfloat16().requires_grad_(False)
    plain = layer.attention.proj
    assert isinstance(plain, torch.nn.Linear)
    layer.attention.proj = RoundedLinear.of(plain, "int8")
    assert layer.attention.proj.weight is plain.weight
    assert layer.attention.proj.bias is plain.bias
    twin = float32_copy(layer, spec)
    assert torch.equal(twin.attention.proj.weight, effective_weight(layer.attention.proj))
    assert not torch.equal(twin.attention.proj.weight, plain.weight.float())
    assert torch.equal(twin.attention.qkv.weight, layer.attention.qkv.weight.float())
