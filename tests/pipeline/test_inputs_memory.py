"""What a call needs grows with what is asked for, and is held against what is free."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from starflow import STARFlow
from starflow.errors import UserError
from starflow.flow.config import STARFlowConfig
from starflow.latents import AutoencoderSpec
from starflow.pipeline import inputs
from starflow.pipeline.inputs import call_bytes, check_memory, free_bytes

FLOW = STARFlow(STARFlowConfig(4, 8, 64, num_blocks=2, layers_per_block=1))
SPEC = AutoencoderSpec("diffusers_kl", 4, 8)


def test_more_pictures_and_pixels_need_more_and_each_way_out_less() -> None:
    needed = call_bytes(FLOW, (4, 64, 64), 2, "network", SPEC, None)
    assert call_bytes(FLOW, (4, 64, 64), 4, "network", SPEC, None) > needed
    assert call_bytes(FLOW, (4, 128, 64), 2, "network", SPEC, None) > needed
    assert call_bytes(FLOW, (4, 64, 64), 2, "network", SPEC, 16) < needed
    pixels = dataclasses.replace(SPEC, kind="pixels")
    assert call_bytes(FLOW, (4, 64, 64), 2, "bfloat16", pixels, None) < call_bytes(
        FLOW, (4, 64, 64), 2, "network", pixels, None
    )


def test_what_is_free_is_the_lesser_of_system_and_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   5000 kB\n")
    monkeypatch.setattr(inputs, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(inputs, "CGROUPS", tmp_path)
    assert free_bytes(cpu) == 5000 * 1024
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(cpu) == 5000 * 1024
    (tmp_path / "memory.max").write_text("3000000\n")
    assert free_bytes(cpu) == 2_000_000
    monkeypatch.setattr(inputs, "MEMINFO", tmp_path / "nowhere")
    assert free_bytes(cpu) is None
    check_memory(FLOW, (4, 2**20, 2**20), 1, "network", SPEC, None)  # what cannot be asked refuses nothing


def test_what_does_not_fit_names_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = call_bytes(FLOW, (4, 16, 8), 4, "network", SPEC, None)
    monkeypatch.setattr(inputs, "free_bytes", lambda device: needed)
    check_memory(FLOW, (4, 16, 8), 4, "network", SPEC, None)
    monkeypatch.setattr(inputs, "free_bytes", lambda device: needed - 1)
    with pytest.raises(UserError, match=r"^4 at once of 64x128 pixels need about .* are free on cpu: use .* or tile$"):
        check_memory(FLOW, (4, 16, 8), 4, "network", SPEC, None)
