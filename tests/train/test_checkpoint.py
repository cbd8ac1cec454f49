"""Checkpoints: the newest two, whole or not at all, and of one model only."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from starflow.errors import UserError
from starflow.io import files
from starflow.train import checkpoint, loop
from starflow.train.checkpoint import TrainState, checkpoints
from starflow.train.distributed import World
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


def test_what_killed_writes_left_is_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in (".step_00000004.tmp", ".step_00000002.old"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model_00000.safetensors").write_bytes(b"half")
    run(Regression(), tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000008", "step_00000012"]


def test_a_checkpoint_reaches_the_disk_before_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder and then the rename are synced, while the two before it are still there."""
    folder = tmp_path / "checkpoints"
    synced: list[tuple[bool, int]] = []

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            synced.append((os.path.samestat(os.fstat(handle), folder.stat()), len(checkpoints(folder))))

    monkeypatch.setattr(os, "fsync", fsync)
    run(Regression(), tmp_path)
    assert [of_parent for of_parent, _ in synced] == [False, True] * 3
    assert [count for of_parent, count in synced if of_parent] == [1, 2, 3]


class OtherProcess(World):
    """A world of two in which the other process sees the checkpoint of another step."""

    def all_reduce(self, values: Tensor) -> list[float]:
        own: list[float] = values.tolist()
        return [own[0] + 4, own[1] + 16]


def test_processes_that_see_other_checkpoints_do_not_start(tmp_path: Path) -> None:
    state = TrainState(Regression().model, SETTINGS, World())
    state.world = OtherProcess(rank=1, size=2)
    with pytest.raises(UserError, match="process 1 sees checkpoint 0 in .* on a file system that all hosts share"):
        loop._resume(tmp_path, state)
    run(Regression(), tmp_path, replace(SETTINGS, steps=4))
    assert loop._resume(tmp_path / "checkpoints", state).step == 4
