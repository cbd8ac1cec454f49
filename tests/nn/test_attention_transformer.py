"""The Transformer without a mask: every token reaches every other, and layers with a mask are as they were."""

from __future__ import annotations

import torch

from starflow.nn.attention import BidirectionalTransformer, Layer, TransformerSpec
from starflow.nn.layers import LayerSpec

LAYER = LayerSpec(width=32, heads=2, kv_heads=2, head_dim=16, hidden=64)


def random_network(**options: int) -> BidirectionalTransformer:
    torch.manual_seed(0)
    network = BidirectionalTransformer(TransformerSpec(3, (1, 1), LAYER, span=4.0, **options))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def changed(network: BidirectionalTransformer, token: int) -> torch.Tensor:
    """By how much each output token moves when one input token does."""
    x = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(1))
    other = x.clone()
    other[0, token] += 1
    difference: torch.Tensor = network(x, (2, 3), None)[-1] - network(other, (2, 3), None)[-1]
    return difference.detach().abs().amax((0, 2))


def test_every_token_reaches_every_other() -> None:
    assert all(bool((changed(random_network(), token) > 1e-4).all()) for token in (0, 5))


def test_a_layer_is_causal_unless_it_is_told_otherwise() -> None:
    torch.manual_seed(0)
    layer = Layer(LAYER)
    x = torch.randn(1, 5, 32)
    other = x.clone()
    other[0, -1] += 1
    assert torch.equal(layer(x, None)[:, :-1], layer(other, None)[:, :-1])


def test_a_new_one_passes_its_tokens_on() -> None:
    network = BidirectionalTransformer(TransformerSpec(3, (2, 1), LAYER, span=4.0))
    x = torch.randn(2, 6, 3)
    for hidden in network(x, (2, 3), None):
        assert torch.equal(hidden, network.proj_in(x))


def test_condition_tokens_classes_and_the_vector_reach_every_token() -> None:
    x = torch.randn(2, 6, 3)
    with_text = random_network(condition_size=4, condition_dim=5)
    texts = torch.randn(2, 4, 5)
    assert with_text(x, (2, 3), texts)[-1].shape == (2, 6, 32)
    assert bool((with_text(x, (2, 3), texts)[-1] != with_text(x, (2, 3), texts.flip(1))[-1]).any(-1).all())
    with_classes = random_network(num_classes=3)
    none, first = (with_classes(x, (2, 3), torch.full((2,), label))[-1] for label in (-1, 0))
    assert bool((none != first).any(-1).all())
    vector = torch.randn(2, 32)
    moved = with_classes(x, (2, 3), torch.full((2,), 0), vector)[-1]
    assert bool((moved != first).any(-1).all())
