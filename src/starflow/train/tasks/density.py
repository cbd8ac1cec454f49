"""Training of a density on arrays: a `SequenceFlow` by a recipe, for what is too large or takes too long for its `fit`.

The arrays are .npy files, or columns of a parquet file, which are written as .npy once. Both are mapped, so that an
update reads the rows of its batch alone. The first rows that are not held out standardise the flow.

RUN/recipe.json   the settings          RUN/arrays/   what was read of a parquet file
RUN/first/        the flow that training starts from, standardised
RUN/shapes.json   of the arrays: rows of another number would be held out otherwise
RUN/log.jsonl, samples/ (of held-out contexts, .npy), checkpoints/
RUN/model/        the last average, as `SequenceFlow.from_pretrained` reads it
RUN/best/         the average of the highest held-out likelihood, likewise
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tokenize import TokenError
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from starflow.data.sources.parquet import read_numbers
from starflow.density import SequenceFlow
from starflow.density.blocks import Bound
from starflow.density.fit import EVALUATION_ROWS, FitOptions, split_rows
from starflow.density.sequence_flow import STANDARDISED_ROWS
from starflow.errors import UserError
from starflow.io.files import atomic_write, read_json, write_json
from starflow.train.distributed import World
from starflow.train.loader import BatchOrder
from starflow.train.loop import fit
from starflow.train.recipe import read_layers
from starflow.train.run import keep_recipe
from starflow.train.settings import TrainSettings, network_precision
from starflow.train.tasks.flow import own_batches, random_subset

Names = str | tuple[str, ...]
"""Of an array: one, or several of single numbers that become a vector."""

FREE = ("name", "train")
"""Keys and sections of a recipe that may change in a run that has begun."""

NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")
"""Kinds of numbers that are read from .npy, by numpy's names."""

DAMAGED = (ValueError, TypeError, EOFError, SyntaxError, TokenError, OverflowError, MemoryError, RecursionError)
"""What numpy raises of a file that is no .npy, whose head it reads as Python's text."""

SAMPLES = 1000
"""Rows of a file in samples/, at most."""


@dataclass(frozen=True)
class ArraysRecipe:
    """The arrays that a density is trained on; rows belong together by their place.

    Raises:
        UserError: a share that cannot be.
    """

    source: Literal["arrays"] = "arrays"
    """What makes a recipe one of a density."""
    path: str = ""
    """A folder of .npy files, or a parquet file."""
    events: Names = "x"
    """What the density is of: the name of a file without .npy, or of a column, of numbers or of lists of equally many;
    or several names of single numbers, which become a vector."""
    context: Names = ()
    """What it is conditioned on, named alike; empty is nothing."""
    lengths: str = ""
    """Whole numbers, how many steps of a sequence count; empty is all."""
    heldout: float = 0.1
    """Share of the rows that is never trained on, drawn by train.seed."""

    def __post_init__(self) -> None:
        if not 0 < self.heldout < 1:
            raise UserError(f"data.heldout is {self.heldout}, expected between 0 and 1")


@dataclass(frozen=True)
class SequenceFlowRecipe:
    """Sizes of the flow, as `SequenceFlow` documents them; shapes and lengths follow from the arrays."""

    bounds: tuple[Bound, ...] = ()
    """[lower, upper] of each number of an event's last axis, null where there is none; empty is no bounds."""
    patch_size: int = 1
    """Consecutive steps, or numbers of a vector, in one token."""
    channels: int = 64
    """Width of the blocks."""
    num_blocks: int = 4
    """Blocks of alternating order."""
    layers_per_block: int = 2
    """Transformer layers of each."""
    head_dim: int = 32
    """Width of an attention head."""


@dataclass(frozen=True)
class DensityRecipe:
    """A density's training, by `starflow train`: a recipe whose `data.source` is "arrays".

    Example:
        >>> DensityRecipe("mine", TrainSettings(steps=100)).flow.channels
        64
    """

    name: str
    """Of the run's folder, where none is given."""
    train: TrainSettings
    """Training of the flow; precision "auto" is float32, as densities are asked for exactly."""
    data: ArraysRecipe = field(default_factory=ArraysRecipe)
    """The arrays."""
    flow: SequenceFlowRecipe = field(default_factory=SequenceFlowRecipe)
    """Sizes of the flow."""


