"""The state that training changes (weights, averages, optimiser), one update of it, and the checkpoints that keep it.

Contract: gradients are means over the whole batch, in float32, whatever the layout, the number of processes and of
micro-batches. All processes take the same decisions: they compare numbers that were summed over all of them.

Checkpoints are a folder each, whole or not at all, the newest two kept; any layout reads any other's.

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
import copy
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule

from starflow.config import from_dict
from starflow.errors import UserError
from starflow.io.files import read_json, write_json, write_tensors
from starflow.nn.cpu import keep_freed_memory
from starflow.train.distributed import (
    ShardingLayout,
    World,
    checkpoint_activations,
    compile_layers,
    full_tensor,
    initialise,
    is_writer,
    local_shard,
    make_layout,
    named_parameters,
    named_state,
    shard_model,
    shard_start,
)
from starflow.train.settings import TrainSettings, network_dtype


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Learning rate of update `step` (counted from 0).

    Example:
        >>> settings = TrainSettings(steps=100, lr=1.0, warmup=10)
        >>> [round(learning_rate(settings, step), 2) for step in (0, 9, 55, 100)]
        [0.1, 1.0, 0.5, 0.0]
    """
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    if settings.schedule == "cosine":
        progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        share = min(1.0, (settings.steps - step) / max(1.0, settings.decay * settings.steps))
    return settings.min_lr + (settings.lr - settings.min_lr) * max(0.0, share)


def make_optimiser(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW whose weight decay leaves vectors (biases, norms, start tokens) out, as is usual."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    not_decayed = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": not_decayed, "weight_decay": 0.0},
    ]
    beta1, beta2 = settings.betas
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=settings.lr, betas=(beta1, beta2), eps=settings.eps, fused=True
    )


class AveragedWeights:
    """Exponential moving average of a model's state (parameters and floating buffers), in float32, split as it is.

    The decay of update t is min(decay, (1 + t) / (10 + t)), so that early averages forget the initialisation.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> average = AveragedWeights(model, decay=0.9)
        >>> _ = nn.init.zeros_(model.weight)
        >>> average.update(model, step=0)
        >>> bool(average.state["weight"].abs() <= 0.1)
        True
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: tensor.clone() for name, tensor in named_state(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after update `step` (counted from 0)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        averaged: list[Tensor] = []
        current: list[Tensor] = []
        for name, tensor in named_state(model).items():
            if tensor.is_floating_point():
                averaged.append(local_shard(self.state[name]))
                current.append(local_shard(tensor))
            else:
                self.state[name].copy_(tensor)
        torch._foreach_lerp_(averaged, current, weight)


class TrainState:
    """A model, wrapped in place for its world, with its optimiser and its average."""

    def __init__(self, model: nn.Module, settings: TrainSettings, world: World) -> None:
        """Wrap the model for its world.

        Args:
            model: real and equal in every process, or on the meta device, where its flow is initialised here.
            settings: see `TrainSettings`.
            world: the processes that hold the model.

        Raises:
            UserError: a layout that these processes cannot have.
        """
        self.model, self.settings, self.world = model, settings, world
        self.layout: ShardingLayout | None = None
        if world.device.type == "cpu":
            keep_freed_memory()
        on_meta = all(parameter.is_meta for parameter in model.parameters())
        if world.size > 1:
            self._plain = copy.deepcopy(model).to("meta")  # what the full average is put into, to draw and to save
            self.layout = make_layout(settings.parallel, world)
        checkpoint_activations(model, settings.parallel)
        if settings.compile:
            compile_layers(model)
        if self.layout is not None:
            dtype = network_dtype(settings, world.device)
            shard_model(model, self.layout, None if dtype == torch.float32 else dtype)
        if on_meta:
            model.to_empty(device=world.device)
            initialise(model, settings.seed)
        self.optimiser = make_optimiser(model, settings)
        self.average = AveragedWeights(model, settings.average)

    def set_learning_rate(self, rate: float) -> None:
        """Use this rate from the next update on."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate

    def begin_micro_batch(self, *, last: bool) -> None:
        """Exchange gradients after the last micro-batch of an update alone, as far as the layout allows it."""
        if self.layout is not None and isinstance(self.model, FSDPModule):
            if self.layout.shards == 1:
                self.model.set_requires_gradient_sync(last)
            elif self.layout.copies > 1:
                self.model.set_requires_all_reduce(last)

    def gradient_norm(self) -> Tensor:
        """Norm of all gradients, float32, on the device; collective.

        Summed over all copies, not one: the same bits everywhere, so that no two clip or skip differently.
        """
        norms = torch._foreach_norm(self._gradients())
        squares = torch.stack([norm.float() for norm in norms]).square().sum()
        if self.layout is not None:
            dist.all_reduce(squares)
            squares = squares / self.layout.copies
        return squares.sqrt()

    def update(self, norm: float, step: int) -> None:
        """Clip the gradients, whose norm is given, update the weights and then their average."""
        factor = self.settings.clip / (norm + 1e-6)
        if factor < 1:
            torch._foreach_mul_(self._gradients(), factor)
        self.optimiser.step()
        self.average.update(self.model, step)

    def zero_grad(self) -> None:
        """Free the gradients."""
        self.optimiser.zero_grad(set_to_none=True)

    def _gradients(self) -> list[Tensor]:
        return [local_shard(parameter.grad) for parameter in self.model.parameters() if parameter.grad is not None]

    @contextlib.contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Run a block with the averaged weights in the model, in eval mode; all is put back bit for bit afterwards."""
        self._swap()
        self.model.eval()
        try:
            yield self.model
        finally:
            self._swap()
            self.model.train()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in named_state(self.model).items():
            current, averaged = local_shard(tensor), local_shard(self.average.state[name])
            kept = current.clone()
            current.copy_(averaged)
            averaged.copy_(kept)

    @contextlib.contextmanager
    def full_average(self, device: torch.device) -> Iterator[nn.Module | None]:
        """Run a block with the averaged model as a plain one in the main process, and None in the others, which wait.

        Args:
            device: that a model of several processes is gathered on; alone, a model stays where it is.
        """
        if self.layout is None:
            with self.averaged() as model:
                yield model
            return
        state: dict[str, Tensor] = {}
        for name, tensor in self.average.state.items():
            gathered = full_tensor(tensor)
            if self.world.is_main:
                state[name] = gathered.to(device)
        if self.world.is_main:
            model = copy.deepcopy(self._plain)
            model.load_state_dict(state, assign=True)
            yield model.eval()
        else:
            yield None
        self.world.barrier()


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
