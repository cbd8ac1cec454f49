"""How the processes of one start find each other in a store that earlier starts have written to.

torchrun keeps one store over its restarts (pytorch/pytorch#135712), so that a process that is faster than the first one
reads addresses of a process that is gone. Here a start agrees on a word that no earlier one had, and everything else
is stored under it. Processes ask with a word of their own, and the first answers each word that it finds: an old word
is answered as well, to nobody, and the first goes on once all have heard its own.

The processes of a training run, as torchrun starts them.

Contract: every process runs the same program and calls the same collectives in the same order. A `World` of one
process (the default) does nothing anywhere, so that code is written once. Nothing is pickled on the wire.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from starflow.errors import UserError

PAUSE = 0.02


def agree_on_run_id(store: Store, rank: int, size: int, timeout: float) -> str:
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


PATIENCE = timedelta(days=30)
"""How long the others wait for work that the first process does alone, such as encoding a data set."""

LOST = ("gloo", "connection", "nccl", "timed out", "timeout", "socket", "recvbytes", "broken pipe")
"""Words of the errors that a collective raises when a process is gone."""


@dataclass(frozen=True)
class World:
    """This process and the others. Build the one of torchrun with `join_world`."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Processes on this host."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    timeout: float = 600.0
    """Seconds that a collective may take in training."""
    patient: dist.ProcessGroup | None = None
    """A group on the CPU whose barriers may take days; None in a world of one."""

    @property
    def main(self) -> bool:
        """Whether this process writes the log, the pictures and the model."""
        return self.rank == 0

    def total(self, values: Tensor) -> list[float]:
        """Sums of a vector's entries over all processes; the one wait for the device in an update."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        totals: list[float] = values.tolist()
        return totals

    def agree(self, *, failed: bool) -> bool:
        """Whether `failed` holds in any process."""
        return self.total(torch.tensor([float(failed)], device=self.device))[0] > 0

    def missing(self, path: Path) -> bool:
        """Whether a file is missing, asked by all before any goes on to write it: all hear the same."""
        return self.agree(failed=not path.is_file())

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.patient is not None:
            dist.barrier(self.patient)

    def first(self, work: Callable[[], None]) -> None:
        """`work` in the main process alone, while the others wait for it."""
        if self.main:
            work()
        self.wait()


def launched_by_torchrun() -> bool:
    """Whether torchrun started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def join_world(device: torch.device, timeout: float) -> Iterator[World]:
    """The world that torchrun's environment describes, or a world of one without it.

    Args:
        device: of the computation; "cuda" becomes this process's own.
        timeout: seconds after which a collective gives up on a process that does not answer.

    Raises:
        UserError: the others are not to be reached, or one was lost on the way.
    """
    if not launched_by_torchrun():
        yield World(device=device)
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    with lost_process(rank, size):
        _meet("nccl" if device.type == "cuda" else "gloo", rank, size, timeout)
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        try:
            yield World(rank, size, local_rank, local_size, device, timeout, patient)
        finally:
            dist.destroy_process_group()


def _meet(backend: str, rank: int, size: int, timeout: float) -> None:
    patience = timedelta(seconds=timeout)
    store, _, _ = next(rendezvous("env://", rank, size, timeout=patience))
    word = agree_on_run_id(PrefixStore("starflow", store), rank, size, timeout)
    dist.init_process_group(backend, store=PrefixStore(word, store), rank=rank, world_size=size, timeout=patience)


@contextlib.contextmanager
def lost_process(rank: int, size: int) -> Iterator[None]:
    """Say in one line that another process is gone, where a collective says it in many.

    Raises:
        UserError: a collective failed or timed out.
    """
    try:
        yield
    except UserError:
        raise
    except RuntimeError as error:  # gloo and NCCL raise this or a child of it
        text = " ".join(str(error).split())
        if not any(word in text.lower() for word in LOST):
            raise
        raise UserError(
            f"process {rank} of {size} lost another one ({text[:160]}): the job ends; the same command goes on from "
            "the last checkpoint (by itself under torchrun --max-restarts)"
        ) from None
