"""Checkpoints: the newest two, whole or not at all, and of one model only."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from starflow.errors import UserError
from starflow.io import files
from starflow.train import checkpoint
from starflow.train.checkpoint import checkpoints
from tests.train.regression import SETTINGS, Regression, losses, run


def test_the_two_newest_checkpoints_stay(tmp_path: Path) -> None:
    run(Regression(), tmp_path)
    names = [path.name for path in checkpoints(tmp_path / "checkpoints")]
    assert names == ["step_00000008", "step_00000012"]


def test_a_changed_model_is_refused(tmp_path: Path) -> None:
    run(Regression(), tmp_path)
    other = Regression()
    other.model = nn.Sequential(nn.Linear(3, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 1))
    with pytest.raises(UserError, match="belongs to another model"):
        run(other, tmp_path, replace(SETTINGS, steps=20))


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    run(Regression(), tmp_path)
    part = checkpoints(tmp_path / "checkpoints")[-1] / "model_00000.safetensors"
    part.write_bytes(part.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"step_00000012/model_00000\.safetensors is not a whole safetensors file"):
        run(Regression(), tmp_path, replace(SETTINGS, steps=20))


def test_a_damaged_write_leaves_the_old_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: the run ends with the name of the checkpoint that still stands, and a later one goes on from it."""
    write = files.write_tensors

    def full(path: Path, *rest: Any) -> None:
        if "step_00000008" in str(path) and path.name.startswith("exp_avg"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *rest)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(UserError, match=r"No space left on device\): the last checkpoint is still step_00000004"):
        run(Regression(), tmp_path / "full")
    assert [path.name for path in (tmp_path / "full" / "checkpoints").iterdir()] == ["step_00000004"]
    monkeypatch.undo()
    run(Regression(), tmp_path / "full")
    run(Regression(), tmp_path / "whole")
    assert losses(tmp_path / "full") == losses(tmp_path / "whole")
