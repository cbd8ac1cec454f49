"""Weights of one byte: only next to the noise, near the others, and refused where they cannot be."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest
import torch

from starflow import STARFlow, sample
from starflow.errors import UserError
from starflow.flow.config import STARFlowConfig
from starflow.flow.memory import weight_bytes
from starflow.flow.quantize import is_quantized, quantize_int8
from starflow.pipeline.pipeline import StarFlowPipeline
from tests.registry import randomised

CONFIG = STARFlowConfig(
    in_channels=2, img_size=4, channels=64, head_dim=32, num_blocks=2, layers_per_block=(1, 3), txt_size=3, txt_dim=5
)


def starflow() -> STARFlow:
    model = randomised(CONFIG, 0)
    assert isinstance(model, STARFlow)
    return model.requires_grad_(False)


def test_only_the_deep_blocks_maps_are_rounded_and_little_is_lost() -> None:
    pytest.importorskip("torchao")
    model, plain = starflow(), starflow()
    x, condition = torch.randn(2, 2, 4, 4), torch.randn(2, 3, 5)
    logger = logging.getLogger("torchao")
    level = logger.level
    quantize_int8(model)
    assert logger.level == level, "the caller's logger is as it was"
    assert is_quantized(model)
    assert not is_quantized(plain)
    shallow, deep = model.iter_blocks()
    for ours, theirs in zip(shallow.parameters(), next(plain.iter_blocks()).parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert type(deep.proj_out.weight.data) is torch.Tensor
    dimensions = x[0].numel()
    change = (model.log_prob(x, condition) - plain.log_prob(x, condition)) / dimensions
    assert 0 < change.abs().max() < 2e-2
    for solver in ("sequential", "jacobi"):
        drawn = sample(model, x, condition, condition * 0, 1.0, solver)
        torch.testing.assert_close(drawn, sample(plain, x, condition, condition * 0, 1.0), rtol=0.2, atol=0.2)


class Stored(torch.Tensor):
    """Stands for the type of a rounded weight."""


def test_a_weight_of_another_type_in_the_deep_block_is_what_tells() -> None:
    for block, expected in ((0, False), (1, True)):
        model = starflow()
        assert not is_quantized(model)
        linear = model.get_submodule(f"blocks.{block}.attn_blocks.0.attention.proj")
        assert isinstance(linear, torch.nn.Linear)
        linear.weight = torch.nn.Parameter(linear.weight.data.as_subclass(Stored), requires_grad=False)
        assert is_quantized(model) is expected


def test_a_byte_a_weight_is_what_is_predicted() -> None:
    layers, maps, outputs = 3, 12 * 64 * 64, 3 * 64 + 64 + 4 * 64 + 64
    saved = weight_bytes(CONFIG, "float32") - weight_bytes(CONFIG, "float32", int8=True)
    assert saved == layers * (3 * maps - 4 * outputs)


def test_rounded_weights_are_not_saved(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    pipeline = StarFlowPipeline.from_pretrained("glyphs", int8=True)
    with pytest.raises(UserError, match="rounded to int8, which is not saved"):
        pipeline.save_pretrained(tmp_path / "model")


def test_without_torchao_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="int8 weights need torchao, which is not installed"):
        quantize_int8(starflow())


def test_weights_are_rounded_before_they_go_to_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that holds the rounded model need not hold the whole one."""
    order: list[str] = []
    monkeypatch.setattr(
        "starflow.pipeline.pipeline.quantize_int8", lambda flow: order.append(f"int8 on {flow.device.type}")
    )
    monkeypatch.setattr(StarFlowPipeline, "to", lambda self, device, dtype: order.append(f"to {device}"))
    StarFlowPipeline.from_pretrained("glyphs", "cuda", int8=True)
    assert order == ["int8 on cpu", "to cuda"]


def test_with_offload_the_rounded_block_comes_and_goes() -> None:
    pytest.importorskip("torchao")
    plain, away = starflow(), starflow()
    for model in (plain, away):
        quantize_int8(model)
    away.offload("cpu")
    x, condition = torch.randn(2, 2, 4, 4), torch.randn(2, 3, 5)
    homes = list(away.parameters())
    torch.testing.assert_close(sample(away, x, condition), sample(plain, x, condition))
    torch.testing.assert_close(away(x, condition)[0], plain(x, condition)[0])
    assert all(one is other for one, other in zip(away.parameters(), homes, strict=True))
    assert is_quantized(away)
