"""The latent cache: parts, the mark of a whole cache, and damaged files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from starflow.data import latent_cache
from starflow.data.latent_cache import CachedPicture, finish_cache, read_cache, write_conditions, write_part
from starflow.errors import UserError


def write(folder: Path, count: int, monkeypatch: pytest.MonkeyPatch, with_std: bool = True) -> torch.Tensor:
    monkeypatch.setattr(latent_cache, "PART", 4)
    mean = torch.randn(count, 2, 3, 3).half()
    for part, start in enumerate(range(0, count, 4)):
        piece = mean[start : start + 4]
        write_part(folder, part, piece, piece.abs() if with_std else None)
    write_conditions(folder, torch.randn(2, 5, 6), torch.zeros(5, 6))
    pictures = [CachedPicture(f"p{i}", "ä caption", "heldout" if i == 3 else "train", i % 2) for i in range(count)]
    finish_cache(folder, pictures, {"image_size": 24})
    return mean


@pytest.mark.parametrize("with_std", [True, False])
def test_there_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_std: bool) -> None:
    mean = write(tmp_path, 10, monkeypatch, with_std)
    cache = read_cache(tmp_path)
    assert torch.equal(cache.mean, mean)
    assert (cache.std is not None) == with_std
    assert cache.split("heldout").tolist() == [3]
    assert cache.pictures[3] == CachedPicture("p3", "ä caption", "heldout", 1)
    assert cache.info["image_size"] == 24


def test_an_unfinished_cache_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 10, monkeypatch)
    (tmp_path / "info.json").unlink()
    with pytest.raises(UserError, match="no finished latent cache: run `starflow cache-latents`"):
        read_cache(tmp_path)


def test_a_missing_part_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 10, monkeypatch)
    latent_cache.part_path(tmp_path, 1).unlink()
    with pytest.raises(UserError, match=r"no such file: .*latents-00001\.safetensors"):
        read_cache(tmp_path)
