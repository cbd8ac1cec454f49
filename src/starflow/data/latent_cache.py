"""The cache that a flow trains from: latents and condition tokens, encoded once.

A folder:
- `latents-XXXXX.safetensors`: parts of `mean` (n, C, h, w) in float16 and, where the autoencoder has a posterior, its
  `std`; the flow's noise of 0.2 or more makes float16's rounding (5e-4 of a value) irrelevant.
- `conditions.safetensors`: `states` (M, S, D) float16, one entry a distinct caption or class, and `null` (S, D).
- `index.jsonl`: a line a picture: name, caption, split, condition (a row of `states`).
- `info.json`: what encoded it; written last, so its presence means that the cache is whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starflow.errors import UserError
from starflow.files import read_json, read_tensors, write_json, write_tensors, write_text

PART = 4096
"""Pictures per part: a killed run encodes at most this many again."""


@dataclass(frozen=True)
class CachedPicture:
    """One line of the index."""

    name: str
    caption: str
    split: str
    condition: int


@dataclass
class LatentCache:
    """A whole cache in memory."""

    mean: Tensor
    """(N, C, h, w) float16."""
    std: Tensor | None
    """(N, C, h, w) float16 posterior spread, or None."""
    states: Tensor | None
    """(M, S, D) float16 condition tokens, or None without conditions."""
    null: Tensor | None
    """(S, D) null condition."""
    pictures: list[CachedPicture]
    info: dict[str, Any]

    def split(self, split: str) -> Tensor:
        """Indices of the pictures of one split."""
        return torch.tensor([i for i, picture in enumerate(self.pictures) if picture.split == split], dtype=torch.long)


def part_path(folder: Path, part: int) -> Path:
    """File of one part of the latents."""
    return folder / f"latents-{part:05d}.safetensors"


def write_part(folder: Path, part: int, mean: Tensor, std: Tensor | None) -> None:
    """Write one part, rounding to float16."""
    tensors = {"mean": mean.to(torch.float16)}
    if std is not None:
        tensors["std"] = std.to(torch.float16)
    write_tensors(part_path(folder, part), tensors)


def write_conditions(folder: Path, states: Tensor, null: Tensor) -> None:
    """Write (M, S, D) condition tokens and the (S, D) null condition."""
    write_tensors(
        folder / "conditions.safetensors", {"states": states.to(torch.float16), "null": null.to(torch.float16)}
    )


def finish_cache(folder: Path, pictures: Iterable[CachedPicture], info: Mapping[str, Any]) -> None:
    """Write the index and then `info.json`, which marks the cache as whole."""
    lines = [
        json.dumps(
            {"name": p.name, "caption": p.caption, "split": p.split, "condition": p.condition}, ensure_ascii=False
        )
        for p in pictures
    ]
    write_text(folder / "index.jsonl", "\n".join(lines) + "\n")
    write_json(folder / "info.json", dict(info))


def is_whole(folder: Path) -> bool:
    """Whether a finished cache lies in `folder`."""
    return (folder / "info.json").is_file()


def read_cache(folder: Path) -> LatentCache:
    """Read a finished cache into memory.

    Raises:
        UserError: unfinished, damaged, or parts are missing.
    """
    if not is_whole(folder):
        raise UserError(f"{folder} holds no finished latent cache: run `starflow cache-latents` on the recipe")
    info = read_json(folder / "info.json")
    lines = (folder / "index.jsonl").read_text(encoding="utf-8").splitlines()
    pictures = [CachedPicture(**json.loads(line)) for line in lines]
    count = -(-len(pictures) // PART)
    parts = [read_tensors(part_path(folder, part)) for part in range(count)]
    mean = torch.cat([part["mean"] for part in parts])
    std = torch.cat([part["std"] for part in parts]) if all("std" in part for part in parts) else None
    if len(mean) != len(pictures):
        raise UserError(f"{folder} holds {len(mean)} latents for {len(pictures)} pictures: delete it and encode again")
    conditions = folder / "conditions.safetensors"
    tensors = read_tensors(conditions) if conditions.is_file() else {}
    return LatentCache(mean, std, tensors.get("states"), tensors.get("null"), pictures, info)
