"""Attention is causal and grouped, the same with a cache as without, and cast to float32 only where that pays."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from starflow import STARFlow, denoise, sample
from starflow.flow import block as blocks
from starflow.flow.config import STARFlowConfig
from starflow.nn import attention
from starflow.nn.attention import Attention, CacheIndex, CacheShape, CacheSlice, KVCache, Layer
from starflow.nn.layers import LayerSpec, grid_positions, rotary_table
from tests.registry import randomised

CPU = torch.device("cpu")
TOKENS = 7


def spec(heads: int = 4, kv_heads: int = 4, *, qk_norm: bool = False) -> LayerSpec:
    return LayerSpec(width=24, heads=heads, kv_heads=kv_heads, head_dim=8, hidden=32, qk_norm=qk_norm)


def table() -> Tensor:
    return rotary_table(grid_positions(1, TOKENS, 3.0, dtype=torch.float64, device=CPU), 8, 0)


def cache_for(layer: LayerSpec, batch: int) -> KVCache:
    shape = CacheShape(1, batch, layer.kv_heads, TOKENS, layer.head_dim)
    return KVCache.allocate(shape, dtype=torch.float64, device=CPU)


def by_hand(attention: Attention, x: Tensor, rotary: Tensor | None) -> Tensor:
    """Softmax attention written out, head by head."""
    q, k, v = attention._queries_keys_values(x, rotary)
    group = attention.heads // attention.kv_heads
    future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    heads = []
    for head in range(attention.heads):
        scores = q[:, head] @ k[:, head // group].transpose(1, 2) / attention.head_dim**0.5
        heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, head // group])
    out: Tensor = attention.proj(torch.cat(heads, dim=-1))
    return out


@pytest.mark.parametrize(("heads", "kv_heads", "qk_norm"), [(4, 4, False), (4, 2, True), (3, 1, False)])
def test_it_is_causal_softmax_attention_with_grouped_heads(heads: int, kv_heads: int, qk_norm: bool) -> None:
    attention = Attention(spec(heads, kv_heads, qk_norm=qk_norm)).double()
    x = torch.randn(2, TOKENS, 24, dtype=torch.float64)
    torch.testing.assert_close(attention(x, table()), by_hand(attention, x, table()))
    torch.testing.assert_close(attention(x, None), by_hand(attention, x, None))


def splits() -> list[tuple[int, ...]]:
    """Ways to cut the tokens: one by one, at once, and in pieces."""
    return [(1,) * TOKENS, (TOKENS,), (3, 1, 3), (1, 6), (2, 5)]


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("pieces", splits())
def test_cached_equals_uncached_however_the_tokens_come(kv_heads: int, pieces: tuple[int, ...]) -> None:
    layer = Layer(spec(4, kv_heads, qk_norm=True)).double()
    x, rotary = torch.randn(2, TOKENS, 24, dtype=torch.float64), table()
    cache = cache_for(spec(4, kv_heads), batch=2)
    starts = itertools.accumulate(pieces, initial=0)
    outs = []
    for start, count in zip(starts, pieces, strict=False):
        position = CacheSlice.at(cache, start, count)
        rows = slice(start, start + count)
        outs.append(layer(x[:, rows], rotary[rows], cache.layers[0], position))
    torch.testing.assert_close(torch.cat(outs, dim=1), layer(x, rotary))


def test_writing_further_back_rewinds() -> None:
    """What stood after the new tokens is never seen."""
    layer, rotary = Layer(spec()).double(), table()
    first, second = torch.randn(2, 1, TOKENS, 24, dtype=torch.float64)
    cache = cache_for(spec(), batch=1)
    layer(first, rotary, cache.layers[0], CacheSlice.at(cache, 0, TOKENS))
    mixed = torch.cat((first[:, :2], second[:, 2:4]), dim=1)
    out = layer(second[:, 2:4], rotary[2:4], cache.layers[0], CacheSlice.at(cache, 2, 2))
    torch.testing.assert_close(out, layer(mixed, rotary[:4])[:, 2:])


def test_a_position_in_a_tensor_is_the_same_as_one_in_a_number() -> None:
    """One token after the other, whatever stands in the cache after them."""
    layer, rotary = Layer(spec()).double(), table()
    x = torch.randn(2, TOKENS, 24, dtype=torch.float64)
    cache = cache_for(spec(), batch=2)
    for kept in cache.layers:
        kept.keys_BNLH.normal_()
        kept.values_BNLH.normal_()
    outs = []
    for number in range(TOKENS):
        position = CacheIndex.at(cache, torch.tensor([number]), limit=TOKENS)
        rows = slice(number, number + 1)
        outs.append(layer(x[:, rows], rotary[rows], cache.layers[0], position))
    torch.testing.assert_close(torch.cat(outs, dim=1), layer(x, rotary))


def test_query_scale_divides_the_logits_of_its_row_alone() -> None:
    attention, x = Attention(spec()).double(), torch.randn(2, TOKENS, 24, dtype=torch.float64)
    scale = torch.tensor([1.0, 2.0], dtype=torch.float64).view(2, 1, 1, 1)
    cache = cache_for(spec(), batch=2)
    out = attention(x, None, cache.layers[0], CacheSlice.at(cache, 0, TOKENS, scale))
    plain = attention(x, None)
    torch.testing.assert_close(out[0], plain[0])
    with torch.no_grad():
        inner = attention.heads * attention.head_dim
        attention.qkv.weight[:inner] *= 2
        attention.qkv.bias[:inner] *= 2
    torch.testing.assert_close(out[1], attention(x, None)[1])
    assert not torch.allclose(out[1], plain[1], atol=1e-3)


CONFIG = STARFlowConfig(
    in_channels=2, img_size=8, channels=48, head_dim=24, num_blocks=2, layers_per_block=(1, 3), txt_size=3, txt_dim=5
)
X, CONDITION = torch.randn(2, 2, 8, 8), torch.randn(2, 3, 5)


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> STARFlow:
    """A model in bfloat16, on a processor without it."""
    monkeypatch.setattr(attention, "has_bfloat16", lambda device: False)
    model = randomised(CONFIG, 0)
    assert isinstance(model, STARFlow)
    return model.requires_grad_(False).to(torch.bfloat16)


def exact(model: STARFlow) -> STARFlow:
    """The same numbers in float32."""
    twin = randomised(CONFIG, 0)
    assert isinstance(twin, STARFlow)
    twin.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    return twin.requires_grad_(False)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@torch.no_grad()
def test_a_long_pass_is_nearer_to_the_stored_weights(half: STARFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = exact(half)(X, CONDITION)[0]
    wide = distance(half(X, CONDITION)[0], expected)
    monkeypatch.setattr(attention, "has_bfloat16", lambda device: True)
    narrow = distance(half(X, CONDITION)[0], expected)
    assert 0 < wide < 0.7 * narrow
    assert half.network_dtype == torch.bfloat16


@torch.no_grad()
def test_one_layer_is_wide_at_a_time_and_a_few_tokens_are_not(half: STARFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    most, made = 0, 0

    def counted(*given: object) -> nn.Module:
        nonlocal most, made
        layer = attention.float32_copy(*given)  # type: ignore[arg-type]
        alive.add(layer)
        most, made = max(most, len(alive)), made + 1
        return layer

    monkeypatch.setattr(blocks, "float32_copy", counted)
    half(X, CONDITION)
    assert (most, made) == (1, 4)
    half(X[:1, :, :4, :4], CONDITION[:1])  # 16 tokens
    assert made == 4


def test_training_and_other_precisions_stay_as_they_are(half: STARFlow) -> None:
    block, hidden = half.blocks[1], torch.zeros(2, 64, 48, dtype=torch.bfloat16)
    assert attention.computes_in_float32(block, hidden)
    assert not attention.computes_in_float32(block, hidden.float())
    half.requires_grad_(True)
    assert not attention.computes_in_float32(block, hidden)
    with torch.no_grad():
        assert attention.computes_in_float32(block, hidden)


def test_the_score_goes_through_the_cast(half: STARFlow) -> None:
    expected = denoise(exact(half), X, CONDITION)
    assert distance(denoise(half, X, CONDITION), expected) < 1e-2


def test_solvers_agree(half: STARFlow) -> None:
    drawn = sample(half, X, CONDITION, solver="jacobi", tolerance=0)
    assert distance(drawn, sample(exact(half), X, CONDITION)) < 5e-2
