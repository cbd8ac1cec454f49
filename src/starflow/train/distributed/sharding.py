"""How the weights of a model are split over processes, in place, and what a process holds of each tensor.

Layouts are meshes. Every layout is (copies x shards) processes, and one code path trains them all: replicated is
(size, 1), sharded (1, size), hybrid (size / shard_size, shard_size). Process r belongs to copy r // shard_size, so that
the shards of a copy are neighbours, on one host where they fit.

Contract of split tensors: a tensor is split along its first dimension over the last mesh dimension, as fully_shard does
it (like `torch.chunk`), and equal over the other one. A plain tensor is equal everywhere.

Units of sharding are the Transformer layers and the blocks around them; a model without any is one unit. z and
log-determinants are never rounded: shards change the precision of weights alone, never of a module's inputs or outputs,
and gradients are averaged in float32.

First weights of a flow that was built on the meta device: every Transformer layer, and the rest of every block, draws
from a seed of its own. Each process makes one of them at a time on the CPU and keeps its part, so that a model larger
than a process's memory starts with the same weights in any layout and at any number of processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from starflow.errors import UserError
from starflow.flow.block import AutoregressiveBlock
from starflow.flow.model import Flow
from starflow.nn.attention import Layer
from starflow.train.distributed.world import World
from starflow.train.loader import generator
from starflow.train.settings import ParallelSettings


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
        weights: precision that weights are gathered in; None is their own.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=weights, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
    )
    blocks = [module for module in model.modules() if isinstance(module, AutoregressiveBlock)]
    for unit in [*layers_of(model), *blocks, model]:
        fully_shard(unit, mesh=layout.mesh, mp_policy=policy)


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
