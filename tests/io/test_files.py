"""Files are written whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from starflow.errors import UserError
from starflow.io import files


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "value.txt"
    files.write_text(path, "old")

    def fill_the_disk(temporary: Path) -> None:
        temporary.write_text("half of the ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        pytest.raises(UserError, match=r"cannot write .*value\.txt: No space left"),
        files.atomic_write(path) as temporary,
    ):
        fill_the_disk(temporary)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.txt"
    files.write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), files.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_real_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    path = tmp_path / "value.txt"
    files.write_text(path, "old")
    with pytest.raises(UserError, match="No space left"), files.atomic_write(path):
        full.write_text("x" * 100_000)
    assert path.read_text() == "old"


def test_tensors_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "a" / "t.safetensors"
    tensors = {"x": torch.arange(6).reshape(2, 3), "y": torch.ones(2, dtype=torch.bfloat16)}
    files.write_tensors(path, tensors)
    read = files.read_tensors(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], tensors[key]) for key in tensors)


def test_a_truncated_tensor_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    files.write_tensors(path, {"x": torch.arange(1000)})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"t\.safetensors is not a whole safetensors file"):
        files.read_tensors(path)


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("something")
    with pytest.raises(UserError, match="is a file, expected a folder"):
        files.check_output_folder(path)
    with pytest.raises(UserError, match="cannot write"):
        files.check_output_folder(path / "below")
    assert path.read_text() == "something"
