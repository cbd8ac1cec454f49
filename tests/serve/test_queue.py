"""The fair order of the queue, whatever arrives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starflow.serve.queue import FairQueue, Job, QueueFullError, Ticket


def put(queue: FairQueue, client: str, count: int, cost: float = 1.0) -> Ticket:
    ticket = Ticket(client, "pictures", None, None)
    ticket.jobs = [Job(ticket, index, cost, 0.0) for index in range(count)]
    queue.put(ticket.jobs, 1)
    return ticket


def serve(queue: FairQueue) -> str:
    job = queue.jobs[0]
    queue.begin(job)
    queue.drop(lambda one: one is job)
    return job.ticket.client


def test_clients_take_turns_by_what_their_pictures_cost() -> None:
    queue = FairQueue(100)
    put(queue, "dear", 6, cost=2.0)
    put(queue, "cheap", 12)
    served = [serve(queue) for _ in range(9)]
    assert served.count("cheap") == 6
    assert served.count("dear") == 3


def test_a_client_who_was_away_has_saved_nothing_up() -> None:
    queue = FairQueue(100)
    put(queue, "a", 20)
    for _ in range(10):
        serve(queue)
    put(queue, "b", 10)
    served = [serve(queue) for _ in range(10)]
    assert 4 <= served.count("b") <= 6


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 6)), min_size=1, max_size=20))
def test_nobody_waits_for_more_than_a_turn_of_each_other(arrivals: list[tuple[str, int]]) -> None:
    """Between two services of a client that waits, no other is served more than twice."""
    queue = FairQueue(1000)
    for client, count in arrivals:
        put(queue, client, count)
    waiting = {client: sum(count for name, count in arrivals if name == client) for client, _ in arrivals}
    since: dict[str, dict[str, int]] = {client: {} for client in waiting}
    while len(queue):
        served = serve(queue)
        waiting[served] -= 1
        since[served] = {}
        for client in waiting:
            if client != served and waiting[client]:
                since[client][served] = since[client].get(served, 0) + 1
                assert since[client][served] <= 2
    assert not any(waiting.values())


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 9)), max_size=20))
def test_it_is_bounded_and_takes_whole_requests(arrivals: list[tuple[str, int]]) -> None:
    queue = FairQueue(10)
    for client, count in arrivals:
        before = len(queue)
        try:
            put(queue, client, count)
            assert len(queue) == before + count
        except QueueFullError:
            assert len(queue) == before
    assert len(queue) <= 10


def test_large_uploads_take_as_many_places_as_they_hold_memory() -> None:
    queue = FairQueue(8)

    def put(client: str, places: int) -> None:
        queue.put([Job(Ticket(client, "edit", None, None), 0, 1.0, 0.0, places=places)], 1)

    put("a", 20)  # larger than the queue, and alone
    with pytest.raises(QueueFullError, match="the queue is full"):
        put("b", 1)
    queue.drop(lambda job: True)
    put("a", 3)
    with pytest.raises(QueueFullError, match="this client's half"):
        put("a", 2)
    put("b", 5)
    with pytest.raises(QueueFullError, match="the queue is full"):
        put("c", 1)
