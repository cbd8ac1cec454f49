"""The scheduler: a bounded queue in front of one thread that owns the model. It knows nothing of HTTP.

Pictures go through the flow block by block. At every block boundary those that are cancelled or late leave, and those
whose block it is join, so that nobody waits for a whole batch. Which block is next is decided by the picture that is
first in a fair order (`starflow.serve.queue`); the others of the same size, guidance and block fill its batch up. What
is no drawing (filling a hole, a likelihood) is a call of its own, which lends the model to the drawings at each of its
progress reports. A request that fails fails alone.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from starflow.serve.queue import (
    BatchKey,
    CancelledError,
    ClosingError,
    DeadlineError,
    Drawn,
    DrawRequest,
    Event,
    FairQueue,
    Job,
    Listener,
    PictureInProgress,
    Progress,
    Row,
    Ticket,
)

if TYPE_CHECKING:
    from PIL.Image import Image

GATHER_SECONDS = 0.005
"""How long a batch waits for the clients that were just answered to ask again: while they come, six times that."""

PLACES = 256
"""Of the queue."""

RATE_MEMORY = 0.1
"""Weight of the latest block in the mean of seconds a row."""


class Sampler(Protocol):
    """What draws; see `starflow.serve.drawing.BlockSampler`, of which this is what the scheduler needs."""

    @property
    def blocks(self) -> int: ...
    def begin(self, request: DrawRequest, index: int) -> PictureInProgress: ...
    def capacity(self, key: BatchKey) -> int: ...
    def prepare(self, drawings: Sequence[PictureInProgress]) -> None: ...
    def solve(self, rows: Sequence[tuple[PictureInProgress, Row]], progress: Callable[[int], None]) -> None: ...
    def preview(self, drawing: PictureInProgress) -> Image: ...
    def finish(self, drawings: Sequence[PictureInProgress]) -> list[Drawn | Exception]: ...


class Observer:
    """Told what the scheduler does; this one does not listen."""

    def waited(self, seconds: float) -> None:
        """A picture or call has waited so long to begin."""

    def worked(self, stage: str, rows: int, seconds: float) -> None:
        """A stage ("encode", "block 3", "preview", "decode" or "call") of so many rows took so long."""

    def ended(self, kind: str, outcome: str, parts: int) -> None:
        """A request of a kind ended: "done", "failed", "cancelled" or "late"; `parts` are its pictures or calls."""


class Scheduler:
    """A queue, and a thread that works through it.

    Args:
        sampler: what draws; after `start`, other threads call nothing of it but `begin` and `capacity`.
        places: pictures and calls that may be here at once; one client may have half of them.
        observer: told what happens.
        clock: seconds that only grow.
        gather: seconds that a batch waits, before its first block, for another of those that were just answered.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        places: int = PLACES,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
        gather: float = GATHER_SECONDS,
    ) -> None:
        self.sampler, self.observer = sampler, observer or Observer()
        self._clock, self._gather_seconds = clock, gather
        self._changed = threading.Condition(threading.RLock())  # guards what follows
        self._queue = FairQueue(places)
        self._calls_at_work = 0
        self._came_at = -math.inf  # when something last came
        self._answered_at, self._company = -math.inf, 0  # when pictures last left, and how many were here until then
        self._seconds_a_row = 0.0
        self._closing = False
        self._thread: threading.Thread | None = None

    def draw(
        self, request: DrawRequest, client: str = "", timeout: float | None = None, listener: Listener | None = None
    ) -> Ticket:
        """Queue pictures; the ticket's future holds a `starflow.serve.queue.Drawn` for each.

        Args:
            request: what to draw.
            client: whose turns they take.
            timeout: seconds from now in which all must be done.
            listener: told of previews and pictures, from the model's thread.

        Raises:
            UserError: what cannot be drawn.
            RefusedError: no place, or closing.
        """
        ticket = self._ticket(client, "pictures", timeout, listener)
        for index in range(request.num_images):
            drawing = self.sampler.begin(request, index)
            ticket.jobs.append(Job(ticket, index, float(len(drawing.rows)), self._clock(), drawing))
        return self._submit(ticket)

    def call(
        self,
        functions: Sequence[Callable[[Progress], Any]],
        kind: str,
        cost: float,
        client: str = "",
        timeout: float | None = None,
        listener: Listener | None = None,
        places: int = 1,
    ) -> Ticket:
        """Queue functions that need the model; the ticket's future holds what each returns.

        Args:
            functions: the parts of a request, which may run at different times; each is given a progress callback that
                it calls as often as it can.
            kind: of the request, for the observer.
            cost: of each part, in rows of a picture.
            client: as for `draw`, and so are `timeout` and `listener`.
            timeout: seconds from now in which all must be done.
            listener: told of results.
            places: of the queue that each part takes: a large upload as much as many pictures that are drawn.

        Raises:
            RefusedError: no place, or closing.
        """
        ticket = self._ticket(client, kind, timeout, listener)
        for index, one in enumerate(functions):
            ticket.jobs.append(Job(ticket, index, cost, self._clock(), call=one, places=places))
        return self._submit(ticket)

    @property
    def waiting(self) -> int:
        """Pictures and calls that have not begun."""
        with self._changed:
            return sum(not job.begun for job in self._queue)

    @property
    def at_work(self) -> int:
        """Pictures and calls that have begun."""
        with self._changed:
            return sum(job.begun for job in self._queue) + self._calls_at_work

    @property
    def closing(self) -> bool:
        """Whether nothing is taken any more."""
        return self._closing

    @property
    def running(self) -> bool:
        """Whether its thread has begun and not ended."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Begin to work, in a thread of its own."""
        self._thread = threading.Thread(target=self._loop, name="starflow-model", daemon=True)
        self._thread.start()

    def work(self, begun: Callable[[], None]) -> None:
        """Work in this thread until `close`; `begun` is called first.

        The thread that warmed the sampler up is the one to draw, so that no other has OpenMP threads beside its own.
        """
        self._thread = threading.current_thread()
        begun()
        self._loop()

    def close(self, timeout: float) -> bool:
        """Take nothing more and wait until what is here is done; whether it was done in time."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout)
        return not self.waiting + self.at_work

    def _ticket(self, client: str, kind: str, timeout: float | None, listener: Listener | None) -> Ticket:
        return Ticket(client, kind, None if timeout is None else self._clock() + timeout, listener)

    def _submit(self, ticket: Ticket) -> Ticket:
        with self._changed:
            if self._closing:
                raise ClosingError("the service is shutting down: ask again in a moment", 5)
            half = 0.5 * self._queue.rows * self._seconds_a_row  # about the seconds until half of it is done
            self._queue.put(ticket.jobs, retry_after=max(1, min(60, round(half))))
            self._came_at = self._clock()
            self._changed.notify_all()
        return ticket

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not len(self._queue) and not self._closing:
                    self._changed.wait()
                if not len(self._queue):
                    return
                self._gather()
            self.turn()

    def _gather(self) -> None:
        """Wait a moment for clients that were answered together, to draw for them together again; the lock is held.

        Who is alone, or comes after a rest, is not kept waiting.
        """
        until = self._answered_at + 6 * self._gather_seconds
        while 0 < len(self._queue) < self._company and not self._closing:
            job, now = self._queue.jobs[0], self._clock()
            end = min(max(self._came_at, self._answered_at) + self._gather_seconds, until)
            if job.begun or job.drawing is None or now >= end:
                return
            if self._queue.rows >= self.sampler.capacity(job.drawing.key):
                return
            self._changed.wait(end - now)

    def turn(self, *, drawings_only: bool = False) -> bool:
        """Do the next piece of work: one block of one batch, or one call; False where there is none."""
        self._let_go()
        with self._changed:
            jobs = [job for job in self._queue if job.drawing is not None or not drawings_only]
            if not jobs:
                return False
            batch = self._batch(jobs) if jobs[0].drawing is not None else []
            for job in dict.fromkeys(job for job, _, _ in batch) if batch else jobs[:1]:
                if self._queue.begin(job):
                    self.observer.waited(self._clock() - job.arrived)
            if not batch:
                self._queue.drop(lambda job: job is jobs[0])
                self._calls_at_work += 1
        if batch:
            self._solve(batch)
        else:
            self._call(jobs[0])
        return True

    def _batch(self, jobs: Sequence[Job]) -> list[tuple[Job, PictureInProgress, Row]]:
        """The rows of the first job's next block, and of the others who are at it; the lock is held."""
        first = jobs[0].drawing
        assert first is not None
        block, room = max(row.block for row in first.rows), self.sampler.capacity(first.key)
        batch = [
            (job, job.drawing, row)
            for job in jobs
            if job.drawing is not None and job.drawing.key == first.key
            for row in job.drawing.rows
            if row.block == block
        ]
        return batch[:room]

    def _solve(self, batch: list[tuple[Job, PictureInProgress, Row]]) -> None:
        """Take a batch through one block, and hand out what is finished."""
        batch = self._prepared(batch)
        if not batch:
            return
        block, began = batch[0][2].block, self._clock()
        jobs = list(dict.fromkeys(job for job, _, _ in batch))
        try:
            self.sampler.solve([(drawing, row) for _, drawing, row in batch], self._counter(batch))
        except CancelledError:
            return  # nobody waits for this batch: all leave at the next turn
        except Exception as error:  # noqa: BLE001  # one by one, so that what raised fails alone
            if len(jobs) == 1:
                self._fail(jobs[0].ticket, error)
            for job in jobs if len(jobs) > 1 else ():
                self._solve([one for one in batch if one[0] is job])
            return
        seconds = self._clock() - began
        self._seconds_a_row += RATE_MEMORY * (self.sampler.blocks * seconds / len(batch) - self._seconds_a_row)
        self.observer.worked(f"block {block}", len(batch), seconds)
        self._preview(jobs)
        self._finish([job for job in jobs if job.drawing is not None and job.drawing.finished])

    def _prepared(self, batch: list[tuple[Job, PictureInProgress, Row]]) -> list[tuple[Job, PictureInProgress, Row]]:
        """The batch without those whose prompt cannot be encoded."""
        began = self._clock()
        new = {job: drawing for job, drawing, _ in batch if not drawing.prepared}
        if new:
            self._prepare(new)
            self.observer.worked("encode", len(new), self._clock() - began)
        return [one for one in batch if not one[0].ticket.future.done()]

    def _prepare(self, new: dict[Job, PictureInProgress]) -> None:
        """Prepare pictures together, and one by one where that fails, so that whose prompt is at fault fails alone."""
        try:
            self.sampler.prepare(list(new.values()))
        except Exception as error:  # noqa: BLE001
            for job, drawing in new.items():
                if len(new) == 1:
                    self._fail(job.ticket, error)
                else:
                    self._prepare({job: drawing})

    def _counter(self, batch: list[tuple[Job, PictureInProgress, Row]]) -> Callable[[int], None]:
        """What counts the tokens of a batch's pictures, and ends a block when the last who waits is gone or late."""

        def count(tokens: int) -> None:
            for job, drawing, _ in batch:
                whole = drawing.tokens * self.sampler.blocks * len(drawing.rows)
                job.progress = min(1.0, job.progress + tokens / whole)
            if all(self._is_over(job.ticket) for job, _, _ in batch):
                raise CancelledError("cancelled")

        return count

    def _preview(self, jobs: Sequence[Job]) -> None:
        """Show what is solved of those who asked for it."""
        for job in jobs:
            drawing = job.drawing
            if drawing is None or drawing.finished or drawing.previewed >= drawing.request.previews:
                continue
            if drawing.previewed >= self.sampler.blocks - 1 - drawing.rows[0].block:
                continue  # this block was shown: more candidates than fit a batch take several turns for one
            began = self._clock()
            try:
                job.ticket.tell(Event(job.index, preview=self.sampler.preview(drawing)))
            except Exception as error:  # noqa: BLE001
                self._fail(job.ticket, error)
            self.observer.worked("preview", 1, self._clock() - began)

    def _finish(self, jobs: Sequence[Job]) -> None:
        """Decode pictures; those that nobody waits for leave at the next turn."""
        jobs = [job for job in jobs if not self._is_over(job.ticket)]
        if not jobs:
            return
        began = self._clock()
        try:
            made = self.sampler.finish([job.drawing for job in jobs if job.drawing is not None])
        except Exception as error:  # noqa: BLE001
            made = [error] * len(jobs)
        self.observer.worked("decode", len(jobs), self._clock() - began)
        with self._changed:
            self._answered_at, self._company = self._clock(), len(self._queue)
        for job, one in zip(jobs, made, strict=True):
            if isinstance(one, Exception):
                self._fail(job.ticket, one)
            else:
                self._done(job, one)

    def _call(self, job: Job) -> None:
        """One call, which lends the model at each of its reports."""
        ticket, began = job.ticket, self._clock()

        def progress(done: int, total: int) -> None:
            job.progress = done / max(1, total)
            if self._is_over(ticket):
                raise self._reason(ticket)
            self.turn(drawings_only=True)

        assert job.call is not None
        try:
            self._done(job, job.call(progress))
        except Exception as error:  # noqa: BLE001
            self._fail(ticket, error)
        with self._changed:
            self._calls_at_work -= 1
        self.observer.worked("call", 1, self._clock() - began)

    def _let_go(self) -> None:
        """Drop what is cancelled or late."""
        with self._changed:
            gone = self._queue.drop(lambda job: self._is_over(job.ticket))
        for ticket in dict.fromkeys(job.ticket for job in gone):
            self._fail(ticket, self._reason(ticket))

    def _is_over(self, ticket: Ticket) -> bool:
        late = ticket.deadline is not None and self._clock() > ticket.deadline
        return ticket.cancelled or late or ticket.future.done()

    def _reason(self, ticket: Ticket) -> Exception:
        return CancelledError("cancelled") if ticket.cancelled else DeadlineError("the time for this request is over")

    def _done(self, job: Job, result: Any) -> None:
        """One part of a request is done, and so may be the request."""
        ticket = job.ticket
        with self._changed:
            self._queue.drop(lambda one: one is job)
        if ticket.future.done():
            return
        job.progress = 1.0
        ticket.results[job.index] = result
        ticket.tell(Event(job.index, result=result))
        if len(ticket.results) == len(ticket.jobs):
            self.observer.ended(ticket.kind, "done", len(ticket.jobs))
            ticket.future.set_result([ticket.results[index] for index in range(len(ticket.jobs))])

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        """A request fails, and its other parts leave."""
        with self._changed:
            self._queue.drop(lambda job: job.ticket is ticket)
        if ticket.future.done():
            return
        outcomes: dict[type[Exception], str] = {CancelledError: "cancelled", DeadlineError: "late"}
        self.observer.ended(ticket.kind, outcomes.get(type(error), "failed"), len(ticket.jobs))
        ticket.future.set_exception(error)
