"""Rotary tables and rotations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from starflow.nn.layers import condition_positions, grid_positions, rotary_table, rotate

CPU = torch.device("cpu")


def grid(rows: int, columns: int, span: float) -> Tensor:
    return grid_positions(rows, columns, span, dtype=torch.float64, device=CPU)


def test_any_shape_of_a_grid_covers_the_same_span() -> None:
    """Row r and column c at r L / sqrt(h w): the area of what the positions cover is L^2."""
    positions = grid(3, 12, 8.0).view(3, 12, 3)
    step = 8.0 / 6
    torch.testing.assert_close(positions[2, 5], torch.tensor([2 * step, 5 * step, 0.0], dtype=torch.float64))
    assert math.isclose(3 * 12 * step * step, 64)


def test_a_condition_spreads_over_the_span_on_an_axis_of_its_own() -> None:
    positions = condition_positions(4, 8.0, dtype=torch.float64, device=CPU)
    assert positions.tolist() == [[0, 0, 0], [0, 0, 2], [0, 0, 4], [0, 0, 6]]


def test_frequencies_without_and_with_a_condition_axis() -> None:
    one = torch.ones(1, 3, dtype=torch.float64)
    plain = rotary_table(one, 32, 0)[0, 0]
    angles = torch.atan2(plain[:, 1], plain[:, 0])
    expected = [10_000 ** (-2 * i / 16) for i in range(8)]
    torch.testing.assert_close(angles, torch.tensor(expected * 2, dtype=torch.float64))
    conditional = rotary_table(one, 32, 8)[0, 0]
    angles = torch.atan2(conditional[:, 1], conditional[:, 0])
    expected = [10_000 ** (-2 * i / 8) for i in range(4)] * 2 + [10_000 ** (-i / 8) for i in range(8)]
    torch.testing.assert_close(angles, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("half_split", [False, True])
def test_scores_depend_on_distances_alone(half_split: bool) -> None:
    """Shift every position by the same vector: no product of a rotated query and key changes."""
    positions = grid(3, 4, 5.0)
    shifted = positions + torch.tensor([1.7, -0.3, 2.0], dtype=torch.float64)
    q, k = torch.randn(2, 1, 12, 2, 24, dtype=torch.float64)
    scores = []
    for table in (rotary_table(positions, 24, 8), rotary_table(shifted, 24, 8)):
        turned_q, turned_k = (rotate(x, table, half_split=half_split) for x in (q, k))
        scores.append(torch.einsum("btnh,bsnh->bnts", turned_q, turned_k))
    torch.testing.assert_close(scores[0], scores[1])
    assert not torch.allclose(scores[0], torch.einsum("btnh,bsnh->bnts", q, k), atol=0.1)


def test_the_two_pairings_are_one_rotation_of_reordered_channels() -> None:
    table = rotary_table(grid(2, 3, 3.0), 16, 0)
    x = torch.randn(2, 6, 3, 16, dtype=torch.float64)
    evens_then_odds = torch.cat((torch.arange(0, 16, 2), torch.arange(1, 16, 2)))
    adjacent = rotate(x, table, half_split=False)[..., evens_then_odds]
    torch.testing.assert_close(rotate(x[..., evens_then_odds], table, half_split=True), adjacent)


@contextmanager
def as_if_compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        yield


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_form_for_compilers_is_the_same_rotation(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    table = rotary_table(grid(2, 3, 3.0), 16, 0)
    x = torch.randn(2, 6, 3, 16, dtype=torch.float64).to(dtype)
    eager = rotate(x, table, half_split=False)
    with as_if_compiling(monkeypatch):
        compiled = rotate(x, table, half_split=False)
    assert eager.dtype == compiled.dtype == dtype
    torch.testing.assert_close(eager, compiled)


def test_a_head_too_narrow_for_the_plane_keeps_its_condition_axis() -> None:
    """d = 16 with a condition leaves m = 0 angles for rows and columns."""
    table = rotary_table(torch.tensor([[3.0, 2.0, 0.0], [0.0, 0.0, 1.0]]), 16, 8)
    assert table.shape == (2, 1, 8, 2)
    assert (table[0, 0, :, 1] == 0).all()
    assert (table[1, 0, :, 1] != 0).all()