def is_density_recipe(path: Path, overrides: Mapping[str, str]) -> bool:
    """Whether a recipe's `data.source` is "arrays".

    Raises:
        UserError: the file, or its base, cannot be read.
    """
    data = read_layers(path, overrides)[0].get("data")
    return isinstance(data, dict) and data.get("source") == "arrays"


class Arrays(NamedTuple):
    """Mapped arrays of equally many rows."""

    events: Tensor
    """(R, *event_shape)"""
    context: Tensor | None
    lengths: Tensor | None

    def rows(self, indices: Tensor | slice, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Some rows, on a device: real numbers in float32, lengths as they are."""
        events, context, lengths = (None if one is None else one[indices].to(device) for one in self)
        assert events is not None
        return events.float(), None if context is None else context.float(), lengths


def open_arrays(recipe: ArraysRecipe, folder: Path, world: World) -> Arrays:
    """The arrays of a recipe; what has to be written first goes to `folder`, by the main process. Collective.

    Raises:
        UserError: no such file or column, not numbers, or unequal numbers of rows.
    """
    opened: list[Tensor | None] = []
    for part, names in (("events", recipe.events), ("context", recipe.context), ("lengths", recipe.lengths)):
        names = (names,) if isinstance(names, str) else names
        opened.append(_open(recipe, names, folder / f"{part}.npy", world) if any(names) else None)
    events, context, lengths = opened
    if events is None:
        raise UserError("data.events is empty, expected the name of what the density is of")
    for part, one in (("context", context), ("lengths", lengths)):
        if one is not None and len(one) != len(events):
            raise UserError(f"{len(events)} events and {len(one)} rows of {part}: give one for each event")
    column = events if events.dim() > 1 else events[:, None]
    return Arrays(column, context[:, None] if context is not None and context.dim() == 1 else context, lengths)


def _open(recipe: ArraysRecipe, names: tuple[str, ...], written: Path, world: World) -> Tensor:
    source = Path(recipe.path).expanduser()
    if source.is_dir() and len(names) == 1:
        return _mapped(source / f"{names[0]}.npy")
    if not source.exists():
        raise UserError(f"no folder or parquet file at '{recipe.path}': set data.path")
    if world.any_missing(written):
        world.run_on_main(lambda: _write(_parts(source, names), written))
    return _mapped(written)


def _parts(source: Path, names: tuple[str, ...]) -> Iterator[NDArray[Any]]:
    """The rows of a parquet file, or of several .npy files side by side, a part at a time."""
    if source.is_file():
        yield from read_numbers(source, names)
        return
    columns = [_mapped(source / f"{name}.npy") for name in names]
    if any(one.dim() != 1 or len(one) != len(columns[0]) for one in columns):
        shapes = ", ".join(f"{name} {tuple(one.shape)}" for name, one in zip(names, columns, strict=True))
        raise UserError(f"several names are of single numbers, equally many of each, got {shapes}: name one array")
    for start in range(0, len(columns[0]), STANDARDISED_ROWS):
        yield torch.stack([one[start : start + STANDARDISED_ROWS] for one in columns], 1).numpy()


def _write(parts: Iterator[NDArray[Any]], path: Path) -> None:
    """Write parts one after another as one .npy, whose head, of a fixed length, is written last."""
    head = 128
    rows, first = 0, None
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.seek(head)
        for part in parts:
            kind = np.dtype(np.int64 if part.dtype.kind in "iub" else np.float32)
            first = first or (kind, part.shape[1:])
            if part.shape[1:] != first[1]:
                raise UserError(f"rows of shape {part.shape[1:]} after rows of {first[1]}: all need one shape")
            part.astype(first[0]).tofile(file)
            rows += len(part)
        if first is None:
            raise UserError("the file has no rows, expected at least 2")
        text = repr({"descr": first[0].str, "fortran_order": False, "shape": (rows, *first[1])})
        file.seek(0)
        file.write(b"\x93NUMPY\x01\x00" + (head - 10).to_bytes(2, "little") + text.ljust(head - 11).encode() + b"\n")


def _mapped(path: Path) -> Tensor:
    """A .npy file, of which only what is asked for is read."""
    if not path.is_file():
        names = sorted(one.stem for one in path.parent.glob("*.npy"))
        raise UserError(f"no {path.name} in {path.parent}, which has {', '.join(names) or 'no .npy files'}")
    try:
        array = np.lib.format.open_memmap(path, mode="c")
    except (*DAMAGED, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is no .npy array ({reason}): save it again with numpy.save") from None
    if array.dtype.str[1:] not in NUMBERS or not array.dtype.isnative or not array.ndim:
        found = f"{path} has {array.dtype.str} of shape {array.shape}"
        raise UserError(f"{found}, expected rows of real numbers that torch has: save array.astype('float32')")
    return torch.from_numpy(array)


class DensityLoss(nn.Module):
    """Log-densities as a module over a flow, so that one call covers all of its weights, whoever shares them."""

    def __init__(self, flow: SequenceFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, events: Tensor, context: Tensor | None, lengths: Tensor | None) -> Tensor:
        """log p (B,) of events in nats."""
        return self.flow.log_prob_rows(self.flow.check_events(events, lengths), context, lengths)


class DensityTask:
    """Maximum likelihood of rows of arrays; see `starflow.train.loop.Task`."""

    def __init__(
        self, flow: SequenceFlow, arrays: Arrays, heldout: float, settings: TrainSettings, world: World
    ) -> None:
        """Train this flow.

        Args:
            flow: real, standardised and equal in every process.
            arrays: of all rows.
            heldout: share of the rows that is held out.
            settings: see `TrainSettings`.
            world: the processes that train together.
        """
        self.model: nn.Module = DensityLoss(flow)
        self.flops = 0.0
        self.arrays, self.settings, self.world = arrays, settings, world
        self.numbers = math.prod(flow.config.event_shape)
        self.train, self.heldout = _split(arrays, heldout, settings.seed)
        if 0 < settings.evaluate_pictures < len(self.heldout):
            self.heldout = self.heldout[: settings.evaluate_pictures]
        self.order = BatchOrder([self.train], settings.batch, settings.seed)

    def batch(self, step: int, rows: range) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Events, contexts and lengths of these rows."""
        return self.arrays.rows(self.order(step)[rows.start : rows.stop], self.world.device)

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, Tensor | None, Tensor | None]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """-log p over the numbers of an event, and the mean of log p in nats."""
        with network_precision(self.settings, self.world.device):
            nats = model(*batch).mean()
        return -nats / self.numbers, {"nats": nats.detach()}

    def batch_names(self, step: int, rows: range) -> list[str]:
        """The places of these rows in the arrays."""
        return [f"row {row}" for row in self.order(step)[rows.start : rows.stop].tolist()]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Means of log p in nats: of held-out rows, and of as many training ones."""
        heldout = self._mean_nats(model, self.heldout)
        (some,) = random_subset([self.train], len(self.heldout))
        return {"loss": -heldout / self.numbers, "nats": heldout, "train_nats": self._mean_nats(model, some)}

    def _mean_nats(self, model: nn.Module, indices: Tensor) -> float:
        total = torch.zeros(1, device=self.world.device, dtype=torch.float64)
        for _, some, weight in own_batches([indices], self.world, EVALUATION_ROWS):
            with network_precision(self.settings, self.world.device):
                total += weight * model(*self.arrays.rows(some, self.world.device)).double().mean()
        return self.world.all_reduce(total)[0] / len(indices)

    @torch.no_grad()
    def draw(self, model: nn.Module, path: Path) -> None:
        """Write samples under contexts of held-out rows as .npy, in the place of a picture."""
        assert isinstance(model, DensityLoss)
        _, context, lengths = self.arrays.rows(self.heldout[:SAMPLES], self.world.device)
        shape = () if context is not None or lengths is not None else (SAMPLES,)
        draw = torch.Generator(self.world.device).manual_seed(self.settings.seed)
        samples = model.flow(context, lengths).sample(shape, generator=draw)
        with atomic_write(path.with_suffix(".npy")) as temporary, temporary.open("wb") as file:
            np.save(file, samples.cpu().numpy())

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the flow."""
        assert isinstance(model, DensityLoss)
        model.flow.save_pretrained(folder)

    def describe(self, terms: Mapping[str, float]) -> dict[str, str]:
        """Nats of an event."""
        return {"nats": f"{terms['nats']:.3f}"}


