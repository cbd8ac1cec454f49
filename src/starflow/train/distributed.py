"""The processes of a training run: how they find each other, and how the weights of a model are split over them.

Contract: every process runs the same program and calls the same collectives in the same order. A `World` of one
process (the default) does nothing anywhere, so that code is written once. Nothing is pickled on the wire.

torchrun keeps one store over its restarts (pytorch/pytorch#135712), so that a process that is faster than the main one
would read addresses of a process that is gone. Here the processes of a start first agree on an id that no earlier start
had, and everything else is stored under it. Each process asks with an id of its own, and the main one answers each id
that it finds: an old one is answered as well, to nobody, and the main process goes on once all have heard its own id.

Weights are split in place. Layouts are meshes. Every layout is (copies x shards) processes, and one code path trains
them all: replicated is (size, 1), sharded (1, size), hybrid (size / shard_size, shard_size). Process r belongs to copy
r // shard_size, so that the shards of a copy are neighbours, on one host where they fit.

Contract of split tensors: a tensor is split along its first dimension over the last mesh dimension, as fully_shard does
it (like `torch.chunk`), and equal over the other one. A plain tensor is equal everywhere.

Units of sharding are the Transformer layers and the blocks around them; a model without any is one unit. Only layers
are gathered in bfloat16, so that a block's first and last product are as precise as without shards. z and
log-determinants are never rounded: shards change the precision of weights alone, never of a module's inputs or outputs,
and gradients are averaged in float32.

First weights of a flow that was built on the meta device: every Transformer layer, and the rest of every block, draws
from a seed of its own. Each process makes one of them at a time on the CPU and keeps its part, so that a model larger
than a process's memory starts with the same weights in any layout and at any number of processes.
"""

from __future__ import annotations

import contextlib
import os
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Shard

from starflow.errors import UserError
from starflow.flow.block import AutoregressiveBlock
from starflow.flow.model import Flow
from starflow.nn.attention import Layer
from starflow.train.settings import ParallelSettings, generator

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


@dataclass(frozen=True)
class ShardingLayout:
    """The mesh of processes that hold a model, and its sizes."""

    mesh: DeviceMesh
    """One-dimensional where there is one copy, else (copies, shards)."""
    shards: int
    copies: int


def shard_size(parallel: ParallelSettings, world: World) -> int:
    """The number of processes that share one copy of the weights.

    Raises:
        UserError: a hybrid layout that does not divide the processes.

    Example:
        >>> shard_size(ParallelSettings(layout="hybrid", shard_size=2), World(size=8))
        2
    """
    if parallel.layout == "replicated":
        return 1
    if parallel.layout == "sharded":
        return world.size
    shards = parallel.shard_size or world.local_size
    if world.size % shards:
        raise UserError(
            f"train.parallel.shard_size is {shards}, which does not divide {world.size} processes: "
            "choose a divisor, or 0 for the processes of one host"
        )
    return shards


