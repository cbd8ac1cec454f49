"""What is calibrated meets the tolerance, wins at every batch size and as a whole, and is otherwise not chosen."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from starflow.config import from_dict, to_dict
from starflow.flow.model import Flow
from starflow.sampling import calibrate as calibrate_module
from starflow.sampling.calibrate import (
    CalibrationData,
    Timings,
    calibrate,
    clearly_faster,
    fastest,
    in_turn,
    seconds_of,
)
from starflow.sampling.policy import BlockPolicy, Policy, SampleSettings, Timing, block_policies, keep_policy
from starflow.sampling.sampler import run
from tests.sampling.test_sampler import draw, starflow

NOISE, CONDITION = draw(2, 2, 4, 4), draw(2, 3, 5)
CPU = torch.device("cpu")
ITERATED = BlockPolicy("jacobi", 8, 4, "zero")


@pytest.fixture(autouse=True)
def no_compiled_loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Calibrating builds nothing here: its logic is the same, and a build takes seconds."""
    monkeypatch.setenv("STARFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("starflow.sampling.cpu.engine.CpuEngine.build", lambda _: None)


def data(tolerance: float, weight: float = 0.0) -> CalibrationData:
    return CalibrationData(NOISE, CONDITION, CONDITION * 0, SampleSettings(weight, tolerance=tolerance))


def test_what_is_chosen_met_the_tolerance_and_is_used_by_auto() -> None:
    model, notes = starflow(num_blocks=3), list[str]()
    policy = calibrate(model, data(1e-2, 1.0), [1, 3], repeats=1, note=notes.append)
    assert from_dict(Policy, to_dict(policy)) == policy
    assert (policy.device, policy.tokens, policy.guided, policy.tolerance) == ("cpu", 16, True, 1e-2)
    assert len(policy.choices) == len(policy.convergence) == 3
    assert notes[0] == "how each block converges"
    for choice in policy.choices:
        assert [timing.batch for timing in choice.timings] == [1, 3]
        for timing in choice.timings:
            assert timing.error <= 1e-2
            assert timing.seconds <= timing.sequential_seconds
    keep_policy(model, policy)
    chosen = block_policies(model, SampleSettings(solver="auto", tolerance=1e-2), CPU)
    assert chosen == [choice.policy for choice in policy.choices]


def told_times(ratio: float, whole: Sequence[float]) -> Callable[..., list[float]]:
    """A clock by which iterating a block takes `ratio` times as long, and whole samples what each batch is told."""
    left = list(whole)

    def told(actions: Sequence[functools.partial[object]], _device: torch.device, _rounds: int) -> list[float]:
        for action in actions:
            action()
        policies = [action.args[0] for action in actions]
        if isinstance(policies[0], BlockPolicy):
            return [1.0 if policy == BlockPolicy() else ratio for policy in policies]
        return [1.0, left.pop(0)]

    return told


@pytest.mark.parametrize(
    ("ratio", "whole", "kept"),
    [
        (0.1, [0.5, 0.5], True),
        (0.95, [0.5, 0.5], False),  # blocks are faster, but not clearly
        (0.1, [0.99, 0.97], False),  # the whole is not clearly faster
        (0.1, [0.5, 1.01], False),  # the whole is slower at one batch size
    ],
)
def test_what_wins_block_by_block_must_win_as_a_whole(
    monkeypatch: pytest.MonkeyPatch, ratio: float, whole: list[float], kept: bool
) -> None:
    """Small gains are smaller than the noise that picks them: the sum of them is timed before it is believed."""
    monkeypatch.setattr(calibrate_module, "in_turn", told_times(ratio, whole))
    monkeypatch.setattr(calibrate_module, "seconds_of", lambda action, _device: action() or 0.0)
    policy = calibrate(starflow(), data(0.3), [1, 2], 1, lambda _: None)
    solvers = {choice.policy.solver for choice in policy.choices}
    assert ("jacobi" in solvers) == kept
    assert [sample.seconds for sample in policy.samples] == (whole if kept else [])
    assert all(sample.error > 0 for sample in policy.samples)
    assert all([timing.batch for timing in choice.timings] == [1, 2] for choice in policy.choices)


def test_what_is_slower_at_one_batch_size_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.1, 0.1, 1.01, 1.01])  # two blocks at each of two batch sizes

    def told(actions: Sequence[functools.partial[object]], _device: torch.device, _rounds: int) -> list[float]:
        ratio = next(times)
        return [1.0 if action.args[0] == BlockPolicy() else ratio for action in actions]

    monkeypatch.setattr(calibrate_module, "in_turn", told)
    monkeypatch.setattr(calibrate_module, "seconds_of", lambda action, _device: action() or 0.0)
    policy = calibrate(starflow(), data(0.3), [1, 2], 1, lambda _: None)
    assert {choice.policy for choice in policy.choices} == {BlockPolicy()}


