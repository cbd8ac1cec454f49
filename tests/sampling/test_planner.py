"""The planner never picks what is slower, and remembers; what is calibrated is found again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from starflow import STARFlow, sample
from starflow.config import from_dict, to_dict
from starflow.errors import UserError
from starflow.flow.config import STARFlowConfig, config_to_dict
from starflow.nn.kv_cache import CachePool
from starflow.sampling import calibrate as calibrate_module
from starflow.sampling import planner as planner_module
from starflow.sampling.calibrate import CalibrationData, calibrate
from starflow.sampling.planner import Planner, Question, planner_of
from starflow.sampling.policy import (
    BlockPolicy,
    Candidate,
    Choice,
    Convergence,
    Plan,
    Policy,
    SampleSettings,
    Situation,
    keep_policy,
    machine_of,
    read_policy,
)
from starflow.sampling.predictor import Predictor, SolverResult, can_draft
from starflow.sampling.sampler import run
from tests.registry import randomised

CONFIG = STARFlowConfig(
    in_channels=2, img_size=4, channels=48, head_dim=24, num_blocks=3, layers_per_block=1, txt_size=3, txt_dim=5
)
NOISE = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
CONDITION = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_compiled_loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What an earlier test has built is not found, or planners would ask about rounded weights too."""
    monkeypatch.setenv("STARFLOW_CACHE", str(tmp_path / "cache"))


def starflow() -> STARFlow:
    model = randomised(CONFIG, 0)
    assert isinstance(model, STARFlow)
    return model


class Told:
    """A meter that says what it was told, and counts."""

    def __init__(self, tokens: float, step: float, draft: float) -> None:
        self.seconds, self.asked = (tokens, step, draft), 0

    def tokens(self, _predictor: Predictor, _noise: Tensor, *, rounded: bool = False) -> float:
        self.asked += 1
        return self.seconds[0] / (2 if rounded else 1)

    def step(self, _predictor: Predictor, _noise: Tensor, _segment: int | None, *, draft: bool) -> float:
        self.asked += 1
        return self.seconds[2 if draft else 1]


def planned(meter: Told, policy: Policy | None = None, **options: object) -> tuple[STARFlow, list[str]]:
    """A model whose planner has that meter, and the solvers it used, from the data to the noise."""
    model = starflow()
    model.runtime_cache["planner"] = Planner(policy, meter)
    solutions = run(model, NOISE, CONDITION, None, SampleSettings(solver="auto", **options)).solutions  # type: ignore[arg-type]
    decided = planner_of(model).decisions.values()
    assert len(solutions) == 3
    return model, [decision.policy.solver + "+draft" * decision.policy.draft for decision in reversed(list(decided))]


@pytest.mark.parametrize(
    ("tokens", "step", "draft", "expected"),
    [
        (1000.0, 10.0, 5.0, "jacobi+draft"),
        (1000.0, 10.0, 11.0, "jacobi"),
        (1000.0, 165.0, 170.0, "sequential"),  # 6 passes take 990: less, but not by the margin
        (1000.0, 900.0, 900.0, "sequential"),
        (0.02, 0.0, 0.0, "sequential"),  # too little to be worth a measurement
    ],
)
def test_what_is_slower_is_never_chosen(
    monkeypatch: pytest.MonkeyPatch, tokens: float, step: float, draft: float, expected: str
) -> None:
    monkeypatch.setattr(planner_module, "worth_drafting", can_draft)  # whatever this processor emulates
    solvers = planned(Told(tokens, step, draft), tolerance=0.3)[1]
    assert solvers[:2] == [expected, expected]
    assert solvers[2] == "sequential"


def test_what_turns_out_slower_or_does_not_converge_is_given_up() -> None:
    model = starflow()
    planner = planner_of(model)
    situation = Situation("here", "float32", 3, 16, guided=False)
    question = Question(0, 3, situation, 1e-3, None)
    solution = SolverResult(NOISE, 3, torch.zeros(2))
    for outcome, seconds, kept in ((solution, 0.9, "jacobi"), (solution, 1.1, "sequential")):
        planner.decisions.clear()
        planner.meter = Told(1.0, 0.1, 1.0)
        tokens, grid = model.to_tokens(NOISE)
        table = model.block_rotary(next(model.iter_blocks()), model.rotary(grid))
        predictor = Predictor.of(next(model.iter_blocks()), 2, 16, [None], table, None, CachePool())
        assert planner.choose(question, predictor, tokens).solver == "jacobi"
        planner.learn(question, outcome, seconds)
        assert planner.choose(question, predictor, tokens).solver == kept
        planner.learn(question, dataclasses.replace(solution, single=16), 0.1)
        assert planner.choose(question, predictor, tokens).solver == "sequential"


def test_the_first_call_measures_and_the_model_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner_module, "worth_drafting", can_draft)
    meter = Told(1000.0, 10.0, 5.0)
    model, _ = planned(meter, tolerance=0.3)
    assert meter.asked == 3  # blocks of one shape are measured once
    planner = planner_of(model)
    sample(model, NOISE, CONDITION, solver="auto", tolerance=0.3)
    assert planner_of(model) is planner
    assert meter.asked == 3
    sample(model, NOISE.repeat(4, 1, 1, 1), CONDITION.repeat(4, 1, 1), solver="auto", tolerance=0.3)
    assert meter.asked == 6


