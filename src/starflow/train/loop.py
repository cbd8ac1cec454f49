"""The training loop, for every model alike, in one process or many.

A `Task` knows the data, the loss, the held-out measures and the sample grids; a `TrainState` holds what training
changes; the loop knows when to do what. Contract: the loss of update t is a function of the weights, the settings' seed
and t alone, whatever the number of processes and micro-batches that share its batch, so that a resumed run repeats an
uninterrupted one bit for bit, and another layout repeats it up to rounding.
"""

from __future__ import annotations

import contextlib
import errno
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
from starflow.train.checkpoint import (
    TrainProgress,
    TrainState,
    checkpoints,
    learning_rate,
    load_checkpoint,
    newest_checkpoint_text,
    save_checkpoint,
)
from starflow.train.distributed import World
from starflow.train.run import RunLog, ThroughputMeter
from starflow.train.settings import TrainSettings

NORM_WEIGHT = 0.02
"""Weight of the newest gradient norm in its running value."""

STEPS_BEFORE_SKIPPING = 100
"""Updates after which the running norm is known well enough to skip an update by it."""

TIMED_UPDATES = 5
"""Updates after the first whose time says how long a training will take."""

MAX_NAMES = 8
"""Images of a bad batch that a message names, at most."""


class Interrupted(Exception):
    """The run was told to stop, by Ctrl-C or SIGTERM, and has written a checkpoint."""


class Task(Protocol):
    """What is trained.

    The loop wraps `model` in place; every method is handed the model to use, which is that one or a plain copy of it.
    Methods other than `draw` and `save` are called by all processes alike.
    """

    model: nn.Module
    flops: float
    """Operations of one image's forward and backward pass, or 0 where nobody counted."""

    def batch(self, step: int, rows: range) -> Any:
        """These rows of the batch of update `step`, as `loss` takes them; the time is logged as `data_wait`."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and named terms to log (float32 scalars), all means over the images."""
        ...

    def batch_names(self, step: int, rows: range) -> list[str]:
        """Names of the images in these rows, for messages."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Held-out measures, equal in all processes; the key "loss" decides which average is best (lower is better)."""
        ...

    def draw(self, model: nn.Module, path: Path) -> None:
        """Write a PNG that shows what the averaged model does now: a sample grid."""
        ...

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write a folder that `from_pretrained` reads."""
        ...

    def describe(self, terms: Mapping[str, float]) -> dict[str, str]:
        """What the progress bar shows of an update's terms."""
        ...


