"""The latent cache: parts, the mark of a whole cache, ragged conditions, and damaged files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starflow.data.latent_cache import (
    CachedLatents,
    InMemoryLatents,
    LatentDataset,
    LatentEntry,
    finish_cache,
    latents_path,
    read_latents_header,
    states_path,
    write_latents,
    write_null,
    write_states,
)
from starflow.errors import UserError
from starflow.io.files import read_tensors

SHAPES = [(2, 3, 3), (2, 2, 4)]


def write(folder: Path, with_std: bool = True) -> list[torch.Tensor]:
    """Two buckets of ten pictures, in parts of four; two conditions of five tokens."""
    means, pictures, places = [], [], []
    for bucket, shape in enumerate(SHAPES):
        mean = torch.randn(10, *shape).half()
        means.append(mean)
        for start in range(0, 10, 4):
            piece, part = mean[start : start + 4], bucket * 3 + start // 4
            numbers = torch.arange(start, start + len(piece)) + 10 * bucket
            write_latents(folder, part, piece, piece.abs() if with_std else None, numbers, [("broken", "why")])
            places += [(part, row) for row in range(len(piece))]
        pictures += [
            LatentEntry(f"p{bucket}{i}", "ä caption", "heldout" if i == 3 else "train", i % 2, bucket)
            for i in range(10)
        ]
    write_states(folder, 0, torch.randn(2, 5, 6))
    write_null(folder, torch.zeros(5, 6))
    finish_cache(folder, pictures, places, {"image_size": 24, "side": 3})
    return means


@pytest.mark.parametrize("with_std", [True, False])
def test_there_and_back(tmp_path: Path, with_std: bool) -> None:
    means = write(tmp_path, with_std)
    cache = CachedLatents(tmp_path)
    assert [numbers.tolist() for numbers in cache.indices("heldout")] == [[3], [13]]
    assert [len(numbers) for numbers in cache.indices("train")] == [9, 9]
    for bucket, mean in enumerate(means):
        found, std = cache.posterior(torch.tensor([9, 0, 5]) + 10 * bucket)
        assert torch.equal(found, mean[[9, 0, 5]].float())
        assert (std is not None) == with_std
        if std is not None:
            assert torch.equal(std, found.abs())
    assert cache.entry(13) == LatentEntry("p13", "ä caption", "heldout", 1, 1)
    assert (len(cache), cache.side, cache.name(0)) == (20, 3, "p00")
    assert read_latents_header(tmp_path, 1)[1] == [("broken", "why")]


@settings(max_examples=25, derandomize=True)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=9), seed=st.integers(0, 99))
def test_conditions_lose_their_padding_and_get_it_back(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    states = torch.randn(len(lengths), 5, 3, generator=torch.Generator().manual_seed(seed)).half().float()
    for own, length in zip(states, lengths, strict=True):
        own[length:] = 0
    write_latents(folder, 0, torch.zeros(len(lengths), 1, 1, 1), None, torch.arange(len(lengths)))
    write_states(folder, 0, states)
    write_null(folder, torch.ones(5, 3))
    pictures = [LatentEntry(f"{i}", "", "train", i) for i in range(len(lengths))]
    finish_cache(folder, pictures, [(0, i) for i in range(len(lengths))], {"side": 1})
    cache = CachedLatents(folder)
    assert torch.equal(cache.conditions(torch.arange(len(lengths))), states)
    assert cache.null is not None
    assert torch.equal(cache.null, torch.ones(5, 3))
    kept = read_tensors(states_path(folder, 0))["states"]
    assert len(kept) == sum(lengths), "zeros at the end are not stored"


def test_an_unfinished_cache_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "info.json").unlink()
    with pytest.raises(UserError, match="no finished latent cache: run `starflow cache-latents`"):
        CachedLatents(tmp_path)


def test_a_missing_or_damaged_part_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    latents_path(tmp_path, 1).unlink()
    with pytest.raises(UserError, match=r"no such file: .*latents-00001\.safetensors"):
        CachedLatents(tmp_path).posterior(torch.tensor([5]))
    latents_path(tmp_path, 2).write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"latents-00002\.safetensors is damaged.*run the same command again"):
        read_latents_header(tmp_path, 2)


def test_a_cut_index_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    lines = (tmp_path / "index.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "index.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="delete it and encode again"):
        CachedLatents(tmp_path)


def test_latents_in_memory_are_those_on_disk(tmp_path: Path) -> None:
    """Both ways of holding latents answer alike; those in memory are of one bucket."""
    mean, states, null = torch.randn(6, 2, 3, 3).half(), torch.randn(2, 5, 6).half(), torch.zeros(5, 6)
    entries = [LatentEntry(f"{i}", "", "heldout" if i % 3 == 0 else "train", i % 2) for i in range(6)]
    for std in (mean.abs(), None):
        memory = InMemoryLatents(mean, std, states, null, entries, {})
        folder = tmp_path / str(std is None)
        write_latents(folder, 0, mean, std, torch.arange(6))
        write_states(folder, 0, states)
        write_null(folder, null)
        finish_cache(folder, entries, [(0, row) for row in range(6)], {"side": 3})
        disk: LatentDataset = CachedLatents(folder)
        some = torch.tensor([4, 1, 3])
        assert memory.side == disk.side
        assert memory.name(4) == disk.name(4) == "4"
        for split, expected in (("train", [1, 2, 4, 5]), ("heldout", [0, 3])):
            assert [own.tolist() for own in memory.indices(split)] == [expected]
            assert [own.tolist() for own in disk.indices(split)] == [expected]
        assert torch.equal(memory.conditions(some), disk.conditions(some))
        for ours, theirs in zip(memory.posterior(some), disk.posterior(some), strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or theirs is None or torch.equal(ours, theirs)
