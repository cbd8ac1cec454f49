"""Which pictures each update sees: a function of (seed, step), and so the same at any number of processes.

Contract: every bucket's pictures come as one permutation an epoch after the other, cut into batches; a batch is of one
bucket, and the processes share it. Over an epoch every picture is seen once; what an epoch leaves over of a bucket
begins that bucket's first batch of the next. A position is a step, so that a checkpoint's step is the position in the
data, and no reading or counting leads back to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from starflow.train.randomness import generator

BLOCKS_MIXED = 4
"""Blocks of neighbours that a windowed order mixes."""


class Order:
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
