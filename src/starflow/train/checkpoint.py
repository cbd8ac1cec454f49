"""Checkpoints: a folder each, whole or not at all, the newest two kept; any layout reads any other's.

    checkpoints/step_00000200/model_00000.safetensors        weights that process 0 holds
                              average_00000.safetensors      their averages
                              exp_avg_00000.safetensors ..   the optimiser's moments
                              index.json                     progress, and of every tensor its shape and pieces

Every process writes the shards that it holds into a temporary folder; the main one adds the index and renames the
folder, so that a kill at any moment leaves the old checkpoints as they were. Random numbers and the data's order need
no state: they are functions of the seed and the step, so a resumed run repeats the uninterrupted one bit for bit.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starflow.config import from_dict
from starflow.errors import UserError
from starflow.io.files import read_json, write_json, write_tensors
from starflow.train.distributed import World, is_writer, local_shard, named_parameters, named_state, shard_start
from starflow.train.state import TrainState

INDEX_NAME = "index.json"

CHECKPOINTS_KEPT = 2


@dataclass
class TrainProgress:
    """How far a run has come."""

    step: int = 0
    """Updates done."""
    best: float | None = None
    """Lowest held-out loss of the averaged weights so far."""
    norm: float = 0.0
    """Running value of the gradient norm."""
    skipped: int = 0
    """Updates skipped for a gradient norm far above it."""


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step_*/{INDEX_NAME}"))


def save_checkpoint(folder: Path, progress: TrainProgress, state: TrainState) -> Path:
    """Write `folder/step_XXXXXXXX` and drop all but the newest two; collective.

    Raises:
        UserError: a process could not write; the old checkpoints are unchanged.
    """
    world = state.world
    target = folder / f"step_{progress.step:08d}"
    temporary = folder / f".step_{progress.step:08d}.tmp"
    with _all_or_none(world, target):
        if world.is_main:
            _remove_leftovers(folder)
            temporary.mkdir(parents=True)
    world.barrier()
    with _all_or_none(world, target):
        for part, tensors in _tensors_by_part(state).items():
            _write_part(temporary / f"{part}_{world.rank:05d}.safetensors", part, tensors, main=world.is_main)
    with _all_or_none(world, target):
        if world.is_main:
            index = {"progress": asdict(progress), "processes": world.size, "tensors": _index(temporary)}
            write_json(temporary / INDEX_NAME, index)
            _move_into_place(temporary, target)
    return target


@contextlib.contextmanager
def _all_or_none(world: World, target: Path) -> Iterator[None]:
    """Run a block that writes in every process; where one cannot, all stop, and each says so.

    Raises:
        UserError: the block failed here or elsewhere.
    """
    failure: Exception | None = None
    try:
        yield
    except (OSError, UserError) as error:
        failure = error
    if world.any_process(failure is not None):
        if world.is_main:
            shutil.rmtree(target.with_name(f".{target.name}.tmp"), ignore_errors=True)
        raise UserError(
            f"cannot write checkpoint {target} ({failure or 'another process says why'}): "
            f"{newest_checkpoint_text(target.parent)}; make room, then run the same command again"
        )


def newest_checkpoint_text(folder: Path) -> str:
    """Words for a message: the checkpoint that a run would go on from."""
    kept = [path.name for path in checkpoints(folder)]
    return f"the last checkpoint is still {kept[-1]}" if kept else "there is no checkpoint yet"


def _tensors_by_part(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """Everything that a checkpoint holds, by part (model, average, a moment) and name."""
    parts = {"model": named_state(state.model), "average": state.average.state}
    for name, parameter in named_parameters(state.model).items():
        for kind, value in state.optimiser.state.get(parameter, {}).items():
            parts.setdefault(kind, {})[name] = value
    return parts


def _write_part(path: Path, part: str, tensors: Mapping[str, Tensor], *, main: bool) -> None:
    """Write one file of this process's shards; the header says where each begins, and the full shape."""
    own = {name: tensor for name, tensor in tensors.items() if is_writer(tensor, main=main)}
    if own:
        places = {name: f"{shard_start(tensor)} {list(tensor.shape)}" for name, tensor in own.items()}
        write_tensors(path, {name: local_shard(tensor) for name, tensor in own.items()}, {"part": part, **places})


