"""Weights of linear layers in fewer bits than the arithmetic: bfloat16, 8 and 4 bits.

Integer weights are symmetric and have a scale, itself a bfloat16 number, for each group of inputs of an output: w is
about code * scale, with codes from -127 to 127 and groups of 64 inputs for 8 bits, from -8 to 7 and groups of 32 for 4.
The scale of 4 bits is the one of a few that leaves the smallest squared error.

Contract: a `RoundedLinear` keeps the weights that it was given and computes with them rounded, so that every pass of a
network, whichever code computes it, is of the same rounded weights. Rounding depends on the values alone.

Shapes: N outputs, K inputs, G groups of S inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

WeightFormat = Literal["float32", "bfloat16", "int8", "int4"]
"""How the linear layers of a network's Transformer layers store their weights."""

IntegerFormat = Literal["int8", "int4"]

GROUP_INPUTS = {"int8": 64, "int4": 32}
"""S, the inputs that share a scale."""

LARGEST_CODE = {"int8": 127, "int4": 7}

STORED_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 2 / 64, "int4": 0.5 + 2 / 32}
"""Bytes of a weight, with its part of a scale."""

SCALE_FACTORS = (1.0, 0.94, 0.88, 0.82)
"""Factors on the scale at which the largest weight of 4 bits is just held, of which the best is taken."""

ROWS_AT_ONCE = 64
"""Outputs that are rounded at once: few enough that what is computed of them stays in a processor's cache."""


@dataclass(frozen=True)
class QuantizedMatrix:
    """Integer codes of a matrix and their scales.

    >>> matrix = quantize(torch.tensor([[1.0, -0.5, 0.25]]), "int8")
    >>> matrix.codes_NGS[0, 0, :3].tolist(), matrix.dequantize().shape
    ([127, -64, 32], torch.Size([1, 3]))
    """

    codes_NGS: Tensor
    """int8, filled up with zeros to whole groups."""
    scales_NG: Tensor
    """bfloat16."""
    inputs: int
    """K"""

    def dequantize(self) -> Tensor:
        """The rounded matrix (N, K), in float32."""
        whole = self.codes_NGS.float() * self.scales_NG.float().unsqueeze(2)
        return whole.flatten(1)[:, : self.inputs]


def quantize(weight_NK: Tensor, form: IntegerFormat) -> QuantizedMatrix:
    """A matrix (N, K) in integers."""
    parts = [_quantize_rows(some, form) for some in weight_NK.detach().split(ROWS_AT_ONCE)]
    codes, scales = (torch.cat(found) for found in zip(*parts, strict=True))
    return QuantizedMatrix(codes, scales, weight_NK.shape[1])


def _quantize_rows(weight_NK: Tensor, form: IntegerFormat) -> tuple[Tensor, Tensor]:
    """Codes and scales of a few outputs."""
    size = GROUP_INPUTS[form]
    whole = F.pad(weight_NK.float(), (0, -weight_NK.shape[1] % size)).unflatten(1, (-1, size))
    if form == "int8":
        scales = (whole.abs().amax(2) / LARGEST_CODE[form]).bfloat16()
        return _codes(whole, scales, -127, 127), scales
    # The largest weight, whatever its sign, is -8: of 16 codes one more is negative.
    extreme = whole.gather(2, whole.abs().argmax(2, keepdim=True)).squeeze(2)
    scales, codes, least = _scales_and_error(whole, extreme / -8)
    for factor in SCALE_FACTORS[1:]:
        others, other_codes, error = _scales_and_error(whole, extreme * (factor / -8))
        better = error < least
        scales, least = torch.where(better, others, scales), torch.where(better, error, least)
        codes = torch.where(better.unsqueeze(2), other_codes, codes)
    return codes, scales


def _scales_and_error(whole_NGS: Tensor, scales_NG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales as they are stored, the codes that they give, and the squared error of each group."""
    scales_NG = scales_NG.bfloat16()
    codes = _codes(whole_NGS, scales_NG, -8, 7)
    return scales_NG, codes, (codes * scales_NG.float().unsqueeze(2) - whole_NGS).square().sum(2)


def _codes(whole_NGS: Tensor, scales_NG: Tensor, least: int, most: int) -> Tensor:
    inverse = torch.where(scales_NG == 0, 0.0, 1 / scales_NG.float())
    return (whole_NGS * inverse.unsqueeze(2)).round_().clamp_(least, most).to(torch.int8)


def rounded(weight_NK: Tensor, form: WeightFormat) -> Tensor:
    """A matrix rounded to a format, in float32, or as it is where that holds no more than the format.

    >>> rounded(torch.tensor([[1.001, -1.0]]), "bfloat16")
    tensor([[ 1., -1.]])
    """
    if form == "float32":
        return weight_NK
    if form == "bfloat16":
        return weight_NK.bfloat16().float()
    return quantize(weight_NK, form).dequantize()


class RoundedLinear(nn.Linear):
    """A linear layer that computes with its weights rounded to a format; the weights themselves stay as they are.

    >>> layer = RoundedLinear.of(nn.Linear(4, 2), "int8")
    >>> layer(torch.randn(3, 4)).shape
    torch.Size([3, 2])
    """

    form: WeightFormat

    @staticmethod
    def of(linear: nn.Linear, form: WeightFormat) -> RoundedLinear:
        """One with the parameters of a linear layer, which are shared."""
        with torch.device("meta"):
            made = RoundedLinear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        made.weight, made.bias, made.form = linear.weight, linear.bias, form
        return made.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, effective_weight(self).to(x.dtype), self.bias)


def effective_weight(linear: nn.Linear) -> Tensor:
    """The weights (N, K) that a linear layer multiplies with, in enough precision to hold them."""
    return rounded(linear.weight, linear.form) if isinstance(linear, RoundedLinear) else linear.weight


def stored_bytes(tensor: Tensor) -> int:
    """Memory of a tensor's values; of one that wraps others, as torchao's weights do, theirs.

    >>> stored_bytes(torch.zeros(3, dtype=torch.bfloat16))
    6
    """
    if is_traceable_wrapper_subclass(tensor):
        return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()
