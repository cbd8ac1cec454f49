"""The cache that a flow trains from: latents and condition tokens, encoded once.

A cache is a folder:

- `latents-XXXXX.safetensors`: parts of `mean` (n, C, h, w) in float16 and, where the autoencoder has a posterior, its
  `std`, all of one aspect bucket. `numbers` (n,) are the images' indices in the data set that was encoded, and the
  header names those that could not be read. The flow's noise of 0.2 or more makes float16's rounding (5e-4 of a value)
  irrelevant.
- `states-XXXXX.safetensors`: parts of the distinct conditions: `states` (tokens, D) float16 without the zeros that
  pad a caption to S tokens, and `ends` (m,), where each one ends.
- `null.safetensors`: the null condition (S, D).
- `rows.safetensors`: of every image its part, its row there, its condition, its bucket and whether it is held out.
- `index.jsonl`: a line an image: name, caption, split.
- `info.json`: what encoded it, and what it came to; written last, so its presence means that the cache is complete.

Files are mapped, not read: what a batch needs comes from the disk or the system's cache of it, which the processes of
a host share.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from starflow.errors import UserError
from starflow.io.files import JsonLines, read_json, read_tensors, write_json, write_tensors, write_text

PART_SIZE = 1024
"""Images, or conditions, per part: a killed run encodes at most so many again a process."""

ROW_COLUMNS = ("part", "row", "condition", "bucket", "heldout")
"""What `rows.safetensors` holds of every image, a tensor each."""


@dataclass(frozen=True)
class LatentEntry:
    """What the cache says of an image beside its latent.

    Attributes:
        name: unique id within the data set.
        caption: its caption; empty for none.
        split: "train" or "heldout".
        condition: row of its condition tokens among the distinct ones.
        bucket: number of its aspect bucket.
    """

    name: str
    caption: str
    split: str
    condition: int
    bucket: int = 0


class LatentDataset(Protocol):
    """Encoded images by index, as training reads them."""

    @property
    def null(self) -> Tensor | None:
        """The null condition (S, D), or None without conditions."""
        ...

    @property
    def side(self) -> int:
        """Side of a square latent of the buckets' area, latent pixels."""
        ...

    def indices(self, split: str) -> list[Tensor]:
        """Indices of the images of one split ("train" or "heldout"), a tensor a bucket, ascending."""
        ...

    def posterior(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation (or None) of latents of one bucket, (B, C, h, w) float32."""
        ...

    def conditions(self, indices: Tensor) -> Tensor:
        """Condition tokens (B, S, D), float32; only where there are conditions."""
        ...

    def name(self, index: int) -> str:
        """Name of an image, for messages."""
        ...


@dataclass
class InMemoryLatents:
    """A `LatentDataset` in memory, of one bucket.

    >>> entries = [LatentEntry("a", "a cat", "train", 0), LatentEntry("b", "a dog", "heldout", 1)]
    >>> mean, states = torch.zeros(2, 4, 8, 8), torch.zeros(2, 77, 16)
    >>> latents = InMemoryLatents(mean, None, states, states[0], entries, {})
    >>> latents.indices("heldout"), latents.conditions(torch.tensor([1])).shape
    ([tensor([1])], torch.Size([1, 77, 16]))
    """

    mean: Tensor
    """(N, C, h, w) float16."""
    std: Tensor | None
    """(N, C, h, w) float16 standard deviation of the posterior, or None where there is no posterior."""
    states: Tensor | None
    """(M, S, D) float16 condition tokens, or None without conditions."""
    null: Tensor | None
    """(S, D) null condition."""
    entries: list[LatentEntry]
    info: dict[str, Any]

    @property
    def side(self) -> int:
        return self.mean.shape[-1]

    def indices(self, split: str) -> list[Tensor]:
        found = [i for i, entry in enumerate(self.entries) if entry.split == split]
        return [torch.tensor(found, dtype=torch.long, device="cpu")]

    def posterior(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.mean[indices].float(), None if self.std is None else self.std[indices].float()

    def conditions(self, indices: Tensor) -> Tensor:
        assert self.states is not None
        rows = [self.entries[i].condition for i in indices.tolist()]
        return self.states[torch.tensor(rows, dtype=torch.long, device="cpu")].float()

    def name(self, index: int) -> str:
        return self.entries[index].name


class CachedLatents:
    """A `LatentDataset` over a complete cache on disk; its files are mapped into memory."""

    def __init__(self, folder: Path) -> None:
        """Open the cache in `folder`.

        Raises:
            UserError: unfinished or damaged; the parts are checked when they are read.
        """
        if not is_complete(folder):
            raise UserError(f"{folder} holds no finished latent cache: run `starflow cache-latents` on the recipe")
        self.folder, self.info = folder, read_json(folder / "info.json")
        self._rows = read_tensors(folder / "rows.safetensors")
        self._lines = JsonLines(folder / "index.jsonl")
        self._latents: dict[int, dict[str, Tensor]] = {}
        self._states: dict[int, dict[str, Tensor]] = {}
        counts = {name: len(tensor) for name, tensor in self._rows.items()} | {"index": len(self._lines)}
        if set(counts) != {*ROW_COLUMNS, "index"} or len(set(counts.values())) != 1:
            raise UserError(f"{folder} holds {counts} rows, expected as many of each: delete it and encode again")

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def side(self) -> int:
        return int(self.info["side"])

    @cached_property
    def null(self) -> Tensor | None:
        path = self.folder / "null.safetensors"
        return read_tensors(path)["null"].float() if path.is_file() else None

    def indices(self, split: str) -> list[Tensor]:
        kept = self._rows["heldout"] == int(split == "heldout")
        count = int(self._rows["bucket"].max()) + 1 if len(self) else 1
        return [(kept & (self._rows["bucket"] == bucket)).nonzero()[:, 0] for bucket in range(count)]

    def posterior(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        locations = [(int(self._rows["part"][i]), int(self._rows["row"][i])) for i in indices.tolist()]
        mean = torch.stack([self._part(part)["mean"][row] for part, row in locations]).float()
        if "std" not in self._part(locations[0][0]):
            return mean, None
        return mean, torch.stack([self._part(part)["std"][row] for part, row in locations]).float()

    def conditions(self, indices: Tensor) -> Tensor:
        assert self.null is not None
        tokens = torch.zeros(len(indices), *self.null.shape, dtype=torch.float32, device="cpu")
        for own, row in zip(tokens, self._rows["condition"][indices].tolist(), strict=True):
            found = self._condition(row)
            own[: len(found)] = found
        return tokens

    def _condition(self, row: int) -> Tensor:
        part, own = divmod(row, PART_SIZE)
        if part not in self._states:
            self._states[part] = read_tensors(states_path(self.folder, part))
        held = self._states[part]
        start = int(held["ends"][own - 1]) if own else 0
        return held["states"][start : int(held["ends"][own])]

    def name(self, index: int) -> str:
        return str(self._lines[index]["name"])

    def entry(self, index: int) -> LatentEntry:
        """What the cache says of an image beside its latent."""
        line, rows = self._lines[index], self._rows
        condition, bucket = int(rows["condition"][index]), int(rows["bucket"][index])
        return LatentEntry(line["name"], line["caption"], line["split"], condition, bucket)

    def _part(self, part: int) -> dict[str, Tensor]:
        """Open a part's tensors: safetensors maps the file, so that nothing is read before it is asked for."""
        if part not in self._latents:
            self._latents[part] = read_tensors(latents_path(self.folder, part))
        return self._latents[part]


def latents_path(folder: Path, part: int) -> Path:
    """Path of the file that holds one part of the latents."""
    return folder / f"latents-{part:05d}.safetensors"


def states_path(folder: Path, part: int) -> Path:
    """Path of the file that holds one part of the conditions."""
    return folder / f"states-{part:05d}.safetensors"


def write_latents(
    folder: Path,
    part: int,
    mean: Tensor,
    std: Tensor | None,
    indices: Tensor,
    skipped: Sequence[tuple[str, str]] = (),
) -> None:
    """Write one part of the latents, rounded to float16.

    Args:
        folder: of the cache.
        part: its number.
        mean: (n, C, h, w), of one bucket.
        std: standard deviation of the posterior, of the same shape, or None.
        indices: (n,), of the images in the data set that was encoded.
        skipped: (name, reason) of the part's images that could not be read.
    """
    tensors = {"mean": mean.to(torch.float16), "numbers": indices}
    if std is not None:
        tensors["std"] = std.to(torch.float16)
    write_tensors(latents_path(folder, part), tensors, {"skipped": json.dumps(list(skipped))})


def read_latents_header(folder: Path, part: int) -> tuple[Tensor, list[tuple[str, str]]]:
    """Read the indices (n,) of a part's images, and (name, reason) of what was skipped, without its latents.

    Raises:
        UserError: damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = latents_path(folder, part)
    try:
        with safe_open(path, "pt") as file:
            skipped = json.loads((file.metadata() or {}).get("skipped", "[]"))
            return file.get_tensor("numbers"), [(name, reason) for name, reason in skipped]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run the same command again") from None


def write_states(folder: Path, part: int, states: Tensor) -> None:
    """Write one part of the conditions, tokens (m, S, D), each without the zero tokens at its end."""
    held = [own[: int((own != 0).any(-1).nonzero().max()) + 1] if own.any() else own[:0] for own in states]
    ends = torch.tensor([len(own) for own in held], dtype=torch.long, device="cpu").cumsum(0)
    write_tensors(states_path(folder, part), {"states": torch.cat(held).to(torch.float16), "ends": ends})


def write_null(folder: Path, null: Tensor) -> None:
    """Write the (S, D) null condition."""
    write_tensors(folder / "null.safetensors", {"null": null.to(torch.float16)})


def finish_cache(
    folder: Path, entries: Iterable[LatentEntry], locations: Sequence[tuple[int, int]], info: Mapping[str, Any]
) -> None:
    """Write the index and then `info.json`, which marks the cache as complete; `locations` are (part, row in it)."""
    lines, rows = [], []
    for entry, location in zip(entries, locations, strict=True):
        line = {"name": entry.name, "caption": entry.caption, "split": entry.split}
        lines.append(json.dumps(line, ensure_ascii=False))
        rows.append((*location, entry.condition, entry.bucket, int(entry.split == "heldout")))
    columns = torch.tensor(rows, dtype=torch.int32, device="cpu").reshape(len(rows), len(ROW_COLUMNS)).T
    write_tensors(folder / "rows.safetensors", dict(zip(ROW_COLUMNS, columns, strict=True)))
    write_text(folder / "index.jsonl", "".join(f"{line}\n" for line in lines))
    write_json(folder / "info.json", dict(info))


def is_complete(folder: Path) -> bool:
    """Whether a finished cache lies in `folder`."""
    return (folder / "info.json").is_file()
