"""Int8 weights, by torchao, for the block next to the noise: they save memory, not time.

The linear maps inside that block's layers, almost all parameters of a deep-shallow flow, keep one byte a weight and one
scale an output channel, and are multiplied in the network's precision. First and last projections, norms and the other
blocks stay as they are. What it costs in nats/dim is stated in docs/performance.md.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from starflow.errors import UserError
from starflow.flow.model import Flow


def quantize_int8(model: Flow) -> None:
    """Round the weights of the block next to the noise to 8 bits, in place; there is no way back.

    Raises:
        UserError: torchao is not installed.
    """
    if importlib.util.find_spec("torchao") is None:
        raise UserError("int8 weights need torchao, which is not installed: pip install 'starflow[int8]'")
    block = list(model.iter_blocks())[-1]
    with _only_errors("torchao"):  # it warns of kernels that this machine cannot use
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(block.attn_blocks, Int8WeightOnlyConfig())
    model.runtime_cache.clear()  # what was measured or packed was of the other weights


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


def is_quantized(model: Flow) -> bool:
    """Whether `quantize_int8` has rounded the model's weights."""
    maps = (module for module in list(model.iter_blocks())[-1].attn_blocks.modules() if isinstance(module, nn.Linear))
    return any(type(linear.weight.data) is not Tensor for linear in maps)
