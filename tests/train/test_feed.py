"""Pictures for training: in order, whatever the workers, from any position, and without those that cannot be read."""

from __future__ import annotations

import time
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.data.test_sources import indexed

from starflow.data.buckets import Buckets
from starflow.data.index import IndexedPictures
from starflow.data.records import ImageError
from starflow.data.sources import open_source
from starflow.train.decode import decoded
from starflow.train.feed import Feed, training_order
from starflow.train.settings import TrainSettings


@pytest.fixture
def pictures(tmp_path: Path) -> IndexedPictures:
    """Thirty pictures in two shapes; the red of each is in its name."""
    folder = tmp_path / "set"
    folder.mkdir()
    for n in range(30):
        Image.new("RGB", (16, 16) if n % 3 else (28, 12), (8 * n, 0, 0)).save(folder / f"{8 * n:03d}.png")
    return indexed(open_source("folder", str(folder)), tmp_path / "index", Buckets(16, 8, ("21:9", "1:1")))


def feed_of(
    pictures: IndexedPictures,
    rank: int = 0,
    size: int = 1,
    workers: int = 0,
    batch: int = 6,
    said: list[str] | None = None,
) -> tuple[Feed, list[range]]:
    settings = TrainSettings(steps=1, batch=batch)
    parts = settings.rows(rank, size)
    say = (lambda _: None) if said is None else said.append
    return Feed(pictures, training_order(pictures, batch, 0, 0), parts, workers, say=say), parts


def reds(pictures: IndexedPictures, feed: Feed, parts: list[range], steps: range) -> list[list[int]]:
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
def test_resumed_is_uninterrupted_at_any_number_of_processes(pictures: IndexedPictures, size: int) -> None:
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


def test_worker_processes_change_nothing(pictures: IndexedPictures) -> None:
    expected = reds(pictures, *feed_of(pictures), range(3, 9))
    assert reds(pictures, *feed_of(pictures, workers=2), range(3, 9)) == expected


def test_what_cannot_be_read_is_named_once_and_replaced(pictures: IndexedPictures, tmp_path: Path) -> None:
    (tmp_path / "set" / "064.png").write_bytes(b"nothing")
    said: list[str] = []
    feed, (rows,) = feed_of(pictures, said=said)
    sizes = {len(feed.batch(step, rows).images) for step in range(15)}
    assert sizes == {6}
    assert said == ["skipped 064.png: no known image format"]
    assert feed.unreadable == {"064.png"}


def test_with_nothing_to_read_it_stops_with_a_name(pictures: IndexedPictures, tmp_path: Path) -> None:
    for path in (tmp_path / "set").iterdir():
        path.unlink()
    feed, (rows,) = feed_of(pictures)
    with pytest.raises(ImageError, match=r"png is not a readable image \(no such file; nor can its neighbours be read"):
        feed.batch(0, rows)


def test_the_thread_stays_ahead_and_ends(pictures: IndexedPictures) -> None:
    endless = decoded(pictures, ([1, 2] for _ in iter(int, 1)), 0, replace=False)
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


def test_steps_in_turn_use_one_stream(pictures: IndexedPictures) -> None:
    feed, (rows,) = feed_of(pictures)
    streams = []
    for step in (0, 1, 2, 7, 8):
        feed.batch(step, rows)
        streams.append(feed._coming)
    assert [one is other for one, other in pairwise(streams)] == [True, True, False, True]
    assert torch.equal(feed.batch(8, range(2)).numbers, feed.order(8)[:2]), "other rows are read on the spot"
