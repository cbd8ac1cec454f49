"""Fitting: the split, early stopping, the best weights, and what a failure says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from starflow.density.fit import FitOptions, FitResult, fit, mean_log_prob, split_rows
from starflow.errors import UserError

QUIET: dict[str, Any] = {"progress": False}


class Mean(nn.Module):
    """A normal density of unknown mean: its maximum likelihood is the mean of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(1))

    def log_prob(self, rows: Sequence[Tensor]) -> Tensor:
        return -0.5 * (rows[0][:, 0] - self.mean).square()


def rows(count: int = 200) -> Tensor:
    return 3 + torch.randn(count, 1, generator=torch.Generator().manual_seed(0))


def run(data: Tensor, **options: Any) -> tuple[Mean, FitResult]:
    model = Mean()
    return model, fit(model, model.log_prob, [data], FitOptions(**{**QUIET, **options}))


def test_it_finds_the_maximum_and_stops_by_itself() -> None:
    model, result = run(rows(), lr=0.05, batch_size=50, max_epochs=500, patience=9)
    options = FitOptions()
    train, heldout = split_rows(200, options)
    assert abs(model.mean - rows()[train].mean()) < 0.1
    assert result.epochs < 500
    assert result.epochs - result.best_epoch == 9
    assert result.heldout_nats == max(result.heldout_history) == result.heldout_history[result.best_epoch - 1]
    assert mean_log_prob(model.log_prob, [rows()], heldout) == pytest.approx(result.heldout_nats)


def test_the_best_weights_are_kept_and_not_the_last() -> None:
    """The first epoch is the best one here: with a huge step every later one overshoots further."""
    model, result = run(rows(), lr=3.0, batch_size=400, max_epochs=3)
    assert result.heldout_history[0] > result.heldout_history[1]
    assert model.mean.item() == pytest.approx(3.0)


def test_an_interrupted_fit_leaves_the_best_weights() -> None:
    model = Mean()
    calls = iter(range(100))

    def log_prob(some: Sequence[Tensor]) -> Tensor:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return model.log_prob(some)

    with pytest.raises(KeyboardInterrupt):
        fit(model, log_prob, [rows()], FitOptions(lr=3.0, batch_size=400, **QUIET))
    assert model.mean.item() == pytest.approx(3.0)


def test_a_fit_that_fails_at_once_leaves_the_weights_that_it_was_given() -> None:
    model = Mean()
    calls = iter(range(100))

    def log_prob(some: Sequence[Tensor]) -> Tensor:
        return model.log_prob(some) * (torch.nan if next(calls) else 1.0)

    with pytest.raises(UserError, match="expected a finite one"):
        fit(model, log_prob, [rows()], FitOptions(lr=3.0, batch_size=50, **QUIET))
    assert model.mean.item() == 0.0


def test_a_seed_repeats_everything_and_another_does_not() -> None:
    (first, one), (_, again), (_, other) = (run(rows(), seed=seed, max_epochs=3, batch_size=20) for seed in (0, 0, 1))
    assert one.heldout_history == again.heldout_history
    assert one.train_history == again.train_history
    assert one.heldout_history != other.heldout_history
    assert first.mean.item() > 0


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    run(rows(), max_epochs=1)
    assert torch.equal(torch.rand(1), expected)


def test_the_split_is_a_partition() -> None:
    for count, fraction in ((2, 0.9), (10, 0.1), (11, 0.5), (3, 0.01)):
        train, heldout = split_rows(count, FitOptions(validation_fraction=fraction))
        assert len(train) >= 1 <= len(heldout)
        assert sorted(torch.cat([train, heldout]).tolist()) == list(range(count))


def test_a_likelihood_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(UserError, match="log-likelihood of epoch 1 is nan, expected a finite one: lower lr"):
        run(torch.full((10, 1), torch.inf))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epochs": 0}, "max_epochs is 0, expected at least 1"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0, expected between 0 and 1"),
        ({"lr": 0.0}, "lr is 0.0, expected above 0"),
        ({"lr": float("inf")}, "lr is inf, expected above 0 and finite"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FitOptions(**options)


def test_one_row_is_too_few() -> None:
    with pytest.raises(UserError, match="1 rows to fit, expected at least 2"):
        run(rows(1))
