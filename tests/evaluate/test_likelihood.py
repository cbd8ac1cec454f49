"""Bits of a set: closed forms, errors that shrink as they should, seeds, and pictures without a likelihood."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from starflow.data.images import to_float
from starflow.errors import UserError
from starflow.evaluate import (
    EvaluationSet,
    log_likelihoods,
    mean_bits_per_dim,
    measure_bits_map,
    measure_one_pass,
    prompt_scores,
    rank_prompts,
)
from starflow.evaluate.dataset import select_rows
from starflow.evaluate.likelihood import measure_classification, measure_likelihoods
from starflow.flow.model import condition_scores
from starflow.pipeline.likelihood import add_training_noise
from tests.cli.conftest import CLASSES
from tests.evaluate.test_report import pictures, pipeline

__all__ = ["pictures"]


def test_bits_of_gaussian_data_are_its_entropy() -> None:
    """0.5 log2(2 pi e) a dimension."""
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nats = torch.distributions.Normal(0, 1).log_prob(x).sum(1, keepdim=True)
    found = mean_bits_per_dim(nats, 16, "noised latent")
    expected = 0.5 * math.log2(2 * math.pi * math.e)
    assert found.error is not None
    assert abs(found.bits_per_dim - expected) < 4 * found.error
    assert found.nats_per_dim == pytest.approx(found.bits_per_dim * math.log(2))
    assert found.error == pytest.approx(math.sqrt(0.5 * 16) / (16 * math.log(2)) / math.sqrt(4000), rel=0.1)
    assert (found.count, found.draws, found.draw_error, found.not_finite) == (4000, 1, None, 0)


def test_the_draws_error_is_that_of_their_means() -> None:
    nats = torch.tensor([[0.0, 2.0], [4.0, 6.0]], dtype=torch.float64)
    found = mean_bits_per_dim(nats, 1, "noised latent")
    assert found.bits_per_dim == pytest.approx(-3 / math.log(2))
    assert found.draw_error == pytest.approx(1 / math.log(2))  # means 2 and 4: a spread of sqrt 2 over sqrt 2 draws
    assert mean_bits_per_dim(nats[:1], 1, "noised latent").error is None  # one picture has no spread
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


def test_scores_of_prompts_are_those_of_the_conditions(pictures: EvaluationSet) -> None:
    made, images = pipeline(), to_float(pictures.heldout.images)
    seeds = list(range(len(images)))
    noised = add_training_noise(made.autoencoder.encode(images), made.config, seeds)
    given, _ = made._condition(CLASSES, noised.shape)
    assert given is not None
    torch.testing.assert_close(prompt_scores(made, images, CLASSES, seeds), condition_scores(made.flow, noised, given))


def test_prompts_that_are_compared_exactly_come_in_the_order_of_log_prob(pictures: EvaluationSet) -> None:
    made, images = pipeline(), to_float(pictures.heldout.images)
    seeds = list(range(len(images)))
    nats = torch.stack([made.log_probs(images, [name] * len(images), seeds)[0] for name in CLASSES], 1)
    assert torch.equal(rank_prompts(made, images, CLASSES, seeds, exact=3), nats.argsort(1, descending=True))
    first = prompt_scores(made, images, CLASSES, seeds).argsort(1, descending=True)
    assert torch.equal(rank_prompts(made, images, CLASSES, seeds), first)
    two = rank_prompts(made, images, CLASSES, seeds, exact=2)
    assert torch.equal(two[:, 2:], first[:, 2:])
    best = nats.gather(1, two[:, :2])
    assert bool((best[:, 0] >= best[:, 1]).all())


def test_prompts_that_cannot_be_ranked(pictures: EvaluationSet) -> None:
    """No prompts, a count below 0; one text is one prompt and not its letters; what is not finite comes last."""
    made, images = pipeline(), to_float(pictures.heldout.images[:2])
    with pytest.raises(UserError, match="there are 0 prompts, expected at least 1"):
        rank_prompts(made, images, [], [0, 1])
    with pytest.raises(UserError, match="exact is -1, expected at least 0"):
        rank_prompts(made, images, CLASSES, [0, 1], exact=-1)
    assert rank_prompts(made, images, CLASSES[0], [0, 1]).tolist() == [[0], [0]]
    with pytest.warns(UserWarning, match="pictures reach 255"):
        prompt_scores(made, images * 0 + 255, CLASSES, [0, 1])


def test_a_prompt_without_a_finite_density_comes_last(pictures: EvaluationSet, monkeypatch: pytest.MonkeyPatch) -> None:
    made, images = pipeline(), to_float(pictures.heldout.images[:2])
    log_probs = type(made).log_probs

    def broken(self: Any, images: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, int]:
        nats, dimensions = log_probs(self, images, prompts, seeds)
        return nats.masked_fill(torch.tensor([prompt == CLASSES[1] for prompt in prompts]), math.nan), dimensions

    monkeypatch.setattr(type(made), "log_probs", broken)
    assert rank_prompts(made, images, CLASSES, [0, 1], exact=3)[:, 2].tolist() == [1, 1]


def test_one_pass_classifies_by_the_largest_score(pictures: EvaluationSet) -> None:
    made, count = pipeline(), len(pictures.heldout)
    found = measure_one_pass(made, pictures.heldout, count, draws=2)
    images = to_float(pictures.heldout.images)
    scores = sum(prompt_scores(made, images, CLASSES, [2 * row + draw for row in range(count)]) for draw in range(2))
    assert isinstance(scores, Tensor)
    right = [CLASSES[k] == label for k, label in zip(scores.argmax(1).tolist(), pictures.heldout.labels, strict=True)]
    assert found.accuracy == pytest.approx(sum(right) / count)
    assert sum(map(sum, found.confusion)) == count


@pytest.mark.parametrize("measure", [measure_one_pass, measure_classification])
def test_nothing_is_classified_without_draws_pictures_or_labels(pictures: EvaluationSet, measure: Any) -> None:
    views = pictures.heldout
    with pytest.raises(UserError, match="6 pictures with 0 draws of the noise: both must be at least 1"):
        measure(pipeline(), views, 0, 0)
    with pytest.raises(UserError, match="0 pictures with 1 draws"):
        measure(pipeline(), select_rows(views, []), 0, 1)
    with pytest.raises(UserError, match="2 of 6 pictures have no label"):
        measure(pipeline(), dataclasses.replace(views, labels=[None, None, *views.labels[2:]]), 0, 1)


def test_the_map_of_bits_sums_to_those_of_the_whole(pictures: EvaluationSet) -> None:
    made = pipeline()
    bits = measure_bits_map(made, pictures.heldout, most=0)
    assert bits.ndim == 2
    assert bits.numel() > 1
    whole = measure_likelihoods(made, pictures, most=0, draws=1)["heldout"]
    assert float(bits.sum()) == pytest.approx(whole.bits_per_dim * whole.dimensions, rel=1e-5)
    assert float(bits.std()) > 0


def test_the_map_of_bits_leaves_out_what_has_no_density(
    pictures: EvaluationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `measure_likelihoods` does: one broken picture says nothing about the others."""
    made = pipeline()
    expected = measure_bits_map(made, select_rows(pictures.heldout, range(1, 6)), most=0)
    maps = type(made).log_prob_maps
    broken = {0}

    def with_gaps(self: Any, images: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        gone = torch.tensor([seed in broken for seed in seeds])
        return maps(self, images, prompts, [max(seed - 1, 0) for seed in seeds]).masked_fill(
            gone[:, None, None], math.nan
        )

    monkeypatch.setattr(type(made), "log_prob_maps", with_gaps)
    torch.testing.assert_close(measure_bits_map(made, pictures.heldout, most=0), expected)
    broken.update(range(6))
    with pytest.raises(UserError, match="not one of 6 pictures has a finite log-likelihood"):
        measure_bits_map(made, pictures.heldout, most=0)
