"""The training loop, for every model alike, in one process or many.

A `Task` knows the data, the loss, the held-out measure and the pictures; the `TrainState` holds what training changes;
the loop knows when to do what. Contract: the loss of update t is a function of the weights, the settings' seed and t
alone, whatever the number of processes and parts that share its batch, so that a resumed run repeats an uninterrupted
one bit for bit, and another layout repeats it up to rounding.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from starflow.errors import UserError
from starflow.io.files import folder_lock
from starflow.train.checkpoint import TrainProgress, checkpoints, load_checkpoint, save_checkpoint, what_stands
from starflow.train.distributed.world import World
from starflow.train.log import RunLog, measured_peak
from starflow.train.settings import TrainSettings, network_dtype
from starflow.train.state import TrainState, learning_rate

NORM_MEMORY = 0.02
"""Weight of the newest gradient norm in its running value."""
NORMS_BEFORE_SKIPS = 100
NAMED = 8
"""Pictures of a bad batch that a message names."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: a checkpoint has been written."""


class Task(Protocol):
    """What is trained.

    `model` is wrapped in place by the loop; every other method is handed the model to use, which is that one or a
    plain copy of it. Methods other than `draw` and `save` are called by all processes alike.
    """

    model: nn.Module
    flops: float
    """Operations of one picture's forward and backward pass, or 0 where nobody counted."""

    def batch(self, step: int, rows: range) -> Any:
        """These rows of the batch of update `step`, as `loss` takes them; the time spent here is logged as a wait."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and named terms to log (float32 scalars), all means over the pictures."""
        ...

    def batch_names(self, step: int, rows: range) -> list[str]:
        """Names of these pictures, for messages."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Held-out measures, equal in all processes; the key "loss" decides which average is best (lower is better)."""
        ...

    def draw(self, model: nn.Module, path: Path) -> None:
        """Write a PNG that shows what the averaged model does now."""
        ...

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write what `from_pretrained` reads."""
        ...

    def describe(self, terms: Mapping[str, float]) -> dict[str, str]:
        """What the progress bar shows."""
        ...


def fit(
    task: Task, settings: TrainSettings, folder: Path, show_progress: bool = True, world: World | None = None
) -> TrainProgress:
    """Train until `settings.steps`, resuming from the newest checkpoint in `folder/checkpoints`.

    Writes log.jsonl, tensorboard/, samples/, checkpoints/, best/ (best held-out average) and model/ (the last average).

    Args:
        task: see `Task`.
        settings: see `TrainSettings`.
        folder: of the run; all processes must see the same one.
        show_progress: draw a bar.
        world: the processes that train together; None is this one alone.

    Raises:
        UserError: loss not finite (nothing is updated), damaged checkpoint, unwritable folder, full disk, a batch or
            a layout that the processes cannot share.
        Interrupted: after a signal, once a checkpoint has been written.
    """
    world = world or World(device=next(task.model.parameters()).device)
    rows = settings.rows(world.rank, world.size)
    engine = TrainState(task.model, settings, world)
    progress = _resume(folder / "checkpoints", engine)
    meter = _Meter(task, settings, world) if progress.step < settings.steps else None
    bar = _bar(settings, progress, show_progress and world.main)
    with bar, _log(folder, progress, settings, world) as log, _signals(alone=world.size == 1) as stop:
        while progress.step < settings.steps:
            terms, stopping = _update(task, rows, engine, stop, progress)
            assert meter is not None
            terms |= meter.read()
            last = progress.step == settings.steps
            _report(task, log, bar, progress, terms)
            if progress.step % settings.evaluate_every == 0 or last:
                _evaluate(task, engine, progress, folder, log)
            if progress.step % settings.sample_every == 0 or last:
                _draw(task, engine, progress, folder, log)
            stopping |= world.size == 1 and bool(stop)
            if progress.step % settings.checkpoint_every == 0 or last or stopping:
                save_checkpoint(folder / "checkpoints", progress, engine)
            if stopping and not last:
                raise Interrupted(f"stopped at step {progress.step} of {settings.steps}; the same command resumes")
            meter.start()
    _save(task, engine, folder / "model")
    return progress


def _resume(folder: Path, engine: TrainState) -> TrainProgress:
    """Load the newest checkpoint, or start at 0.

    Raises:
        UserError: damaged, of another model, or not the same for every process.
    """
    found = checkpoints(folder)
    step = float(found[-1].name.removeprefix("step_")) if found else 0.0
    seen = engine.world.total(torch.tensor([step, step * step], dtype=torch.float64, device=engine.world.device))
    if seen != [engine.world.size * step, engine.world.size * step * step]:
        raise UserError(
            f"process {engine.world.rank} sees checkpoint {int(step)} in {folder} and another process a different "
            "one: put the run's folder (--output) on a file system that all hosts share"
        )
    return load_checkpoint(found[-1], engine) if found else TrainProgress()


def _update(
    task: Task, rows: list[range], engine: TrainState, stop: list[int], progress: TrainProgress
) -> tuple[dict[str, float], bool]:
    """One update of the weights, or none where the gradient is far above its running norm.

    Returns:
        What to log, and whether a process was told to stop.

    Raises:
        UserError: the loss or the gradient is not finite.
    """
    settings, step = engine.settings, progress.step
    rate = learning_rate(settings, step)
    engine.set_rate(rate)
    engine.model.train()
    sums: dict[str, Tensor] = {}
    waited = 0.0
    for part in rows:
        started = time.perf_counter()
        batch = task.batch(step, part)
        waited += time.perf_counter() - started
        engine.before_part(last=part == rows[-1])
        loss, terms = task.loss(engine.model, batch)
        (loss / len(rows)).backward()
        for name, term in {"loss": loss, **terms}.items():
            sums[name] = sums.get(name, 0.0) + term.detach().float() / len(rows)
    norm_on_device = engine.gradient_norm()
    values, bad, stopping = _agree(sums, waited, stop, engine.world)
    norm = float(norm_on_device)
    if bad or not math.isfinite(norm) or not math.isfinite(values["loss"]):
        _refuse(task, rows, engine.world, bad, f"loss {values['loss']} and gradient norm {norm} at step {step}")
    if _is_far_above(norm, progress, settings):
        progress.skipped += 1
    else:
        engine.apply(norm, step)
    engine.forget_gradients()
    _remember(norm, progress, settings)
    progress.step += 1
    return {**values, "gradient_norm": norm, "lr": rate, "skipped": progress.skipped}, stopping


def _agree(
    sums: Mapping[str, Tensor], waited: float, stop: list[int], world: World
) -> tuple[dict[str, float], list[int], bool]:
    """Means over all processes, the ranks whose loss is not finite, and whether one was told to stop."""
    bad = torch.zeros(world.size, device=world.device)
    bad[world.rank] = (~sums["loss"].isfinite()).float()
    own = torch.tensor([waited, float(bool(stop))], device=world.device)
    totals = world.total(torch.cat((torch.stack(list(sums.values())).to(world.device), own, bad)))
    values = {name: total / world.size for name, total in zip([*sums, "data_wait"], totals, strict=False)}
    ranks = [rank for rank, count in enumerate(totals[len(sums) + 2 :]) if count]
    return values, ranks, totals[len(sums) + 1] > 0


def _refuse(task: Task, rows: list[range], world: World, bad: list[int], what: str) -> None:
    """Raise; the process whose own pictures did it names them."""
    whose = ""
    if world.rank in bad or not bad:
        step = int(what.rpartition(" ")[2])
        names = [name for part in rows for name in task.batch_names(step, part)]
        more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
        whose = f" (batch: {', '.join(names[:NAMED])}{more})"
    else:
        whose = f" (process {bad[0]} names its pictures)"
    raise UserError(
        f"{what}{whose}: nothing was updated; lower train.lr or look at these pictures, then run again from the last "
        "checkpoint"
    )


def _is_far_above(norm: float, progress: TrainProgress, settings: TrainSettings) -> bool:
    return progress.step >= NORMS_BEFORE_SKIPS and 0 < settings.skip_above * progress.norm < norm


def _remember(norm: float, progress: TrainProgress, settings: TrainSettings) -> None:
    """Move the running norm; what is far above it counts as just so far, so that a lasting rise is followed."""
    if progress.step >= NORMS_BEFORE_SKIPS and settings.skip_above:
        norm = min(norm, settings.skip_above * progress.norm)
    weight = max(NORM_MEMORY, 1 / (progress.step + 1))
    progress.norm += weight * (norm - progress.norm)


class _Meter:
    """Pictures a second, memory, and the share of what the device can do."""

    def __init__(self, task: Task, settings: TrainSettings, world: World) -> None:
        self.batch, self.world = settings.batch, world
        self.flops = task.flops * settings.batch / world.size
        self.peak = 0.0
        if self.flops:
            self.peak = settings.peak_tflops * 1e12 or measured_peak(
                world.device, network_dtype(settings, world.device)
            )
        self.start()

    def start(self) -> None:
        """An update begins."""
        self.started = time.perf_counter()

    def read(self) -> dict[str, float]:
        """It has ended; evaluations, pictures and checkpoints come after."""
        seconds = time.perf_counter() - self.started
        values = {"pictures_per_second": self.batch / seconds, "memory_gib": peak_memory(self.world.device) / 2**30}
        if self.flops:
            rate = self.flops / seconds
            values |= {"tflops": rate / 1e12, "utilisation": rate / self.peak}
        return values


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held so far: of the GPU, or of the host where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _report(task: Task, log: RunLog | None, bar: tqdm[Any], progress: TrainProgress, terms: dict[str, float]) -> None:
    bar.set_postfix(task.describe(terms), refresh=False)
    bar.update()
    if log is not None:
        log.step(progress.step, terms)


def _evaluate(task: Task, engine: TrainState, progress: TrainProgress, folder: Path, log: RunLog | None) -> None:
    with engine.averaged() as model, torch.no_grad():
        measures = task.evaluate(model)
    if log is not None:
        log.evaluation(progress.step, measures)
    if progress.best is None or measures["loss"] < progress.best:
        progress.best = measures["loss"]
        _save(task, engine, folder / "best")


def _draw(task: Task, engine: TrainState, progress: TrainProgress, folder: Path, log: RunLog | None) -> None:
    path = folder / "samples" / f"step_{progress.step:08d}.png"
    with engine.whole_average(engine.world.device) as model:
        if model is not None:
            task.draw(model, path)
    if log is not None and path.is_file():
        log.picture(progress.step, path)


def _save(task: Task, engine: TrainState, folder: Path) -> None:
    with engine.whole_average(torch.device("cpu")) as model:  # which has room for all that the GPUs share
        if model is not None:
            task.save(model, folder)


@contextlib.contextmanager
def _log(folder: Path, progress: TrainProgress, settings: TrainSettings, world: World) -> Iterator[RunLog | None]:
    """The run's log, which the main process writes, and which nobody else's may write meanwhile.

    Raises:
        UserError: the disk is full; a log is what fills it first, a line an update.
    """
    if not world.main:
        yield None
        return
    try:
        with folder_lock(folder), RunLog(folder, progress.step, settings.wandb) as log:
            yield log
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"cannot write to {folder} ({error.strerror}): {what_stands(folder / 'checkpoints')}; make room, then run "
            "the same command again"
        ) from None


@contextlib.contextmanager
def _signals(*, alone: bool) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying in the middle of an update; the list is true once one came.

    Alone, a second one does not wait for the update, the evaluation or the checkpoint. Beside others it says nothing
    new: Ctrl-C reaches every process, and torchrun sends its own signal after it.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and alone:
            raise KeyboardInterrupt("stopped at once; the same command resumes from the last checkpoint")
        received.append(number)

    previous: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # signals can be caught in the main thread only
        previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _bar(settings: TrainSettings, progress: TrainProgress, show: bool) -> tqdm[Any]:
    return tqdm(total=settings.steps, initial=progress.step, unit="step", disable=not show, dynamic_ncols=True)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]
