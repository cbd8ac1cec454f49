"""Weights in fewer bits: every pass is of the same rounded weights; on a CPU by our code, elsewhere by torchao."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest
import torch

from starflow import STARFlow, denoise, sample
from starflow.errors import UserError
from starflow.flow.config import STARFlowConfig
from starflow.flow.memory import weight_bytes
from starflow.flow.quantize import is_rounded, set_weight_format, weight_format
from starflow.nn.quantize import RoundedLinear, WeightFormat, rounded, stored_bytes
from starflow.pipeline.pipeline import StarFlowPipeline
from tests.registry import randomised

CONFIG = STARFlowConfig(
    in_channels=2, img_size=4, channels=64, head_dim=32, num_blocks=2, layers_per_block=(1, 3), txt_size=3, txt_dim=5
)
ROUNDED: tuple[WeightFormat, ...] = ("bfloat16", "int8", "int4")


def starflow() -> STARFlow:
    model = randomised(CONFIG, 0)
    assert isinstance(model, STARFlow)
    return model.requires_grad_(False)


@pytest.mark.parametrize("form", ROUNDED)
def test_a_rounded_model_is_one_with_rounded_layers(form: WeightFormat) -> None:
    """Densities, samples by every solver and Tweedie steps are those of a model that holds the rounded numbers."""
    model, expected = starflow(), starflow()
    set_weight_format(model, form)
    for block in expected.iter_blocks():
        for part in block.attn_blocks.modules():
            if isinstance(part, torch.nn.Linear):
                part.weight.copy_(rounded(part.weight, form))
    draw = torch.Generator().manual_seed(0)
    x, condition = torch.randn(2, 2, 4, 4, generator=draw), torch.randn(2, 3, 5, generator=draw)
    assert torch.equal(model.log_prob(x, condition), expected.log_prob(x, condition))
    assert not torch.equal(model.log_prob(x, condition), starflow().log_prob(x, condition))
    assert torch.equal(denoise(model, x, condition), denoise(expected, x, condition))
    for solver in ("sequential", "jacobi"):
        ours, theirs = (sample(one, x, condition, condition * 0, 1.0, solver) for one in (model, expected))
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("form", ROUNDED)
def test_only_maps_inside_layers_are_rounded_and_their_weights_stay(form: WeightFormat) -> None:
    model, plain = starflow(), starflow()
    set_weight_format(model, form)
    assert weight_format(model) == form
    assert is_rounded(model)
    assert not is_rounded(plain)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    for block in model.iter_blocks():
        assert type(block.proj_in) is torch.nn.Linear
        assert sum(isinstance(part, RoundedLinear) for part in block.modules()) == 4 * len(block.attn_blocks)
        assert block.as_built


def test_a_format_is_chosen_once_and_is_no_more_than_the_arithmetic() -> None:
    model = starflow()
    set_weight_format(model, "float32")
    assert not is_rounded(model)
    set_weight_format(model, "int8")
    set_weight_format(model, "int8")
    with pytest.raises(UserError, match="^the weights are int8 already, .*: load it with int4$"):
        set_weight_format(model, "int4")
    for form in ("float32", "bfloat16"):
        half = starflow().to(torch.bfloat16)
        if form == "bfloat16":
            set_weight_format(half, form)
            assert not is_rounded(half)
        else:
            with pytest.raises(UserError, match="^weights are float32 where the arithmetic is bfloat16: choose dtype"):
                set_weight_format(half, "float32")


@pytest.mark.parametrize(("form", "size"), [("int8", 1 + 2 / 64), ("int4", 0.5 + 2 / 32), ("bfloat16", 2)])
def test_what_a_weight_takes_is_what_is_predicted(form: WeightFormat, size: float) -> None:
    layers, maps = 4, 12 * 64 * 64
    saved = weight_bytes(CONFIG, "float32") - weight_bytes(CONFIG, "float32", form)
    assert saved == layers * maps * (4 - size)


def test_rounded_weights_are_not_saved(tmp_path: Path) -> None:
    pipeline = StarFlowPipeline.from_pretrained("glyphs", weights="int8")
    assert weight_format(pipeline.flow) == "int8"
    with pytest.raises(UserError, match="the weights are rounded, which is not saved"):
        pipeline.save_pretrained(tmp_path / "model")


class Stored(torch.Tensor):
    """Stands for the type of a weight that torchao rounded."""


def test_torchaos_weights_are_told_by_their_type() -> None:
    model = starflow()
    linear = model.get_submodule("blocks.0.attn_blocks.0.attention.qkv")
    assert isinstance(linear, torch.nn.Linear)
    linear.weight = torch.nn.Parameter(linear.weight.data.as_subclass(Stored), requires_grad=False)
    assert is_rounded(model)
    with pytest.raises(UserError, match="quantized by torchao already"):
        set_weight_format(model, "int8")


def test_for_another_device_torchao_rounds_every_block_and_little_is_lost() -> None:
    pytest.importorskip("torchao")
    model, plain = starflow(), starflow()
    x, condition = torch.randn(2, 2, 4, 4), torch.randn(2, 3, 5)
    logger = logging.getLogger("torchao")
    level = logger.level
    set_weight_format(model, "int8", "cuda")
    assert logger.level == level, "the caller's logger is as it was"
    assert is_rounded(model)
    whole, rounded = (sum(map(stored_bytes, one.parameters())) for one in (plain, model))
    assert whole - rounded == 4 * (12 * 64 * 64 * 3 - 9 * 64 * 5), "of a weight a byte is left, of an output a scale"
    change = (model.log_prob(x, condition) - plain.log_prob(x, condition)) / x[0].numel()
    assert 0 < change.abs().max() < 4e-2


def test_on_a_gpu_4_bits_are_packed_there_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao's default of 4 bits needs a library of its own; what is asked for are torch's kernels."""
    quantization = pytest.importorskip("torchao.quantization")
    asked: list[object] = []

    def move(layer: torch.nn.Module, place: torch.device) -> torch.nn.Module:
        asked.append(place)
        return layer

    monkeypatch.setattr(torch.nn.Module, "to", move)
    monkeypatch.setattr(quantization, "quantize_", lambda layer, config: asked.append(config))
    model = starflow().bfloat16()
    set_weight_format(model, "int4", "cuda")
    there, config, back = asked[:3]
    assert (there, back) == (torch.device("cuda"), torch.device("cpu"))
    assert isinstance(config, quantization.Int4WeightOnlyConfig)
    assert (config.group_size, config.int4_packing_format) == (32, "tile_packed_to_4d")
    assert len(asked) == 3 * (1 + 3)


