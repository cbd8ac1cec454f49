"""How a block is solved depends on the model, its policy.json, the device and the options: on nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starflow import STARFlow, sample
from starflow.config import from_dict, to_dict
from starflow.errors import UserError
from starflow.flow.config import config_to_dict
from starflow.flow.model import Flow
from starflow.sampling.policy import (
    BlockChoice,
    BlockPolicy,
    ConvergedPolicy,
    Convergence,
    Policy,
    SampleSettings,
    Timing,
    block_policies,
    keep_policy,
    read_policy,
)
from starflow.sampling.sampler import run
from tests.sampling.test_sampler import CONDITION, NOISE, NULL, draw, starflow

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ITERATED = BlockPolicy("jacobi", 8, 4, "zero")
TOKEN_BY_TOKEN = BlockPolicy()


def policy_of(model: Flow, **changes: Any) -> Policy:
    """What a calibration of a model of two blocks may have written: the first is iterated."""
    convergence = Convergence(0.2, {"noise": 0.4}, (ConvergedPolicy(ITERATED, 2, 0),))
    choices = tuple(BlockChoice(one, (Timing(2, 0.5, 1.0, 1e-3),)) for one in (ITERATED, TOKEN_BY_TOKEN))
    samples = (Timing(2, 0.8, 1.0, 1e-3),)
    known = Policy(
        config_to_dict(model.config), "cpu", "here", "float32", 16, True, 1e-2, (convergence,) * 2, choices, samples
    )
    return dataclasses.replace(known, **changes)


def calibrated(**changes: Any) -> STARFlow:
    """A model with such a policy beside its weights."""
    model = starflow()
    keep_policy(model, policy_of(model, **changes))
    return model


def test_without_a_policy_every_block_goes_token_by_token() -> None:
    model = starflow()
    assert block_policies(model, SampleSettings(solver="auto"), CPU) == [TOKEN_BY_TOKEN] * 2
    assert torch.equal(sample(model, NOISE, CONDITION, solver="auto"), sample(model, NOISE, CONDITION))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 5),
    side=st.sampled_from([2, 4]),
    weight=st.sampled_from([0.0, 2.0]),
    loose=st.sampled_from([1.0, 2.0]),
)
def test_a_stored_choice_is_taken_whatever_the_batch_the_size_and_the_guidance(
    batch: int, side: int, weight: float, loose: float
) -> None:
    model = calibrated()
    chosen = SampleSettings(weight, "auto", tolerance=loose * 1e-2)
    named = dataclasses.replace(chosen, solver=[ITERATED, TOKEN_BY_TOKEN])
    inputs = draw(batch, 2, side, side), draw(batch, 3, 5), NULL[:1]
    ours, theirs = (run(model, *inputs, one) for one in (chosen, named))
    assert torch.equal(ours.x, theirs.x)
    assert [one.iterations for one in ours.solutions] == [one.iterations for one in theirs.solutions]
    assert ours.solutions[1].iterations == side * side


@pytest.mark.parametrize(
    ("device", "tolerance", "expected"),
    [(CPU, 1e-2, ITERATED), (CPU, 9e-3, TOKEN_BY_TOKEN), (CPU, 0.0, TOKEN_BY_TOKEN), (CUDA, 1e-2, TOKEN_BY_TOKEN)],
)
def test_a_stored_choice_is_for_its_device_and_a_tolerance_that_it_met(
    device: torch.device, tolerance: float, expected: BlockPolicy
) -> None:
    assert block_policies(calibrated(), SampleSettings(solver="auto", tolerance=tolerance), device)[0] == expected


def test_a_solver_that_is_named_is_taken() -> None:
    model = calibrated()
    for solver, expected in (
        ("sequential", [TOKEN_BY_TOKEN] * 2),
        ("jacobi", [BlockPolicy("jacobi", 3)] * 2),
        ([TOKEN_BY_TOKEN, ITERATED], [TOKEN_BY_TOKEN, ITERATED]),
    ):
        segment = 3 if solver == "jacobi" else None
        assert block_policies(model, SampleSettings(solver=solver, segment=segment), CPU) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", ["sequential", "auto"])
def test_a_segment_that_nothing_takes_is_said(solver: Any) -> None:
    with pytest.warns(UserWarning, match=f"segment is 8, but solver '{solver}' takes none: it is for 'jacobi'"):
        sample(starflow(), NOISE, CONDITION, solver=solver, segment=8)


def test_a_policy_lies_beside_the_weights(tmp_path: Path) -> None:
    model = starflow()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "policy.json").exists()
    assert STARFlow.from_pretrained(tmp_path).policy is None
    calibrated().save_pretrained(tmp_path)
    loaded = STARFlow.from_pretrained(tmp_path)
    assert read_policy(loaded) == policy_of(model) == from_dict(Policy, to_dict(policy_of(model)))


def test_a_policy_of_another_model_is_not_believed() -> None:
    model = calibrated()
    assert model.policy is not None
    model.policy["model"]["channels"] = 96
    assert read_policy(model) is None
    assert block_policies(model, SampleSettings(solver="auto", tolerance=1e-2), CPU) == [TOKEN_BY_TOKEN] * 2


def test_a_policy_of_the_first_format_is_said_and_left_aside() -> None:
    model = calibrated()
    assert model.policy is not None
    model.policy |= {"format": 1, "plans": []}
    with pytest.warns(UserWarning, match="policy.json has format 1, with a choice a batch size, .*: calibrate again"):
        assert torch.equal(sample(model, NOISE, CONDITION, solver="auto"), sample(model, NOISE, CONDITION))


def test_a_policy_that_cannot_be_read_is_refused() -> None:
    model = calibrated(format=99)
    with pytest.raises(UserError, match="policy.json has format 99, expected 2: calibrate again"):
        sample(model, NOISE, CONDITION, solver="auto")
    model = calibrated(choices=())
    with pytest.raises(UserError, match="has 0 choices, expected one for each of 2 blocks: calibrate again"):
        sample(model, NOISE, CONDITION, solver="auto")
    assert sample(model, NOISE, CONDITION).isfinite().all(), "a named solver asks no policy"
