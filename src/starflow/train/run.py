"""A run: a recipe with its folder and the processes that carry it out; and the log that it keeps there.

The log is log.jsonl (one line a step, and one an evaluation), TensorBoard files and, if asked for, W&B.

What a line of an update holds, means over the whole batch: `loss` and the task's terms (of the flow: `squares` and
`logdet`, nats a dimension, `penalty`, `bits_per_dim`), `gradient_norm`, `lr`, `skipped` (updates skipped so far),
`pictures_per_second`, `data_wait` (seconds an update waited for its images), `memory_gib` (the most that a process
has held), and of a task that counts its operations `tflops` (10^12 a second and process) and `utilisation` (their
share of what the device can do).

Floating-point operations are counted, and what the device can do is measured. Counted are the
matrix products that the model needs: every linear layer (2 per weight and token) and attention over the tokens that
causality lets it see (4 per query, key and channel of the heads). The backward pass counts twice the forward one. What
is computed again to save memory, norms, activations, the optimiser and the averages count nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from starflow.config import Dataclass, to_dict
from starflow.errors import UserError
from starflow.flow.block import AutoregressiveBlock
from starflow.flow.config import ModelConfig
from starflow.flow.model import Flow, build
from starflow.io import files
from starflow.io.files import write_text
from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig
from starflow.train.checkpoint import checkpoints
from starflow.train.distributed import World
from starflow.train.recipe import Recipe
from starflow.train.recipe_keys import check_changes, check_idle_keys, check_ratios, flat_keys, longest_warmup_text
from starflow.train.settings import TrainSettings, network_dtype

LOG_NAME = "log.jsonl"

BACKWARD_COST = 2
"""Operations of a backward pass, relative to the forward one."""


class RunLog:
    """Appends to `folder/log.jsonl`, `folder/tensorboard` and, where a project is named, to Weights & Biases.

    On resume, lines of steps after the checkpoint are dropped first: those updates are done again.
    """

    def __init__(self, folder: Path, step: int, project: str = "") -> None:
        """Open the log of a run.

        Args:
            folder: of the run.
            step: updates that are done; later lines are dropped.
            project: the W&B project; empty for none.

        Raises:
            UserError: W&B is asked for and not installed.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._weights_and_biases = _open_wandb(project, folder) if project else None
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOG_NAME
        if path.exists():
            write_text(path, "".join(line for line in _whole_lines(path) if json.loads(line)["step"] <= step))
        self._file = path.open("a", encoding="utf-8", buffering=1)  # by lines: a killed run leaves no gap behind it
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def step(self, step: int, terms: Mapping[str, float]) -> None:
        """Write the terms of one update."""
        self._write(step, "train", terms)

    def evaluation(self, step: int, measures: Mapping[str, float]) -> None:
        """Write one held-out evaluation; keys are prefixed with `heldout_` in log.jsonl; NaN is null."""
        self._write(step, "heldout", {f"heldout_{name}": value for name, value in measures.items()})

    def image(self, step: int, path: Path) -> None:
        """Show a sample grid, a PNG, in TensorBoard and W&B."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        self._board.add_image("samples", pixels, step, dataformats="HWC")
        if self._weights_and_biases is not None:
            self._weights_and_biases.image(step, path)

    def _write(self, step: int, group: str, values: Mapping[str, float]) -> None:
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        self._file.write(json.dumps({"step": step, **numbers}, allow_nan=False) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{group}/{name}", value, step)
        if self._weights_and_biases is not None:
            self._weights_and_biases.scalars(step, {f"{group}/{name}": value for name, value in values.items()})

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._board.close()
        if self._weights_and_biases is not None:
            self._weights_and_biases.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl, as dictionaries.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / LOG_NAME
        >>> _ = path.write_text('{"step": 1, "loss": 0.5}\\n')
        >>> read_log(path)
        [{'step': 1, 'loss': 0.5}]
    """
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _whole_lines(path: Path) -> list[str]:
    """Lines that a killed run wrote completely."""
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


