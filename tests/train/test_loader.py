"""Images for training: in order, whatever the workers, from any position, and without those that cannot be read.

Their order: every image once an epoch, one bucket a batch, disjoint over the processes, by step alone.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import count, islice, pairwise
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
    PREFETCH,
    BatchOrder,
    TrainingLoader,
    batch_order,
    read_batches,
    windowed_permutation,
)
from starflow.train.settings import TrainSettings, generator
from tests.data.sources.common import indexed


@pytest.fixture
def pictures(tmp_path: Path) -> IndexedDataset:
    """Thirty pictures in two shapes; the red of each is in its name."""
    folder = tmp_path / "set"
    folder.mkdir()
    for n in range(30):
        Image.new("RGB", (16, 16) if n % 3 else (28, 12), (8 * n, 0, 0)).save(folder / f"{8 * n:03d}.png")
    return indexed(open_source("folder", str(folder)), tmp_path / "index", Buckets(16, 8, ("21:9", "1:1")))


def make_loader(
    pictures: IndexedDataset,
    rank: int = 0,
    size: int = 1,
    workers: int = 0,
    batch: int = 6,
    said: list[str] | None = None,
) -> tuple[TrainingLoader, list[range]]:
    settings = TrainSettings(steps=1, batch=batch)
    parts = settings.rows(rank, size)
    notify = (lambda _: None) if said is None else said.append
    return TrainingLoader(pictures, batch_order(pictures, batch, 0, 0), parts, workers, notify=notify), parts


def reds(pictures: IndexedDataset, loader: TrainingLoader, parts: list[range], steps: range) -> list[list[int]]:
    """What a process sees; each picture is the one that its number says."""
    seen = []
    for step in steps:
        for rows in parts:
            found = loader.batch(step, rows)
            shown = found.images[:, 0, 0, 0].tolist()
            names = [pictures.entry(index).name for index in found.indices.tolist()]
            assert [f"{value:03d}.png" for value in shown] == names == loader.names(step, rows)
            seen.append(shown)
    return seen


@pytest.mark.parametrize("size", [1, 2, 3])
def test_resumed_is_uninterrupted_at_any_number_of_processes(pictures: IndexedDataset, size: int) -> None:
    alone = make_loader(pictures)
    whole = reds(pictures, *alone, range(12))
    for step in range(12):
        shapes = set()
        pieces = []
        for rank in range(size):
            loader, parts = make_loader(pictures, rank, size)  # a process that begins at this step
            found = loader.batch(step, parts[0])
            shapes.add(found.images.shape[1:])
            pieces += found.images[:, 0, 0, 0].tolist()
        assert pieces == whole[step]
        assert len(shapes) == 1, "all processes have one bucket"
    loader, parts = make_loader(pictures)
    assert (
        reds(pictures, loader, parts, range(4)) + reds(pictures, loader, parts, range(9, 12)) == whole[:4] + whole[9:]
    )


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_worker_processes_change_nothing(pictures: IndexedDataset) -> None:
    """Nor does Ctrl-C, which reaches them as well, and which they leave to their parent."""
    expected = reds(pictures, *make_loader(pictures), range(3, 9))
    loader, parts = make_loader(pictures, workers=2)
    first = reds(pictures, loader, parts, range(3, 5))  # both workers have answered, so both are ready
    workers = [child.pid for child in multiprocessing.active_children() if child.pid]
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGINT)
    assert first + reds(pictures, loader, parts, range(5, 9)) == expected


def test_what_cannot_be_read_is_named_once_and_replaced(pictures: IndexedDataset, tmp_path: Path) -> None:
    (tmp_path / "set" / "064.png").write_bytes(b"nothing")
    said: list[str] = []
    loader, (rows,) = make_loader(pictures, said=said)
    sizes = {len(loader.batch(step, rows).images) for step in range(15)}
    assert sizes == {6}
    assert said == ["skipped 064.png: no known image format"]
    assert loader.unreadable == {"064.png"}


def test_with_nothing_to_read_it_stops_with_a_name(pictures: IndexedDataset, tmp_path: Path) -> None:
    for path in (tmp_path / "set").iterdir():
        path.unlink()
    loader, (rows,) = make_loader(pictures)
    with pytest.raises(ImageError, match=r"png is not a readable image \(no such file; nor can its neighbours be read"):
        loader.batch(0, rows)


def test_the_thread_stays_ahead_and_ends(pictures: IndexedDataset) -> None:
    """It takes requests without being asked, until so many answers wait; then it stops, and it ends with its reader."""
    taken: queue.Queue[int] = queue.Queue()

    def requests() -> Iterator[list[int]]:
        for number in count():
            taken.put(number)
            yield [1, 2]

    before = set(threading.enumerate())
    batches = read_batches(pictures, requests(), 0, replace=False)
    assert len(next(batches).images) == 2
    for _ in range(1 + PREFETCH):
        taken.get(timeout=60)  # the answer that was read, and those that wait
    (reader,) = set(threading.enumerate()) - before
    assert taken.qsize() <= 1, "the one that has no place among them yet"
    assert [len(one.images) for one in islice(batches, 2)] == [2, 2]
    del batches
    reader.join(timeout=60)
    assert not reader.is_alive()


def test_an_error_in_the_thread_is_raised_where_it_is_waited_for(pictures: IndexedDataset) -> None:
    batches = read_batches(pictures, [[1], [10**6]], 0, replace=False)
    assert len(next(batches).images) == 1
    with pytest.raises(IndexError):
        next(batches)


def test_requests_end(pictures: IndexedDataset) -> None:
    assert [one.indices.tolist() for one in read_batches(pictures, [[1], [2, 4]], 0, replace=False)] == [[1], [2, 4]]


def test_nothing_is_prepared_beyond_the_last_update(pictures: IndexedDataset) -> None:
    loader, (rows,) = make_loader(pictures)
    loader.steps = 3
    whole = [loader.batch(step, rows).indices.tolist() for step in range(3)]
    assert loader._batches is not None
    assert next(loader._batches, None) is None
    assert loader.batch(3, rows).indices.tolist() == loader.indices(3, rows), "what is asked for all the same is read"
    assert len(whole) == 3
    loader.close()
    assert loader.batch(1, rows).indices.tolist() == whole[1]


def test_steps_in_turn_use_one_stream(pictures: IndexedDataset) -> None:
    loader, (rows,) = make_loader(pictures)
    streams = []
    for step in (0, 1, 2, 7, 8):
        loader.batch(step, rows)
        streams.append(loader._batches)
    assert [one is other for one, other in pairwise(streams)] == [True, True, False, True]
    assert torch.equal(loader.batch(8, range(2)).indices, loader.order(8)[:2]), "other rows are read on the spot"


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


def plain_order(count: int, batch: int, seed: int, step: int) -> torch.Tensor:
    """The batch of an update where one permutation an epoch is cut into batches."""
    epochs = range((step + 1) * batch // count + 1)
    permutations = [torch.randperm(count, generator=generator(seed, "order", epoch)) for epoch in epochs]
    return torch.cat(permutations)[step * batch : (step + 1) * batch]


@given(size=st.integers(1, 50), batch=st.integers(1, 60), step=st.integers(0, 30))
def test_of_one_bucket_it_is_the_plain_order(size: int, batch: int, step: int) -> None:
    assert torch.equal(BatchOrder([torch.arange(size)], batch, 5)(step), plain_order(size, batch, 5, step))


def test_seed_and_epoch_change_it() -> None:
    one, other = (BatchOrder([torch.arange(64)], 64, seed) for seed in (0, 1))
    assert not torch.equal(one(0), one(1))
    assert not torch.equal(one(0), other(0))


@given(size=st.integers(1, 200), window=st.integers(1, 40))
def test_a_windowed_order_is_a_permutation_that_stays_near(size: int, window: int) -> None:
    shuffled = windowed_permutation(size, window, torch.Generator().manual_seed(0))
    assert sorted(shuffled.tolist()) == list(range(size))
    if window < size:
        for part in shuffled.split(BLOCKS_MIXED * window):
            blocks = {number // window for number in part.tolist()}
            assert len(blocks) <= 2 * BLOCKS_MIXED + 1, "of two neighbouring mixtures at most, and the short last block"


@pytest.mark.parametrize("batch", [1, 64])
def test_an_order_of_many_steps_needs_no_counting_up(batch: int) -> None:
    order = BatchOrder(buckets_of([10_000, 5_000, 3]), batch, 0)
    assert len(order(10_000_000)) == batch
