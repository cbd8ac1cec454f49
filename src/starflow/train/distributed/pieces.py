"""Tensors that several processes hold together: this process's piece, the whole, and where the piece lies in it.

Contract: a tensor is split along its first dimension over the last mesh dimension, as fully_shard does it (like
`torch.chunk`), and equal over the other one. A plain tensor is equal everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard


def local(tensor: Tensor) -> Tensor:
    """This process's piece; it shares memory with the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def first_row(tensor: Tensor) -> int:
    """Where this process's piece begins along the first dimension of the whole."""
    if not isinstance(tensor, DTensor):
        return 0
    assert tensor.placements[-1] == Shard(0)
    mesh = tensor.device_mesh
    shards, rows = mesh.size(mesh.ndim - 1), tensor.shape[0]
    return min(rows, mesh.get_local_rank(mesh.ndim - 1) * -(-rows // shards))


def is_writer(tensor: Tensor, *, main: bool) -> bool:
    """Whether this process is the one that writes its piece: of equal copies, the first."""
    if not isinstance(tensor, DTensor):
        return main
    mesh = tensor.device_mesh
    in_first_copy = mesh.ndim == 1 or mesh.get_local_rank(0) == 0
    return in_first_copy and local(tensor).numel() > 0


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, in every process; collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def write(tensor: Tensor, value: Tensor) -> None:
    """Copy this process's part of a whole `value` into the tensor; not collective."""
    assert tensor.shape == value.shape
    piece = local(tensor)
    if isinstance(tensor, DTensor):
        value = value.narrow(0, first_row(tensor), len(piece))
    piece.copy_(value)


def named_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by the names of the plain model; values share its memory."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names of the plain model, without those of wrappers in between."""
    return {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in model.named_parameters()}
