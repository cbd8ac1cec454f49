"""Conversion writes what loads as the same model, tells its progress, and looks for room before it writes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from starflow import STARFlow, load_published
from starflow.errors import UserError
from starflow.flow.config import PRESETS, STARFlowConfig, config_from_dict, config_to_dict
from starflow.io import weights
from starflow.published.checkpoint import constructor_options, open_published
from starflow.published.convert import RELEASES, convert_flow
from tests.registry import randomised

CONFIG = STARFlowConfig(in_channels=2, img_size=4, channels=48, head_dim=24, num_blocks=2, layers_per_block=(1, 2))
OPTIONS = config_to_dict(CONFIG)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "published.pth"
    torch.save(randomised(CONFIG, 0).state_dict(), path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_loads_as_the_model(file: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    told: list[tuple[int, int]] = []
    size = convert_flow(
        open_published(file, OPTIONS), tmp_path / "model", dtype, shard_bytes=20_000,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert len(weights.weight_files(tmp_path / "model")) > 2
    converted, expected = STARFlow.from_pretrained(tmp_path / "model"), load_published(file, OPTIONS).to(dtype)
    assert converted.config == CONFIG
    for name, tensor in converted.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    assert size == sum(tensor.nbytes for tensor in converted.state_dict().values())
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (size, size)


def test_without_room_on_the_disk_nothing_is_written(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Full)
    with pytest.raises(UserError, match=r"published\.pth in float32 takes .* GB are free there: make room"):
        convert_flow(open_published(file, OPTIONS), tmp_path / "model", torch.float32)
    assert not (tmp_path / "model").exists()


def test_releases_are_the_presets_that_they_name() -> None:
    for release in RELEASES.values():
        options = constructor_options(release.options)
        assert config_from_dict({**options, "txt_dim": 2048}) == PRESETS[release.preset].config
        assert release.file.endswith(".pth")
        assert release.terms