class _WeightsAndBiases:
    """The one place that knows wandb. A resumed run goes on in the same W&B run, named after its folder."""

    def __init__(self, wandb: Any, project: str, folder: Path) -> None:
        self._wandb = wandb
        self._run = wandb.init(project=project, name=folder.name, id=folder.name, dir=str(folder), resume="allow")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, path: Path) -> None:
        self._run.log({"samples": self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


def _open_wandb(project: str, folder: Path) -> _WeightsAndBiases:
    try:
        wandb = importlib.import_module("wandb")
    except ModuleNotFoundError:
        raise UserError(
            f"train.wandb is '{project}' and wandb is not installed: pip install wandb, or leave the key out"
        ) from None
    return _WeightsAndBiases(wandb, project, folder.absolute())


class ThroughputMeter:
    """Measures each update: images a second, memory, and the share of what the device can do."""

    def __init__(self, flops: float, settings: TrainSettings, world: World) -> None:
        """`flops` are the operations of one image's forward and backward pass; 0 leaves them out."""
        self._batch, self._device = settings.batch, world.device
        self._flops = flops * settings.batch / world.size
        self._peak = 0.0
        if self._flops:
            dtype = network_dtype(settings, world.device)
            self._peak = settings.peak_tflops * 1e12 or measured_peak(world.device, dtype)
        self.start()

    def start(self) -> None:
        """Note that an update begins."""
        self._started = time.perf_counter()

    def read(self) -> dict[str, float]:
        """The measures of the update that has just ended; evaluations, sample grids and checkpoints come after."""
        seconds = time.perf_counter() - self._started
        values = {"pictures_per_second": self._batch / seconds, "memory_gib": peak_memory(self._device) / 2**30}
        if self._flops:
            rate = self._flops / seconds
            values |= {"tflops": rate / 1e12, "utilisation": rate / self._peak}
        return values


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: of the GPU, or of the host where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def training_flops(flow: Flow) -> float:
    """Operations of one image's forward and backward pass, at the model's own size.

    Example:
        >>> from starflow.flow.config import STARFlowConfig
        >>> from starflow.flow.model import STARFlow
        >>> config = STARFlowConfig(in_channels=4, img_size=4, channels=64, num_blocks=2, layers_per_block=1)
        >>> f"{training_flops(STARFlow(config)):.3g}"
        '9.79e+06'
    """
    tokens = flow.config.grid_side**2
    forward = sum(_forward_flops(block, tokens, flow.condition_length) for block in flow.iter_blocks())
    return (1 + BACKWARD_COST) * float(forward)


def _forward_flops(block: AutoregressiveBlock, tokens: int, condition: int) -> int:
    inputs = tokens - block.first_predicted
    length = inputs + (condition if block.proj_txt is not None else 0)
    total = 2 * inputs * (_matrix_entries(block.proj_in) + _matrix_entries(block.proj_out))
    if block.proj_txt is not None:
        total += 2 * condition * _matrix_entries(block.proj_txt)
    spec = block.spec.layer
    attention = 4 * (length * (length + 1) // 2) * spec.heads * spec.head_dim
    return total + sum(2 * length * _matrix_entries(layer) + attention for layer in block.attn_blocks)


def _matrix_entries(module: nn.Module) -> int:
    return sum(one.in_features * one.out_features for one in module.modules() if isinstance(one, nn.Linear))


SHARE_OF_PRODUCT = 0.5
"""An update's operations a second over those of a large matrix product: 0.45 to 0.8 as `bench train` measures it."""


class MatrixProduct:
    """A large square matrix product on this machine, to be timed beside other work."""

    def __init__(self, device: torch.device, dtype: torch.dtype, side: int = 0) -> None:
        """`side` 0 is 1024 on a CPU and 8192 elsewhere."""
        self.side = side or (1024 if device.type == "cpu" else 8192)
        self.device = device
        draw = torch.Generator().manual_seed(0)
        left, right = (torch.randn(self.side, self.side, generator=draw).to(device, dtype) for _ in range(2))
        self.left, self.right, self.out = left, right, torch.empty_like(left)

    def rate(self, repeats: int = 1) -> float:
        """Operations a second over that many products."""
        synchronise(self.device)
        started = time.perf_counter()
        for _ in range(repeats):
            torch.mm(self.left, self.right, out=self.out)
        synchronise(self.device)
        return repeats * 2 * self.side**3 / (time.perf_counter() - started)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, the best of a few."""
    product = MatrixProduct(device, dtype)
    return max(product.rate() for _ in range(4))


def expected_time(run: Run, flow: ModelConfig, rate: float) -> str:
    """How long the stages of a run that are missing will take here, about; "" where nothing is missing.

    Counted are the operations of every update that is left, forward and backward; of a convolution, as of a flow, those
    of its products. They are taken to run at `SHARE_OF_PRODUCT` of the rate of a large matrix product.

    Args:
        run: whose recipe and folder say what is missing.
        flow: the configuration of the flow that it trains.
        rate: operations a second of a large matrix product, of one process.

    Example:
        >>> import tempfile
        >>> from starflow.flow.config import STARFlowConfig
        >>> run = Run(Recipe("mine", TrainSettings(steps=10**6)), Path(tempfile.mkdtemp()), torch.device("cpu"))
        >>> flow = STARFlowConfig(in_channels=4, img_size=4, channels=64, num_blocks=2, layers_per_block=1)
        >>> expected_time(run, flow, rate=1e11)
        'time expected here: autoencoder about 40 min, flow about 2 h'
    """
    coder, parts = run.recipe.autoencoder, {}
    with torch.device("meta"):
        work = training_flops(build(flow))
    if coder.kind == "small" and not coder.source:
        coding = _autoencoder_flops(coder.model, run.recipe.data.side)
        if coder.joint:
            work += coding
        elif not (run.folder / "autoencoder" / "model" / "config.json").is_file():
            parts["autoencoder"] = coding * coder.train.batch * _steps_left(coder.train, run.folder / "autoencoder")
    left = _steps_left(run.recipe.train, run.folder)
    if left:
        parts["flow"] = work * run.recipe.train.batch * left / run.world.size
    seconds = {name: operations / (SHARE_OF_PRODUCT * rate) for name, operations in parts.items()}
    said = ", ".join(f"{name} about {_duration(value)}" for name, value in seconds.items())
    return f"time expected here: {said}" if said else ""


def _steps_left(settings: TrainSettings, folder: Path) -> int:
    stored = checkpoints(folder / "checkpoints")
    return max(0, settings.steps - (int(stored[-1].name.removeprefix("step_")) if stored else 0))


def _autoencoder_flops(config: SmallAutoencoderConfig, side: int) -> float:
    """Operations of one image's forward and backward pass through the autoencoder, at `side` pixels."""
    from torch.utils.flop_counter import FlopCounterMode

    side = max(config.factor, side // config.factor * config.factor)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = SmallAutoencoder(config)
        network.decode(network.encode(torch.zeros(2, 3, side, side)))
    return (1 + BACKWARD_COST) * float(counter.get_total_flops()) / 2


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.0f} h" if seconds > 5400 else f"{max(1, round(seconds / 60))} min"


def synchronise(device: torch.device) -> None:
    """Wait for what a device still computes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Run:
    """A recipe, its folder and where it computes. Make one with `start_run`."""

    recipe: Recipe
    folder: Path
    device: torch.device
    progress: bool = True
    """Whether this process shows bars and messages."""
    world: World = field(default_factory=World)
    """The processes that train together."""

    def notify(self, text: str) -> None:
        """Show one line of text about what happens next, above any progress bar."""
        if self.progress:
            tqdm.write(text)


def settle_precision(recipe: Recipe, before: dict[str, Any] | None, device: torch.device) -> Recipe:
    """The recipe with "auto" replaced by the precision that its run has: that of the device, or that it began in.

    A run that was begun before "auto" was settled in its folder computed in float32 on a CPU. What is known of the run
    so far, `before`, is settled alike, in place.

    >>> recipe = settle_precision(Recipe("mine", TrainSettings(steps=1)), None, torch.device("meta"))
    >>> recipe.train.precision, recipe.autoencoder.train.precision
    ('float32', 'float32')
    """

    def settled(settings: TrainSettings, stored: dict[str, Any] | None) -> TrainSettings:
        began: str | None = (stored or {}).get("precision")
        if stored is not None and began == "auto" and device.type == "cpu":
            began = stored["precision"] = "float32"
        if settings.precision != "auto":
            return settings
        low = network_dtype(settings, device) == torch.bfloat16
        if began == "auto" and stored is not None:
            began = stored["precision"] = "bfloat16" if low else "float32"
        chosen: Literal["float32", "bfloat16"] = "bfloat16" if (began == "bfloat16" if began else low) else "float32"
        return replace(settings, precision=chosen)

    coder, known = recipe.autoencoder, before or {}
    return replace(
        recipe,
        train=settled(recipe.train, known.get("train")),
        autoencoder=replace(coder, train=settled(coder.train, known.get("autoencoder", {}).get("train"))),
    )


def start_run(
    recipe: Recipe, folder: Path, device: torch.device, progress: bool = True, world: World | None = None
) -> Run:
    """Prepare the folder of a run: RUN/recipe.json is written, or compared with what is there.

    Args:
        recipe: what is trained.
        folder: of the run; the same one again goes on with it.
        device: of the computation, where `world` is None.
        progress: whether to show bars and messages.
        world: the processes that train together; None is this one alone.

    Raises:
        UserError: the folder cannot be written, another process trains in it, it holds a run whose finished stages
            this recipe would have made otherwise, or a key of the recipe has no effect.

    Example:
        >>> import tempfile
        >>> from starflow.train.settings import TrainSettings
        >>> folder = Path(tempfile.mkdtemp())
        >>> run = start_run(Recipe("mine", TrainSettings(steps=200)), folder, torch.device("cpu"))
        >>> [path.name for path in folder.iterdir() if path.suffix]
        ['recipe.json']
    """
    check_idle_keys(recipe)
    check_ratios(recipe)
    files.check_output_folder(folder)
    world = world or World(device=device)
    path = folder / "recipe.json"
    # A training in this folder holds the lock, and its recipe stays as it is.
    with files.folder_lock(folder) if world.is_main else contextlib.nullcontext():
        before = files.read_json(path) if path.is_file() else None
        recipe = settle_precision(recipe, before, world.device)
        if before is not None:
            check_changes(before, recipe, folder)
        if world.is_main:
            files.write_json(path, to_dict(recipe))
    run = Run(recipe, folder, world.device, progress and world.is_main, world)
    if text := longest_warmup_text(recipe):
        run.notify(f"warning: {text}")
    return run


def keep_recipe(recipe: Dataclass, free: Collection[str], folder: Path, world: World) -> None:
    """Prepare the folder of a run whose recipe is not a `Recipe`: recipe.json is written, or compared with it.

    Args:
        recipe: of a student, a denoiser or a density, with a section `train`.
        free: keys and sections that may change in a run that has begun; `train.seed` may never.
        folder: of the run.
        world: the processes that train together.

    Raises:
        UserError: the folder cannot be written, or was started with another value of a key that is not free.
    """
    files.check_output_folder(folder)
    path, new = folder / "recipe.json", flat_keys(to_dict(recipe))
    with files.folder_lock(folder) if world.is_main else contextlib.nullcontext():
        old = flat_keys(files.read_json(path)) if path.is_file() else new
        for key in new:
            if old.get(key) != new[key] and (key.split(".")[0] not in free or key == "train.seed"):
                raise UserError(f"{folder} was started with another {key}: choose another --output, or undo the change")
        if world.is_main:
            files.write_json(path, to_dict(recipe))
