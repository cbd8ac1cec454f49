"""The training loop, for every model alike.

A `Task` knows the data, the loss, the held-out measure and the pictures; the loop knows optimisation, averaging,
logging, checkpoints and stopping. Contract: the loss of update t is a function of the weights, the settings' seed and t
alone, so that a resumed run repeats an uninterrupted one bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from starflow.errors import UserError
from starflow.train.checkpoint import Progress, checkpoints, load_checkpoint, save_checkpoint
from starflow.train.log import RunLog
from starflow.train.optimiser import AveragedWeights, learning_rate, make_optimiser
from starflow.train.settings import TrainSettings


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: a checkpoint has been written."""


class Task(Protocol):
    """What is trained. `network` is the model, compiled or not, and shares its weights."""

    model: nn.Module

    def loss(self, network: nn.Module, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss of update `step` and named terms to log (float32 scalars)."""
        ...

    def batch_names(self, step: int) -> list[str]:
        """Names of the pictures in the batch of update `step`, for messages."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Held-out measures; the key "loss" decides which average is best (lower is better)."""
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


def fit(task: Task, settings: TrainSettings, folder: Path, show_progress: bool = True) -> Progress:
    """Train until `settings.steps`, resuming from the newest checkpoint in `folder/checkpoints`.

    Writes log.jsonl, tensorboard/, samples/, checkpoints/, best/ (best held-out average) and model/ (the last average).

    Raises:
        UserError: loss not finite (nothing is updated), damaged checkpoint, unwritable folder.
        Interrupted: after a signal, once a checkpoint has been written.
    """
    optimiser = make_optimiser(task.model, settings)
    average = AveragedWeights(task.model, settings.average)
    found = checkpoints(folder / "checkpoints")
    progress = load_checkpoint(found[-1], task.model, average, optimiser) if found else Progress()
    network: nn.Module = torch.compile(task.model) if settings.compile else task.model  # type: ignore[assignment]

    def checkpoint() -> None:
        save_checkpoint(folder / "checkpoints", progress, task.model, average, optimiser)

    with RunLog(folder, progress.step) as log, _signals() as stop, _bar(settings, progress, show_progress) as bar:
        while progress.step < settings.steps:
            terms = _update(task, network, average, optimiser, settings, progress)
            bar.set_postfix(task.describe(terms), refresh=False)
            bar.update()
            log.step(progress.step, terms)
            last = progress.step == settings.steps
            if progress.step % settings.evaluate_every == 0 or last:
                _evaluate(task, average, progress, folder, log)
            if progress.step % settings.sample_every == 0 or last:
                with _weights(task.model, average.state):
                    task.draw(task.model, folder / "samples" / f"step_{progress.step:08d}.png")
            if progress.step % settings.checkpoint_every == 0 or last or stop:
                checkpoint()
            if stop and not last:
                raise Interrupted(f"stopped at step {progress.step} of {settings.steps}; the same command resumes")
    with _weights(task.model, average.state):
        task.save(task.model, folder / "model")
    return progress


def _update(
    task: Task,
    network: nn.Module,
    average: AveragedWeights,
    optimiser: torch.optim.Optimizer,
    settings: TrainSettings,
    progress: Progress,
) -> dict[str, float]:
    started = time.perf_counter()
    step = progress.step
    rate = learning_rate(settings, step)
    for group in optimiser.param_groups:
        group["lr"] = rate
    network.train()
    loss, terms = task.loss(network, step)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(task.model.parameters(), settings.clip)
    values = {"loss": float(loss.detach()), **{k: float(v.detach()) for k, v in terms.items()}}
    values |= {"gradient_norm": float(norm), "lr": rate}
    if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
        names = ", ".join(task.batch_names(step)[:4])
        raise UserError(
            f"loss {values['loss']} and gradient norm {values['gradient_norm']} at step {step} (batch: {names}, ...): "
            "nothing was updated; lower train.lr or look at these pictures, then run again from the last checkpoint"
        )
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    average.update(task.model, step)
    progress.step += 1
    values["pictures_per_second"] = settings.batch / (time.perf_counter() - started)
    return values


def _evaluate(task: Task, average: AveragedWeights, progress: Progress, folder: Path, log: RunLog) -> None:
    with _weights(task.model, average.state), torch.no_grad():
        measures = task.evaluate(task.model)
        log.evaluation(progress.step, measures)
        if progress.best is None or measures["loss"] < progress.best:
            progress.best = measures["loss"]
            task.save(task.model, folder / "best")


@contextlib.contextmanager
def _weights(model: nn.Module, state: dict[str, Tensor]) -> Iterator[None]:
    """Run a block with `state` in the model, in eval mode, and put everything back."""
    own = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    model.eval()
    try:
        yield
    finally:
        model.load_state_dict(own)
        model.train()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying in the middle of an update; the list is true once one came.

    A second one does not wait for the update, the evaluation or the checkpoint.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
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


def _bar(settings: TrainSettings, progress: Progress, show: bool) -> tqdm[Any]:
    return tqdm(total=settings.steps, initial=progress.step, unit="step", disable=not show, dynamic_ncols=True)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]
