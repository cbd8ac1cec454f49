"""How a block converges: figures in closed form, and policies that meet what they promise."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor

from starflow.sampling.calibrate import EXTRA_PASSES, SolvedBlock, contraction_of, converge, initial_guess
from starflow.sampling.predictor import Predictor, ignore_progress
from starflow.sampling.sampler import solve_by_policy
from starflow.sampling.solvers import relative_change
from tests.sampling.cpu.common import solving
from tests.sampling.cpu.test_engine import text_case


class Linear:
    """A stand-in for a predictor: mu_n = slope x_(n-1), sigma = 1, so x_n = z_n + slope x_(n-1)."""

    first, tokens, engine = 0, 12, None

    def __init__(self, slope: float) -> None:
        self.slope = slope

    def prefill(self) -> None:
        pass

    def inputs(self, x_BNC: Tensor, start: int, stop: int) -> Tensor:
        return torch.nn.functional.pad(x_BNC, (0, 0, 1, 0))[:, start:stop]

    def predict(self, inputs_BTC: Tensor, _start: int) -> tuple[Tensor, Tensor]:
        return self.slope * inputs_BTC, torch.zeros_like(inputs_BTC)


def linear_block(slope: float) -> SolvedBlock:
    """The answer is a geometric series: of the noise 1, 0, 0, .. it is slope^n."""
    noise = torch.zeros(1, 12, 1)
    noise[:, 0] = 1.0
    answer = (slope ** torch.arange(12.0)).view(1, 12, 1)
    return SolvedBlock(cast(Predictor, Linear(slope)), noise, answer)


@pytest.mark.parametrize("slope", [0.1, 0.5, 0.9])
def test_a_linear_block_contracts_by_its_slope(slope: float) -> None:
    """Each pass makes one token more exact, and x_k - x is slope^(k+1) times a shorter geometric series."""
    block = linear_block(slope)
    errors = [block.x_BNC.clone() for _ in range(5)]
    for steps, error in enumerate(errors):
        error[:, : 1 + steps] = 0  # from the noise, the first token is right at once
    norms = [float(error.norm()) for error in errors]
    expected = (norms[4] / norms[0]) ** 0.25
    assert contraction_of(block, block.noise_BNC) == pytest.approx(expected, rel=1e-4)
    assert abs(contraction_of(block, block.noise_BNC) - slope) < 0.15


def test_initial_guesses_in_closed_form() -> None:
    block = linear_block(0.5)
    assert torch.equal(initial_guess(block, "noise"), block.noise_BNC)
    assert initial_guess(block, "zero").abs().max() == 0
    assert initial_guess(block, "previous").flatten()[:4].tolist() == [0.0, 1.0, 0.5, 0.25]
    # mu of the token before, and its own noise: x_1 = slope x_-1 + z_1 = 0, x_2 = slope x_0 + z_2 = slope, ..
    assert initial_guess(block, "gaussian").flatten()[:4].tolist() == [1.0, 0.0, 0.5, 0.25]


@pytest.fixture(params=[0, 1], ids=["plain", "guided"])
def block(request: pytest.FixtureRequest) -> SolvedBlock:
    given = solving(text_case(), request.param, 1.5)
    return SolvedBlock(given.predictor, given.noise_BNC, given.eager())


@torch.no_grad()
def test_every_policy_that_is_said_to_converge_does_so_again(block: SolvedBlock) -> None:
    known = converge(block, 1e-2)
    assert known.distances["zero"] == pytest.approx(1.0)
    assert known.distances["noise"] == pytest.approx(float(relative_change(block.x_BNC, block.noise_BNC).max()))
    assert known.converged
    assert [one.passes for one in known.converged] == sorted(one.passes for one in known.converged)
    for one in known.converged:
        assert one.passes + one.drafts < 16
        again = solve_by_policy(block.predictor, block.noise_BNC, one.policy, 1e-2, ignore_progress)
        assert (again.iterations, again.drafts, again.sequential_tokens) == (one.passes, one.drafts, 0)
        assert (again.residual_B <= 1e-2).all()
        if one.policy.segment is None:
            assert one.policy.max_iterations == max(one.passes, one.drafts) + EXTRA_PASSES


@torch.no_grad()
def test_what_does_not_converge_is_not_named(block: SolvedBlock) -> None:
    assert converge(block, 1e-12).converged == ()
