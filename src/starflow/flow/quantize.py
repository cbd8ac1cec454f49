"""The format of a flow's weights: the linear maps inside the layers of every block, almost all of its parameters.

On a CPU the weights stay as they are and every pass is of the rounded ones (`starflow.nn.quantize`); the compiled loop
packs them in their format. On other devices torchao stores 8 bits with a scale an output, or 4 bits with one for 32
inputs, and multiplies in the network's precision. First and last projections, norms and embeddings stay as they are.
What it costs in nats/dim is stated in docs/performance.md.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from starflow.errors import UserError
from starflow.flow.model import Flow
from starflow.nn.quantize import GROUP_INPUTS, RoundedLinear, WeightFormat


def set_weight_format(model: Flow, form: WeightFormat, device: str | torch.device = "cpu") -> None:
    """Round the weights of all layers to a format, in place.

    Args:
        model: whose weights are rounded; its precision is that of the arithmetic.
        form: "float32", "bfloat16", "int8" or "int4".
        device: where the model will compute.

    Raises:
        UserError: the weights are rounded already, have more bits than the arithmetic, or need torchao, which is not
            installed.
    """
    stored, precision = weight_format(model), str(model.network_dtype).removeprefix("torch.")
    if form == stored:
        return
    if stored != precision:
        raise UserError(f"the weights are {stored} already, expected a model as it was loaded: load it with {form}")
    if form == "float32" or (form == "bfloat16" and precision != "float32"):
        raise UserError(f"weights are {form} where the arithmetic is {precision}: choose dtype {form} as well")
    kind = torch.device(device).type
    if form == "int4" and kind != "cpu" and (kind, precision) != ("cuda", "bfloat16"):
        raise UserError(
            f"int4 weights on {kind} in {precision}, expected cuda in bfloat16: choose dtype bfloat16 or int8"
        )
    for block in model.iter_blocks():
        if form == "bfloat16" or kind == "cpu":
            _replace_linears(block.attn_blocks, form)
        else:
            _quantize_by_torchao(block.attn_blocks, form, torch.device(device))
    model.runtime_cache.clear()  # what was measured or packed was of the other weights


def weight_format(model: Flow) -> str:
    """The format of the layers' weights; of one that was not rounded, the name of its precision."""
    for part in next(iter(model.iter_blocks())).attn_blocks.modules():
        if isinstance(part, RoundedLinear):
            return part.form
        if isinstance(part, nn.Linear) and type(part.weight.data) is not Tensor:
            return "quantized by torchao"
    return str(model.network_dtype).removeprefix("torch.")


def is_rounded(model: Flow) -> bool:
    """Whether `set_weight_format` has rounded the model's weights."""
    return weight_format(model) != str(model.network_dtype).removeprefix("torch.")


def _replace_linears(layers: nn.Module, form: WeightFormat) -> None:
    for module in list(layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, RoundedLinear.of(child, form))


def _quantize_by_torchao(layers: nn.Module, form: WeightFormat, device: torch.device) -> None:
    """Store the weights of linear layers as torchao does, 8 bits where they lie, and 4 bits on a CUDA device.

    Products of 4 bits are kernels of torch for bfloat16, whose weights are packed on the device: layers that lie
    elsewhere are moved there for it, one after the other, and back.
    """
    if importlib.util.find_spec("torchao") is None:
        raise UserError(f"{form} weights need torchao, which is not installed: pip install 'starflow[int8]'")
    with _only_errors("torchao"):  # it warns of kernels that this machine cannot use
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

        if form == "int8":
            quantize_(layers, Int8WeightOnlyConfig(set_inductor_config=False))
            return
        config = Int4WeightOnlyConfig(
            group_size=GROUP_INPUTS["int4"], int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
        for layer in layers.children():
            home = next(layer.parameters()).device
            quantize_(layer.to(device), config)
            layer.to(home)


@contextmanager
def _only_errors(name: str) -> Iterator[None]:
    """A context in which a logger keeps warnings to itself; afterwards its level is the caller's again."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