def test_what_was_chosen_without_the_compiled_loop_is_asked_again_with_it() -> None:
    """Going token by token is several times faster from then on."""
    model, planner = starflow(), Planner(None, Told(1.0, 0.1, 1.0))
    block, (tokens, grid) = next(model.iter_blocks()), model.to_tokens(NOISE)
    predictor = Predictor.of(block, 2, 16, [None], model.block_rotary(block, model.rotary(grid)), None, CachePool())
    eager = Question(0, 3, Situation("here", "float32", 2, 16, guided=False), 1e-3, None)
    assert planner.choose(eager, predictor, tokens).solver == "jacobi"
    planner.meter = Told(0.2, 0.1, 1.0)
    assert planner.choose(eager, predictor, tokens).solver == "jacobi"
    assert planner.choose(dataclasses.replace(eager, compiled=True), predictor, tokens).solver == "sequential"


def policy_for(model: STARFlow, situation: Situation, choice: BlockPolicy) -> Policy:
    convergence = Convergence(0.2, {"noise": 0.4}, (Candidate(choice, 2, 0),))
    choices = tuple(Choice(one, 0.5, 1.0) for one in (choice, choice, BlockPolicy()))
    return Policy(config_to_dict(model.config), 1e-2, (convergence,) * 3, (Plan(situation, choices),))


def test_a_stored_plan_is_taken_where_it_was_measured_and_asks_nothing() -> None:
    choice = BlockPolicy("jacobi", 8, 4, "zero")
    here = Situation(machine_of(torch.device("cpu")), "float32", 2, 16, guided=False)
    meter = Told(1000.0, 1.0, 1.0)
    for situation, asks in (
        (here, False),
        (dataclasses.replace(here, batch=4), False),
        (dataclasses.replace(here, batch=5), True),
        (dataclasses.replace(here, machine="elsewhere"), True),
        (dataclasses.replace(here, dtype="bfloat16"), True),
        (dataclasses.replace(here, tokens=64), True),
        (dataclasses.replace(here, guided=True), True),
    ):
        meter.asked = 0
        model, _ = planned(meter, policy_for(starflow(), situation, choice), tolerance=0.3)
        assert bool(meter.asked) == asks, situation
        assert planner_of(model).policy is not None
    meter.asked = 0
    planned(meter, policy_for(starflow(), here, choice), tolerance=1e-3)
    assert meter.asked, "a plan for a looser tolerance was taken"


def test_a_policy_lies_beside_the_weights(tmp_path: Path) -> None:
    model = starflow()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "policy.json").exists()
    assert STARFlow.from_pretrained(tmp_path).policy is None
    policy = policy_for(model, Situation("here", "float32", 2, 16, guided=False), BlockPolicy("jacobi"))
    keep_policy(model, policy)
    model.save_pretrained(tmp_path)
    loaded = STARFlow.from_pretrained(tmp_path)
    assert planner_of(loaded).policy == policy == read_policy(loaded)
    assert from_dict(Policy, to_dict(policy)) == policy
    assert loaded.policy is not None
    loaded.policy["format"] = 99
    with pytest.raises(UserError, match="policy.json has format 99, expected 1: calibrate again"):
        read_policy(loaded)
    loaded.policy["model"]["channels"] = 96
    assert read_policy(loaded) is None, "a policy of another model was believed"


def test_calibration_finds_what_meets_the_tolerance() -> None:
    model = starflow()
    notes: list[str] = []
    material = CalibrationData(NOISE, CONDITION, CONDITION * 0, SampleSettings(1.0, tolerance=1e-2))
    policy = calibrate(model, material, [1, 3], repeats=1, note=notes.append)
    assert [(plan.situation.batch, plan.situation.guided) for plan in policy.plans] == [
        (1, True),
        (1, False),
        (3, True),
        (3, False),
    ]
    assert len(notes) == 3 + 4
    for known in policy.convergence:
        assert known.starts["zero"] == pytest.approx(1.0)
        for candidate in known.candidates:
            assert candidate.passes + candidate.drafts < 16
    for plan in policy.plans:
        assert plan.deviation < 0.1
        for choice in plan.choices:
            assert choice.residual <= 1e-2
            assert choice.seconds <= choice.sequential_seconds
    assert from_dict(Policy, to_dict(policy)) == policy


def timed(whole: tuple[float, float]) -> Callable[..., list[float]]:
    """A clock by which every block gains tenfold, and whole samples take what it is told."""

    def in_turn(actions: Sequence[functools.partial[object]], _device: torch.device, _rounds: int) -> list[float]:
        for action in actions:
            action()
        if not isinstance(actions[0].args[0], BlockPolicy):
            return list(whole)
        return [1.0 if action.args[0] == BlockPolicy() else 0.1 for action in actions]

    return in_turn


@pytest.mark.parametrize(("before", "after", "kept"), [(1.0, 0.9, True), (1.0, 0.98, False), (1.0, 1.2, False)])
def test_what_wins_block_by_block_must_win_as_a_whole(
    monkeypatch: pytest.MonkeyPatch, before: float, after: float, kept: bool
) -> None:
    """Small gains are smaller than the noise that picks them: the sum of them is timed before it is believed."""
    monkeypatch.setattr(calibrate_module, "in_turn", timed((before, after)))
    monkeypatch.setattr(calibrate_module, "_expected", lambda _block, _candidate: 0.0)
    policy = calibrate(
        starflow(), CalibrationData(NOISE, CONDITION, None, SampleSettings(tolerance=0.3)), [2], 1, lambda _: None
    )
    (plan,) = policy.plans
    solvers = {choice.policy.solver for choice in plan.choices}
    assert ("jacobi" in solvers) == kept
    assert (plan.seconds, plan.sequential_seconds) == ((after, before) if kept else (0.0, 0.0))
    assert (plan.deviation > 0) == kept