class Pace:
    """Says once, after the first updates of a training, how long the rest will take.

    The first update is not timed: it compiles, fills caches and waits for the first images.

    Example:
        >>> pace = Pace(steps=10_000)
        >>> [pace.after_update(step, 2.0 * step) for step in range(1, TIMED_UPDATES + 2)][-1]
        'about 5.6 h to go: 9994 updates of 2.00 s, evaluations and samples apart'
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._times: list[float] = []

    def after_update(self, step: int, now: float) -> str:
        """A line to show after update `step`, which ended at `now` (seconds), or ""; up to a minute is not said."""
        if len(self._times) > TIMED_UPDATES:
            return ""
        self._times.append(now)
        each = (now - self._times[0]) / TIMED_UPDATES
        seconds = each * (self.steps - step)
        if len(self._times) <= TIMED_UPDATES or seconds <= 60:
            return ""
        spelt = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
        return f"about {spelt} to go: {self.steps - step} updates of {each:.2f} s, evaluations and samples apart"


def fit(
    task: Task, settings: TrainSettings, folder: Path, show_progress: bool = True, world: World | None = None
) -> TrainProgress:
    """Train until `settings.steps`, resuming from the newest checkpoint in `folder/checkpoints`.

    Writes log.jsonl, tensorboard/, samples/, checkpoints/, best/ (the average of the lowest held-out loss) and model/
    (the last average).

    Args:
        task: see `Task`.
        settings: see `TrainSettings`.
        folder: of the run; all processes must see the same one.
        show_progress: draw a bar.
        world: the processes that train together; None is this one alone.

    Returns:
        How far the run has come.

    Raises:
        UserError: loss not finite (nothing is updated), damaged checkpoint, unwritable folder, full disk, a batch or
            a layout that the processes cannot share.
        Interrupted: after a signal, once a checkpoint has been written.
    """
    world = world or World(device=next(task.model.parameters()).device)
    rows = settings.rows(world.rank, world.size)
    state = TrainState(task.model, settings, world)
    progress = _resume(folder / "checkpoints", state)
    meter = ThroughputMeter(task.flops, settings, world) if progress.step < settings.steps else None
    show = show_progress and world.is_main
    bar = _bar(settings, progress, show)
    pace = Pace(settings.steps)
    with bar, _log(folder, progress, settings, world) as log, _signals(alone=world.size == 1) as stop:
        while progress.step < settings.steps:
            terms, stopping = _update(task, rows, state, stop, progress)
            assert meter is not None
            terms |= meter.read()
            if (text := pace.after_update(progress.step, time.perf_counter())) and show:
                tqdm.write(text, file=sys.stderr)
            last = progress.step == settings.steps
            _log_update(task, log, bar, progress, terms)
            if progress.step % settings.evaluate_every == 0 or last:
                _evaluate(task, state, progress, folder, log, last=last)
            if progress.step % settings.sample_every == 0 or last:
                _draw(task, state, progress, folder, log)
            stopping |= world.size == 1 and bool(stop)
            if progress.step % settings.checkpoint_every == 0 or last or stopping:
                save_checkpoint(folder / "checkpoints", progress, state)
            if stopping and not last:
                raise Interrupted(f"stopped at step {progress.step} of {settings.steps}; the same command resumes")
            meter.start()
    _save(task, state, folder / "model")
    return progress


def _resume(folder: Path, state: TrainState) -> TrainProgress:
    """Load the newest checkpoint, or start at 0.

    Raises:
        UserError: damaged, of another model, or not the same for every process.
    """
    found = checkpoints(folder)
    step = float(found[-1].name.removeprefix("step_")) if found else 0.0
    seen = state.world.all_reduce(torch.tensor([step, step * step], dtype=torch.float64, device=state.world.device))
    if seen != [state.world.size * step, state.world.size * step * step]:
        raise UserError(
            f"process {state.world.rank} sees checkpoint {int(step)} in {folder} and another process a different "
            "one: put the run's folder (--output) on a file system that all hosts share"
        )
    return load_checkpoint(found[-1], state) if found else TrainProgress()


def _update(
    task: Task, rows: list[range], state: TrainState, stop: list[int], progress: TrainProgress
) -> tuple[dict[str, float], bool]:
    """One update of the weights, or none where the gradient is far above its running norm.

    Returns:
        What to log, and whether a process was told to stop.

    Raises:
        UserError: the loss or the gradient is not finite.
    """
    settings, step = state.settings, progress.step
    rate = learning_rate(settings, step)
    state.set_learning_rate(rate)
    state.model.train()
    sums: dict[str, Tensor] = {}
    waited = 0.0
    for part in rows:
        started = time.perf_counter()
        batch = task.batch(step, part)
        waited += time.perf_counter() - started
        state.begin_micro_batch(last=part == rows[-1])
        loss, terms = task.loss(state.model, batch)
        (loss / len(rows)).backward()
        for name, term in {"loss": loss, **terms}.items():
            sums[name] = sums.get(name, 0.0) + term.detach().float() / len(rows)
    norm_on_device = state.gradient_norm()
    values, bad, stopping = _reduce_terms(sums, waited, stop, state.world)
    norm = float(norm_on_device)
    if bad or not math.isfinite(norm) or not math.isfinite(values["loss"]):
        whose = _bad_batch_text(task, step, rows, state.world, bad)
        raise UserError(
            f"loss {values['loss']} and gradient norm {norm} at step {step} ({whose}): nothing was updated; lower "
            "train.lr or look at these pictures, then run again from the last checkpoint"
        )
    if _is_spike(norm, progress, settings):
        progress.skipped += 1
    else:
        state.update(norm, step)
    state.zero_grad()
    _update_running_norm(norm, progress, settings)
    progress.step += 1
    return {**values, "gradient_norm": norm, "lr": rate, "skipped": progress.skipped}, stopping


def _reduce_terms(
    sums: Mapping[str, Tensor], waited: float, stop: list[int], world: World
) -> tuple[dict[str, float], list[int], bool]:
    """Means over all processes, the ranks whose loss is not finite, and whether one was told to stop."""
    bad = torch.zeros(world.size, device=world.device)
    bad[world.rank] = (~sums["loss"].isfinite()).float()
    own = torch.tensor([waited, float(bool(stop))], device=world.device)
    totals = world.all_reduce(torch.cat((torch.stack(list(sums.values())).to(world.device), own, bad)))
    values = {name: total / world.size for name, total in zip([*sums, "data_wait"], totals, strict=False)}
    ranks = [rank for rank, count in enumerate(totals[len(sums) + 2 :]) if count]
    return values, ranks, totals[len(sums) + 1] > 0


def _bad_batch_text(task: Task, step: int, rows: list[range], world: World, bad: list[int]) -> str:
    """Words for a message: the names of this process's images, or which process names its own."""
    if bad and world.rank not in bad:
        return f"process {bad[0]} names its pictures"
    names = [name for part in rows for name in task.batch_names(step, part)]
    more = f", and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"batch: {', '.join(names[:MAX_NAMES])}{more}"


