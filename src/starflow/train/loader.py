"""Images for training: which ones each update sees, read ahead of their use, and the random numbers of each row.

Which images: a function of (seed, step), and so the same at any number of processes. Every bucket's images come as one
permutation an epoch after the other, cut into batches; a batch is of one bucket, and the processes share it. Over an
epoch every image is seen once; what an epoch leaves over of a bucket begins that bucket's first batch of the next. A
position is a step, so that a checkpoint's step is the position in the data, and no reading or counting leads back to
it.

Read ahead: in worker processes, or in one thread where none are asked for. Results come in the order of the requests,
whatever the number of workers. Asking in turn costs no wait while the workers keep up, and asking out of turn (after a
resume) begins there. An image that cannot be read is named once, counted, and replaced by its neighbour, so that a
batch keeps its size. A worker leaves Ctrl-C to its parent, and ends with it.

Random numbers: row number `row` of the batch of update `step` has a generator of its own, so that its draws depend
neither on how many processes share the batch nor on how it is cut into micro-batches.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import util
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from starflow.data.images import ImageError
from starflow.data.index import ImageDataset, split_indices
from starflow.errors import UserError
from starflow.train.distributed import World
from starflow.train.settings import TrainSettings, generator

PREFETCH = 4
"""Requests that a worker, or the thread, has ready."""

BLOCKS_MIXED = 4
"""Blocks of neighbours that a windowed order mixes."""


@dataclass(frozen=True)
class LoaderSettings:
    """How images reach a task; see `starflow.train.recipe.DataRecipe`."""

    workers: int = 0
    """Processes that decode; 0 is a thread."""
    window: int = 0
    """See `BatchOrder`."""
    flip: bool = False
    """Turn half of the training images around; see `random_flip`."""
    notify: Callable[[str], None] = print
    """Called with one line about an image that cannot be read."""


class TrainingLoader:
    """The training images of a set: this process's rows of every batch."""

    def __init__(
        self,
        dataset: ImageDataset,
        order: BatchOrder,
        parts: Sequence[range],
        workers: int = 0,
        *,
        steps: int = sys.maxsize,
        pin: bool = False,
        notify: Callable[[str], None] = print,
    ) -> None:
        """Prepare nothing yet; reading begins with the first `batch`.

        Args:
            dataset: where images are read.
            order: which images an update sees.
            parts: the rows of a batch that this process will ask for in turn, a range a micro-batch.
            workers: processes that decode; 0 is a thread.
            steps: updates in all; nothing is prepared for later ones.
            pin: put the results where a GPU copies them from at once.
            notify: called with one line about each image that cannot be read.
        """
        self.steps = steps
        self.dataset, self.order, self.parts = dataset, order, list(parts)
        self.workers, self.pin, self._notify = workers, pin, notify
        self._batches: Iterator[ImageBatch] | None = None
        self._next: tuple[int, range] | None = None
        self.unreadable: set[str] = set()

    def indices(self, step: int, rows: range) -> list[int]:
        """Indices of the images in these rows of a batch."""
        indices: list[int] = self.order(step)[rows.start : rows.stop].tolist()
        return indices

    def names(self, step: int, rows: range) -> list[str]:
        """Names of the images in these rows of a batch."""
        return [self.dataset.entry(index).name for index in self.indices(step, rows)]

    def batch(self, step: int, rows: range) -> ImageBatch:
        """The images in these rows of a batch.

        Raises:
            ImageError: an image and all of its neighbours cannot be read.
        """
        if rows not in self.parts or step >= self.steps:
            return self._count_unreadable(BatchReader(self.dataset, replace=True)[self.indices(step, rows)])
        if self._batches is None or self._next != (step, rows):
            requests = self._requests(step, rows)
            self._batches = read_batches(self.dataset, requests, self.workers, replace=True, pin=self.pin)
        part = self.parts.index(rows) + 1
        self._next = (step + part // len(self.parts), self.parts[part % len(self.parts)])
        return self._count_unreadable(next(self._batches))

    def close(self) -> None:
        """End the workers, whatever they have ready."""
        self._batches = None

    def _requests(self, step: int, rows: range) -> Iterator[list[int]]:
        part = self.parts.index(rows)
        while step < self.steps:
            yield self.indices(step, self.parts[part])
            part = (part + 1) % len(self.parts)
            step += part == 0

    def _count_unreadable(self, batch: ImageBatch) -> ImageBatch:
        self.dataset.add_skipped(one for one in batch.skipped if one[0] not in self.unreadable)
        for name, reason in batch.skipped:
            if name not in self.unreadable:
                self.unreadable.add(name)
                self._notify(f"skipped {name}: {reason}")
        return batch


def make_loader(
    dataset: ImageDataset, order: BatchOrder, settings: TrainSettings, world: World, loading: LoaderSettings
) -> TrainingLoader:
    """The loader of this process's rows of every batch.

    Raises:
        UserError: the batch cannot be cut into equal parts.
    """
    parts = settings.rows(world.rank, world.size)
    pin = world.device.type == "cuda"
    return TrainingLoader(dataset, order, parts, loading.workers, steps=settings.steps, pin=pin, notify=loading.notify)


class BatchOrder:
    """The order in which images are seen: `order(step)` is the batch of that update, as indices.

    Example:
        >>> order = BatchOrder([torch.arange(6)], batch=3, seed=0)
        >>> sorted(order(0).tolist() + order(1).tolist())
        [0, 1, 2, 3, 4, 5]
    """

    def __init__(self, buckets: Sequence[Tensor], batch: int, seed: int, window: int = 0) -> None:
        """Set the order of these images.

        Args:
            buckets: indices of the images, a tensor a bucket; empty ones are never drawn.
            batch: images per update.
            seed: of the order.
            window: 0 shuffles all images of a bucket; otherwise the blocks of so many neighbours are shuffled, and
                images within a few of them, for data that is read faster in its own order.
        """
        self.buckets, self.batch, self.seed, self.window = buckets, batch, seed, window
        self._buckets_of_epoch = lru_cache(maxsize=2)(self._draw_buckets)
        self._permutation = lru_cache(maxsize=2 * len(buckets))(self._draw_permutation)

    def __call__(self, step: int) -> Tensor:
        """Indices (batch,) of the images of an update, all of one bucket."""
        bucket, index = self._find(step)
        indices = self.buckets[bucket]
        start, end = index * self.batch, (index + 1) * self.batch
        epochs = range(start // len(indices), (end - 1) // len(indices) + 1)
        stream = torch.cat([self._permutation(bucket, epoch) for epoch in epochs])
        first = start - epochs.start * len(indices)
        return indices[stream[first : first + self.batch]]

    def bucket(self, step: int) -> int:
        """The bucket that an update's images are of."""
        return self._find(step)[0]

    def _batches(self, bucket: int, epoch: int) -> int:
        """Batches of a bucket that are whole by the end of so many epochs."""
        return epoch * len(self.buckets[bucket]) // self.batch

    def _start(self, epoch: int) -> int:
        """The first step of an epoch."""
        return sum(self._batches(bucket, epoch) for bucket in range(len(self.buckets)))

    def _find(self, step: int) -> tuple[int, int]:
        """An update's bucket, and which of that bucket's batches it is."""
        if len(self.buckets) == 1:
            return 0, step
        low, high = 0, 1
        while self._start(high) <= step:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._start(middle) <= step else (low, middle)
        buckets = self._buckets_of_epoch(low)
        within = step - self._start(low)
        bucket = int(buckets[within])
        return bucket, self._batches(bucket, low) + int((buckets[:within] == bucket).sum())

    def _draw_buckets(self, epoch: int) -> Tensor:
        """The bucket of every batch of an epoch, shuffled."""
        counts = [self._batches(b, epoch + 1) - self._batches(b, epoch) for b in range(len(self.buckets))]
        buckets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        return buckets[torch.randperm(len(buckets), generator=generator(self.seed, "buckets", epoch))]

    def _draw_permutation(self, bucket: int, epoch: int) -> Tensor:
        draw = generator(self.seed, "order" if len(self.buckets) == 1 else f"order/{bucket}", epoch)
        return windowed_permutation(len(self.buckets[bucket]), self.window, draw)


def windowed_permutation(count: int, window: int, draw: torch.Generator) -> Tensor:
    """A permutation of 0 .. count - 1 that keeps blocks of `window` neighbours nearly together; 0 is any."""
    if not window or window >= count:
        return torch.randperm(count, generator=draw)
    blocks = torch.arange(count).split(window)
    shuffled = [blocks[i] for i in torch.randperm(len(blocks), generator=draw).tolist()]
    mixed = [torch.cat(shuffled[i : i + BLOCKS_MIXED]) for i in range(0, len(shuffled), BLOCKS_MIXED)]
    return torch.cat([part[torch.randperm(len(part), generator=draw)] for part in mixed])


def batch_order(dataset: ImageDataset, batch: int, seed: int, window: int) -> BatchOrder:
    """The order of a set's training images; arguments as those of `BatchOrder`.

    Raises:
        UserError: there are none, or none are held out.
    """
    train, heldout = (split_indices(dataset, heldout=held) for held in (False, True))
    check_splits(train, heldout)
    return BatchOrder(train, batch, seed, window)


def check_splits(train: Sequence[Tensor], heldout: Sequence[Tensor]) -> None:
    """Refuse a set in which a split has no images; each split is a tensor of indices a bucket.

    Raises:
        UserError: a split is empty.
    """
    counts = [sum(map(len, indices)) for indices in (train, heldout)]
    if not all(counts):
        raise UserError(f"{counts[0]} training and {counts[1]} held-out pictures: both must be at least 1")


class ImageBatch(NamedTuple):
    """One request's images."""

    images: Tensor
    """uint8 (B, 3, H, W)."""
    indices: Tensor
    """(B,) of the images that they are."""
    skipped: list[tuple[str, str]]
    """Names of those that could not be read, with the reasons."""


class BatchReader(Dataset[ImageBatch]):
    """Reads the images that a list of indices of one bucket asks for.

    What cannot be read is left out, or replaced by its neighbour.
    """

    def __init__(self, dataset: ImageDataset, *, replace: bool) -> None:
        self.dataset, self.replace = dataset, replace

    def __getitem__(self, request: Sequence[int]) -> ImageBatch:
        """The images of a request.

        Raises:
            ImageError: an image and all of its neighbours cannot be read, where they are to be replaced.
        """
        images: list[Tensor] = []
        indices: list[int] = []
        skipped: list[tuple[str, str]] = []
        for index in request:
            found = self._read(index, skipped)
            if found is not None:
                images.append(found[0])
                indices.append(found[1])
        stacked = torch.stack(images) if images else torch.empty(0, 3, 0, 0, dtype=torch.uint8)
        return ImageBatch(stacked, torch.tensor(indices, dtype=torch.long), skipped)

    def _read(self, index: int, skipped: list[tuple[str, str]]) -> tuple[Tensor, int] | None:
        try:
            return self.dataset.read(index), index
        except ImageError as error:
            skipped.append((self.dataset.entry(index).name, error.reason))
        for other in self.dataset.substitutes(index) if self.replace else ():
            try:
                return self.dataset.read(other), other
            except ImageError:
                continue  # it is named when its own turn comes
        if self.replace:
            raise ImageError(Path(skipped[-1][0]), f"{skipped[-1][1]}; nor can its neighbours be read")
        return None


def read_batches(
    dataset: ImageDataset, requests: Iterable[list[int]], workers: int, *, replace: bool, pin: bool = False
) -> Iterator[ImageBatch]:
    """The answers to all requests, prepared ahead of their use; `requests` may be endless.

    Args:
        dataset: where images are read.
        requests: lists of indices, each of one bucket.
        workers: processes; 0 is a thread of this one.
        replace: take a neighbour for what cannot be read, instead of leaving it out.
        pin: put the results where a GPU copies them from at once.
    """
    reader = BatchReader(dataset, replace=replace)
    if dataset.in_memory:
        return map(reader.__getitem__, requests)
    if workers < 1:
        return _read_in_thread(reader.__getitem__, requests)
    loader: Any = DataLoader(
        reader,
        sampler=requests,  # the requests themselves, one an item
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        pin_memory=pin,
        # Not fork: the parent holds threads, and a forked copy of their locks hangs.
        multiprocessing_context="spawn",
        worker_init_fn=_start_worker,
    )
    return iter(loader)


def _start_worker(worker: int) -> None:
    """Leave interrupts to the parent, and end without tearing the interpreter down.

    A worker that is told to stop while its queue's thread is inside torch would abort there, with a message of C++'s.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    util.Finalize(None, os._exit, args=(0,), exitpriority=-1)


def _read_in_thread(answer: Callable[[list[int]], ImageBatch], requests: Iterable[list[int]]) -> Iterator[ImageBatch]:
    ready: queue.Queue[ImageBatch | BaseException | None] = queue.Queue(maxsize=PREFETCH)
    done = threading.Event()

    def put(item: ImageBatch | BaseException | None) -> None:
        while not done.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def work() -> None:
        try:
            for request in requests:
                if done.is_set():
                    return
                put(answer(request))
            put(None)
        except BaseException as error:  # noqa: BLE001  (raised again where it is waited for)
            put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        done.set()


def normal(rows: range, shape: Sequence[int], seed: int, purpose: str, step: int) -> Tensor:
    """Standard normal numbers (len(rows), *shape) of these rows of a batch, float32, on the CPU.

    Example:
        >>> whole = normal(range(4), (2,), seed=0, purpose="noise", step=1)
        >>> bool(torch.equal(whole[2:], normal(range(2, 4), (2,), seed=0, purpose="noise", step=1)))
        True
    """
    return _draw_rows(torch.randn, rows, shape, seed, purpose, step)


def uniform(rows: range, shape: Sequence[int], seed: int, purpose: str, step: int) -> Tensor:
    """Numbers as those of `normal`, but uniform in [0, 1)."""
    return _draw_rows(torch.rand, rows, shape, seed, purpose, step)


def _draw_rows(
    draw: Callable[..., Tensor], rows: range, shape: Sequence[int], seed: int, purpose: str, step: int
) -> Tensor:
    drawn = [draw(tuple(shape), generator=generator(seed, f"{purpose}/{row}", step)) for row in rows]
    return torch.stack(drawn) if drawn else torch.empty(0, *shape)


def random_flip(images: Tensor, seed: int, step: int, rows: range) -> Tensor:
    """Images (B, 3, H, W), half of them turned around left to right; drawn by (seed, step, row)."""
    flipped = uniform(rows, (), seed, "mirror", step) < 0.5
    return torch.where(flipped.view(-1, 1, 1, 1).to(images.device), images.flip(-1), images)
