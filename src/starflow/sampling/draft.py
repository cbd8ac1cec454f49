"""Cheap passes for guesses: a block whose large products run in bfloat16.

Contract: what a draft gives is a guess and no more; whoever uses it verifies it with the block itself. Hidden states,
norms, attention and the first and last projection keep their precision, so that the error is that of rounding the
weights and the products' inputs to 8 bits of mantissa (about 7e-4 of the data's scale on trained blocks, half of that
of a network all in bfloat16). Where bfloat16 products are native they are several times faster: four times on one core
with avx512_bf16.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from starflow.flow.block import AutoregressiveBlock
from starflow.sampling.predictor import Predictor


class _Rounded(nn.Module):
    """A linear layer whose product runs in bfloat16; input and output keep theirs."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight.detach().to(torch.bfloat16)
        self.bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(torch.bfloat16), self.weight, self.bias).to(x.dtype)


def draft_of(predictor: Predictor) -> Predictor:
    """The same predictor with the same cache, and rounded products; the predictor itself is left as it is."""
    return dataclasses.replace(predictor, block=_rounded(predictor.block))


def can_draft(predictor: Predictor) -> bool:
    """Whether drafts differ from the block: not where it is in bfloat16 or float16 already."""
    return predictor.block.proj_in.weight.dtype in (torch.float32, torch.float64)


def worth_drafting(predictor: Predictor) -> bool:
    """Whether a draft may be faster: not on x86 processors without AVX-512, where bfloat16 products are emulated."""
    weight = predictor.block.proj_in.weight
    emulated = weight.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    return can_draft(predictor) and not emulated


def _rounded(block: AutoregressiveBlock) -> AutoregressiveBlock:
    """A copy of the block that shares every parameter but those of its layers' linear maps."""
    shared = {id(parameter): parameter for parameter in block.parameters()}
    twin = copy.deepcopy(block, shared)
    for module in list(twin.attn_blocks.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and type(child.weight.data) is Tensor:  # not what is quantised already
                setattr(module, name, _Rounded(child))
    return twin
