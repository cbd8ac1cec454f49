"""The log's lines, what W&B is handed, and counted operations against torch's own count of what runs."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from starflow.errors import UserError
from starflow.flow.config import ModelConfig, STARFlowConfig, TarFlowConfig
from starflow.flow.model import build
from starflow.train.run import MatrixProduct, read_log, training_flops
from tests.train.regression import SETTINGS, Regression, run

WITH_TEXT = STARFlowConfig(
    in_channels=3, img_size=4, channels=64, num_blocks=2, layers_per_block=(1, 3), head_dim=32, txt_size=5, txt_dim=16
)
GATED = STARFlowConfig(
    in_channels=3,
    img_size=8,
    patch_size=2,
    channels=64,
    num_blocks=2,
    layers_per_block=(1, 2),
    head_dim=32,
    num_heads=4,
    num_kv_heads=2,
    use_swiglu=True,
    sos=False,
)


@pytest.mark.parametrize("config", [WITH_TEXT, GATED, TarFlowConfig(3, 8, 2, 64, 2, 2, num_classes=4)])
def test_linear_layers_are_counted_as_torch_does(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """With attention replaced by its values, so that matrix products of linear layers are all that is left."""
    flow = build(config)
    attention = sum(
        12 * (length * (length + 1) // 2) * block.spec.layer.heads * block.spec.layer.head_dim * len(block.attn_blocks)
        for block in flow.iter_blocks()
        for length in [
            config.grid_side**2 - block.first_predicted + (flow.condition_length if block.proj_txt is not None else 0)
        ]
    )
    x = torch.randn(1, config.in_channels, config.img_size, config.img_size, requires_grad=True)
    condition = None
    if isinstance(config, STARFlowConfig) and config.txt_size:
        condition = torch.randn(1, config.txt_size, config.txt_dim, requires_grad=True)
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, **rest: v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    )
    with FlopCounterMode(display=False) as counter:
        z, logdet = flow(x, condition)
        (z.sum() + logdet.sum()).backward()
    assert counter.get_total_flops() == pytest.approx(training_flops(flow) - attention, rel=1e-9)


def test_attention_counts_what_causality_lets_through() -> None:
    """Two lengths, all else equal: the difference of the counts has the closed form."""
    long, short = (
        training_flops(
            build(
                STARFlowConfig(
                    in_channels=3, img_size=side, channels=64, num_blocks=1, layers_per_block=1, head_dim=32, txt_size=0
                )
            )
        )
        for side in (8, 4)
    )
    weights = 64 * (3 * 64 + 64 + 8 * 64) + 3 * 64 + 64 * 6
    linear = 6 * weights * (64 - 16)
    attention = 12 * 64 * (64 * 65 // 2 - 16 * 17 // 2)
    assert long - short == linear + attention


def test_a_product_has_a_rate() -> None:
    assert MatrixProduct(torch.device("cpu"), torch.float32, side=64).rate(3) > 1e6


def test_wandb_is_handed_what_the_log_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[int, dict[str, Any]]] = []
    started: list[dict[str, Any]] = []

    class FakeRun:
        def log(self, values: dict[str, Any], step: int) -> None:
            logged.append((step, values))

        def finish(self) -> None:
            logged.append((-1, {}))

    def init(**options: Any) -> FakeRun:
        started.append(options)
        return FakeRun()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Image=lambda path: path))
    run(Regression(), tmp_path / "run", replace(SETTINGS, wandb="flows"))
    assert (started[0]["project"], started[0]["id"], started[0]["resume"]) == ("flows", "run", "allow")
    lines = [line for line in read_log(tmp_path / "run" / "log.jsonl") if "loss" in line]
    sent = [(step, values["train/loss"]) for step, values in logged if "train/loss" in values]
    assert sent == [(line["step"], line["loss"]) for line in lines]
    assert [step for step, values in logged if "samples" in values] == [6, 12]
    assert [step for step, values in logged if "heldout/heldout_loss" in values] == [5, 10, 12]
    assert logged[-1] == (-1, {})


def test_wandb_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wandb is not installed: pip install wandb"):
        run(Regression(), tmp_path, replace(SETTINGS, wandb="flows"))


def test_log_lines_are_json_with_step_and_loss(tmp_path: Path) -> None:
    run(Regression(), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert list((tmp_path / "tensorboard").iterdir())
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step_00000006.png", "step_00000012.png"]
