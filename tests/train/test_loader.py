"""Pictures for training: in order, whatever the workers, from any position, and without those that cannot be read.

The data's order: every picture once an epoch, one bucket a batch, disjoint over the processes, by step alone.
"""

from __future__ import annotations

import time
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from starflow.data.buckets import Buckets
from starflow.data.images import ImageError
from starflow.data.index import IndexedDataset, open_source
from starflow.train.loader import (
    BLOCKS_MIXED,
    BatchOrder,
    TrainingLoader,
    batch_indices,
    batch_order,
    read_batches,
    windowed_permutation,
)
from starflow.train.settings import TrainSettings
from tests.data.sources.common import indexed


@pytest.fixture
def pictures(tmp_path: Path) -> IndexedDataset:
    """Thirty pictures in two shapes; the red of each is in its name."""
    folder = tmp_path / "set"
    folder.mkdir()
    for n in range(30):
        Image.new("RGB", (16, 16) if n % 3 else (28, 12), (8 * n, 0, 0)).save(folder / f"{8 * n:03d}.png")
    return indexed(open_source("folder", str(folder)), tmp_path / "index", Buckets(16, 8, ("21:9", "1:1")))


def feed_of(
    pictures: IndexedDataset,
    rank: int = 0,
    size: int = 1,
    workers: int = 0,
    batch: int = 6,
    said: list[str] | None = None,
) -> tuple[TrainingLoader, list[range]]:
    settings = TrainSettings(steps=1, batch=batch)
    parts = settings.rows(rank, size)
    say = (lambda _: None) if said is None else said.append
    return TrainingLoader(pictures, batch_order(pictures, batch, 0, 0), parts, workers, say=say), parts


def reds(pictures: IndexedDataset, feed: TrainingLoader, parts: list[range], steps: range) -> list[list[int]]:
    """What a process sees; each picture is the one that its number says."""
    seen = []
    for step in steps:
        for rows in parts:
            found = feed.batch(step, rows)
            shown = found.images[:, 0, 0, 0].tolist()
            names = [pictures.entry(number).name for number in found.numbers.tolist()]
            assert [f"{value:03d}.png" for value in shown] == names == feed.names(step, rows)
            seen.append(shown)
    return seen


@pytest.mark.parametrize("size", [1, 2, 3])
def test_resumed_is_uninterrupted_at_any_number_of_processes(pictures: IndexedDataset, size: int) -> None:
    alone = feed_of(pictures)
    whole = reds(pictures, *alone, range(12))
    for step in range(12):
        shapes = set()
        pieces = []
        for rank in range(size):
            feed, parts = feed_of(pictures, rank, size)  # a process that begins at this step
            found = feed.batch(step, parts[0])
            shapes.add(found.images.shape[1:])
            pieces += found.images[:, 0, 0, 0].tolist()
        assert pieces == whole[step]
        assert len(shapes) == 1, "all processes have one bucket"
    feed, parts = feed_of(pictures)
    assert reds(pictures, feed, parts, range(4)) + reds(pictures, feed, parts, range(9, 12)) == whole[:4] + whole[9:]


def test_worker_processes_change_nothing(pictures: IndexedDataset) -> None:
    expected = reds(pictures, *feed_of(pictures), range(3, 9))
    assert reds(pictures, *feed_of(pictures, workers=2), range(3, 9)) == expected


def test_what_cannot_be_read_is_named_once_and_replaced(pictures: IndexedDataset, tmp_path: Path) -> None:
    (tmp_path / "set" / "064.png").write_bytes(b"nothing")
    said: list[str] = []
    feed, (rows,) = feed_of(pictures, said=said)
    sizes = {len(feed.batch(step, rows).images) for step in range(15)}
    assert sizes == {6}
    assert said == ["skipped 064.png: no known image format"]
    assert feed.unreadable == {"064.png"}


def test_with_nothing_to_read_it_stops_with_a_name(pictures: IndexedDataset, tmp_path: Path) -> None:
    for path in (tmp_path / "set").iterdir():
        path.unlink()
    feed, (rows,) = feed_of(pictures)
    with pytest.raises(ImageError, match=r"png is not a readable image \(no such file; nor can its neighbours be read"):
        feed.batch(0, rows)


def test_the_thread_stays_ahead_and_ends(pictures: IndexedDataset) -> None:
    endless = read_batches(pictures, ([1, 2] for _ in iter(int, 1)), 0, replace=False)
    assert [len(one.images) for one in islice(endless, 3)] == [2, 2, 2]
    del endless
    time.sleep(0.3)
    waits = []
    feed, (rows,) = feed_of(pictures)
    for step in range(8):
        started = time.perf_counter()
        feed.batch(step, rows)
        waits.append(time.perf_counter() - started)
        time.sleep(0.03)
    assert sorted(waits)[len(waits) // 2] < 0.02, "the next batch is ready when it is asked for"


def test_nothing_is_prepared_beyond_the_last_update(pictures: IndexedDataset) -> None:
    feed, (rows,) = feed_of(pictures)
    feed.steps = 3
    whole = [feed.batch(step, rows).numbers.tolist() for step in range(3)]
    assert feed._coming is not None
    assert next(feed._coming, None) is None
    assert feed.batch(3, rows).numbers.tolist() == feed.numbers(3, rows), "what is asked for all the same is read"
    assert len(whole) == 3
    feed.close()
    assert feed.batch(1, rows).numbers.tolist() == whole[1]


def test_steps_in_turn_use_one_stream(pictures: IndexedDataset) -> None:
    feed, (rows,) = feed_of(pictures)
    streams = []
    for step in (0, 1, 2, 7, 8):
        feed.batch(step, rows)
        streams.append(feed._coming)
    assert [one is other for one, other in pairwise(streams)] == [True, True, False, True]
    assert torch.equal(feed.batch(8, range(2)).numbers, feed.order(8)[:2]), "other rows are read on the spot"


SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any)


def buckets_of(sizes: list[int]) -> list[torch.Tensor]:
    """Consecutive numbers, cut into buckets."""
    return list(torch.arange(sum(sizes)).split(sizes))


@given(sizes=SIZES, batch=st.integers(1, 12), seed=st.integers(0, 3), window=st.sampled_from([0, 3, 7]))
def test_every_bucket_comes_whole_epoch_after_epoch(sizes: list[int], batch: int, seed: int, window: int) -> None:
    if len(sizes) == 1 or not any(size >= batch for size in sizes):
        sizes = [*sizes, batch]
    buckets = buckets_of(sizes)
    order = BatchOrder(buckets, batch, seed, window)
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
        order = BatchOrder(buckets_of(sizes), batch, 0)  # a process's own, asked for this step alone
        parts += [order(step)[rows.start : rows.stop] for rows in settings.rows(rank, processes)]
    assert torch.equal(torch.cat(parts), BatchOrder(buckets_of(sizes), batch, 0)(step))
    places = [place for rank in range(processes) for rows in settings.rows(rank, processes) for place in rows]
    assert sorted(places) == list(range(batch))


@given(size=st.integers(1, 50), batch=st.integers(1, 60), step=st.integers(0, 30))
def test_of_one_bucket_it_is_the_plain_order(size: int, batch: int, step: int) -> None:
    assert torch.equal(BatchOrder([torch.arange(size)], batch, 5)(step), batch_indices(size, batch, 5, step))


def test_seed_and_epoch_change_it() -> None:
    one, other = (BatchOrder([torch.arange(64)], 64, seed) for seed in (0, 1))
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
    order = BatchOrder(buckets_of([10_000, 5_000, 3]), batch, 0)
    assert len(order(10_000_000)) == batch
