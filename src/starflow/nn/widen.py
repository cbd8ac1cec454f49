"""Layers in bfloat16 on a processor that has no bfloat16 arithmetic: over many tokens each is cast to float32 first.

There such a product takes several times as long as in float32 (6.8 times for 1,152 tokens of width 3072 on a CPU with
AVX2), and a cast a fraction of it. One layer is wide at a time, so the memory is that of one layer. What comes out is
nearer to the stored weights than bfloat16 arithmetic is. A few tokens are not worth a cast, and neither is training.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from starflow.nn.attention import Layer
from starflow.nn.layers import LayerSpec

LONG = 32
"""Tokens of a pass from which on the cast pays."""


@functools.cache
def has_bfloat16() -> bool:
    """Whether this processor has products in bfloat16, as far as torch's own library for them says."""
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return asked is None or bool(asked())


def runs_wide(block: nn.Module, hidden_BTD: Tensor) -> bool:
    """Whether a block's layers are to be cast for a pass over these hidden states."""
    if hidden_BTD.dtype != torch.bfloat16 or hidden_BTD.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    long = hidden_BTD.shape[0] * hidden_BTD.shape[1] >= LONG
    return long and not has_bfloat16() and all(map(_plain, block.parameters()))


def widened(layer: nn.Module, spec: LayerSpec) -> Layer:
    """A copy of a layer in float32."""
    with torch.device("meta"):
        twin = Layer(spec)
    twin.load_state_dict({name: tensor.float() for name, tensor in layer.state_dict().items()}, assign=True)
    return twin.requires_grad_(False)


def _plain(parameter: Tensor) -> bool:
    """Neither trained, nor of a type of its own (quantised, sharded), nor anything but bfloat16."""
    trained = parameter.requires_grad and torch.is_grad_enabled()
    return not trained and type(parameter.data) is Tensor and parameter.dtype == torch.bfloat16
