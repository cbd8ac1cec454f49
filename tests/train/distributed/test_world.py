"""Processes of one start agree on a word, whatever earlier starts left in the store."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import HashStore, Store

from starflow.errors import UserError
from starflow.train.distributed.world import agree_on_run_id


def meet(store: Store, late: int, size: int = 3) -> set[str]:
    """One start, in threads; process `late` comes last."""
    words: list[str] = []

    def come(rank: int) -> None:
        time.sleep(0.1 * (rank == late))
        words.append(agree_on_run_id(store, rank, size, timeout=20))

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(words) == size
    return set(words)


def test_every_start_has_a_word_of_its_own() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=20))
    seen: set[str] = set()
    for late in (0, 1, 2, 0):
        (word,) = meet(store, late)
        assert word not in seen
        seen.add(word)


def test_a_start_in_which_one_is_missing_ends() -> None:
    store = HashStore()
    store.set("asks/1", "of an earlier start")
    with pytest.raises(UserError, match=r"process 1 did not come within 0 s"):
        agree_on_run_id(store, 0, 2, timeout=0.1)
