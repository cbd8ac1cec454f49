"""Pictures to tokens: order of channels, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch

from starflow.errors import UserError
from starflow.flow.tokens import grid_of, in_order, patchify, unpatchify


def picture() -> torch.Tensor:
    """(1, 2, 4, 6); a number says where it stands: channel, row, column."""
    channel, row, column = torch.meshgrid(torch.arange(2), torch.arange(4), torch.arange(6), indexing="ij")
    return (100 * channel + 10 * row + column)[None]


def test_channel_is_fastest() -> None:
    tokens = patchify(picture(), 2)
    assert tokens.shape == (1, 6, 8)
    assert tokens[0, 4].tolist() == [22, 122, 23, 123, 32, 132, 33, 133]


def test_channel_is_slowest_in_tarflow() -> None:
    tokens = patchify(picture(), 2, channel_first=True)
    assert tokens[0, 4].tolist() == [22, 23, 32, 33, 122, 123, 132, 133]


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize("patch", [1, 2])
def test_unpatchify_is_the_inverse(patch: int, channel_first: bool) -> None:
    x = picture()
    tokens = patchify(x, patch, channel_first=channel_first)
    assert torch.equal(unpatchify(tokens, (4 // patch, 6 // patch), patch, channel_first=channel_first), x)


def test_an_order_is_its_own_inverse() -> None:
    tokens = patchify(picture(), 1)
    assert torch.equal(in_order(tokens, backwards=False), tokens)
    backwards = in_order(tokens, backwards=True)
    assert torch.equal(backwards[:, 0], tokens[:, -1])
    assert torch.equal(in_order(backwards, backwards=True), tokens)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 4, 4), "shape (1, 3, 4, 4), expected (batch, 2, height, width)"),
        ((2, 4, 4), "shape (2, 4, 4), expected (batch, 2, height, width)"),
        ((1, 2, 4, 5), "4 x 5, expected sides that are multiples of the patch, 2"),
        ((1, 2, 0, 4), "0 x 4"),
    ],
)
def test_other_shapes_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        grid_of(torch.zeros(shape), channels=2, patch=2)
