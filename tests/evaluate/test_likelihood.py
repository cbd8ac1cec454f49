"""Bits of a set: closed forms, errors that shrink as they should, seeds, and pictures without a likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from starflow.errors import UserError
from starflow.evaluate import log_likelihoods, mean_bits_per_dim


def test_bits_of_gaussian_data_are_its_entropy() -> None:
    """0.5 log2(2 pi e) a dimension."""
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nats = torch.distributions.Normal(0, 1).log_prob(x).sum(1, keepdim=True)
    found = mean_bits_per_dim(nats, 16, "noised latent")
    expected = 0.5 * math.log2(2 * math.pi * math.e)
    assert abs(found.bits_per_dim - expected) < 4 * found.error
    assert found.nats_per_dim == pytest.approx(found.bits_per_dim * math.log(2))
    assert found.error == pytest.approx(math.sqrt(0.5 * 16) / (16 * math.log(2)) / math.sqrt(4000), rel=0.1)
    assert (found.count, found.draws, found.draw_error, found.not_finite) == (4000, 1, None, 0)


def test_the_draws_error_is_that_of_their_means() -> None:
    nats = torch.tensor([[0.0, 2.0], [4.0, 6.0]], dtype=torch.float64)
    found = mean_bits_per_dim(nats, 1, "noised latent")
    assert found.bits_per_dim == pytest.approx(-3 / math.log(2))
    assert found.draw_error == pytest.approx(1 / math.log(2))  # means 2 and 4: a spread of sqrt 2 over sqrt 2 draws
    assert found.error == pytest.approx(2 / math.log(2))  # pictures 1 and 5: a spread of 4 / sqrt 2 over sqrt 2


def test_every_row_and_draw_has_its_seed_and_the_last_batch_counts() -> None:
    def density(rows: Sequence[int], seeds: Sequence[int]) -> Tensor:
        return torch.tensor([100.0 * row + seed for row, seed in zip(rows, seeds, strict=True)])

    rows = [3, 5, 9, 11, 12]
    expected = torch.tensor([[100.0 * row + row * 2 + draw for draw in range(2)] for row in rows]).double()
    for batch in (1, 2, 64):
        torch.testing.assert_close(log_likelihoods(density, rows, 2, batch), expected)


def test_pictures_without_a_likelihood_are_counted() -> None:
    nats = torch.tensor([[-1.0], [torch.nan], [-3.0], [-torch.inf]]).double()
    found = mean_bits_per_dim(nats, 2, "noised pixels")
    assert (found.count, found.not_finite) == (2, 2)
    assert found.nats_per_dim == pytest.approx(1.0)
    with pytest.raises(UserError, match="not one of 1 pictures"):
        mean_bits_per_dim(nats[1:2], 2, "noised pixels")
    with pytest.raises(UserError, match="0 pictures with 1 draws"):
        log_likelihoods(lambda rows, seeds: nats, [], 1, 4)
