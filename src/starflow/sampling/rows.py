"""Some pictures of a batch on their own: rows leave a computation, and their keys and values come back.

Contract: a narrowed predictor computes for its rows what the whole one would, against a cache of its own that starts as
a copy; nothing it does reaches the whole one's cache until `give_back`.

Shapes: B pictures of the whole batch, P of them; with guidance the cache has both branches, the null one second.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from starflow.nn.cache import KVCache, LayerCache
from starflow.sampling.predictor import Predictor


def narrow(predictor: Predictor, pictures_P: Tensor, filled: int) -> Predictor:
    """The predictor of some pictures alone.

    Args:
        predictor: of B pictures.
        pictures_P: their indices, without repetition.
        filled: positions of the cache that are in use, the condition's included; the others are not copied.
    """
    rows = _rows(predictor, pictures_P)
    layers = tuple(
        LayerCache(_copied(layer.keys_BNLH, rows, filled), _copied(layer.values_BNLH, rows, filled))
        for layer in predictor.cache.layers
    )
    guidance = predictor.guidance
    if guidance is not None:
        guidance = dataclasses.replace(guidance, weight_B=guidance.weight_B[pictures_P])
    return dataclasses.replace(
        predictor,
        cache=KVCache(layers),
        prefix_RSD=_select(predictor.prefix_RSD, rows),
        class_R1D=_select(predictor.class_R1D, rows),
        query_scale=_select(predictor.query_scale, rows),
        guidance=guidance,
    )


def give_back(some: Predictor, from_P: Tensor, whole: Predictor, to_P: Tensor, start: int, stop: int) -> None:
    """Copy the cache's positions start..stop-1 of pictures `from_P` of `some` to pictures `to_P` of `whole`."""
    source, target = _rows(some, from_P), _rows(whole, to_P)
    for taken, given in zip(some.cache.layers, whole.cache.layers, strict=True):
        given.keys_BNLH[target, :, start:stop] = taken.keys_BNLH[source, :, start:stop]
        given.values_BNLH[target, :, start:stop] = taken.values_BNLH[source, :, start:stop]


def _rows(predictor: Predictor, pictures_P: Tensor) -> Tensor:
    """The rows of the cache that belong to some pictures."""
    if predictor.guidance is None:
        return pictures_P
    return torch.cat((pictures_P, pictures_P + len(predictor.guidance.weight_B)))


def _copied(cache_BNLH: Tensor, rows: Tensor, filled: int) -> Tensor:
    own = cache_BNLH.new_empty(len(rows), *cache_BNLH.shape[1:])
    own[:, :, :filled] = cache_BNLH[rows, :, :filled]
    return own


def _select(tensor: Tensor | None, rows: Tensor) -> Tensor | None:
    return tensor if tensor is None or len(tensor) == 1 else tensor[rows]
