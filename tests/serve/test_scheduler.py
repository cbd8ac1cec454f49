"""The scheduler with a model that computes nothing: who shares a block, leaves, fails, and whose turn it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from starflow.errors import UserError
from starflow.serve.queue import (
    CancelledError,
    ClosingError,
    DeadlineError,
    DrawRequest,
    Event,
    QueueFullError,
    Ticket,
)
from starflow.serve.scheduler import Scheduler
from tests.serve.fake import Clock, FakeSampler, Recorder


def by_hand(places: int = 64) -> tuple[Scheduler, FakeSampler, Clock, Recorder]:
    """A scheduler without a thread: a test calls `turn`. Each block takes a second of the clock."""
    clock = Clock()
    sampler, recorder = FakeSampler(clock), Recorder()
    return Scheduler(sampler, places=places, observer=recorder, clock=clock), sampler, clock, recorder


def finish(scheduler: Scheduler) -> None:
    while scheduler.turn():
        pass


def test_those_that_are_there_share_every_block() -> None:
    scheduler, sampler, _, recorder = by_hand()
    tickets = [scheduler.draw(DrawRequest(name, seed=7)) for name in ("a", "b", "c")]
    finish(scheduler)
    assert sampler.batches == [(block, ["a", "b", "c"]) for block in (3, 2, 1, 0)]
    assert [one.future.result()[0].seed for one in tickets] == [7, 7, 7]
    assert recorder.outcomes == [("pictures", "done", 1)] * 3


def test_one_that_comes_later_joins_at_its_block_and_not_at_another() -> None:
    """It begins alone while the first is further, and nobody is overtaken."""
    scheduler, sampler, _, _ = by_hand()
    first = scheduler.draw(DrawRequest("a"))
    scheduler.turn()
    late = [scheduler.draw(DrawRequest(name)) for name in ("b", "c")]
    finish(scheduler)
    assert sampler.batches[:4] == [(3, ["a"]), (2, ["a"]), (1, ["a"]), (0, ["a"])]
    assert sampler.batches[4:] == [(block, ["b", "c"]) for block in (3, 2, 1, 0)]
    assert all(one.future.done() for one in (first, *late))


def test_two_that_meet_at_a_block_go_on_together() -> None:
    """More rows than fit one batch: what was left behind catches up, and the rest is shared."""
    scheduler, sampler, _, _ = by_hand()
    scheduler.draw(DrawRequest("a", candidates=6))
    scheduler.draw(DrawRequest("b", candidates=6))
    finish(scheduler)
    assert sampler.batches[0] == (3, ["a"] * 6 + ["b"] * 2)
    assert (2, ["a"] * 6 + ["b"] * 2) in sampler.batches
    assert sum(names.count("b") for block, names in sampler.batches if block == 3) == 6


def test_guided_and_unguided_do_not_share_a_batch() -> None:
    scheduler, sampler, _, _ = by_hand()
    scheduler.draw(DrawRequest("a", guidance=1.0))
    scheduler.draw(DrawRequest("b"))
    scheduler.draw(DrawRequest("c", guidance=3.0))
    finish(scheduler)
    assert sampler.batches[0] == (3, ["a", "c"])
    assert all("b" not in names or names == ["b"] for _, names in sampler.batches)


def test_a_client_with_many_pictures_does_not_starve_another() -> None:
    scheduler, sampler, _, _ = by_hand()
    scheduler.draw(DrawRequest("many", num_images=30), client="a")
    scheduler.turn()
    one = scheduler.draw(DrawRequest("one"), client="b")
    for _ in range(3 + 4):  # what has begun, and then its own blocks
        scheduler.turn()
    assert one.future.done()
    assert sampler.batches[4] == (3, ["one"] + ["many"] * 7)
    assert scheduler.waiting + scheduler.at_work == 30 - 8 - 7


def test_who_is_cancelled_leaves_at_the_next_boundary() -> None:
    scheduler, sampler, _, recorder = by_hand()
    kept, gone = scheduler.draw(DrawRequest("a")), scheduler.draw(DrawRequest("b"))
    queued = scheduler.draw(DrawRequest("c", guidance=1.0))
    scheduler.turn()
    gone.cancel()
    queued.cancel()
    finish(scheduler)
    assert sampler.batches == [(3, ["a", "b"]), (2, ["a"]), (1, ["a"]), (0, ["a"])]
    assert kept.future.result()
    for one in (gone, queued):
        with pytest.raises(CancelledError):
            one.future.result()
    assert sorted(recorder.outcomes) == [("pictures", "cancelled", 1)] * 2 + [("pictures", "done", 1)]
    assert (scheduler.waiting, scheduler.at_work) == (0, 0)


def test_a_block_that_nobody_waits_for_ends_at_once() -> None:
    scheduler, sampler, clock, _ = by_hand()
    ticket = scheduler.draw(DrawRequest("a"))
    sampler.before = lambda block: ticket.cancel()
    finish(scheduler)
    assert clock.now == 100.0  # not a second of the block
    assert scheduler.at_work == 0
    with pytest.raises(CancelledError):
        ticket.future.result()


def test_a_deadline_is_kept_at_the_next_boundary() -> None:
    scheduler, sampler, _, recorder = by_hand()
    late = scheduler.draw(DrawRequest("a"), timeout=1.5)
    in_time = scheduler.draw(DrawRequest("b"), timeout=4.5)
    finish(scheduler)
    assert [names for _, names in sampler.batches] == [["a", "b"], ["a", "b"], ["b"], ["b"]]
    with pytest.raises(DeadlineError):
        late.future.result()
    assert in_time.future.result()
    assert ("pictures", "late", 1) in recorder.outcomes


@pytest.mark.parametrize(
    ("prompt", "error"), [("bad prompt", UserError), ("bad block", RuntimeError), ("bad picture", ValueError)]
)
def test_what_fails_in_a_full_batch_fails_alone(prompt: str, error: type[Exception]) -> None:
    scheduler, _, _, recorder = by_hand()
    tickets = [scheduler.draw(DrawRequest(name)) for name in ("a", "b", "c", prompt, "d", "e", "f", "g")]
    finish(scheduler)
    with pytest.raises(error):
        tickets.pop(3).future.result()
    assert all(one.future.result() for one in tickets)
    assert recorder.outcomes.count(("pictures", "failed", 1)) == 1
    assert (scheduler.waiting, scheduler.at_work) == (0, 0)


def test_a_request_of_which_one_picture_fails_fails_once_and_leaves() -> None:
    scheduler, sampler, _, _ = by_hand()
    ticket = scheduler.draw(DrawRequest("bad picture", num_images=20))
    finish(scheduler)
    with pytest.raises(ValueError, match="not finite"):
        ticket.future.result()
    assert sum(len(names) for block, names in sampler.batches if block == 3) == 8


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    scheduler, _, _, _ = by_hand(places=8)
    scheduler.draw(DrawRequest("a", num_images=4), client="a")
    with pytest.raises(QueueFullError, match="half"):
        scheduler.draw(DrawRequest("a"), client="a")
    scheduler.draw(DrawRequest("b", num_images=4), client="b")
    with pytest.raises(QueueFullError, match="full") as found:
        scheduler.draw(DrawRequest("c"), client="c")
    assert 1 <= found.value.retry_after <= 60
    finish(scheduler)
    assert scheduler.draw(DrawRequest("c"), client="c")


def test_what_cannot_be_drawn_is_refused_at_once() -> None:
    scheduler, _, _, _ = by_hand()
    with pytest.raises(UserError):
        scheduler.draw(DrawRequest("a", guidance=-1))
    assert scheduler.waiting == 0


def test_progress_and_events_are_told_in_order() -> None:
    scheduler, sampler, _, _ = by_hand()
    events: list[Event] = []
    ticket = scheduler.draw(DrawRequest("a", num_images=2, previews=2), listener=events.append)
    seen = []
    sampler.before = lambda block: seen.append(ticket.progress)
    finish(scheduler)
    assert seen == [0.0, 0.25, 0.5, 0.75]
    assert ticket.progress == 1.0
    kinds = [(one.index, "preview" if one.preview else "result") for one in events]
    assert kinds == [(0, "preview"), (1, "preview"), (0, "preview"), (1, "preview"), (0, "result"), (1, "result")]


def test_a_listener_that_raises_harms_nobody() -> None:
    scheduler, _, _, _ = by_hand()

    def fail(event: Event) -> None:
        raise OSError("gone")

    ticket = scheduler.draw(DrawRequest("a", previews=1), listener=fail)
    finish(scheduler)
    assert ticket.future.result()


def test_a_call_lends_the_model_to_drawings_at_its_reports() -> None:
    scheduler, sampler, _, _ = by_hand()
    order: list[Any] = []
    sampler.before = order.append

    def work(progress: Callable[[int, int], None]) -> str:
        scheduler.draw(DrawRequest("a"))
        for step in range(1, 4):
            order.append(f"step {step}")
            progress(step, 3)
        return "worked"

    ticket = scheduler.call([work], "edit", cost=1.0)
    finish(scheduler)
    assert order == ["step 1", 3, "step 2", 2, "step 3", 1, 0]
    assert ticket.future.result() == ["worked"]
    assert ticket.progress == 1.0


def test_a_call_is_cancelled_at_its_next_report_and_others_go_on() -> None:
    scheduler, _, _, recorder = by_hand()
    reached: list[int] = []

    def work(progress: Callable[[int, int], None]) -> None:
        ticket.cancel()
        progress(1, 2)
        reached.append(2)

    ticket = scheduler.call([work, work], "edit", cost=1.0)
    other = scheduler.call([lambda progress: 5], "likelihood", cost=1.0)
    finish(scheduler)
    assert other.future.result() == [5]
    assert not reached
    assert recorder.outcomes == [("edit", "cancelled", 2), ("likelihood", "done", 1)]
    assert scheduler.at_work == 0


def test_the_waits_and_stages_are_observed() -> None:
    scheduler, _, clock, recorder = by_hand()
    scheduler.draw(DrawRequest("a"))
    clock.now += 5
    finish(scheduler)
    assert recorder.waits == [5.0]
    assert [stage for stage, _, _ in recorder.stages] == [
        "encode",
        "block 3",
        "block 2",
        "block 1",
        "block 0",
        "decode",
    ]
    assert {stage: seconds for stage, _, seconds in recorder.stages}["block 3"] == 1.0


def threaded(**options: Any) -> tuple[Scheduler, FakeSampler]:
    sampler = FakeSampler()
    scheduler = Scheduler(sampler, **options)
    scheduler.start()
    return scheduler, sampler


def test_closing_finishes_what_was_taken_and_takes_nothing_more() -> None:
    scheduler, sampler = threaded()
    sampler.before = lambda block: time.sleep(0.002)
    tickets = [scheduler.draw(DrawRequest("a", num_images=3)) for _ in range(10)]
    assert scheduler.close(timeout=20)
    assert all(len(one.future.result(timeout=0)) == 3 for one in tickets)
    with pytest.raises(ClosingError):
        scheduler.draw(DrawRequest("a"))


def test_closing_in_no_time_says_so() -> None:
    scheduler, sampler = threaded()
    hold = threading.Event()
    sampler.before = lambda block: [None][hold.wait(10) - 1]
    ticket = scheduler.draw(DrawRequest("a"))
    assert not scheduler.close(timeout=0.05)
    hold.set()
    assert ticket.future.result(timeout=10)
    assert scheduler.close(timeout=10)


def test_many_threads_get_their_own_pictures() -> None:
    scheduler, _ = threaded(places=1000)
    found: dict[int, list[int]] = {}

    def client(number: int) -> None:
        ticket: Ticket = scheduler.draw(DrawRequest("a", num_images=5, seed=100 * number), client=str(number))
        found[number] = [one.seed for one in ticket.future.result(timeout=30)]

    threads = [threading.Thread(target=client, args=(number,)) for number in range(16)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    scheduler.close(10)
    assert found == {number: [100 * number + index for index in range(5)] for number in range(16)}


def test_those_who_were_answered_together_are_drawn_together_again() -> None:
    scheduler, sampler = threaded(gather=0.5)
    together = [scheduler.call([lambda _: time.sleep(0.1)], "likelihood", 1.0)]  # meanwhile three pictures come
    together += [scheduler.draw(DrawRequest("a")) for _ in range(3)]
    for one in together:
        one.future.result(timeout=10)
    tickets = []
    for _ in range(3):
        tickets.append(scheduler.draw(DrawRequest("b")))
        time.sleep(0.02)
    for one in tickets:
        one.future.result(timeout=10)
    scheduler.close(10)
    assert sampler.batches[0] == (3, ["a", "a", "a"])
    assert sampler.batches[4] == (3, ["b", "b", "b"])


def test_who_is_alone_does_not_wait_for_company() -> None:
    scheduler, sampler = threaded(gather=60.0)
    for _ in range(2):
        scheduler.draw(DrawRequest("a")).future.result(timeout=10)
    scheduler.close(10)
    assert [rows for _, rows in sampler.batches] == [["a"]] * 8


def test_a_block_ends_when_the_last_who_waits_for_it_is_late() -> None:
    """A block of a large picture may take minutes; with a neighbour who has time it goes on."""
    for neighbour in (False, True):
        scheduler, sampler, clock, recorder = by_hand()
        late = scheduler.draw(DrawRequest("late"), timeout=5)
        other = scheduler.draw(DrawRequest("other")) if neighbour else None
        drawn: list[int] = []

        def before(block: int, clock: Clock = clock) -> None:
            clock.now += 10

        sampler.before = before
        solve = sampler.solve

        def counted(rows: Any, progress: Callable[[int], None], solve: Any = solve, drawn: list[int] = drawn) -> None:
            solve(rows, progress)
            drawn.append(rows[0][1].block)

        sampler.solve = counted  # type: ignore[method-assign]
        finish(scheduler)
        with pytest.raises(DeadlineError):
            late.future.result(timeout=0)
        assert len(drawn) == (4 if neighbour else 0)
        assert ("pictures", "late", 1) in recorder.outcomes
        assert other is None or other.future.result(timeout=0)[0].seed == 0
