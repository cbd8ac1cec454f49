"""How the processes of one start find each other in a store that earlier starts have written to.

torchrun keeps one store over its restarts (pytorch/pytorch#135712), so that a process that is faster than the first one
reads addresses of a process that is gone. Here a start agrees on a word that no earlier one had, and everything else
is stored under it. Processes ask with a word of their own, and the first answers each word that it finds: an old word
is answered as well, to nobody, and the first goes on once all have heard its own.
"""

from __future__ import annotations

import time
import uuid

from torch._C._distributed_c10d import Store

from starflow.errors import UserError

PAUSE = 0.02


def agree_on_a_word(store: Store, rank: int, size: int, timeout: float) -> str:
    """A word that all processes of this start share, and no other start does.

    Args:
        store: all processes', whatever it already holds.
        rank: of this process.
        size: processes.
        timeout: seconds that the first process waits for the others; those wait as long as the store does.

    Raises:
        UserError: one of them did not come.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        _answer(store, own, set(range(1, size)), timeout)
        return own
    store.set(f"asks/{rank}", own)
    word = bytes(store.get(f"answer/{own}")).decode()
    store.set(f"heard/{word}/{rank}", "yes")
    return word


def _answer(store: Store, word: str, missing: set[int], timeout: float) -> None:
    answered: dict[int, bytes] = {}
    deadline = time.monotonic() + timeout
    while missing:
        for rank in sorted(missing):
            if store.check([f"heard/{word}/{rank}"]):
                missing.discard(rank)
            elif store.check([f"asks/{rank}"]) and (asked := bytes(store.get(f"asks/{rank}"))) != answered.get(rank):
                store.set(f"answer/{asked.decode()}", word)
                answered[rank] = asked
        if time.monotonic() > deadline:
            raise UserError(
                f"process {min(missing)} did not come within {timeout:.0f} s: see what it says, then start again"
            )
        time.sleep(PAUSE if missing else 0)
