"""A static key/value cache, which the caller allocates once and layers write in place.

Contract: keys are stored after their rotation, so nothing is rotated twice. Writing at `start` makes everything from
there on obsolete; there is no other state, so a rewind is a write further back and a reset is a write at 0. Positions
are Python integers, or tensors on the cache's device: no step waits for the device.

Shapes: B batch, T tokens, N key/value heads, H head width, L cache length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from starflow.nn.cpu import on_huge_pages


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
