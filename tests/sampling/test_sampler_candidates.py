"""Of a picture's candidates the likeliest under its condition is kept, whatever the batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from starflow import sample
from starflow.flow.model import Flow
from starflow.sampling.policy import SampleSettings
from starflow.sampling.sampler import best_candidates, candidate_noise, noise_from_seeds
from tests.sampling.test_sampler import CONDITION, NULL, draw, starflow, tarflow

LABELS, NONE = torch.tensor([0, 2]), torch.tensor([-1, -1])
CASES = {"starflow": (starflow(), CONDITION, NULL), "tarflow": (tarflow(), LABELS, NONE)}


def by_hand(model: Flow, noise_KCHW: Tensor, condition: Tensor, null: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """One picture's candidates, drawn and judged one by one."""
    drawn = torch.cat([sample(model, one[None], condition, null, weight) for one in noise_KCHW])
    return drawn, torch.cat([model.log_prob(x[None], condition) for x in drawn])


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=12)
@given(
    candidates=st.integers(1, 4),
    at_once=st.integers(1, 9),
    weights=st.sampled_from([(0.0, 0.0), (2.0, 2.0), (0.0, 3.0)]),
)
@torch.no_grad()
def test_the_best_by_hand_is_kept(name: str, candidates: int, at_once: int, weights: tuple[float, float]) -> None:
    model, condition, null = CASES[name]
    noise = draw(2, candidates, 2, 4, 4)
    kept = best_candidates(model, noise, condition, null, SampleSettings(torch.tensor(weights)), at_once)
    for picture, weight in enumerate(weights):
        rows = slice(picture, picture + 1)
        drawn, scores = by_hand(model, noise[picture], condition[rows], null[rows], weight)
        torch.testing.assert_close(kept[picture], drawn[scores.argmax()], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_one_candidate_is_a_plain_sample() -> None:
    model, condition, null = CASES["starflow"]
    noise = draw(2, 1, 2, 4, 4)
    kept = best_candidates(model, noise, condition, null, SampleSettings(2.0), 2)
    assert torch.equal(kept, sample(model, noise[:, 0], condition, null, 2.0))


@torch.no_grad()
def test_a_model_without_a_condition_keeps_its_likeliest() -> None:
    model = starflow(txt_size=0)
    noise = draw(2, 3, 2, 4, 4)
    kept = best_candidates(model, noise, None, None, SampleSettings(), 4)
    every = torch.stack([model.log_prob(sample(model, noise[:, k])) for k in range(3)])
    torch.testing.assert_close(model.log_prob(kept), every.max(0).values, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_a_candidate_that_is_not_finite_is_never_kept() -> None:
    model, condition, null = CASES["starflow"]
    noise = draw(2, 3, 2, 4, 4)
    noise[:, 0] = torch.nan
    assert best_candidates(model, noise, condition, null, SampleSettings(), 6).isfinite().all()


def test_progress_counts_every_candidate() -> None:
    model, condition, null = CASES["starflow"]
    seen: list[tuple[int, int]] = []
    best_candidates(model, draw(2, 3, 2, 4, 4), condition, null, SampleSettings(), 4, lambda *count: seen.append(count))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_first_of_several_draws_is_the_only_one_of_one() -> None:
    several = candidate_noise([0, 7], (2, 4, 4), 3)
    assert torch.equal(several[:, 0], noise_from_seeds([0, 7], (2, 4, 4)))
    assert torch.equal(several[1], candidate_noise([7], (2, 4, 4), 3)[0])
    assert not torch.allclose(several[:, 0], several[:, 1])
