"""Shards: any split reads back the same, what is wrong is named, and an interruption leaves what was there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from starflow import shards
from starflow.errors import UserError

TENSORS = {f"layer.{number}.weight": torch.randn(number + 1, 4) for number in range(6)}
"""16 to 96 bytes each, 336 in all."""


def write(folder: Path, limit: int = 100) -> Path:
    shards.write(folder, TENSORS.items(), limit)
    return folder


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8), limit=st.integers(1, 400))
def test_any_split_reads_back(tmp_path: Path, sizes: list[int], limit: int) -> None:
    """Over the remains of the last example, which must leave nothing behind."""
    tensors = {f"t{number}": torch.randn(size).to(torch.bfloat16) for number, size in enumerate(sizes)}
    shards.write(tmp_path, tensors.items(), limit)
    found = shards.read(tmp_path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    for path in shards.weight_files(tmp_path):
        held = sum(tensor.nbytes for name, tensor in tensors.items() if name in _names(path))
        assert held <= limit or len(_names(path)) == 1
    on_disk = {path.name for path in tmp_path.iterdir()}
    listed = {path.name for path in shards.weight_files(tmp_path)}
    index = {shards.index_name()} if len(listed) > 1 else set()
    assert on_disk == listed | index | {shards.CHECKSUMS}


def _names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return list(file.keys())


def test_the_index_is_the_one_that_others_read(tmp_path: Path) -> None:
    """transformers' reader takes the layout for its own."""
    from transformers.utils.hub import get_checkpoint_shard_files

    write(tmp_path)
    found, metadata = get_checkpoint_shard_files(str(tmp_path), str(tmp_path / shards.index_name()))
    assert [Path(path) for path in found] == shards.weight_files(tmp_path)
    assert metadata["total_size"] == 336


def test_tensors_may_be_made_one_by_one(tmp_path: Path) -> None:
    """A shard is on the disk before the tensor after it is asked for."""
    seen = []

    def made() -> object:
        for name, tensor in TENSORS.items():
            seen.append(len(list(tmp_path.glob(".model-*.tmp"))))
            yield name, tensor

    shards.write(tmp_path, made(), 100)  # type: ignore[arg-type]
    assert seen == sorted(seen)
    assert seen[-1] >= 2


def test_an_error_on_the_way_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError), shards.ShardWriter(tmp_path, 10) as writer:
        writer.add("one", torch.ones(9))
        writer.add("two", torch.ones(9))
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("limit", [10_000, 100])
@pytest.mark.parametrize("length", [0, 5, 100, -1, +1])
def test_a_file_of_another_size_is_named(tmp_path: Path, limit: int, length: int) -> None:
    """With and without checksums beside it."""
    write(tmp_path, limit)
    wrong = shards.weight_files(tmp_path)[-1]
    data = wrong.read_bytes()
    wrong.write_bytes(data + b"x" if length == 1 else data[:length])
    with pytest.raises(UserError, match=rf"{wrong.name} has \d+ bytes, checksums.json says {len(data)}: fetch"):
        shards.read(tmp_path)
    (tmp_path / shards.CHECKSUMS).unlink()
    with pytest.raises(UserError, match=rf"{wrong.name} is not a whole safetensors file"):
        shards.read(tmp_path)


def test_a_shard_that_is_missing_or_anothers_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    first, second, *_ = shards.weight_files(tmp_path)
    (tmp_path / shards.CHECKSUMS).unlink()
    second.write_bytes(first.read_bytes())
    with pytest.raises(UserError, match=rf"{second.name} does not hold the tensors .* missing \(.* extra \("):
        shards.read(tmp_path)
    second.unlink()
    with pytest.raises(UserError, match=rf"lacks 1 of \d shards \({second.name}\)"):
        shards.read(tmp_path)
    for path in shards.weight_files(write(tmp_path)):
        path.unlink()
    with pytest.raises(UserError, match="no such file: .*model-00001"):
        shards.read(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [("{}", "no 'weight_map'"), ('{"weight_map": {"a": "../b"}}', "names '../b'"), ("{", "cannot read")],
)
def test_a_damaged_index(tmp_path: Path, content: str, said: str) -> None:
    write(tmp_path)
    (tmp_path / shards.index_name()).write_text(content)
    with pytest.raises(UserError, match=said):
        shards.read(tmp_path)


@pytest.mark.parametrize("content", ["[]", '{"model.safetensors": 3}', '{"../x": {"bytes": 1, "sha256": ""}}'])
def test_damaged_checksums(tmp_path: Path, content: str) -> None:
    write(tmp_path)
    (tmp_path / shards.CHECKSUMS).write_text(content)
    with pytest.raises(UserError, match="checksums"):
        shards.read(tmp_path)


def test_checksums_are_the_files_own(tmp_path: Path) -> None:
    import hashlib

    write(tmp_path)
    values = json.loads((tmp_path / shards.CHECKSUMS).read_text())
    assert values == {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in shards.weight_files(tmp_path)
    }


def test_nothing_there(tmp_path: Path) -> None:
    assert not shards.has_weights(tmp_path)
    with pytest.raises(UserError, match=r"no such file: .*model.safetensors; the model is not whole"):
        shards.read(tmp_path)
