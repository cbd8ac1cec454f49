"""Decoding and resizing beside the training: in worker processes, or in one thread where the set asks for none.

Contract: results come in the order of the requests, whatever the number of workers. A worker leaves Ctrl-C to its
parent, and ends with it.

Random numbers and data order as pure functions of (seed, purpose, step), whoever draws them.

Contract: picture number `row` of the batch of update `step` has a generator of its own, so that its draws depend
neither on how many processes share the batch nor on how it is cut into parts.

Which pictures each update sees: a function of (seed, step), and so the same at any number of processes.

Contract: every bucket's pictures come as one permutation an epoch after the other, cut into batches; a batch is of one
bucket, and the processes share it. Over an epoch every picture is seen once; what an epoch leaves over of a bucket
begins that bucket's first batch of the next. A position is a step, so that a checkpoint's step is the position in the
data, and no reading or counting leads back to it.

Pictures for training, decoded ahead of the update that wants them.

Contract: the pictures of (step, rows) are a function of the order, whatever the workers; asking for them in turn costs
no wait while the workers keep up, and asking out of turn (after a resume) begins there. A picture that cannot be read
is named once, counted, and replaced by its neighbour, so that a batch keeps its size.
"""

from __future__ import annotations

import hashlib
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
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

AHEAD = 4
"""Requests that a worker, or the thread, has ready."""


class ImageBatch(NamedTuple):
    """One request's pictures."""

    images: Tensor
    """uint8 (B, 3, H, W)."""
    numbers: Tensor
    """(B,) of the pictures that they are."""
    skipped: list[tuple[str, str]]
    """Names of those that could not be read, with the reasons."""


class BatchReader(Dataset[ImageBatch]):
    """Requests are lists of numbers of one bucket. What cannot be read is left out, or replaced by its neighbour."""

    def __init__(self, pictures: ImageDataset, *, replace: bool) -> None:
        self.pictures, self.replace = pictures, replace

    def __getitem__(self, request: Sequence[int]) -> ImageBatch:
        images: list[Tensor] = []
        numbers: list[int] = []
        skipped: list[tuple[str, str]] = []
        for number in request:
            found = self._read(number, skipped)
            if found is not None:
                images.append(found[0])
                numbers.append(found[1])
        stacked = torch.stack(images) if images else torch.empty(0, 3, 0, 0, dtype=torch.uint8)
        return ImageBatch(stacked, torch.tensor(numbers, dtype=torch.long), skipped)

    def _read(self, number: int, skipped: list[tuple[str, str]]) -> tuple[Tensor, int] | None:
        try:
            return self.pictures.read(number), number
        except ImageError as error:
            skipped.append((self.pictures.entry(number).name, error.reason))
        for other in self.pictures.substitutes(number) if self.replace else ():
            try:
                return self.pictures.read(other), other
            except ImageError:
                continue  # it is named when its own turn comes
        if self.replace:
            raise ImageError(Path(skipped[-1][0]), f"{skipped[-1][1]}; nor can its neighbours be read")
        return None


def read_batches(
    pictures: ImageDataset, requests: Iterable[list[int]], workers: int, *, replace: bool, pin: bool = False
) -> Iterator[ImageBatch]:
    """The answers to all requests, prepared ahead of their use; `requests` may be endless.

    Args:
        pictures: where they are read.
        requests: lists of numbers, each of one bucket.
        workers: processes; 0 is a thread of this one.
        replace: take a neighbour for what cannot be read, instead of leaving it out.
        pin: put the results where a GPU copies them from at once.
    """
    decoder = BatchReader(pictures, replace=replace)
    if pictures.in_memory:
        return map(decoder.__getitem__, requests)
    if workers < 1:
        return _in_thread(decoder.__getitem__, requests)
    loader: Any = DataLoader(
        decoder,
        sampler=requests,  # the requests themselves, one an item
        batch_size=None,
        num_workers=workers,
        prefetch_factor=AHEAD,
        pin_memory=pin,
        # Not fork: the parent holds threads, and a forked copy of their locks hangs.
        multiprocessing_context="spawn",
        worker_init_fn=_begin_worker,
    )
    return iter(loader)


def _begin_worker(worker: int) -> None:
    """Leave interrupts to the parent, and end without tearing the interpreter down.

    A worker that is told to stop while its queue's thread is inside torch would abort there, with a message of C++'s.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    util.Finalize(None, os._exit, args=(0,), exitpriority=-1)


def _in_thread(answer: Callable[[list[int]], ImageBatch], requests: Iterable[list[int]]) -> Iterator[ImageBatch]:
    ready: queue.Queue[ImageBatch | BaseException | None] = queue.Queue(maxsize=AHEAD)
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


def generator(seed: int, purpose: str, step: int) -> torch.Generator:
    """A CPU generator for one purpose at one step; different purposes never share numbers."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def normal(rows: range, shape: Sequence[int], seed: int, purpose: str, step: int) -> Tensor:
    """Standard normal numbers (len(rows), *shape) of these rows of a batch, float32, on the CPU."""
    return _each(torch.randn, rows, shape, seed, purpose, step)


def uniform(rows: range, shape: Sequence[int], seed: int, purpose: str, step: int) -> Tensor:
    """The same, uniform in [0, 1)."""
    return _each(torch.rand, rows, shape, seed, purpose, step)


