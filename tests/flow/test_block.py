"""A block's parts: inputs embedded one by one, tokens that continue a cache, and gradients with weights that move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from starflow.flow.block import AutoregressiveBlock
from starflow.flow.config import STARFlowConfig
from starflow.nn.attention import CacheShape, CacheSlice, KVCache, Layer
from tests.registry import randomised

CPU = torch.device("cpu")


def block(*, backwards: bool = False, rope: bool = True) -> AutoregressiveBlock:
    """The first block of two reads backwards."""
    config = STARFlowConfig(in_channels=2, img_size=4, channels=48, head_dim=24, num_blocks=2, layers_per_block=2,
                            txt_size=3, txt_dim=5, cond_top_only=False, rope=rope)  # fmt: skip
    return list(randomised(config, 0).double().iter_blocks())[0 if backwards else 1]


def tokens(count: int = 16) -> Tensor:
    return torch.randn(2, count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("rope", [False, True])
def test_inputs_embedded_in_parts_or_one_by_one_are_those_of_the_whole(backwards: bool, rope: bool) -> None:
    given = block(backwards=backwards, rope=rope)
    whole = given.embed(tokens(), 0)
    torch.testing.assert_close(given.embed(tokens()[:, 5:9], 5), whole[:, 5:9])
    ones = [given.embed_at(tokens()[:, k : k + 1], torch.tensor([k])) for k in range(16)]
    torch.testing.assert_close(torch.cat(ones, dim=1), whole)


def test_under_autocast_the_first_and_the_last_product_are_those_in_float32() -> None:
    given, inputs = block().float(), tokens().float()
    layer = given.attn_blocks[0]
    hidden = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(2))
    expected = given.embed(inputs, 0), given.outputs(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        found = given.embed(inputs, 0), given.outputs(hidden)
        assert isinstance(layer, Layer)
        assert layer.mlp(hidden).dtype == torch.bfloat16, "autocast does nothing here"
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_tokens_that_continue_a_cache_are_those_of_the_whole_sequence() -> None:
    given, hidden = block(), torch.randn(2, 7, 48, dtype=torch.float64)
    shape = CacheShape(2, 2, given.spec.layer.kv_heads, 7, 24)
    cache = KVCache.allocate(shape, dtype=torch.float64, device=CPU)
    parts = [
        given.extend(hidden[:, start : start + count], None, CacheSlice.at(cache, start, count))
        for start, count in ((0, 3), (3, 1), (4, 3))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), given.run_layers(hidden, None))


def test_with_weights_that_move_gradients_are_the_same_and_each_layer_moves_twice() -> None:
    """Once for the pass, and once for the way back."""
    given, moved = block(), []

    @contextmanager
    def move(layer: nn.Module) -> Iterator[None]:
        moved.append(layer)
        yield

    gradients = []
    for mover in (None, move):
        x, condition = tokens().requires_grad_(), torch.ones(2, 3, 5, dtype=torch.float64)
        z, log_sigma = given(x, condition, None, mover)
        (gradient,) = torch.autograd.grad(z.square().sum() + log_sigma.sum(), x)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients)
    layers = list(given.attn_blocks)
    assert moved == layers + layers[::-1]
