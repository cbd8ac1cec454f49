"""Layouts as meshes: every layout is (copies x shards) processes, and one code path trains them all.

Replicated is (size, 1), sharded (1, size), hybrid (size / shard_size, shard_size). Process r belongs to copy
r // shard_size, so that the shards of a copy are neighbours, on one host where they fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from starflow.errors import UserError
from starflow.train.distributed.world import World
from starflow.train.settings import ParallelSettings


@dataclass(frozen=True)
class Layout:
    """A mesh and its sizes."""

    mesh: DeviceMesh
    """One-dimensional where there is one copy, else (copies, shards)."""
    shards: int
    copies: int


def shard_size(parallel: ParallelSettings, world: World) -> int:
    """Processes that share one copy of the weights.

    Raises:
        UserError: a hybrid layout that does not divide the processes.
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


def make_layout(parallel: ParallelSettings, world: World) -> Layout:
    """The mesh of a layout; collective. Its groups give up after the world's timeout."""
    shards = shard_size(parallel, world)
    ranks = torch.arange(world.size).view(-1, shards)
    kind = world.device.type
    everyone = dist.group.WORLD
    assert everyone is not None
    if shards == world.size:
        return Layout(DeviceMesh.from_group(everyone, kind), shards, 1)
    patience = timedelta(seconds=world.timeout)
    within, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=patience)
    across, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout=patience)
    assert within is not None
    assert across is not None
    mesh = DeviceMesh.from_group([across, within], kind, mesh=ranks, mesh_dim_names=("copy", "shard"))
    return Layout(mesh, shards, world.size // shards)
