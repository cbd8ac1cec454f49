"""Processes of one start agree on an id, whatever earlier starts left in the store; and who tells of a lost process."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from starflow.errors import UserError
from starflow.train.distributed import World, agree_on_run_id, explain_lost_process, join_world, raised_by_collective


def ids_of_a_start(store: Store, late: int, size: int = 3) -> set[str]:
    """One start, in threads; process `late` comes last."""
    ids: list[str] = []

    def come(rank: int) -> None:
        time.sleep(0.1 * (rank == late))
        ids.append(agree_on_run_id(store, rank, size, timeout=20))

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == size
    return set(ids)


def test_every_start_has_an_id_of_its_own() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=20))
    seen: set[str] = set()
    for late in (0, 1, 2, 0):
        (run_id,) = ids_of_a_start(store, late)
        assert run_id not in seen
        seen.add(run_id)


def test_a_start_in_which_one_is_missing_ends() -> None:
    store = HashStore()
    store.set("asks/1", "of an earlier start")
    with pytest.raises(UserError, match=r"process 1 did not come within 0 s"):
        agree_on_run_id(store, 0, 2, timeout=0.1)


def test_alone_every_collective_is_the_identity(tmp_path: Path) -> None:
    with join_world(torch.device("cpu"), timeout=1) as world:
        assert (world.rank, world.size, world.is_main, world.device) == (0, 1, True, torch.device("cpu"))
    assert world.all_reduce(torch.tensor([1.5, 2.0])) == [1.5, 2.0]
    assert [world.any_process(flag) for flag in (False, True)] == [False, True]
    assert world.any_missing(tmp_path / "none")
    assert not world.any_missing(Path(__file__))
    done: list[int] = []
    world.run_on_main(lambda: done.append(1))
    World(rank=1, size=2).run_on_main(lambda: done.append(2))
    world.barrier()
    assert done == [1]


def test_an_error_of_our_own_is_no_lost_process() -> None:
    """Whatever its words are: only where it was raised counts."""
    with pytest.raises(RuntimeError, match="gloo connection timed out"), explain_lost_process(0, 2):
        raise RuntimeError("gloo connection timed out")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), explain_lost_process(0, 2):
        checkpoint_wrapper(nn.Linear(2, 3))(torch.ones(1, 3))
    with pytest.raises(UserError, match="of the user"), explain_lost_process(0, 2):
        raise UserError("of the user")


def test_an_error_of_a_collective_is_a_lost_process() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.1))
    with (
        pytest.raises(UserError, match=r"process 1 of 2 lost another one \(.*goes on from the last checkpoint"),
        explain_lost_process(1, 2),
    ):
        store.get("never")
    with pytest.raises(RuntimeError) as caught:
        raise_in("torch.distributed.distributed_c10d")
    assert raised_by_collective(caught.value)
    with pytest.raises(RuntimeError) as caught:
        raise_in("torch.nn.functional")
    assert not raised_by_collective(caught.value)


def raise_in(module: str) -> None:
    """Raise an error without a type of its own, as gloo does, in code of that module."""
    exec("raise RuntimeError('Connection closed by peer')", {"__name__": module})


@pytest.mark.parametrize(("rank", "local_rank", "calls"), [(0, 0, 1), (1, 1, 0), (8, 0, 1), (9, 1, 0)])
def test_one_process_of_each_host_does_what_its_cache_keeps(rank: int, local_rank: int, calls: int) -> None:
    done: list[int] = []
    World(rank=rank, size=16, local_rank=local_rank, local_size=8).run_on_hosts(lambda: done.append(rank))
    assert len(done) == calls
