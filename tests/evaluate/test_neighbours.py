"""Precision, recall, density and coverage: hand-made sets, a slow copy of the definitions, and their limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from starflow.errors import UserError
from starflow.evaluate import fidelity
from starflow.evaluate.neighbours import Fidelity


def points(count: int, seed: int, width: int = 2) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(samples: Tensor, references: Tensor, k: int) -> Fidelity:
    """The four definitions, loop by loop."""

    def radius(own: Tensor, index: int) -> float:
        return sorted(float((own[index] - other).norm()) for other in own)[k]

    real = [radius(references, index) for index in range(len(references))]
    made = [radius(samples, index) for index in range(len(samples))]
    near = [[float((one - other).norm()) <= real[j] for j, other in enumerate(references)] for one in samples]
    back = [any(float((one - other).norm()) <= made[i] for i, other in enumerate(samples)) for one in references]
    return Fidelity(
        precision=sum(any(row) for row in near) / len(samples),
        recall=sum(back) / len(references),
        density=sum(map(sum, near)) / (k * len(samples)),
        coverage=sum(any(row[j] for row in near) for j in range(len(references))) / len(references),
        samples=len(samples),
        references=len(references),
        neighbours=k,
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(4, 12), st.integers(4, 12), st.integers(1, 3))
def test_against_the_definitions(seed: int, count: int, references: int, k: int) -> None:
    one, two = points(count, seed), points(references, seed + 1)
    found, expected = fidelity(one, two, k), by_definition(one, two, k)
    assert vars(found) == pytest.approx(vars(expected))


def test_a_copy_is_perfect_and_a_far_set_is_not() -> None:
    real = points(50, 0)
    same = fidelity(real, real)
    assert (same.precision, same.recall, same.coverage) == (1.0, 1.0, 1.0)
    far = fidelity(points(40, 1) + 100, real)
    assert (far.precision, far.recall, far.density, far.coverage) == (0.0, 0.0, 0.0, 0.0)
    assert (far.samples, far.references) == (40, 50)


def test_one_mode_of_two_has_precision_without_recall() -> None:
    real = torch.cat([points(60, 0), points(60, 1) + 50])
    found = fidelity(points(60, 2) * 0.5, real)
    assert found.precision > 0.95
    assert found.recall < 0.55
    assert found.coverage < 0.55


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = points(30, 3), points(25, 4)
    whole = fidelity(one, two)
    monkeypatch.setattr("starflow.evaluate.neighbours.CHUNK", 7)
    assert fidelity(one, two) == whole


def test_bad_input() -> None:
    with pytest.raises(UserError, match="5 neighbours among 5 samples and 9 references"):
        fidelity(points(5, 0), points(9, 1))
    with pytest.raises(UserError, match="shapes"):
        fidelity(points(9, 0), points(9, 1, width=3))
    with pytest.raises(UserError, match="not finite"):
        fidelity(points(9, 0).fill_(torch.nan), points(9, 1))
