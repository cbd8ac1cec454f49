"""Pictures for training, decoded ahead of the update that wants them.

Contract: the pictures of (step, rows) are a function of the order, whatever the workers; asking for them in turn costs
no wait while the workers keep up, and asking out of turn (after a resume) begins there. A picture that cannot be read
is named once, counted, and replaced by its neighbour, so that a batch keeps its size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from starflow.data.picture_set import Pictures, all_numbers
from starflow.errors import UserError
from starflow.train.decode import Decoded, Decoder, decoded
from starflow.train.order import Order


class Feed:
    """The training pictures of a set, in this process's parts of every batch."""

    def __init__(
        self,
        pictures: Pictures,
        order: Order,
        parts: Sequence[range],
        workers: int = 0,
        *,
        pin: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        """`parts` are the rows of a batch that this process will ask for, in turn."""
        self.pictures, self.order, self.parts = pictures, order, list(parts)
        self.workers, self.pin, self._say = workers, pin, say
        self._coming: Iterator[Decoded] | None = None
        self._next: tuple[int, range] | None = None
        self.unreadable: set[str] = set()

    def numbers(self, step: int, rows: range) -> list[int]:
        """What the order wants there."""
        wanted: list[int] = self.order(step)[rows.start : rows.stop].tolist()
        return wanted

    def names(self, step: int, rows: range) -> list[str]:
        """Names of the pictures there."""
        return [self.pictures.entry(number).name for number in self.numbers(step, rows)]

    def batch(self, step: int, rows: range) -> Decoded:
        """The pictures of these rows of a batch.

        Raises:
            ImageError: a picture and all of its neighbours cannot be read.
        """
        if rows not in self.parts:
            return self._note(Decoder(self.pictures, replace=True)[self.numbers(step, rows)])
        if self._coming is None or self._next != (step, rows):
            self._coming = decoded(self.pictures, self._requests(step, rows), self.workers, replace=True, pin=self.pin)
        place = self.parts.index(rows) + 1
        self._next = (step + place // len(self.parts), self.parts[place % len(self.parts)])
        return self._note(next(self._coming))

    def _requests(self, step: int, rows: range) -> Iterator[list[int]]:
        place = self.parts.index(rows)
        while True:
            yield self.numbers(step, self.parts[place])
            place = (place + 1) % len(self.parts)
            step += place == 0

    def _note(self, found: Decoded) -> Decoded:
        for name, reason in found.skipped:
            if name not in self.unreadable:
                self.unreadable.add(name)
                self._say(f"skipped {name}: {reason}")
        return found


def training_order(pictures: Pictures, batch: int, seed: int, window: int) -> Order:
    """The order of a set's training pictures.

    Raises:
        UserError: there are none, or none are held out.
    """
    train, heldout = (all_numbers(pictures, heldout=held) for held in (False, True))
    counts = [sum(map(len, numbers)) for numbers in (train, heldout)]
    if not all(counts):
        raise UserError(f"{counts[0]} training and {counts[1]} held-out pictures: both must be at least 1")
    return Order(train, batch, seed, window)
