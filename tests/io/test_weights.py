"""Shards: any split reads back the same, what is wrong is named, and an interruption leaves what was there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from starflow.errors import UserError
from starflow.io import weights
from starflow.io.files import write_tensors

TENSORS = {f"layer.{number}.weight": torch.randn(number + 1, 4) for number in range(6)}
"""16 to 96 bytes each, 336 in all."""


def write(folder: Path, limit: int = 100) -> Path:
    weights.write(folder, TENSORS.items(), limit)
    return folder


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8), limit=st.integers(1, 400))
def test_any_split_reads_back(tmp_path: Path, sizes: list[int], limit: int) -> None:
    """Over the remains of the last example, which must leave nothing behind."""
    tensors = {f"t{number}": torch.randn(size).to(torch.bfloat16) for number, size in enumerate(sizes)}
    weights.write(tmp_path, tensors.items(), limit)
    found = weights.read(tmp_path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    for path in weights.weight_files(tmp_path):
        held = sum(tensor.nbytes for name, tensor in tensors.items() if name in _names(path))
        assert held <= limit or len(_names(path)) == 1
    on_disk = {path.name for path in tmp_path.iterdir()}
    listed = {path.name for path in weights.weight_files(tmp_path)}
    index = {weights.index_file_name()} if len(listed) > 1 else set()
    assert on_disk == listed | index | {weights.CHECKSUMS}


def _names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return list(file.keys())


def test_the_index_is_the_one_that_others_read(tmp_path: Path) -> None:
    """transformers' reader takes the layout for its own."""
    from transformers.utils.hub import get_checkpoint_shard_files

    write(tmp_path)
    found, metadata = get_checkpoint_shard_files(str(tmp_path), str(tmp_path / weights.index_file_name()))
    assert [Path(path) for path in found] == weights.weight_files(tmp_path)
    assert metadata["total_size"] == 336


def test_tensors_may_be_made_one_by_one(tmp_path: Path) -> None:
    """A shard is on the disk before the tensor after it is asked for."""
    seen = []

    def made() -> object:
        for name, tensor in TENSORS.items():
            seen.append(len(list(tmp_path.glob(".model-*.tmp"))))
            yield name, tensor

    weights.write(tmp_path, made(), 100)  # type: ignore[arg-type]
    assert seen == sorted(seen)
    assert seen[-1] >= 2


def test_an_error_on_the_way_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError), weights.ShardWriter(tmp_path, 10) as writer:
        writer.add("one", torch.ones(9))
        writer.add("two", torch.ones(9))
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("limit", [10_000, 100])
@pytest.mark.parametrize("length", [0, 5, 100, -1, +1])
def test_a_file_of_another_size_is_named(tmp_path: Path, limit: int, length: int) -> None:
    write(tmp_path, limit)
    wrong = weights.weight_files(tmp_path)[-1]
    data = wrong.read_bytes()
    wrong.write_bytes(data + b"x" if length == 1 else data[:length])
    with pytest.raises(UserError, match=rf"{wrong.name} is not a whole safetensors file .*: fetch or write it again"):
        weights.read(tmp_path)


def test_a_whole_file_of_another_size_is_named(tmp_path: Path) -> None:
    write(tmp_path, 10_000)
    wrong = weights.weight_files(tmp_path)[0]
    before = wrong.stat().st_size
    write_tensors(wrong, {"other": torch.zeros(3)})
    now = wrong.stat().st_size
    with pytest.raises(
        UserError, match=rf"{wrong.name} has {now} bytes, checksums.json says {before}: .* if you changed"
    ):
        weights.read(tmp_path)


def test_a_shard_that_is_missing_or_anothers_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    first, second, *_ = weights.weight_files(tmp_path)
    (tmp_path / weights.CHECKSUMS).unlink()
    second.write_bytes(first.read_bytes())
    with pytest.raises(UserError, match=rf"{second.name} does not hold the tensors .* missing \(.* extra \("):
        weights.read(tmp_path)
    second.unlink()
    with pytest.raises(UserError, match=rf"lacks 1 of \d shards \({second.name}\)"):
        weights.read(tmp_path)
    for path in weights.weight_files(write(tmp_path)):
        path.unlink()
    with pytest.raises(UserError, match=r"lacks 4 of 4 shards \(model-00001"):
        weights.read(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [("{}", "no 'weight_map'"), ('{"weight_map": {"a": "../b"}}', "names '../b'"), ("{", "cannot read")],
)
def test_a_damaged_index(tmp_path: Path, content: str, said: str) -> None:
    write(tmp_path)
    (tmp_path / weights.index_file_name()).write_text(content)
    with pytest.raises(UserError, match=said):
        weights.read(tmp_path)


@pytest.mark.parametrize("content", ["[]", '{"model.safetensors": 3}', '{"../x": {"bytes": 1, "sha256": ""}}'])
def test_damaged_checksums(tmp_path: Path, content: str) -> None:
    write(tmp_path)
    (tmp_path / weights.CHECKSUMS).write_text(content)
    with pytest.raises(UserError, match="checksums"):
        weights.read(tmp_path)


def test_checksums_are_the_files_own(tmp_path: Path) -> None:
    import hashlib

    write(tmp_path)
    values = json.loads((tmp_path / weights.CHECKSUMS).read_text())
    assert values == {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in weights.weight_files(tmp_path)
    }


def test_files_that_another_library_wrote_are_checked_from_then_on(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", TENSORS)
    weights.write_checksums(tmp_path)
    assert weights.checksums(tmp_path).keys() == {"model.safetensors"}
    assert weights.read(tmp_path).keys() == TENSORS.keys()
    write_tensors(tmp_path / "model.safetensors", {"other": torch.zeros(3)})
    with pytest.raises(UserError, match=r"model.safetensors has \d+ bytes, checksums.json says \d+"):
        weights.read(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    assert not weights.has_weights(tmp_path)
    with pytest.raises(UserError, match=r"no such file: .*model.safetensors; the model is not whole"):
        weights.read(tmp_path)