def _each(draw: Callable[..., Tensor], rows: range, shape: Sequence[int], seed: int, purpose: str, step: int) -> Tensor:
    drawn = [draw(tuple(shape), generator=generator(seed, f"{purpose}/{row}", step)) for row in rows]
    return torch.stack(drawn) if drawn else torch.empty(0, *shape)


def batch_indices(count: int, batch: int, seed: int, step: int) -> Tensor:
    """Indices (batch,) of the pictures of update `step`.

    The order is the concatenation of one permutation an epoch, so every picture is seen once an epoch.
    """
    start, end = step * batch, (step + 1) * batch
    epochs = range(start // count, (end - 1) // count + 1)
    stream = torch.cat([torch.randperm(count, generator=generator(seed, "order", epoch)) for epoch in epochs])
    offset = start - epochs.start * count
    return stream[offset : offset + batch]


BLOCKS_MIXED = 4
"""Blocks of neighbours that a windowed order mixes."""


class BatchOrder:
    """`order(step)` is the batch of that update, as numbers."""

    def __init__(self, buckets: Sequence[Tensor], batch: int, seed: int, window: int = 0) -> None:
        """Of these pictures, a tensor of numbers a bucket; empty ones are never drawn.

        Args:
            buckets: numbers of the pictures.
            batch: pictures per update.
            seed: of the order.
            window: 0 shuffles all pictures of a bucket; else the order stays within a few blocks of so many
                neighbours, for data that is read faster in its own order, and the blocks are shuffled.
        """
        self.buckets, self.batch, self.seed, self.window = buckets, batch, seed, window
        self._of_epoch = lru_cache(maxsize=2)(self._draw_buckets)
        self._permutation = lru_cache(maxsize=2 * len(buckets))(self._draw_permutation)

    def __call__(self, step: int) -> Tensor:
        """Numbers (batch,) of the pictures of an update, all of one bucket."""
        bucket, place = self._find(step)
        numbers = self.buckets[bucket]
        start, end = place * self.batch, (place + 1) * self.batch
        epochs = range(start // len(numbers), (end - 1) // len(numbers) + 1)
        stream = torch.cat([self._permutation(bucket, epoch) for epoch in epochs])
        first = start - epochs.start * len(numbers)
        return numbers[stream[first : first + self.batch]]

    def bucket(self, step: int) -> int:
        """The bucket that an update's pictures are of."""
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
        buckets = self._of_epoch(low)
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


class TrainingLoader:
    """The training pictures of a set, in this process's parts of every batch."""

    def __init__(
        self,
        pictures: ImageDataset,
        order: BatchOrder,
        parts: Sequence[range],
        workers: int = 0,
        *,
        steps: int = sys.maxsize,
        pin: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        """`parts` are the rows of a batch that this process will ask for, in turn, in updates before `steps`."""
        self.steps = steps
        self.pictures, self.order, self.parts = pictures, order, list(parts)
        self.workers, self.pin, self._say = workers, pin, say
        self._coming: Iterator[ImageBatch] | None = None
        self._next: tuple[int, range] | None = None
        self.unreadable: set[str] = set()

    def numbers(self, step: int, rows: range) -> list[int]:
        """What the order wants there."""
        wanted: list[int] = self.order(step)[rows.start : rows.stop].tolist()
        return wanted

    def names(self, step: int, rows: range) -> list[str]:
        """Names of the pictures there."""
        return [self.pictures.entry(number).name for number in self.numbers(step, rows)]

    def batch(self, step: int, rows: range) -> ImageBatch:
        """The pictures of these rows of a batch.

        Raises:
            ImageError: a picture and all of its neighbours cannot be read.
        """
        if rows not in self.parts or step >= self.steps:
            return self._note(BatchReader(self.pictures, replace=True)[self.numbers(step, rows)])
        if self._coming is None or self._next != (step, rows):
            self._coming = read_batches(
                self.pictures, self._requests(step, rows), self.workers, replace=True, pin=self.pin
            )
        place = self.parts.index(rows) + 1
        self._next = (step + place // len(self.parts), self.parts[place % len(self.parts)])
        return self._note(next(self._coming))

    def close(self) -> None:
        """End the workers, whatever they have ready."""
        self._coming = None

    def _requests(self, step: int, rows: range) -> Iterator[list[int]]:
        place = self.parts.index(rows)
        while step < self.steps:
            yield self.numbers(step, self.parts[place])
            place = (place + 1) % len(self.parts)
            step += place == 0

    def _note(self, found: ImageBatch) -> ImageBatch:
        for name, reason in found.skipped:
            if name not in self.unreadable:
                self.unreadable.add(name)
                self._say(f"skipped {name}: {reason}")
        return found


def batch_order(pictures: ImageDataset, batch: int, seed: int, window: int) -> BatchOrder:
    """The order of a set's training pictures.

    Raises:
        UserError: there are none, or none are held out.
    """
    train, heldout = (split_indices(pictures, heldout=held) for held in (False, True))
    counts = [sum(map(len, numbers)) for numbers in (train, heldout)]
    if not all(counts):
        raise UserError(f"{counts[0]} training and {counts[1]} held-out pictures: both must be at least 1")
    return BatchOrder(train, batch, seed, window)
