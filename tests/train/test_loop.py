"""The loop: schedules, averages, exact resume, and stopping before harm."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from starflow.errors import UserError
from starflow.io import files
from starflow.train import checkpoint, loop
from starflow.train.checkpoint import checkpoints
from starflow.train.distributed.world import World
from starflow.train.loader import generator
from starflow.train.log import RunLog, read_log
from starflow.train.loop import Interrupted, fit
from starflow.train.settings import ParallelSettings, TrainSettings
from starflow.train.state import AveragedWeights, TrainState, learning_rate, make_optimiser

SETTINGS = TrainSettings(
    steps=12, batch=4, lr=0.05, warmup=2, average=0.9, evaluate_every=5, sample_every=6, checkpoint_every=4
)


class Regression:
    """A batch-normed regression whose data and noise are functions of the step; can be told to misbehave."""

    def __init__(self, nan_at: int | None = None, stop_at: int | None = None) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        self.nan_at, self.stop_at = nan_at, stop_at
        self.spikes: dict[int, float] = {}
        self.saved: list[Path] = []

    def _batch(self, step: int) -> Tensor:
        return torch.randn(4, 3, generator=generator(1, "data", step))

    flops = 0.0

    def batch(self, step: int, rows: range) -> tuple[Tensor, float]:
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        factor = math.nan if step == self.nan_at else self.spikes.get(step, 1.0)
        return self._batch(step)[rows.start : rows.stop], factor

    def loss(self, model: nn.Module, batch: tuple[Tensor, float]) -> tuple[Tensor, dict[str, Tensor]]:
        x, factor = batch
        error = factor * (model(x)[:, 0] - x.sum(1)).square().mean()
        return error, {"error": error}

    def batch_names(self, step: int, rows: range) -> list[str]:
        return [f"picture-{step}-{i}" for i in rows]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        x = self._batch(10_000)
        return {"loss": float((model(x)[:, 0] - x.sum(1)).square().mean())}

    def draw(self, model: nn.Module, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)

    def save(self, model: nn.Module, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), folder / "weights.pt")

    def describe(self, terms: Mapping[str, float]) -> dict[str, str]:
        return {"error": f"{terms['error']:.3f}"}


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_log(folder / "log.jsonl") if "loss" in line]


def run(task: Regression, folder: Path, settings: TrainSettings = SETTINGS) -> None:
    fit(task, settings, folder, show_progress=False)


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    whole, parts = Regression(), Regression(stop_at=6)
    run(whole, tmp_path / "whole")
    with pytest.raises(Interrupted, match="stopped at step 7 of 12; the same command resumes"):
        run(parts, tmp_path / "parts")
    resumed = Regression()
    run(resumed, tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "parts")) == 12
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_a_run_killed_after_a_checkpoint_repeats_what_was_lost(tmp_path: Path) -> None:
    """Log lines after the newest checkpoint are dropped and written again."""
    whole, killed = Regression(), Regression(nan_at=10)
    run(whole, tmp_path / "whole")
    with pytest.raises(UserError):
        run(killed, tmp_path / "killed")
    with (tmp_path / "killed" / "log.jsonl").open("a") as log:
        log.write('{"step": 11, "lo')  # a line that the kill cut
    run(Regression(), tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_nan_stops_before_the_update_and_names_step_and_pictures(tmp_path: Path) -> None:
    task = Regression(nan_at=5)
    with pytest.raises(UserError, match=r"at step 5 \(batch: picture-5-0, picture-5-1") as caught:
        run(task, tmp_path)
    assert "\n" not in str(caught.value)
    assert all(bool(tensor.isfinite().all()) for tensor in task.model.state_dict().values())
    assert checkpoints(tmp_path / "checkpoints")[-1].name == "step_00000004"


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    run(Regression(), tmp_path)
    before = (tmp_path / "log.jsonl").read_text()
    run(Regression(nan_at=0), tmp_path)
    assert (tmp_path / "log.jsonl").read_text() == before


def test_the_two_newest_checkpoints_stay(tmp_path: Path) -> None:
    run(Regression(), tmp_path)
    names = [path.name for path in checkpoints(tmp_path / "checkpoints")]
    assert names == ["step_00000008", "step_00000012"]


def test_the_best_average_is_kept_apart(tmp_path: Path) -> None:
    run(Regression(), tmp_path)
    heldout = [line["heldout_loss"] for line in read_log(tmp_path / "log.jsonl") if "heldout_loss" in line]
    best = torch.load(tmp_path / "best" / "weights.pt", weights_only=True)
    task = Regression()
    task.model.load_state_dict(best)
    assert task.evaluate(task.model.eval())["loss"] == min(heldout)


def test_a_changed_model_is_refused(tmp_path: Path) -> None:
    run(Regression(), tmp_path)
    other = Regression()
    other.model = nn.Sequential(nn.Linear(3, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 1))
    with pytest.raises(UserError, match="belongs to another model"):
        run(other, tmp_path, replace(SETTINGS, steps=20))


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    run(Regression(), tmp_path)
    part = checkpoints(tmp_path / "checkpoints")[-1] / "model_00000.safetensors"
    part.write_bytes(part.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"step_00000012/model_00000\.safetensors is not a whole safetensors file"):
        run(Regression(), tmp_path, replace(SETTINGS, steps=20))


def test_a_damaged_write_leaves_the_old_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: the run ends with the name of the checkpoint that still stands, and a later one goes on from it."""
    write = files.write_tensors

    def full(path: Path, *rest: Any) -> None:
        if "step_00000008" in str(path) and path.name.startswith("exp_avg"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *rest)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(UserError, match=r"No space left on device\): the last checkpoint is still step_00000004"):
        run(Regression(), tmp_path / "full")
    assert [path.name for path in (tmp_path / "full" / "checkpoints").iterdir()] == ["step_00000004"]
    monkeypatch.undo()
    run(Regression(), tmp_path / "full")
    run(Regression(), tmp_path / "whole")
    assert losses(tmp_path / "full") == losses(tmp_path / "whole")