def _is_spike(norm: float, progress: TrainProgress, settings: TrainSettings) -> bool:
    """Whether a gradient norm is so far above its running value that the update is skipped."""
    return progress.step >= STEPS_BEFORE_SKIPPING and 0 < settings.skip_above * progress.norm < norm


def _update_running_norm(norm: float, progress: TrainProgress, settings: TrainSettings) -> None:
    """Move the running norm; a spike counts as the largest norm that is none, so that a lasting rise is followed."""
    if progress.step >= STEPS_BEFORE_SKIPPING and settings.skip_above:
        norm = min(norm, settings.skip_above * progress.norm)
    weight = max(NORM_WEIGHT, 1 / (progress.step + 1))
    progress.norm += weight * (norm - progress.norm)


def _log_update(
    task: Task, log: RunLog | None, bar: tqdm[Any], progress: TrainProgress, terms: dict[str, float]
) -> None:
    bar.set_postfix(task.describe(terms), refresh=False)
    bar.update()
    if log is not None:
        log.step(progress.step, terms)


def _evaluate(
    task: Task, state: TrainState, progress: TrainProgress, folder: Path, log: RunLog | None, *, last: bool
) -> None:
    """Measure the average, and keep it where it is the best one.

    Raises:
        UserError: it is the last evaluation, and the loss is not finite: the run does not finish with such a model.
    """
    with state.averaged() as model, torch.no_grad():
        measures = task.evaluate(model)
    loss = measures["loss"]
    if log is not None:
        log.evaluation(progress.step, measures)
    if not math.isfinite(loss):
        if last:
            raise UserError(
                f"the held-out loss at step {progress.step}, the last, is {loss}: the training in {folder} has "
                "diverged and no model was written; lower its lr, then run the same command again"
            )
        if log is not None:
            tqdm.write(f"warning: the held-out loss at step {progress.step} is {loss}", file=sys.stderr)
    elif progress.best is None or not math.isfinite(progress.best) or loss < progress.best:
        progress.best = loss
        _save(task, state, folder / "best")


def _draw(task: Task, state: TrainState, progress: TrainProgress, folder: Path, log: RunLog | None) -> None:
    path = folder / "samples" / f"step_{progress.step:08d}.png"
    with state.full_average(state.world.device) as model:
        if model is not None:
            task.draw(model, path)
    if log is not None and path.is_file():
        log.image(progress.step, path)


def _save(task: Task, state: TrainState, folder: Path) -> None:
    with state.full_average(torch.device("cpu")) as model:  # which has room for all that the GPUs share
        if model is not None:
            bad = next((name for name, value in model.state_dict().items() if not value.isfinite().all()), "")
            if bad:
                raise UserError(
                    f"the average of {bad} is not finite: the training in {folder.parent} has diverged and "
                    f"{folder.name}/ was not written; delete its newest checkpoint, lower its lr, then run it again"
                )
            task.save(model, folder)


@contextlib.contextmanager
def _log(folder: Path, progress: TrainProgress, settings: TrainSettings, world: World) -> Iterator[RunLog | None]:
    """The run's log, which the main process writes, and no other run meanwhile; None in the other processes.

    Raises:
        UserError: the disk is full; a log is what fills it first, a line an update.
    """
    if not world.is_main:
        yield None
        return
    try:
        with folder_lock(folder), RunLog(folder, progress.step, settings.wandb) as log:
            yield log
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        newest = newest_checkpoint_text(folder / "checkpoints")
        raise UserError(
            f"cannot write to {folder} ({error.strerror}): {newest}; make room, then run the same command again"
        ) from None


@contextlib.contextmanager
def _signals(*, alone: bool) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of dying in the middle of an update.

    Where the process is alone, a second signal ends it without waiting for the update, the evaluation or the
    checkpoint. Beside others a second signal says nothing new: Ctrl-C reaches every process, and torchrun sends its own
    after it.
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