def make_layout(parallel: ParallelSettings, world: World) -> ShardingLayout:
    """The mesh of a layout; collective. Its groups give up after the world's timeout."""
    shards = shard_size(parallel, world)
    ranks = torch.arange(world.size).view(-1, shards)
    kind = world.device.type
    everyone = dist.group.WORLD
    assert everyone is not None
    if shards == world.size:
        return ShardingLayout(DeviceMesh.from_group(everyone, kind), shards, 1)
    limit = timedelta(seconds=world.timeout)
    within, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=limit)
    across, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout=limit)
    assert within is not None
    assert across is not None
    mesh = DeviceMesh.from_group([across, within], kind, mesh=ranks, mesh_dim_names=("copy", "shard"))
    return ShardingLayout(mesh, shards, world.size // shards)


def shard_model(model: nn.Module, layout: ShardingLayout, weights: torch.dtype | None) -> None:
    """Split the weights over the layout's mesh, layer by layer and block by block.

    Args:
        model: on the meta device, or real and equal in every process.
        layout: see `make_layout`.
        weights: precision that the layers' weights are gathered in; None is their own.
    """
    rounded, own = (
        MixedPrecisionPolicy(param_dtype=one, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False)
        for one in (weights, None)
    )
    blocks = [module for module in model.modules() if isinstance(module, AutoregressiveBlock)]
    layers = layers_of(model)
    for unit in [*layers, *blocks, model]:  # what is around layers, such as a block's first product, is not rounded
        fully_shard(unit, mesh=layout.mesh, mp_policy=rounded if unit in layers or not layers else own)


def checkpoint_activations(model: nn.Module, parallel: ParallelSettings) -> None:
    """Keep no activations inside attention or MLP where the settings say so: the backward pass computes them again."""
    for layer in layers_of(model):
        if parallel.checkpoint_attention:
            layer.register_module("attention", checkpoint_wrapper(layer.attention))
        if parallel.checkpoint_mlp:
            layer.register_module("mlp", checkpoint_wrapper(layer.mlp))


def compile_layers(model: nn.Module) -> None:
    """Compile every Transformer layer, or the whole of a model that has none; names and `extend` stay as they are."""
    units: list[nn.Module] = [*layers_of(model)]
    for unit in units or [model]:
        unit.compile()


def layers_of(model: nn.Module) -> list[Layer]:
    """The Transformer layers of a model."""
    return [module for module in model.modules() if isinstance(module, Layer)]


def initialise(model: nn.Module, seed: int) -> None:
    """Fill the flow inside `model` with what its constructors would draw; not collective."""
    for module in model.modules():
        if isinstance(module, Flow):
            _initialise_flow(module, seed)


def _initialise_flow(flow: Flow, seed: int) -> None:
    for buffer in flow.buffers(recurse=False):
        buffer.fill_(1.0)  # TarFlow's variances, the only ones: a new model has the standard normal for a prior
    for number, block in enumerate(flow.iter_blocks()):
        with _seeded(seed, f"initial/{number}"):
            _copy(AutoregressiveBlock(replace(block.spec, layers=0)), block)
        for depth, layer in enumerate(block.attn_blocks):
            with _seeded(seed, f"initial/{number}/{depth}"):
                _copy(Layer(block.spec.layer), layer)


@contextlib.contextmanager
def _seeded(seed: int, purpose: str) -> Iterator[None]:
    """Run a block with the CPU's global generator seeded for one purpose, and put it back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, purpose, 0).initial_seed())
        yield


def _copy(source: nn.Module, target: nn.Module) -> None:
    into = named_state(target)
    for name, value in source.state_dict().items():
        write_shard(into[name], value)


def local_shard(tensor: Tensor) -> Tensor:
    """This process's shard, which shares memory with the tensor; of a plain tensor all of it.

    Example:
        >>> local_shard(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, in every process; collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def write_shard(tensor: Tensor, value: Tensor) -> None:
    """Copy this process's part of a full `value` into the tensor; not collective.

    Example:
        >>> weight = torch.zeros(2)
        >>> write_shard(weight, torch.tensor([1.0, 2.0]))
        >>> weight
        tensor([1., 2.])
    """
    assert tensor.shape == value.shape
    own = local_shard(tensor)
    if isinstance(tensor, DTensor):
        value = value.narrow(0, shard_start(tensor), len(own))
    own.copy_(value)


def shard_start(tensor: Tensor) -> int:
    """The row of the full tensor at which this process's shard begins."""
    if not isinstance(tensor, DTensor):
        return 0
    assert tensor.placements[-1] == Shard(0)
    mesh = tensor.device_mesh
    shards, rows = mesh.size(mesh.ndim - 1), tensor.shape[0]
    return min(rows, mesh.get_local_rank(mesh.ndim - 1) * -(-rows // shards))


def is_writer(tensor: Tensor, *, main: bool) -> bool:
    """Whether this process is the one that writes its shard: of equal copies, the first."""
    if not isinstance(tensor, DTensor):
        return main
    mesh = tensor.device_mesh
    in_first_copy = mesh.ndim == 1 or mesh.get_local_rank(0) == 0
    return in_first_copy and local_shard(tensor).numel() > 0


def named_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by the names of the plain model; values share its memory."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names of the plain model, without those of wrappers in between."""
    return {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in model.named_parameters()}
