"""The processes of a training run, as torchrun starts them, and how they find each other.

Contract: every process runs the same program and calls the same collectives in the same order. A `World` of one
process (the default) does nothing anywhere, so that code is written once. Nothing is pickled on the wire.

torchrun keeps one store over its restarts (pytorch/pytorch#135712), so that a process that is faster than the main one
would read addresses of a process that is gone. Here the processes of a start first agree on an id that no earlier start
had, and everything else is stored under it. Each process asks with an id of its own, and the main one answers each id
that it finds: an old one is answered as well, to nobody, and the main process goes on once all have heard its own id.
"""

from __future__ import annotations

import contextlib
import os
import time
import traceback
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

LONG_TIMEOUT = timedelta(days=30)
"""How long the others wait for work that the main process does alone, such as encoding a data set."""

POLL_INTERVAL = 0.02
"""Seconds between two looks at the store."""


@dataclass(frozen=True)
class World:
    """This process and the others. `join_world` makes the one that torchrun describes.

    Example:
        >>> alone = World()
        >>> alone.is_main, alone.all_reduce(torch.tensor([1.0, 2.0])), alone.any_process(False)
        (True, [1.0, 2.0], False)
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Processes on this host."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    timeout: float = 600.0
    """Seconds that a collective may take in training."""
    patient_group: dist.ProcessGroup | None = None
    """A group on the CPU whose barriers may take days; None in a world of one."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the log, the images and the model."""
        return self.rank == 0

    def all_reduce(self, values: Tensor) -> list[float]:
        """Sums of a vector's entries over all processes; the one wait for the device in an update."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        sums: list[float] = values.tolist()
        return sums

    def any_process(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return self.all_reduce(torch.tensor([float(flag)], device=self.device))[0] > 0

    def any_missing(self, path: Path) -> bool:
        """Whether any process misses a file, asked by all before one goes on to write it: all hear the same."""
        return self.any_process(not path.is_file())

    def barrier(self) -> None:
        """Wait until every process is here, for days if need be."""
        if self.patient_group is not None:
            dist.barrier(self.patient_group)

    def run_on_hosts(self, work: Callable[[], object]) -> None:
        """Do `work` in the main process, then in one process of each other host, while the rest wait.

        What it leaves in a cache, such as weights that are fetched and converted, is then there for all of them.
        """
        if self.is_main:
            work()
        self.barrier()
        if self.local_rank == 0 and not self.is_main:
            work()
        self.barrier()

    def run_on_main(self, work: Callable[[], None]) -> None:
        """Do `work` in the main process alone, while the others wait for it."""
        if self.is_main:
            work()
        self.barrier()


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

    Example:
        >>> with join_world(torch.device("cpu"), timeout=600) as world:
        ...     world.size
        1
    """
    if not launched_by_torchrun():
        yield World(device=device)
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    with explain_lost_process(rank, size):
        _init_process_group("nccl" if device.type == "cuda" else "gloo", rank, size, timeout)
        patient_group = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)
        try:
            yield World(rank, size, local_rank, local_size, device, timeout, patient_group)
        finally:
            dist.destroy_process_group()


def _init_process_group(backend: str, rank: int, size: int, timeout: float) -> None:
    limit = timedelta(seconds=timeout)
    store, _, _ = next(rendezvous("env://", rank, size, timeout=limit))
    run_id = agree_on_run_id(PrefixStore("starflow", store), rank, size, timeout)
    dist.init_process_group(backend, store=PrefixStore(run_id, store), rank=rank, world_size=size, timeout=limit)


def agree_on_run_id(store: Store, rank: int, size: int, timeout: float) -> str:
    """An id that all processes of this start share, and no other start has.

    Args:
        store: shared by all processes, whatever it already holds.
        rank: of this process.
        size: number of processes.
        timeout: seconds that the main process waits for the others; those wait as long as the store does.

    Raises:
        UserError: one of them did not come.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        _answer_all(store, own, set(range(1, size)), timeout)
        return own
    store.set(f"asks/{rank}", own)
    run_id = bytes(store.get(f"answer/{own}")).decode()
    store.set(f"heard/{run_id}/{rank}", "yes")
    return run_id


def _answer_all(store: Store, run_id: str, missing: set[int], timeout: float) -> None:
    """Answer every process that asks, until all of `missing` have heard the id."""
    answered: dict[int, bytes] = {}
    deadline = time.monotonic() + timeout
    while missing:
        for rank in sorted(missing):
            if store.check([f"heard/{run_id}/{rank}"]):
                missing.discard(rank)
            elif store.check([f"asks/{rank}"]) and (asked := bytes(store.get(f"asks/{rank}"))) != answered.get(rank):
                store.set(f"answer/{asked.decode()}", run_id)
                answered[rank] = asked
        if missing and time.monotonic() > deadline:
            raise UserError(
                f"process {min(missing)} did not come within {timeout:.0f} s: see what it says, then start again"
            )
        time.sleep(POLL_INTERVAL if missing else 0)


@contextlib.contextmanager
def explain_lost_process(rank: int, size: int) -> Iterator[None]:
    """Say in one line that another process is gone, where a collective says it in many.

    Raises:
        UserError: a collective failed or timed out.
    """
    try:
        yield
    except RuntimeError as error:  # gloo raises this itself, NCCL and the store a child of it
        if not raised_by_collective(error):
            raise
        text = " ".join(str(error).split())
        raise UserError(
            f"process {rank} of {size} lost another one ({text[:160]}): the job ends; the same command again starts it "
            "anew, and a training run goes on from the last checkpoint (by itself under torchrun --max-restarts)"
        ) from None


def raised_by_collective(error: RuntimeError) -> bool:
    """Whether an error comes from torch.distributed: by its type, or else by the code that raised it.

    gloo's errors have no type of their own, so the innermost frames of the traceback are looked at, those of torch's
    operators (through which sharded tensors call their collectives) aside.
    """
    if isinstance(error, dist.DistError):
        return True
    modules = [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    while modules and modules[-1] == "torch._ops":
        modules.pop()
    return bool(modules) and modules[-1].startswith("torch.distributed.")
