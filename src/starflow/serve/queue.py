"""The queue of the scheduler: requests as tickets, their pictures and calls as jobs, in a fair order and bounded.

`DrawRequest` asks for pictures, `PictureInProgress` is one of them on its way, and
`starflow.serve.queue.Drawn` one that is done.
Shapes: latents are C x h x w.

The order is start-time fair queueing (Goyal et al., SIGCOMM 1996): the jobs of each client take turns with those of the
other clients, whatever the number that one of them has sent. Whoever shares a queue between threads locks it.
"""

from __future__ import annotations

import concurrent.futures
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

from starflow.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

LOGGER = logging.getLogger(__name__)


Progress = Callable[[int, int], None]
"""Called with (done, in all)."""

BatchKey = tuple[tuple[int, int, int], bool]
"""What the pictures of a batch have in common: the latents' shape, and whether they are guided."""


@dataclass(frozen=True)
class DrawRequest:
    """Pictures of one prompt; None leaves a choice to the model. Picture i has the seed `seed + i`."""

    prompt: str = ""
    num_images: int = 1
    seed: int = 0
    guidance: float | None = None
    temperature: float | None = None
    candidates: int | None = None
    size: tuple[int, int] | None = None
    """(width, height) in pixels."""
    previews: int = 0
    """Pictures of what the first blocks have solved, at most one a block."""
    keep_candidates: bool = False
    """Whether every candidate becomes a picture, or the likeliest alone."""
    sampler: Literal["flow", "student"] = "flow"
    """A student's pass has no blocks: it is a call, without previews, and its kept candidate alone is a picture."""


@dataclass(eq=False)
class Row:
    """One candidate of a picture on its way from the noise to the data."""

    block: int
    """The next block, counted from the data; -1 when it has been through all."""
    state: Tensor | None = None
    """(1, C, h, w); None before the picture is prepared."""


@dataclass(eq=False)
class PictureInProgress:
    """One picture on its way."""

    request: DrawRequest
    seed: int
    key: BatchKey
    tokens: int
    """Of a row."""
    guidance: float
    temperature: float
    rows: list[Row]
    condition: Tensor | None = None
    """One row, as the flow takes it."""
    null_condition: Tensor | None = None
    prepared: bool = False
    previewed: int = 0
    notes: list[str] = field(default_factory=list)
    """See `Drawn`."""

    @property
    def finished(self) -> bool:
        """Whether all of its rows have been through all blocks."""
        return all(row.block < 0 for row in self.rows)


@dataclass(frozen=True)
class Drawn:
    """A picture that is done."""

    image: Image
    seed: int
    latents: Tensor
    """(1, C, h, w): what the flow sampled, before cleaning."""
    log_prob: float | None = None
    """log p(latent | prompt) in nats, unguided; None where nothing was chosen by it."""
    candidates: tuple[tuple[Image, float], ...] = ()
    """Every finite candidate with its log p, the likeliest first, where they were asked for."""
    notes: list[str] = field(default_factory=list)
    """What whoever asked should know: that the model was not trained at the size."""


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


def follow(ticket: Ticket, events: SimpleQueue[Event]) -> Iterator[list[Event]]:
    """A ticket's events as they come, and nothing now and then, until it is done.

    It is cancelled where nobody goes on asking.
    """
    try:
        while not ticket.future.done() or not events.empty():
            some = []
            try:
                some.append(events.get(timeout=0.25))
                while True:
                    some.append(events.get_nowait())
            except Empty:
                yield some
    finally:
        ticket.cancel()


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
    places: int = 1
    """Of the queue that it takes."""
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
        taken, new = sum(job.places for job in self.jobs), sum(job.places for job in jobs)
        own = sum(job.places for job in self.jobs if job.ticket.client == client)
        if taken and taken + new > self.places:  # what is larger than the queue is taken where it is alone
            raise QueueFullError("the queue is full: ask again later", retry_after)
        if own and own + new > max(1, self.places // 2):
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