def _index(folder: Path) -> dict[str, Any]:
    """Every tensor's shape and its pieces, (file, first row), read back from the files' headers."""
    tensors: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with _open_tensors(path) as file:
            header = file.metadata()
            for name in sorted(header.keys() - {"part"}):
                first, _, shape = header[name].partition(" ")
                sizes = [int(size) for size in shape.strip("[]").split(",") if size.strip()]
                entry = tensors.setdefault(f"{header['part']}/{name}", {"shape": sizes, "pieces": []})
                entry["pieces"].append([path.name, int(first)])
    return tensors


def _move_into_place(temporary: Path, target: Path) -> None:
    """Rename the folder, sync the rename to the disk, and only then delete old checkpoints."""
    _sync(temporary)
    if target.exists():  # a run that repeats the step of a checkpoint from before it was damaged
        target.rename(target.with_name(f".{target.name}.old"))
    temporary.rename(target)
    _sync(target.parent)
    for old in checkpoints(target.parent)[:-CHECKPOINTS_KEPT]:
        old.rename(old.with_name(f".{old.name}.old"))  # never half a folder under a checkpoint's name
    _remove_leftovers(target.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_leftovers(folder: Path) -> None:
    """Delete what killed writes and half-done deletions left."""
    for left in [*folder.glob(".step_*.tmp"), *folder.glob(".step_*.old")]:
        shutil.rmtree(left)


def load_checkpoint(path: Path, state: TrainState) -> TrainProgress:
    """Restore everything that `save_checkpoint` wrote, in any layout; not collective.

    Raises:
        UserError: a file is damaged, or belongs to a model of another shape.
    """
    index = read_json(path / INDEX_NAME)
    tensors: dict[str, Any] = index["tensors"]
    _make_moments(state, tensors.keys())
    expected = {f"{part}/{name}": t for part, named in _tensors_by_part(state).items() for name, t in named.items()}
    _check_same_shapes(path, expected, tensors)
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        for name, tensor in expected.items():
            for file, first in tensors[name]["pieces"]:
                if file not in files:
                    files[file] = stack.enter_context(_open_tensors(path / file))
                _read_overlap(files[file], name.partition("/")[2], first, tensor)
    return from_dict(TrainProgress, index["progress"])


def _make_moments(state: TrainState, stored: Collection[str]) -> None:
    """Give parameters the optimiser's state that was stored for them, to be filled."""
    for name, parameter in named_parameters(state.model).items():
        if f"exp_avg/{name}" in stored:
            state.optimiser.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=local_shard(parameter).device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }


def _read_overlap(file: Any, name: str, first: int, tensor: Tensor) -> None:
    """Copy the rows that a stored piece, which begins at row `first`, shares with this process's."""
    piece, own = file.get_slice(name), local_shard(tensor)
    if own.ndim == 0:
        own.copy_(file.get_tensor(name))
        return
    start = shard_start(tensor)
    low, high = max(first, start), min(first + piece.get_shape()[0], start + len(own))
    if low < high:
        own[low - start : high - start].copy_(piece[low - first : high - first])


@contextlib.contextmanager
def _open_tensors(path: Path) -> Iterator[Any]:
    """An open safetensors file.

    Raises:
        UserError: missing, truncated or foreign.
    """
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}): delete {path.parent} to go on from an older checkpoint"
        ) from None
    with file as opened:
        yield opened


def _check_same_shapes(path: Path, expected: Mapping[str, Tensor], got: Mapping[str, Any]) -> None:
    wrong = sorted(k for k in expected.keys() & got.keys() if list(expected[k].shape) != got[k]["shape"])
    wrong += sorted(expected.keys() ^ got.keys())
    if wrong:
        shown = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise UserError(
            f"{path} belongs to another model ({len(wrong)} tensors differ: {shown}): "
            "undo the change in the recipe or choose another --output"
        )