@pytest.mark.gpu
def test_4_bits_on_a_gpu_are_near_the_whole_numbers() -> None:
    pytest.importorskip("torchao")
    model, plain = starflow().bfloat16(), starflow().bfloat16()
    set_weight_format(model, "int4", "cuda")
    x, condition = torch.randn(2, 2, 4, 4), torch.randn(2, 3, 5)
    device = torch.device("cuda")
    ours = model.to(device).log_prob(x.to(device), condition.to(device)).cpu()
    assert 0 < ((ours - plain.log_prob(x, condition)) / x[0].numel()).abs().max() < 0.4
    drawn = [sample(model, x.to(device), condition.to(device)) for _ in range(2)]
    assert bool(drawn[0].isfinite().all())
    assert torch.equal(*drawn)


@pytest.mark.parametrize(("device", "dtype"), [("mps", torch.bfloat16), ("cuda", torch.float32)])
def test_4_bits_elsewhere_than_on_a_gpu_in_bfloat16_are_refused(device: str, dtype: torch.dtype) -> None:
    with pytest.raises(UserError, match=f"^int4 weights on {device} in .*, expected cuda in bfloat16: choose"):
        set_weight_format(starflow().to(dtype), "int4", device)


def test_without_torchao_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="int8 weights need torchao, which is not installed"):
        set_weight_format(starflow(), "int8", "cuda")


def test_weights_are_rounded_before_they_go_to_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that holds the rounded model need not hold the whole one."""
    order: list[str] = []
    monkeypatch.setattr(
        "starflow.pipeline.pipeline.set_weight_format",
        lambda flow, form, device: order.append(f"{form} on {flow.device.type} for {device}"),
    )
    monkeypatch.setattr(StarFlowPipeline, "to", lambda self, device, dtype: order.append(f"to {device}"))
    StarFlowPipeline.from_pretrained("glyphs", "cuda", weights="int8")
    assert order == ["int8 on cpu for cuda", "to cuda"]


def test_with_offload_the_rounded_blocks_come_and_go() -> None:
    plain, away = starflow(), starflow()
    for model in (plain, away):
        set_weight_format(model, "int8")
    away.offload("cpu")
    x, condition = torch.randn(2, 2, 4, 4), torch.randn(2, 3, 5)
    homes = list(away.parameters())
    torch.testing.assert_close(sample(away, x, condition), sample(plain, x, condition))
    torch.testing.assert_close(away(x, condition)[0], plain(x, condition)[0])
    assert all(one is other for one, other in zip(away.parameters(), homes, strict=True))