def _split(arrays: Arrays, heldout: float, seed: int) -> tuple[Tensor, Tensor]:
    return split_rows(len(arrays.events), FitOptions(seed=seed, validation_fraction=heldout))


def first_flow(recipe: DensityRecipe, arrays: Arrays) -> SequenceFlow:
    """The flow before training: its weights are drawn by train.seed, and training rows standardise it.

    Raises:
        UserError: sizes that do not fit the arrays, missing values, or values outside the bounds.
    """
    sizes, context = recipe.flow, arrays.context
    torch.manual_seed(recipe.train.seed)
    flow = SequenceFlow(
        tuple(arrays.events.shape[1:]),
        () if context is None else tuple(context.shape[1:]),
        bounds=sizes.bounds,
        variable_length=arrays.lengths is not None,
        patch_size=sizes.patch_size,
        channels=sizes.channels,
        num_blocks=sizes.num_blocks,
        layers_per_block=sizes.layers_per_block,
        head_dim=sizes.head_dim,
    )
    flow.check_data(*arrays)
    train, _ = _split(arrays, recipe.data.heldout, recipe.train.seed)
    flow.standardise(*arrays.rows(train[:STANDARDISED_ROWS], torch.device("cpu")))
    return flow


def train_density(recipe: DensityRecipe, folder: Path, world: World, *, progress: bool = True) -> Path:
    """Train a density; what is in the folder already is not done again. Returns the model's folder. Collective.

    Raises:
        UserError: the recipe cannot be carried out; the message says what is wrong.
        Interrupted: after a signal, once a checkpoint has been written.
    """
    if recipe.train.precision == "auto":
        recipe = replace(recipe, train=replace(recipe.train, precision="float32"))
    if recipe.train.init_from:
        raise UserError(f"train.init_from is '{recipe.train.init_from}', which is not for densities: leave it out")
    keep_recipe(recipe, FREE, folder, world)
    arrays = open_arrays(recipe.data, folder / "arrays", world)
    shapes = {name: list(one.shape) for name, one in arrays._asdict().items() if one is not None}
    begun = not world.any_missing(folder / "shapes.json")
    if begun and (before := read_json(folder / "shapes.json")) != shapes:
        raise UserError(f"{folder} was started with arrays {before}, now {shapes}: choose another --output, or undo it")
    if world.any_missing(folder / "first" / "config.json"):
        world.run_on_main(lambda: first_flow(recipe, arrays).save_pretrained(folder / "first"))
    if not begun:
        world.run_on_main(lambda: write_json(folder / "shapes.json", shapes))
    flow = SequenceFlow.from_pretrained(folder / "first").to(world.device)
    task = DensityTask(flow, arrays, recipe.data.heldout, recipe.train, world)
    if progress and world.is_main:
        count = sum(parameter.numel() for parameter in flow.parameters())
        shape = tuple(flow.config.event_shape)
        rows = f"{len(task.train)} rows, {recipe.train.steps} steps"
        tqdm.write(f"density of events {shape}: {count / 1e6:.2f} M parameters, {rows}")
    fit(task, recipe.train, folder, progress, world)
    return folder / "model"
