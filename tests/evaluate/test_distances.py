"""Distances against closed forms and against scipy's matrix square root.

Precision, recall, density and coverage: hand-made sets, a slow copy of the definitions, and their limits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from starflow.errors import UserError
from starflow.evaluate import distances, precision_recall
from starflow.evaluate.distances import (
    Distance,
    Moments,
    PrecisionRecall,
    frechet_distance,
    frechet_of_moments,
    inception_score,
    kernel_distance,
    load_moments,
    moments,
    save_moments,
)


def gaussian(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(width: int, seed: int) -> Tensor:
    root = gaussian(width, width, seed)
    return root @ root.T


def test_moments_are_numpys_in_float64() -> None:
    features = gaussian(20, 3, 0).float()
    found = moments(features)
    assert found.count == 20
    assert found.mean.dtype == found.covariance.dtype == torch.float64
    numpy.testing.assert_allclose(found.mean, features.double().numpy().mean(0), atol=1e-12)
    numpy.testing.assert_allclose(found.covariance, numpy.cov(features.double().numpy().T), atol=1e-12)


def test_frechet_of_one_dimensional_gaussians() -> None:
    """(m1 - m2)^2 + (s1 - s2)^2."""
    one = Moments(2, torch.tensor([1.0]).double(), torch.tensor([[4.0]]).double())
    two = Moments(2, torch.tensor([-2.0]).double(), torch.tensor([[0.25]]).double())
    assert frechet_of_moments(one, two) == pytest.approx(9 + 1.5**2, abs=1e-12)


def test_frechet_against_scipy() -> None:
    from scipy.linalg import sqrtm

    one, two = (Moments(9, gaussian(6, 1, seed)[:, 0], covariance(6, seed)) for seed in (1, 2))
    product = sqrtm(one.covariance.numpy() @ two.covariance.numpy()).real
    expected = float((one.mean - two.mean).square().sum())
    expected += float(one.covariance.trace() + two.covariance.trace()) - 2 * float(numpy.trace(product))
    assert frechet_of_moments(one, two) == pytest.approx(expected, rel=1e-9)
    assert frechet_of_moments(two, one) == pytest.approx(expected, rel=1e-9)


def test_frechet_where_the_covariance_is_singular() -> None:
    """Fewer pictures than features: the root stays real, and a set is at distance zero from itself."""
    features = gaussian(5, 12, 3)
    assert frechet_distance(features, features).value == pytest.approx(0, abs=1e-6)
    shifted = frechet_distance(features, features + 2)
    assert shifted == Distance(pytest.approx(12 * 4.0, rel=1e-6), 5, 5)  # type: ignore[arg-type]


def kernel(x: Tensor, y: Tensor) -> float:
    return float((x @ y / len(x) + 1) ** 3)


def test_kernel_distance_is_the_sum_over_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = gaussian(5, 4, 4), gaussian(7, 4, 5) + 1
    within = sum(kernel(first[i], first[j]) for i in range(5) for j in range(5) if i != j) / 20
    within += sum(kernel(second[i], second[j]) for i in range(7) for j in range(7) if i != j) / 42
    between = sum(kernel(x, y) for x in first for y in second) / 35
    for chunk in (distances.CHUNK, 2):
        monkeypatch.setattr(distances, "CHUNK", chunk)
        assert kernel_distance(first, second) == Distance(pytest.approx(within - 2 * between), 5, 7)  # type: ignore[arg-type]


def test_kernel_distance_is_unbiased() -> None:
    """Over many small draws from one distribution its mean is zero, within three standard errors."""
    values = torch.tensor([kernel_distance(gaussian(8, 3, 2 * i), gaussian(8, 3, 2 * i + 1)).value for i in range(400)])
    assert abs(float(values.mean())) < 3 * float(values.std()) / math.sqrt(len(values))
    assert float(values.min()) < 0 < float(values.max())


def test_kernel_distance_in_closed_form() -> None:
    """Points: k(x,x) + k(y,y) - 2 k(x,y) for two sets that are each one point, repeated."""
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    expected = 1.5**3 + 3.0**3 - 2 * 1.0**3
    assert kernel_distance(x.repeat(3, 1), y.repeat(4, 1)).value == pytest.approx(expected)


def test_both_grow_with_the_shift() -> None:
    base = gaussian(200, 4, 6)
    for distance in (frechet_distance, kernel_distance):
        values = [distance(base, gaussian(200, 4, 7) + shift).value for shift in (0.0, 0.5, 1.0)]
        assert values == sorted(values)
        assert values[2] > 4 * abs(values[0])


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_bad_features_are_refused(distance: Callable[[Tensor, Tensor], Distance]) -> None:
    good = gaussian(4, 3, 8)
    with pytest.raises(UserError, match="at least two pictures"):
        distance(good[:1], good)
    with pytest.raises(UserError, match="use one network"):
        distance(good, good[:, :2])
    bad = good.clone()
    bad[1, 2] = torch.nan
    with pytest.raises(UserError, match="1 of 4 pictures have features that are not finite"):
        distance(good, bad)


def test_moments_survive_a_file(tmp_path: Path) -> None:
    made = moments(gaussian(30, 4, 0))
    save_moments(tmp_path / "m.safetensors", made, "mobilenetv2")
    found = load_moments(tmp_path / "m.safetensors", "mobilenetv2")
    assert found.count == 30
    assert torch.equal(found.mean, made.mean)
    assert torch.equal(found.covariance, made.covariance)
    assert frechet_of_moments(found, made) == pytest.approx(0, abs=1e-9)
    with pytest.raises(UserError, match="moments of 'mobilenetv2' features, expected 'inception'"):
        load_moments(tmp_path / "m.safetensors", "inception")


def test_reference_files_of_adm_are_read_without_unpickling(tmp_path: Path) -> None:
    made = moments(gaussian(30, 4, 0))
    numpy.savez(tmp_path / "ref.npz", mu=made.mean.numpy(), sigma=made.covariance.numpy(), mu_s=numpy.zeros(3))
    found = load_moments(tmp_path / "ref.npz", "inception")
    assert found.count == 0  # such a file does not say
    assert frechet_of_moments(found, made) == pytest.approx(0, abs=1e-9)
    numpy.savez(tmp_path / "objects.npz", mu=numpy.array([{}], dtype=object), sigma=made.covariance.numpy())
    numpy.savez(tmp_path / "other.npz", arr_0=numpy.zeros(3))
    numpy.savez(tmp_path / "shapes.npz", mu=numpy.zeros(3), sigma=numpy.zeros((4, 4)))
    (tmp_path / "text.npz").write_text("no archive")
    for name, part in (
        ("objects.npz", "is no reference file"),
        ("other.npz", "'mu' and 'sigma'"),
        ("shapes.npz", "expected"),
        ("text.npz", "is no reference file"),
        ("none.npz", "no such file"),
    ):
        with pytest.raises(UserError, match=part):
            load_moments(tmp_path / name, "inception")


def test_inception_score_of_known_classes() -> None:
    """Sure and even over K classes gives K; the same class for all, or no idea at all, gives 1."""
    sure = 100.0 * torch.eye(5).repeat(4, 1)
    assert inception_score(sure, 1).value == pytest.approx(5)
    assert inception_score(torch.zeros(20, 5), 4).value == pytest.approx(1)
    assert inception_score(sure[:1].repeat(20, 1), 4).value == pytest.approx(1)
    found = inception_score(sure[:18], 4)  # 18 pictures in 4 splits: none is dropped
    assert found.count == 18
    with pytest.raises(UserError, match="splits"):
        inception_score(sure, 21)


def test_inception_score_against_the_definition() -> None:
    logits = gaussian(12, 5, 3)
    probabilities = logits.softmax(1)
    marginal = probabilities.mean(0)
    divergence = (probabilities * (probabilities / marginal).log()).sum(1).mean()
    assert inception_score(logits, 1).value == pytest.approx(math.exp(divergence))


def points(count: int, seed: int, width: int = 2) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(samples: Tensor, references: Tensor, k: int) -> PrecisionRecall:
    """The four definitions, loop by loop."""

    def radius(own: Tensor, index: int) -> float:
        return sorted(float((own[index] - other).norm()) for other in own)[k]

    real = [radius(references, index) for index in range(len(references))]
    made = [radius(samples, index) for index in range(len(samples))]
    near = [[float((one - other).norm()) <= real[j] for j, other in enumerate(references)] for one in samples]
    back = [any(float((one - other).norm()) <= made[i] for i, other in enumerate(samples)) for one in references]
    return PrecisionRecall(
        precision=sum(any(row) for row in near) / len(samples),
        recall=sum(back) / len(references),
        density=sum(map(sum, near)) / (k * len(samples)),
        coverage=sum(any(row[j] for row in near) for j in range(len(references))) / len(references),
        samples=len(samples),
        references=len(references),
        neighbours=k,
    )


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.integers(4, 12), st.integers(4, 12), st.integers(1, 3))
def test_against_the_definitions(seed: int, count: int, references: int, k: int) -> None:
    one, two = points(count, seed), points(references, seed + 1)
    found, expected = precision_recall(one, two, k), by_definition(one, two, k)
    assert vars(found) == pytest.approx(vars(expected))


def test_a_copy_is_perfect_and_a_far_set_is_not() -> None:
    real = points(50, 0)
    same = precision_recall(real, real)
    assert (same.precision, same.recall, same.coverage) == (1.0, 1.0, 1.0)
    far = precision_recall(points(40, 1) + 100, real)
    assert (far.precision, far.recall, far.density, far.coverage) == (0.0, 0.0, 0.0, 0.0)
    assert (far.samples, far.references) == (40, 50)


def test_one_mode_of_two_has_precision_without_recall() -> None:
    real = torch.cat([points(60, 0), points(60, 1) + 50])
    found = precision_recall(points(60, 2) * 0.5, real)
    assert found.precision > 0.95
    assert found.recall < 0.55
    assert found.coverage < 0.55


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = points(30, 3), points(25, 4)
    whole = precision_recall(one, two)
    monkeypatch.setattr("starflow.evaluate.distances.CHUNK", 7)
    assert precision_recall(one, two) == whole


def test_bad_input() -> None:
    with pytest.raises(UserError, match="5 neighbours among 5 samples and 9 references"):
        precision_recall(points(5, 0), points(9, 1))
    with pytest.raises(UserError, match="shapes"):
        precision_recall(points(9, 0), points(9, 1, width=3))
    with pytest.raises(UserError, match="not finite"):
        precision_recall(points(9, 0).fill_(torch.nan), points(9, 1))
