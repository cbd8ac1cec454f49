"""Configs check themselves, read back, and presets have the sizes that their sources state."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from starflow.errors import UserError
from starflow.flow.config import (
    KINDS,
    PRESETS,
    ModelConfig,
    STARFlowConfig,
    TarFlowConfig,
    config_from_dict,
    config_to_dict,
    preset,
)
from starflow.flow.model import build
from tests.registry import configs


@settings(max_examples=60, derandomize=True)
@given(configs())
def test_a_config_reads_back_as_it_was(config: ModelConfig) -> None:
    assert config_from_dict(config_to_dict(config)) == config


BASE: dict[str, Any] = {"in_channels": 4, "img_size": 8, "channels": 64, "num_blocks": 3, "layers_per_block": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "img_size 8 is no multiple of patch_size 3"),
        ({"channels": 96}, "width 96 is no multiple of head_dim 64"),
        ({"top_block_channels": 96}, "width 96 is no multiple of head_dim 64"),
        ({"num_heads": 3, "num_kv_heads": 2}, "num_heads 3 is no multiple of num_kv_heads 2"),
        ({"layers_per_block": [1, 2]}, "layers_per_block has 2 numbers for num_blocks 3"),
        ({"layers_per_block": [1, 0, 2]}, "layers_per_block holds 0, expected at least 1"),
        ({"mlp_hidden": [1]}, "mlp_hidden has 1 numbers for num_blocks 3"),
        ({"in_channels": 0}, "in_channels is 0, expected at least 1"),
        ({"soft_clip": -1.0}, "soft_clip is -1.0, expected at least 0"),
        ({"soft_clip": float("nan")}, "soft_clip is nan, expected at least 0"),
        ({"txt_size": 3}, "txt_dim is 0 with txt_size 3"),
        ({"head_dim": 6, "num_heads": 2}, "head_dim is 6, expected a multiple of 4 from 4 up"),
        ({"head_dim": 8, "txt_size": 1, "txt_dim": 2}, "head_dim is 8, expected a multiple of 4 from 16 up"),
        ({"seq_order": "up"}, "'seq_order' is 'up', expected one of 'L2R', 'R2L'"),
        ({"chanels": 64}, "unknown key 'chanels': did you mean 'channels'?"),
        ({"kind": "glow"}, "the kind of model is 'glow', expected one of 'starflow', 'tarflow'"),
    ],
)
def test_what_no_model_can_have_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        config_from_dict({**BASE, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 96}, "width 96 is no multiple of head_dim 64"),
        ({"num_classes": -1}, "num_classes is -1, expected at least 0"),
        ({"patch_size": 3}, "img_size 8 is no multiple of patch_size 3"),
    ],
)
def test_tarflow_configs_check_themselves_too(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        config_from_dict({**BASE, "patch_size": 2, "kind": "tarflow", **changes})


def test_the_width_of_the_last_block_is_its_own() -> None:
    config = STARFlowConfig(**BASE, top_block_channels=128)
    assert [config.width(block) for block in range(3)] == [64, 64, 128]
    assert [config.heads(block) for block in range(3)] == [1, 1, 2]
    assert [config.hidden(block) for block in range(3)] == [256, 256, 512]


def test_the_condition_is_seen_by_the_last_block_or_by_all() -> None:
    for top_only, seen in ((True, [False, False, True]), (False, [True] * 3)):
        config = STARFlowConfig(**BASE, txt_size=1, txt_dim=2, cond_top_only=top_only)
        assert [config.conditioned(block) for block in range(3)] == seen
    assert not any(STARFlowConfig(**BASE, cond_top_only=False).conditioned(block) for block in range(3))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("starflow-t2i-3b", 3.8e9), ("starflow-xl", 1.4e9), ("starflow-xl-p2", 1.4e9)],
)
def test_presets_have_the_published_sizes(name: str, parameters: float) -> None:
    with torch.device("meta"):
        model = build(preset(name).config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.03)


def test_every_preset_builds_and_says_where_it_is_from() -> None:
    for name, known in PRESETS.items():
        assert isinstance(known.config, tuple(KINDS.values())), name
        assert "arXiv" in known.source
    assert isinstance(preset("tarflow-afhq-256").config, TarFlowConfig)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match="no preset 'starflow-xxl': did you mean 'starflow-xl'"):
        preset("starflow-xxl")