def test_a_log_that_cannot_grow_says_which_checkpoint_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the whole run is on the full disk, a line of its log is what fails first."""
    write = RunLog.step

    def full(log: RunLog, step: int, terms: Mapping[str, float]) -> None:
        if step == 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(log, step, terms)

    monkeypatch.setattr(RunLog, "step", full)
    with pytest.raises(UserError, match=r"No space left on device\): the last checkpoint is still step_00000004; make"):
        run(Regression(), tmp_path / "full")
    monkeypatch.undo()
    run(Regression(), tmp_path / "full")
    run(Regression(), tmp_path / "whole")
    assert losses(tmp_path / "full") == losses(tmp_path / "whole")


def test_an_update_far_above_the_running_norm_is_skipped(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=120, evaluate_every=500, sample_every=500, checkpoint_every=110)
    spiked = Regression()
    spiked.spikes = {50: 1e6, 105: 1e6, 115: 3.0}
    run(spiked, tmp_path, settings)
    counts = [line["skipped"] for line in read_log(tmp_path / "log.jsonl") if "loss" in line]
    assert counts[104] == 0  # update 50 comes before enough norms are known
    assert counts[105:] == [1] * 15
    again = Regression()
    again.spikes = {105: 1e6}
    run(again, tmp_path / "never", replace(settings, skip_above=0.0))
    assert [line for line in read_log(tmp_path / "never" / "log.jsonl") if "loss" in line][-1]["skipped"] == 0


def test_accumulated_parts_give_the_same_losses(tmp_path: Path) -> None:
    """Without the batch norm, whose statistics are of a part: 4 parts of 1 are 1 part of 4."""
    logs = []
    for parts in (1, 2, 4):
        task = Regression()
        torch.manual_seed(3)
        task.model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        run(task, tmp_path / str(parts), replace(SETTINGS, parallel=ParallelSettings(accumulate=parts)))
        logs.append(losses(tmp_path / str(parts)))
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)
    assert logs[2] == pytest.approx(logs[0], rel=1e-5)


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train.batch is 4, expected a multiple of 3"):
        run(Regression(), tmp_path, replace(SETTINGS, parallel=ParallelSettings(accumulate=3)))


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    with (
        files.folder_lock(tmp_path),
        pytest.raises(UserError, match="another process writes to .*: wait until it ends"),
    ):
        run(Regression(), tmp_path)
    run(Regression(), tmp_path)


def test_wandb_is_handed_what_the_log_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[int, dict[str, Any]]] = []
    started: list[dict[str, Any]] = []

    class FakeRun:
        def log(self, values: dict[str, Any], step: int) -> None:
            logged.append((step, values))

        def finish(self) -> None:
            logged.append((-1, {}))

    def init(**options: Any) -> FakeRun:
        started.append(options)
        return FakeRun()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Image=lambda path: path))
    run(Regression(), tmp_path / "run", replace(SETTINGS, wandb="flows"))
    assert (started[0]["project"], started[0]["id"], started[0]["resume"]) == ("flows", "run", "allow")
    lines = [line for line in read_log(tmp_path / "run" / "log.jsonl") if "loss" in line]
    sent = [(step, values["train/loss"]) for step, values in logged if "train/loss" in values]
    assert sent == [(line["step"], line["loss"]) for line in lines]
    assert [step for step, values in logged if "samples" in values] == [6, 12]
    assert [step for step, values in logged if "heldout/heldout_loss" in values] == [5, 10, 12]
    assert logged[-1] == (-1, {})


def test_wandb_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wandb is not installed: pip install wandb"):
        run(Regression(), tmp_path, replace(SETTINGS, wandb="flows"))


def test_signals_are_given_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    run(Regression(), tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_does_not_wait_unless_torchrun_may_have_sent_it() -> None:
    with pytest.raises(KeyboardInterrupt, match="the last checkpoint"), loop._signals(alone=True) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        os.kill(os.getpid(), signal.SIGINT)
    with loop._signals(alone=False) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop


def test_weights_in_training_are_untouched_by_evaluation() -> None:
    task = Regression()
    state = TrainState(task.model, SETTINGS, World())
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    state.average.state["0.weight"].zero_()
    with state.averaged():
        assert not task.model.state_dict()["0.weight"].any()
        assert not task.model.training
    assert task.model.training
    assert all(torch.equal(value, before[key]) for key, value in task.model.state_dict().items())


def test_learning_rate_warms_up_and_falls() -> None:
    cosine = TrainSettings(steps=110, lr=1.0, min_lr=0.1, warmup=10)
    rates = [learning_rate(cosine, step) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    trapezoid = replace(cosine, schedule="trapezoid", decay=0.5)
    assert learning_rate(trapezoid, 54) == 1.0
    assert learning_rate(trapezoid, 110) == pytest.approx(0.1)


def test_averages_follow_the_closed_form() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = AveragedWeights(model, 0.5)
    expected = float(model.weight)
    for step in range(6):
        with torch.no_grad():
            model.weight.fill_(float(step))
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert float(average.state["weight"]) == pytest.approx(expected)


def test_decay_spares_vectors() -> None:
    optimiser = make_optimiser(Regression().model, replace(SETTINGS, weight_decay=0.1))
    decays = {group["weight_decay"]: [p.ndim for p in group["params"]] for group in optimiser.param_groups}
    assert decays == {0.1: [2, 2], 0.0: [1, 1, 1, 1]}


def test_log_lines_are_json_with_step_and_loss(tmp_path: Path) -> None:
    run(Regression(), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert list((tmp_path / "tensorboard").iterdir())
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step_00000006.png", "step_00000012.png"]