def test_what_needs_help_token_by_token_is_never_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast it looks: with a tolerance of nearly 0 every sequence falls back."""
    monkeypatch.setattr(calibrate_module, "in_turn", told_times(0.1, [0.1]))
    policy = calibrate(starflow(), data(1e-12), [2], 1, lambda _: None)
    assert {choice.policy for choice in policy.choices} == {BlockPolicy()}
    assert policy.samples == ()


def test_what_is_slow_at_its_first_run_is_not_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first run is dear: only going token by token is left to be timed in turn."""
    timed: list[int] = []

    def count(actions: Sequence[Callable[[], object]], _device: torch.device, _rounds: int) -> list[float]:
        timed.append(len(actions))
        return [1.0] * len(actions)

    def first_run(action: functools.partial[object], _device: torch.device) -> float:
        action()
        return 1.0 if action.args[0] == BlockPolicy() else 1.6

    monkeypatch.setattr(calibrate_module, "in_turn", count)
    monkeypatch.setattr(calibrate_module, "seconds_of", first_run)
    policy = calibrate(starflow(), data(0.3), [2], 1, lambda _: None)
    assert any(known.converged for known in policy.convergence)
    assert timed == [1, 1]


def test_the_fastest_on_the_mean_is_chosen() -> None:
    other = BlockPolicy("jacobi", 4)
    timings: Timings = {
        BlockPolicy(): (Timing(1, 1.0, 1.0), Timing(4, 2.0, 2.0)),
        ITERATED: (Timing(1, 0.9, 1.0), Timing(4, 0.8, 2.0)),  # 0.9 and 0.4: 0.6 on the mean
        other: (Timing(1, 0.5, 1.0), Timing(4, 1.9, 2.0)),  # 0.5 and 0.95: 0.69
    }
    assert fastest(timings).policy == ITERATED
    assert fastest(timings).timings == timings[ITERATED]
    assert fastest({BlockPolicy(): timings[BlockPolicy()]}).policy == BlockPolicy()
    assert not clearly_faster([Timing(1, 0.5, 1.0), Timing(4, 1.001, 1.0)], 1.1)


def test_fewer_pictures_than_the_batch_are_repeated() -> None:
    five = data(1e-2).first(5)
    assert torch.equal(five.noise, NOISE[[0, 1, 0, 1, 0]])
    assert five.condition is not None
    assert torch.equal(five.condition, CONDITION[[0, 1, 0, 1, 0]])


def test_calibrating_draws_what_sampling_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks that are judged are those of a sample: their answers, one after the other, are the sample itself."""
    model, seen = starflow(), list[Tensor]()
    known = data(1e-2, 2.0)
    calibrate_module.visit_blocks(model, known, lambda _, block: seen.append(block.x_BNC))
    exact = run(model, NOISE, CONDITION, CONDITION * 0, SampleSettings(2.0))
    for ours, theirs in zip(reversed(seen), exact.solutions, strict=True):
        assert torch.equal(ours, theirs.x_BNC)


def test_runs_take_turns_and_the_fastest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    times = iter([3.0, 5.0, 4.0, 2.0])
    monkeypatch.setattr(calibrate_module, "seconds_of", lambda action, _device: action() or next(times))
    assert in_turn([lambda: order.append("a"), lambda: order.append("b")], CPU, 2) == [3.0, 2.0]
    assert order == ["a", "b", "a", "b"]
    assert seconds_of(lambda: None, CPU) >= 0


def test_a_device_that_computes_on_its_own_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    seconds_of(lambda: None, CPU)
    assert waited == []
    seconds_of(lambda: None, torch.device("cuda"))
    assert waited == [torch.device("cuda")] * 2


def test_a_model_is_left_without_gradients_and_as_it_was() -> None:
    model: Flow = starflow()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate(model, data(1e-2), [1], 1, lambda _: None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.is_grad_enabled()
    assert model.policy is None, "keeping the policy is the caller's business"
