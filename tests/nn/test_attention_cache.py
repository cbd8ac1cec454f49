"""A cache takes tokens at a position that a number or a tensor holds, and a pool allocates each shape once."""

from __future__ import annotations

import pytest
import torch

from starflow.nn.attention import CachePool, CacheShape, KVCache

CPU = torch.device("cpu")
SHAPE = CacheShape(layers=2, batch=3, heads=4, length=7, head_dim=8)


def test_what_is_written_is_read_with_all_before_it() -> None:
    cache = KVCache.allocate(SHAPE, dtype=torch.float64, device=CPU).layers[1]
    keys, values = torch.randn(2, 3, 4, 7, 8, dtype=torch.float64)
    cache.write(0, keys[:, :, :5], values[:, :, :5])
    read = cache.write(4, keys[:, :, 4:6], values[:, :, 4:6])  # further back than the last one ended
    for found, expected in zip(read, (keys, values), strict=True):
        assert torch.equal(found, expected[:, :, :6])
        assert found.data_ptr() in (cache.keys_BNLH.data_ptr(), cache.values_BNLH.data_ptr()), "a view, not a copy"


def test_one_token_is_written_where_a_tensor_says_and_rounded_to_the_caches_precision() -> None:
    cache = KVCache.allocate(SHAPE, dtype=torch.bfloat16, device=CPU).layers[0]
    keys, values = torch.randn(2, 3, 4, 1, 8)
    for found, expected in zip(cache.write_at(torch.tensor([2]), 5, keys, values), (keys, values), strict=True):
        assert found.shape == (3, 4, 5, 8)
        assert torch.equal(found[:, :, 2:3], expected.bfloat16())
        assert (found[:, :, [0, 1, 3, 4]] == 0).all()


def test_a_cache_is_full_at_its_length() -> None:
    cache = KVCache.allocate(SHAPE, dtype=torch.float64, device=CPU).layers[0]
    keys = torch.zeros(3, 4, 8, 8, dtype=torch.float64)
    with pytest.raises(AssertionError, match="8 tokens in a cache of 7"):
        cache.write(0, keys, keys)


def test_a_pool_allocates_each_shape_once() -> None:
    pool = CachePool()
    cache = pool.take(SHAPE, dtype=torch.float32, device=CPU)
    assert pool.take(SHAPE, dtype=torch.float32, device=CPU) is cache
    assert pool.take(SHAPE._replace(batch=2), dtype=torch.float32, device=CPU) is not cache
    assert [layer.keys_BNLH.shape for layer in cache.layers] == [(3, 4, 7, 8)] * 2
    assert pool.bytes == 4 * 2 * 2 * (3 + 2) * 4 * 7 * 8


def test_a_pool_with_a_precision_of_its_own_keeps_to_it() -> None:
    cache = CachePool(torch.bfloat16).take(SHAPE, dtype=torch.float32, device=CPU)
    assert {layer.keys_BNLH.dtype for layer in cache.layers} == {torch.bfloat16}
