"""Decoding and resizing beside the training: in worker processes, or in one thread where the set asks for none.

Contract: results come in the order of the requests, whatever the number of workers. A worker leaves Ctrl-C to its
parent, and ends with it.
"""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from starflow.data.picture_set import Pictures
from starflow.data.records import ImageError

AHEAD = 4
"""Requests that a worker, or the thread, has ready."""


class Decoded(NamedTuple):
    """One request's pictures."""

    images: Tensor
    """uint8 (B, 3, H, W)."""
    numbers: Tensor
    """(B,) of the pictures that they are."""
    skipped: list[tuple[str, str]]
    """Names of those that could not be read, with the reasons."""


class Decoder(Dataset[Decoded]):
    """Requests are lists of numbers of one bucket. What cannot be read is left out, or replaced by its neighbour."""

    def __init__(self, pictures: Pictures, *, replace: bool) -> None:
        self.pictures, self.replace = pictures, replace

    def __getitem__(self, request: Sequence[int]) -> Decoded:
        images: list[Tensor] = []
        numbers: list[int] = []
        skipped: list[tuple[str, str]] = []
        for number in request:
            found = self._read(number, skipped)
            if found is not None:
                images.append(found[0])
                numbers.append(found[1])
        stacked = torch.stack(images) if images else torch.empty(0, 3, 0, 0, dtype=torch.uint8)
        return Decoded(stacked, torch.tensor(numbers, dtype=torch.long), skipped)

    def _read(self, number: int, skipped: list[tuple[str, str]]) -> tuple[Tensor, int] | None:
        try:
            return self.pictures.read(number), number
        except ImageError as error:
            skipped.append((self.pictures.entry(number).name, error.reason))
        for other in self.pictures.like(number) if self.replace else ():
            try:
                return self.pictures.read(other), other
            except ImageError:
                continue  # it is named when its own turn comes
        if self.replace:
            raise ImageError(Path(skipped[-1][0]), f"{skipped[-1][1]}; nor can its neighbours be read")
        return None


def decoded(
    pictures: Pictures, requests: Iterable[list[int]], workers: int, *, replace: bool, pin: bool = False
) -> Iterator[Decoded]:
    """The answers to all requests, prepared ahead of their use; `requests` may be endless.

    Args:
        pictures: where they are read.
        requests: lists of numbers, each of one bucket.
        workers: processes; 0 is a thread of this one.
        replace: take a neighbour for what cannot be read, instead of leaving it out.
        pin: put the results where a GPU copies them from at once.
    """
    decoder = Decoder(pictures, replace=replace)
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
        worker_init_fn=_leave_interrupts_to_the_parent,
    )
    return iter(loader)


def _leave_interrupts_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _in_thread(answer: Callable[[list[int]], Decoded], requests: Iterable[list[int]]) -> Iterator[Decoded]:
    ready: queue.Queue[Decoded | BaseException | None] = queue.Queue(maxsize=AHEAD)
    done = threading.Event()

    def put(item: Decoded | BaseException | None) -> None:
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
