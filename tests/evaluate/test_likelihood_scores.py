"""AUROC against its definition, the classifier's counts, typicality and ratios where raw likelihood fails."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starflow.errors import UserError
from starflow.evaluate import auroc, classify, outliers

SCORES = st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0, float("inf")]), min_size=1, max_size=12)


@given(SCORES, SCORES)
def test_auroc_is_the_share_of_pairs_in_order(inside: list[float], outside: list[float]) -> None:
    pairs = [(high > low) + 0.5 * (high == low) for low in inside for high in outside]
    assert auroc(torch.tensor(inside), torch.tensor(outside)) == pytest.approx(sum(pairs) / len(pairs))


@given(SCORES, SCORES)
def test_auroc_turns_over(inside: list[float], outside: list[float]) -> None:
    one, two = torch.tensor(inside), torch.tensor(outside)
    assert auroc(one, two) + auroc(two, one) == pytest.approx(1)


def test_auroc_of_two_gaussians() -> None:
    """Phi(d / sqrt 2) for unit Gaussians d apart."""
    draw = torch.Generator().manual_seed(0)
    one, two = torch.randn(20_000, generator=draw), torch.randn(20_000, generator=draw) + 1.5
    expected = float(torch.distributions.Normal(0, 1).cdf(torch.tensor(1.5 / 2**0.5)))
    assert auroc(one, two) == pytest.approx(expected, abs=0.01)


def test_auroc_refuses_what_it_cannot_rank() -> None:
    with pytest.raises(UserError, match="0 and 2 scores"):
        auroc(torch.zeros(0), torch.zeros(2))
    with pytest.raises(UserError, match="1 of 4 scores are not numbers"):
        auroc(torch.tensor([0.0, torch.nan]), torch.zeros(2))
    with pytest.raises(UserError, match=r"scores of shapes \(2, 2\) and \(2,\)"):
        auroc(torch.zeros(2, 2), torch.zeros(2))


def test_a_ratio_to_the_background_is_the_best_there_is_against_it() -> None:
    """Of N(0, 1) against N(0, 4), whose ratio orders by |x|: the share of pairs with |2 y| > |x| is 2 atan(2) / pi.

    Inside the narrow foreign set N(0, 1/4), likelihood has 2 atan(1/2) / pi, and the ratio to its own density the rest.
    """
    draw = torch.Generator().manual_seed(0)
    normal = torch.distributions.Normal
    own, training = normal(0, 1), torch.zeros(1)
    inside, x = torch.randn(2, 20_000, generator=draw)
    for scale, likelihood in ((2.0, 0.7048), (0.5, 0.2952)):
        foreign, outside = normal(0, scale), scale * x
        background = (foreign.log_prob(inside), foreign.log_prob(outside))
        found = outliers(own.log_prob(inside), own.log_prob(outside), training, background)
        assert found.auroc_likelihood == pytest.approx(likelihood, abs=0.01)
        assert found.auroc_ratio == pytest.approx(0.7048, abs=0.01)
        assert found.auroc_background == pytest.approx(1 - likelihood, abs=0.01)  # it falls with |x| as its own does
    with pytest.raises(UserError, match="background of 20000 and 3 log-densities for 20000 and 20000 pictures"):
        outliers(inside, outside, training, (inside, outside[:3]))


def test_typicality_sees_pictures_that_are_too_likely() -> None:
    """Foreign pictures in the middle of a Gaussian of 100 dimensions are likelier than all that belong."""
    draw = torch.Generator().manual_seed(0)
    normal = torch.distributions.Normal(0, 1)

    def log_prob(scale: float) -> torch.Tensor:
        found: torch.Tensor = normal.log_prob(scale * torch.randn(500, 100, generator=draw)).sum(1)
        return found

    none = (torch.zeros(500), torch.zeros(500))
    found = outliers(log_prob(1.0), log_prob(0.5), log_prob(1.0), none)
    assert found.auroc_ratio == found.auroc_likelihood  # of a background that prefers nothing
    assert found.auroc_likelihood < 0.01
    assert found.auroc_typicality > 0.99
    assert found.mean_nats_outside > found.mean_nats_inside
    assert (found.count_inside, found.count_outside) == (500, 500)


def test_pictures_without_a_finite_likelihood_are_counted() -> None:
    """They are wrong for the classifier whatever their class, and the strangest there are for both scores."""
    nan, inf = torch.nan, torch.inf
    log_probs = torch.tensor([[nan, nan], [-inf, nan], [nan, -3.0], [-1.0, nan]])
    found = classify(log_probs, torch.tensor([0, 0, 1, 1]))
    assert (found.accuracy, found.count, found.not_finite) == (0.25, 4, 2)
    assert found.confusion == ((0, 0), (1, 1))
    inside, outside = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([nan, -inf, 5.0])
    none = (torch.zeros(3), torch.zeros(3))
    scores = outliers(inside, outside, torch.tensor([-2.0, nan]), none)
    assert scores.auroc_ratio == scores.auroc_likelihood
    assert scores.auroc_likelihood == pytest.approx(2 / 3)
    assert scores.auroc_typicality == 1
    assert (scores.not_finite, scores.mean_nats_outside, scores.count_outside) == (2, 5.0, 3)
    impossible = (torch.zeros(3), torch.tensor([-inf, -inf, 0.0]))  # for the background too
    assert outliers(inside, outside, torch.tensor([-2.0]), impossible).auroc_ratio == scores.auroc_ratio
    with pytest.raises(UserError, match="no finite log-likelihoods of training"):
        outliers(inside, outside, torch.tensor([nan]), none)


def test_the_classifier_counts() -> None:
    log_probs = torch.tensor([[0.0, -1.0], [-3.0, -2.0], [0.0, -5.0], [-9.0, -8.0]])
    found = classify(log_probs, torch.tensor([0, 1, 1, 1]))
    assert found.accuracy == 0.75
    assert found.confusion == ((1, 0), (1, 2))
    assert (found.count, found.not_finite) == (4, 0)
    with pytest.raises(UserError, match=r"\(4, 2\) and labels \(3,\)"):
        classify(log_probs, torch.zeros(3))
    for label in (2, -1):
        with pytest.raises(UserError, match=f"1 labels such as {label}, expected 0 to 1"):
            classify(log_probs, torch.tensor([0, 1, label, 1]))
