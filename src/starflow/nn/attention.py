"""Self-attention with grouped heads, its static key/value cache, and the Transformers that are made of it.

The caller allocates the cache once, and layers write it in place: keys are stored after their rotation, so nothing is
rotated twice. Writing at `start` makes everything from there on obsolete; there is no other state, so a rewind is a
write further back and a reset is a write at 0. Positions are Python integers, or tensors on the cache's device: no step
waits for the device.

Without a cache the T tokens are a whole sequence, over which attention is causal unless the spec says otherwise. With a
cache they continue what it holds before `start`, and the result is what the whole sequence would give.

`computes_in_float32` and `float32_copy` are for bfloat16 layers on processors without bfloat16 arithmetic. There a long
product takes several times as long as in float32 (6.8 times for 1,152 tokens of width 3072 on a CPU with AVX2), and a
cast of the weights a fraction of it. One layer is cast at a time, so the memory is that of one layer, and the result is
nearer to the stored weights than bfloat16 arithmetic is. A few tokens are not worth a cast, and training keeps its
precision.

`BidirectionalTransformer` has no causal mask: tokens of a grid, with condition tokens or a class before them. It is the
network of what works beside a flow in one parallel pass: a student and a learned denoiser. Every token sees
every other one. Layers come in groups, and the hidden states after each group are returned, so that a loss can reach
into the network. A new one passes its tokens on through its first projection: what a layer adds starts at zero.

Shapes: B batch, T tokens, D width, N query heads, K key/value heads, H head width, L tokens up to now, S condition
tokens, C token channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from starflow.nn.cpu import has_bfloat16, on_huge_pages
from starflow.nn.layers import (
    MLP,
    GatedMLP,
    LayerSpec,
    RMSNorm,
    condition_positions,
    grid_positions,
    make_norm,
    rotary_table,
    rotate,
)
from starflow.nn.quantize import RoundedLinear, effective_weight


@dataclass(frozen=True)
class LayerCache:
    """The keys and values of one layer, each (B, N, L, H)."""

    keys_BNLH: Tensor
    values_BNLH: Tensor

    def write(self, start: int, keys_BNTH: Tensor, values_BNTH: Tensor) -> tuple[Tensor, Tensor]:
        """Store T tokens at `start`; returns views of everything up to them, each (B, N, start + T, H).

        >>> cache = LayerCache(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2))
        >>> keys, values = cache.write(1, torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
        >>> keys[0, 0, :, 0]
        tensor([0., 1., 1.])
        """
        stop = start + keys_BNTH.shape[2]
        assert stop <= self.keys_BNLH.shape[2], f"{stop} tokens in a cache of {self.keys_BNLH.shape[2]}"
        self.keys_BNLH[:, :, start:stop] = keys_BNTH
        self.values_BNLH[:, :, start:stop] = values_BNTH
        return self.keys_BNLH[:, :, :stop], self.values_BNLH[:, :, :stop]

    def write_at(self, position_1: Tensor, limit: int, keys_BN1H: Tensor, values_BN1H: Tensor) -> tuple[Tensor, Tensor]:
        """Store one token at the position that a tensor (1,) holds; returns views of the first `limit` positions."""
        self.keys_BNLH.index_copy_(2, position_1, keys_BN1H.to(self.keys_BNLH.dtype))
        self.values_BNLH.index_copy_(2, position_1, values_BN1H.to(self.values_BNLH.dtype))
        return self.keys_BNLH[:, :, :limit], self.values_BNLH[:, :, :limit]


class CacheShape(NamedTuple):
    """The sizes of a cache, which holds 2 * layers * batch * heads * length * head_dim numbers."""

    layers: int
    batch: int
    heads: int
    length: int
    head_dim: int


@dataclass(frozen=True)
class KVCache:
    """The caches of a stack of layers, one each."""

    layers: tuple[LayerCache, ...]

    @staticmethod
    def allocate(shape: CacheShape, *, dtype: torch.dtype, device: torch.device) -> KVCache:
        """A cache of zeros with room for `shape.length` tokens in every layer."""

        def zeros() -> Tensor:
            return on_huge_pages(torch.empty(shape[1:], dtype=dtype, device=device)).zero_()

        return KVCache(tuple(LayerCache(zeros(), zeros()) for _ in range(shape.layers)))


class CachePool:
    """A set of caches by shape, each allocated once: whoever takes one overwrites what its last user left.

    Args:
        dtype: precision of all keys and values; None is the network's.

    >>> pool, shape = CachePool(torch.bfloat16), CacheShape(layers=1, batch=1, heads=1, length=4, head_dim=2)
    >>> cache = pool.take(shape, dtype=torch.float32, device=torch.device("cpu"))
    >>> cache is pool.take(shape, dtype=torch.float32, device=torch.device("cpu")), pool.bytes
    (True, 32)
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self._caches: dict[tuple[CacheShape, torch.dtype, torch.device], KVCache] = {}

    def take(self, shape: CacheShape, *, dtype: torch.dtype, device: torch.device) -> KVCache:
        """The pool's cache of this shape, in the pool's precision or else in `dtype`."""
        key = (shape, self.dtype or dtype, device)
        if key not in self._caches:
            self._caches[key] = KVCache.allocate(shape, dtype=self.dtype or dtype, device=device)
        return self._caches[key]

    @property
    def bytes(self) -> int:
        """Bytes of all caches together."""
        layers = [layer for cache in self._caches.values() for layer in cache.layers]
        return sum(layer.keys_BNLH.nbytes + layer.values_BNLH.nbytes for layer in layers)


@dataclass(frozen=True)
class CacheSlice:
    """The place of T consecutive new tokens in a cache: the caches they extend, and the index of the first of them.

    >>> from starflow.nn.attention import CacheShape
    >>> shape = CacheShape(layers=1, batch=1, heads=1, length=4, head_dim=2)
    >>> cache = KVCache.allocate(shape, dtype=torch.float32, device=torch.device("cpu"))
    >>> CacheSlice.at(cache, start=1, count=2).mask_TL
    tensor([[ True,  True, False],
            [ True,  True,  True]])
    """

    cache: KVCache
    start: int
    mask_TL: Tensor | None
    """(T, L), what each new token attends to; None where a plain causal or full mask does."""
    query_scale: Tensor | None = None
    """(B, 1, 1, 1) factor on the attention logits of each row; None is 1."""

    @staticmethod
    def at(cache: KVCache, start: int, count: int, query_scale: Tensor | None = None) -> CacheSlice:
        """The place of `count` tokens that continue the first `start` ones."""
        mask_TL = None
        if start and count > 1:
            device = cache.layers[0].keys_BNLH.device
            mask_TL = torch.ones(count, start + count, dtype=torch.bool, device=device).tril(start)
        return CacheSlice(cache, start, mask_TL, query_scale)

    @property
    def causal(self) -> bool:
        """Whether the new tokens are the whole sequence, so that the plain causal mask applies."""
        return self.start == 0

    def write(self, cache: LayerCache, keys_BNTH: Tensor, values_BNTH: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values, each (B, K, T, H); returns all up to now, each (B, K, L, H)."""
        return cache.write(self.start, keys_BNTH, values_BNTH)


@dataclass(frozen=True)
class CacheIndex:
    """The place of one new token in a cache, held by a tensor so that the work is the same at every position.

    A pass can so be recorded once and replayed, at the price of reading `limit` positions, those masked included.
    """

    cache: KVCache
    position_1: Tensor
    limit: int
    """Number of positions that are read; the token's own is below it."""
    mask_TL: Tensor
    """(1, limit), true up to the token's own position."""
    query_scale: Tensor | None = None
    causal = False

    @staticmethod
    def at(cache: KVCache, position_1: Tensor, limit: int, query_scale: Tensor | None = None) -> CacheIndex:
        """The place that `position_1`, of shape (1,), names."""
        mask_TL = torch.arange(limit, device=position_1.device)[None] <= position_1[:, None]
        return CacheIndex(cache, position_1, limit, mask_TL, query_scale)

    def write(self, cache: LayerCache, keys_BNTH: Tensor, values_BNTH: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values; returns the positions below the limit, each (B, K, limit, H)."""
        return cache.write_at(self.position_1, self.limit, keys_BNTH, values_BNTH)


CachePosition = CacheSlice | CacheIndex

"""Where the tokens of a pass stand in a cache."""


class Attention(nn.Module):
    """Attention with its norms: norm, softmax at scale 1/sqrt(H), projection, and the optional norm after.

    It is causal unless the spec says otherwise, and maps (B, T, D) to (B, T, D). The K key/value heads serve groups of
    N / K query heads (grouped-query attention, arXiv 2305.13245).
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = spec.heads, spec.kv_heads, spec.head_dim
        self.half_split_rope, self.causal = spec.half_split_rope, spec.causal
        inner = spec.heads * spec.head_dim
        self.norm = make_norm(spec)
        self.qkv = nn.Linear(spec.width, inner + 2 * spec.kv_heads * spec.head_dim, bias=spec.bias)
        self.proj = nn.Linear(inner, spec.width, bias=spec.bias)
        self.query_norm = RMSNorm(spec.head_dim) if spec.qk_norm else None
        self.key_norm = RMSNorm(spec.head_dim) if spec.qk_norm else None
        self.post_norm = RMSNorm(spec.width) if spec.post_norm else nn.Identity()

    def forward(
        self,
        x_BTD: Tensor,
        rotary: Tensor | None,
        cache: LayerCache | None = None,
        position: CachePosition | None = None,
    ) -> Tensor:
        """A whole sequence, or with a cache the tokens that continue it, whose keys and values it stores."""
        q_BNTH, k_BKTH, v_BKTH = self._queries_keys_values(x_BTD, rotary)
        if cache is None or position is None:
            return self._output(self._attend(q_BNTH, k_BKTH, v_BKTH, causal=self.causal))
        if position.query_scale is not None:
            q_BNTH = q_BNTH * position.query_scale.to(q_BNTH.dtype)
        k_BKLH, v_BKLH = position.write(cache, k_BKTH, v_BKTH)
        out = self._attend(q_BNTH.to(k_BKLH.dtype), k_BKLH, v_BKLH, causal=position.causal, mask=position.mask_TL)
        return self._output(out.to(x_BTD.dtype))

    def _queries_keys_values(self, x_BTD: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.qkv(self.norm(x_BTD)).unflatten(-1, (-1, self.head_dim))
        rotated, v_BTKH = heads.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = rotated.split((self.heads, self.kv_heads), dim=2)
            rotated = torch.cat((self.query_norm(q), self.key_norm(k)), dim=2)
        if rotary is not None:
            rotated = rotate(rotated, rotary, half_split=self.half_split_rope)
        q_BTNH, k_BTKH = rotated.split((self.heads, self.kv_heads), dim=2)
        return q_BTNH.transpose(1, 2), k_BTKH.transpose(1, 2), v_BTKH.transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None = None) -> Tensor:
        grouped = self.heads != self.kv_heads
        if q.device.type == "cpu" and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu"):
            # A processor's backward pass of attention takes two to five times as long in bfloat16 as in float32.
            with torch.autocast("cpu", enabled=False):
                return F.scaled_dot_product_attention(
                    q.float(), k.float(), v.float(), attn_mask=mask, is_causal=causal, enable_gqa=grouped
                )
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)

    def _output(self, out_BNTH: Tensor) -> Tensor:
        out: Tensor = self.post_norm(self.proj(out_BNTH.transpose(1, 2).flatten(2)))
        return out


class Layer(nn.Module):
    """A pre-norm Transformer layer, x += Attention(x); x += MLP(x), (B, T, D) to the same. Both hold their own norms.

    >>> layer = Layer(LayerSpec(width=16, heads=2, kv_heads=1, head_dim=8, hidden=32))
    >>> layer(torch.zeros(1, 5, 16), rotary=None).shape
    torch.Size([1, 5, 16])
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.attention = Attention(spec)
        self.mlp = GatedMLP(spec) if spec.swiglu else MLP(spec)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: Tensor | None,
        cache: LayerCache | None = None,
        position: CachePosition | None = None,
    ) -> Tensor:
        """A whole sequence, or with a cache the tokens that continue it."""
        x_BTD = x_BTD + self.attention(x_BTD, rotary, cache, position)
        out: Tensor = x_BTD + self.mlp(x_BTD)
        return out


MIN_TOKENS_TO_CAST = 32
"""Tokens of a pass from which on casting the weights takes less time than it saves."""


def computes_in_float32(block: nn.Module, hidden_BTD: Tensor) -> bool:
    """Whether the layers of a block are to be cast for a pass over these hidden states."""
    if hidden_BTD.dtype != torch.bfloat16 or hidden_BTD.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    long = hidden_BTD.shape[0] * hidden_BTD.shape[1] >= MIN_TOKENS_TO_CAST
    return long and not has_bfloat16(hidden_BTD.device) and all(map(_is_plain_bfloat16, block.parameters()))


def float32_copy(layer: nn.Module, spec: LayerSpec) -> Layer:
    """A copy of a layer in float32, without gradients, of the weights that it computes with."""
    with torch.device("meta"):
        twin = Layer(spec)
    twin.load_state_dict({name: tensor.float() for name, tensor in layer.state_dict().items()}, assign=True)
    for name, part in layer.named_modules():
        if isinstance(part, RoundedLinear):
            twin.get_submodule(name).weight = nn.Parameter(effective_weight(part).float())
    return twin.requires_grad_(False)


def _is_plain_bfloat16(parameter: Tensor) -> bool:
    """Whether a parameter is in bfloat16, not being trained, and no tensor subclass (quantised or sharded)."""
    trained = parameter.requires_grad and torch.is_grad_enabled()
    return not trained and type(parameter.data) is Tensor and parameter.dtype == torch.bfloat16


@dataclass(frozen=True)
class TransformerSpec:
    """The sizes of a `BidirectionalTransformer`."""

    token_channels: int
    """C"""
    groups: tuple[int, ...]
    """Layers of each group; the hidden states are returned after each."""
    layer: LayerSpec
    """Of each layer; its mask is taken off."""
    span: float
    """Side in tokens that the positions of any grid cover; see `grid_positions`."""
    condition_size: int = 0
    """S; 0 is no condition tokens."""
    condition_dim: int = 0
    """Width of a condition token."""
    num_classes: int = 0
    """Classes; 0 is none. One vector more stands for no class, label -1."""


class BidirectionalTransformer(nn.Module):
    """See the module's docstring.

    >>> layer = LayerSpec(width=32, heads=2, kv_heads=2, head_dim=16, hidden=64)
    >>> network = BidirectionalTransformer(TransformerSpec(4, (1, 2), layer, span=8))
    >>> [hidden.shape for hidden in network(torch.zeros(1, 6, 4), grid=(2, 3), condition=None)]
    [torch.Size([1, 6, 32]), torch.Size([1, 6, 32])]
    """

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.spec, width = spec, spec.layer.width
        layer = replace(spec.layer, causal=False)
        self.proj_in = nn.Linear(spec.token_channels, width)
        self.proj_condition = nn.Linear(spec.condition_dim, width) if spec.condition_size else None
        self.class_embed = nn.Parameter(1e-2 * torch.randn(spec.num_classes + 1, width)) if spec.num_classes else None
        self.layers = nn.ModuleList(Layer(layer) for _ in range(sum(spec.groups)))
        for one in self.layers:
            assert isinstance(one, Layer)
            last = one.mlp.down_proj if isinstance(one.mlp, GatedMLP) else one.mlp.main[2]
            for module in (one.attention.proj, last):
                assert isinstance(module, nn.Linear)
                nn.init.zeros_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        tokens_BNC: Tensor,
        grid: tuple[int, int],
        condition: Tensor | None,
        vector_BD: Tensor | None = None,
    ) -> list[Tensor]:
        """Tokens in raster order to the hidden states (B, N, D) after each group.

        Args:
            tokens_BNC: of any float type.
            grid: (rows, columns).
            condition: tokens (B, S, condition_dim), labels (B,), or None without a condition.
            vector_BD: is added to every token.
        """
        hidden: Tensor = self.proj_in(tokens_BNC.to(self.proj_in.weight.dtype))
        if self.class_embed is not None:
            assert condition is not None
            hidden = hidden + self.class_embed[condition][:, None]  # row -1 is the last one: no class
        if vector_BD is not None:
            hidden = hidden + vector_BD[:, None]
        skipped = 0
        if self.proj_condition is not None:
            assert condition is not None
            prefix = self.proj_condition(condition.to(self.proj_condition.weight.dtype))
            hidden, skipped = torch.cat((prefix, hidden), dim=1), prefix.shape[1]
        rotary, states = self.rotary(grid, hidden.device), []
        layers = iter(self.layers)
        for count in self.spec.groups:
            for _ in range(count):
                hidden = next(layers)(hidden, rotary)
            states.append(hidden[:, skipped:])
        return states

    def rotary(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """The rotary table of the condition tokens and the grid; a quarter of the angles is for the condition."""
        spec = self.spec
        positions = grid_positions(*grid, spec.span, dtype=torch.float32, device=device)
        if not spec.condition_size:
            return rotary_table(positions, spec.layer.head_dim, 0)
        places = condition_positions(spec.condition_size, spec.span, dtype=torch.float32, device=device)
        return rotary_table(torch.cat((places, positions)), spec.layer.head_dim, spec.layer.head_dim // 8)
