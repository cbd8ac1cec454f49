"""Nine shapes of one area."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starflow.data.buckets import ASPECTS, Buckets, aspect_ratio
from starflow.errors import UserError


@settings(max_examples=40, derandomize=True)
@given(side=st.integers(8, 64).map(lambda n: 16 * n), multiple=st.sampled_from([1, 8, 16]))
def test_areas_are_equal_up_to_the_multiple(side: int, multiple: int) -> None:
    buckets = Buckets(side, multiple, ASPECTS)
    for bucket, aspect in enumerate(ASPECTS):
        width, height = buckets.size(bucket)
        assert width % multiple == height % multiple == 0
        root = aspect_ratio(aspect) ** 0.5
        assert abs(width - side * root) <= multiple / 2
        assert abs(height - side / root) <= multiple / 2
        if multiple == 1:
            assert buckets.nearest(width, height) == bucket


def test_of_one_ratio_the_caption_says_nothing() -> None:
    assert Buckets(64, 8).caption("a cat", 0) == "a cat"
    assert Buckets(64, 8, ASPECTS).caption("a cat", 4) == "a cat\n in a 1:1 aspect ratio.\n"


def test_a_side_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="side 60 for an autoencoder and patches of 8 pixels: choose a multiple of 8"):
        Buckets(60, 8)
