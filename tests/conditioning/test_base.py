"""Class labels: one-hot with one more for "none", found by name or number."""

from __future__ import annotations

import pytest
import torch

from starflow.conditioning import load_conditioner
from starflow.conditioning.base import ClassLabels, ConditionerSpec
from starflow.config import from_dict, to_dict
from starflow.errors import UserError

NAMES = ("food fruit", "Sky and weather", "7")


@pytest.fixture
def labels() -> ClassLabels:
    return ClassLabels(NAMES)


def test_one_token_one_hot(labels: ClassLabels) -> None:
    tokens = labels.encode(["food fruit", "sky AND weather ", "1", ""])
    assert torch.equal(tokens[:, 0], torch.eye(4)[[0, 1, 1, 3]])
    assert tokens.shape == (4, 1, 4)


def test_null_is_the_last(labels: ClassLabels) -> None:
    assert torch.equal(labels.null(2), torch.eye(4)[[3, 3]].unsqueeze(1))


def test_a_name_wins_over_a_number(labels: ClassLabels) -> None:
    assert labels.number("7") == 2


@pytest.mark.parametrize("label", ["3", "4", "-1", "1.0", "²"])
def test_a_number_outside_is_unknown(labels: ClassLabels, label: str) -> None:
    with pytest.raises(UserError, match=r"unknown class .* \(or a number from 0 to 2\)"):
        labels.encode([label])


def test_an_unknown_name_names_the_nearest(labels: ClassLabels) -> None:
    with pytest.raises(UserError, match=r"unknown class 'fod fruits': did you mean 'food fruit'\?"):
        labels.encode(["food fruit", "fod fruits"])
    with pytest.raises(UserError, match="known are food fruit, Sky and weather, 7"):
        labels.encode(["zzz"])


@pytest.mark.parametrize("names", [(), ("a", "A"), ("a", "")])
def test_names_must_differ(names: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="give each class its own"):
        ClassLabels(names)


def test_the_spec_survives_json_and_builds_it_again(labels: ClassLabels) -> None:
    spec = from_dict(ConditionerSpec, to_dict(labels.spec))
    assert spec == labels.spec
    again = load_conditioner(spec)
    assert torch.equal(again.encode(["7"]), labels.encode(["7"]))


@pytest.mark.parametrize(("size", "dim"), [(0, 4), (4, 0), (-1, 4)])
def test_a_condition_has_tokens_and_width(size: int, dim: int) -> None:
    with pytest.raises(UserError, match=f"{size} tokens of width {dim}: both must be at least 1"):
        ConditionerSpec("text", size, dim)


def test_results_follow_the_network(labels: ClassLabels) -> None:
    labels.network.double()
    assert labels.encode(["7"]).dtype == torch.float64


def test_equal_names_may_be_written_otherwise() -> None:
    labels = ClassLabels(["Cafe\u0301", "tea "])
    assert [labels.number(name) for name in (" caf\xe9", "TEA", "")] == [0, 1, 2]
    with pytest.raises(UserError, match="2 class names of which 1 differ"):
        ClassLabels(["cafe\u0301", "caf\xe9"])
    with pytest.raises(UserError, match="no class names, expected one or more"):
        ClassLabels([])
