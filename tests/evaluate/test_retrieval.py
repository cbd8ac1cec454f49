"""Nearest training pictures and the retrieval score."""

from __future__ import annotations

import pytest
import torch

from starflow.errors import UserError
from starflow.evaluate import retrieval
from starflow.evaluate.retrieval import nearest, retrieval_score

REFERENCES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-5.0, 0.1]])


def test_nearest_by_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "CHUNK", 2)
    features = torch.tensor([[3.0, 0.1], [0.2, 9.0], [-1.0, 0.0]])
    rows, cosines = nearest(features, REFERENCES, 2)
    assert rows.tolist() == [[0, 2], [1, 2], [3, 1]]
    assert cosines[0, 0] == pytest.approx(3 / (9 + 0.01) ** 0.5)
    assert torch.all(cosines[:, 0] >= cosines[:, 1])


def test_a_copy_is_its_own_nearest() -> None:
    features = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    rows, cosines = nearest(features * 2, features)
    assert rows[:, 0].tolist() == list(range(20))
    torch.testing.assert_close(cosines, torch.ones(20, 1))


def test_the_score_is_the_share_of_hits() -> None:
    shows = ["apple", "car", "apple", "tree"]
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.9], [-1.0, 0.0]])
    found = retrieval_score(features, ["apple", "apple", "apple", "tree"], REFERENCES, shows)
    assert found.score == 0.75
    assert found.hits == (True, False, True, True)
    assert found.nearest == (0, 1, 2, 3)


def test_what_cannot_be_scored_is_refused() -> None:
    shows = ["apple", "car", "apple", "tree"]
    with pytest.raises(UserError, match="no training picture shows 'boat'"):
        retrieval_score(REFERENCES[:2], ["apple", "boat"], REFERENCES, shows)
    with pytest.raises(UserError, match="2 samples with 1 concepts"):
        retrieval_score(REFERENCES[:2], ["apple"], REFERENCES, shows)
    with pytest.raises(UserError, match="cannot find 5 nearest"):
        nearest(REFERENCES, REFERENCES, 5)
    with pytest.raises(UserError, match="cannot find 1 nearest"):
        nearest(REFERENCES[:, :1], REFERENCES)
