"""A model made ready for training, in place: recomputed activations, compiled layers, and shards.

Units are the Transformer layers and the blocks around them; a model without any is one unit. z and log-determinants
are never rounded: shards change the precision of weights alone, never of a module's inputs or outputs, and gradients
are averaged in float32.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from starflow.flow.block import AutoregressiveBlock
from starflow.nn.attention import Layer
from starflow.train.distributed.mesh import Layout
from starflow.train.settings import ParallelSettings


def layers_of(model: nn.Module) -> list[Layer]:
    """The Transformer layers of a model."""
    return [module for module in model.modules() if isinstance(module, Layer)]


def recompute(model: nn.Module, parallel: ParallelSettings) -> None:
    """Keep no activations inside attention or MLP where the settings say so: the backward pass computes them again."""
    for layer in layers_of(model):
        if parallel.checkpoint_attention:
            layer.register_module("attention", checkpoint_wrapper(layer.attention))
        if parallel.checkpoint_mlp:
            layer.register_module("mlp", checkpoint_wrapper(layer.mlp))


def compile_units(model: nn.Module) -> None:
    """Compile every Transformer layer, or the whole of a model that has none; names and `extend` stay as they are."""
    units: list[nn.Module] = [*layers_of(model)]
    for unit in units or [model]:
        unit.compile()


def shard(model: nn.Module, layout: Layout, weights: torch.dtype | None) -> None:
    """Split the weights over the layout's mesh, layer by layer and block by block.

    Args:
        model: on the meta device, or real and equal in every process.
        layout: the mesh.
        weights: precision that weights are gathered in; None is their own.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=weights, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
    )
    blocks = [module for module in model.modules() if isinstance(module, AutoregressiveBlock)]
    for unit in [*layers_of(model), *blocks, model]:
        fully_shard(unit, mesh=layout.mesh, mp_policy=policy)
