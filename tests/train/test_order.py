"""The data's order: every picture once an epoch, one bucket a batch, disjoint over the processes, by step alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starflow.train.order import BLOCKS_MIXED, Order, windowed_permutation
from starflow.train.randomness import batch_indices
from starflow.train.settings import TrainSettings

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any)


def buckets_of(sizes: list[int]) -> list[torch.Tensor]:
    """Consecutive numbers, cut into buckets."""
    return list(torch.arange(sum(sizes)).split(sizes))


@given(sizes=SIZES, batch=st.integers(1, 12), seed=st.integers(0, 3), window=st.sampled_from([0, 3, 7]))
def test_every_bucket_comes_whole_epoch_after_epoch(sizes: list[int], batch: int, seed: int, window: int) -> None:
    if len(sizes) == 1 or not any(size >= batch for size in sizes):
        sizes = [*sizes, batch]
    buckets = buckets_of(sizes)
    order = Order(buckets, batch, seed, window)
    epochs = 3
    streams: list[list[int]] = [[] for _ in sizes]
    for step in range(sum(epochs * size // batch for size in sizes)):
        numbers = order(step)
        bucket = order.bucket(step)
        assert len(numbers) == batch
        assert set(numbers.tolist()) <= set(buckets[bucket].tolist()), "one bucket a batch"
        streams[bucket] += numbers.tolist()
    for stream, size, own in zip(streams, sizes, buckets, strict=True):
        assert len(stream) == epochs * size // batch * batch
        whole = len(stream) // size if size else 0
        for epoch in range(whole):
            assert sorted(stream[epoch * size : (epoch + 1) * size]) == own.tolist(), "once an epoch"
        rest = Counter(stream[whole * size :])
        assert not rest or max(rest.values()) == 1


@given(sizes=SIZES, each=st.integers(1, 4), processes=st.sampled_from([1, 2, 3]), step=st.integers(0, 200))
def test_processes_see_disjoint_parts_that_make_up_the_batch(
    sizes: list[int], each: int, processes: int, step: int
) -> None:
    batch = 6 * each
    sizes = [*sizes, batch]
    settings = TrainSettings(steps=1, batch=batch)
    parts = []
    for rank in range(processes):
        order = Order(buckets_of(sizes), batch, 0)  # a process's own, asked for this step alone
        parts += [order(step)[rows.start : rows.stop] for rows in settings.rows(rank, processes)]
    assert torch.equal(torch.cat(parts), Order(buckets_of(sizes), batch, 0)(step))
    places = [place for rank in range(processes) for rows in settings.rows(rank, processes) for place in rows]
    assert sorted(places) == list(range(batch))


@given(size=st.integers(1, 50), batch=st.integers(1, 60), step=st.integers(0, 30))
def test_of_one_bucket_it_is_the_plain_order(size: int, batch: int, step: int) -> None:
    assert torch.equal(Order([torch.arange(size)], batch, 5)(step), batch_indices(size, batch, 5, step))


def test_seed_and_epoch_change_it() -> None:
    one, other = (Order([torch.arange(64)], 64, seed) for seed in (0, 1))
    assert not torch.equal(one(0), one(1))
    assert not torch.equal(one(0), other(0))


@given(count=st.integers(1, 200), window=st.integers(1, 40))
def test_a_windowed_order_is_a_permutation_that_stays_near(count: int, window: int) -> None:
    shuffled = windowed_permutation(count, window, torch.Generator().manual_seed(0))
    assert sorted(shuffled.tolist()) == list(range(count))
    if window < count:
        for part in shuffled.split(BLOCKS_MIXED * window):
            blocks = {number // window for number in part.tolist()}
            assert len(blocks) <= 2 * BLOCKS_MIXED + 1, "of two neighbouring mixtures at most, and the short last block"


@pytest.mark.parametrize("batch", [1, 64])
def test_an_order_of_many_steps_needs_no_counting_up(batch: int) -> None:
    order = Order(buckets_of([10_000, 5_000, 3]), batch, 0)
    assert len(order(10_000_000)) == batch
