"""The loop: exact resume, micro-batches, and stopping before harm."""

from __future__ import annotations

import errno
import math
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from starflow.errors import UserError
from starflow.io import files
from starflow.train import loop
from starflow.train.checkpoint import checkpoints
from starflow.train.loop import Interrupted, Pace
from starflow.train.run import RunLog, read_log
from starflow.train.settings import ParallelSettings
from tests.train.regression import SETTINGS, Regression, losses, run


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


def test_the_best_average_is_kept_apart(tmp_path: Path) -> None:
    run(Regression(), tmp_path)
    heldout = [line["heldout_loss"] for line in read_log(tmp_path / "log.jsonl") if "heldout_loss" in line]
    best = torch.load(tmp_path / "best" / "weights.pt", weights_only=True)
    task = Regression()
    task.model.load_state_dict(best)
    assert task.evaluate(task.model.eval())["loss"] == min(heldout)


class Diverging(Regression):
    """Its held-out loss is not finite at these evaluations, which count from 0."""

    def __init__(self, *bad: int) -> None:
        super().__init__()
        self.bad, self.evaluations = bad, 0

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        self.evaluations += 1
        return {"loss": math.nan} if self.evaluations - 1 in self.bad else super().evaluate(model)


def test_a_first_evaluation_that_is_not_finite_does_not_freeze_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(Diverging(0), tmp_path)
    assert (tmp_path / "best" / "weights.pt").is_file()
    assert "warning: the held-out loss at step 5 is nan" in capsys.readouterr().err
    lines = read_log(tmp_path / "log.jsonl")
    assert next(line["heldout_loss"] for line in lines if "heldout_loss" in line) is None
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()


def test_a_run_whose_last_evaluation_is_not_finite_does_not_finish(tmp_path: Path) -> None:
    for _ in range(2):  # the same command again does not take the model either
        with pytest.raises(UserError, match="held-out loss at step 12, the last, is nan"):
            run(Diverging(0, 1, 2), tmp_path)
        assert not (tmp_path / "model").exists()
        assert checkpoints(tmp_path / "checkpoints")[-1].name == "step_00000008"


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that clamps may hide them from the held-out loss."""
    task = Regression()
    monkeypatch.setattr(task, "evaluate", lambda model: {"loss": 1.0})
    next(task.model.buffers()).fill_(math.inf)  # the running mean, which training mode does not read
    with pytest.raises(UserError, match="the average of 1.running_mean is not finite"):
        run(task, tmp_path)
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "best").exists()


def test_the_time_to_go_is_said_once() -> None:
    pace = Pace(steps=1000)
    said = [pace.after_update(step, 100.0 + 0.9 * step) for step in range(5, 30)]  # the first took 100 s
    assert [text for text in said if text] == [
        "about 15 min to go: 990 updates of 0.90 s, evaluations and samples apart"
    ]
    short = Pace(steps=20)
    assert not any(short.after_update(step, float(step)) for step in range(1, 20))


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


def test_micro_batches_give_the_same_losses(tmp_path: Path) -> None:
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
