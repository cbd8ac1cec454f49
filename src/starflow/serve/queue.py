"""The queue of the scheduler: requests as tickets, their pictures and calls as jobs, in a fair order and bounded.

The order is start-time fair queueing (Goyal et al., SIGCOMM 1996): the jobs of each client take turns with those of the
other clients, whatever the number that one of them has sent. Whoever shares a queue between threads locks it.
"""

from __future__ import annotations

import concurrent.futures
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starflow.errors import UserError
from starflow.serve.drawing import PictureInProgress, Progress

if TYPE_CHECKING:
    from PIL.Image import Image

LOGGER = logging.getLogger(__name__)


class RefusedError(Exception):
    """A request that was not taken; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFullError(RefusedError):
    """There is no place in the queue."""


class ClosingError(RefusedError):
    """The scheduler is finishing what it has."""


class DeadlineError(Exception):
    """A request took longer than it was given."""


class CancelledError(Exception):
    """Nobody waits for a request any more."""


@dataclass(frozen=True)
class Event:
    """What a request's listener is told, from the model's thread: a preview of picture `index`, or its result."""

    index: int
    preview: Image | None = None
    result: Any = None


Listener = Callable[[Event], None]


@dataclass(eq=False)
class Ticket:
    """A request that was taken. `future` holds its results in order, one a part, or why there are none."""

    client: str
    kind: str
    deadline: float | None
    listener: Listener | None
    future: concurrent.futures.Future[list[Any]] = field(default_factory=concurrent.futures.Future)
    jobs: list[Job] = field(default_factory=list)
    results: dict[int, Any] = field(default_factory=dict)
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # whoever waits cannot cancel it behind the scheduler's back

    def cancel(self) -> None:
        """Nobody waits for it any more: it leaves at the next block boundary."""
        self.cancelled = True

    @property
    def progress(self) -> float:
        """The share of its work that is done, 0 to 1."""
        return sum(job.progress for job in self.jobs) / max(1, len(self.jobs))

    def tell(self, event: Event) -> None:
        """Pass an event on; a listener that is gone harms nobody."""
        if self.listener is None or self.cancelled:
            return
        try:
            self.listener(event)
        except Exception:
            LOGGER.exception("a listener failed")


@dataclass(eq=False)
class Job:
    """A picture of a request, or its call: what the queue holds."""

    ticket: Ticket
    index: int
    cost: float
    """In rows of a picture."""
    arrived: float
    drawing: PictureInProgress | None = None
    call: Callable[[Progress], Any] | None = None
    order: tuple[float, int] = (0.0, 0)
    progress: float = 0.0
    begun: bool = False


class FairQueue:
    """Jobs in the order in which they are to begin, those that have begun among them.

    Args:
        places: jobs that may be here at once; one client may have half of them.

    >>> queue = FairQueue(8)
    >>> many, one = (Ticket(client, "pictures", None, None) for client in ("a", "b"))
    >>> queue.put([Job(many, index, 1.0, 0.0) for index in range(3)], 1)
    >>> queue.begin(queue.jobs[0])
    True
    >>> queue.put([Job(one, 0, 1.0, 0.0)], 1)
    >>> [job.ticket.client for job in queue.jobs]
    ['a', 'b', 'a', 'a']
    """

    def __init__(self, places: int) -> None:
        if places < 1:
            raise UserError(f"the queue has {places} places, expected at least 1")
        self.places = places
        self.jobs: list[Job] = []
        self._virtual, self._number = 0.0, 0
        self._next_turn: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self.jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self.jobs)

    @property
    def rows(self) -> float:
        """The cost of all jobs together."""
        return sum(job.cost for job in self.jobs)

    def put(self, jobs: Sequence[Job], retry_after: int) -> None:
        """Take the jobs of one request, or none of them.

        Raises:
            QueueFullError: no places for all of them; it says to come back after `retry_after` seconds.
        """
        client = jobs[0].ticket.client
        own = sum(job.ticket.client == client for job in self.jobs)
        if len(self.jobs) + len(jobs) > self.places:
            raise QueueFullError("the queue is full: ask again later", retry_after)
        if own and own + len(jobs) > max(1, self.places // 2):
            raise QueueFullError("this client's half of the queue is full: ask again later", retry_after)
        turn = max(self._virtual, self._next_turn.get(client, 0.0))
        for job in jobs:
            self._number += 1
            job.order = (turn, self._number)
            turn += job.cost
        self._next_turn[client] = turn
        self.jobs = sorted([*self.jobs, *jobs], key=lambda job: job.order)

    def begin(self, job: Job) -> bool:
        """Mark a job as at work; False where it was already."""
        if job.begun:
            return False
        job.begun = True
        self._virtual = max(self._virtual, job.order[0])
        self._next_turn = {client: turn for client, turn in self._next_turn.items() if turn > self._virtual}
        return True

    def drop(self, gone: Callable[[Job], bool]) -> list[Job]:
        """Take out the jobs of which `gone` is true."""
        dropped = [job for job in self.jobs if gone(job)]
        if dropped:
            out = set(map(id, dropped))
            self.jobs = [job for job in self.jobs if id(job) not in out]
        return dropped
