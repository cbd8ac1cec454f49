"""What every solver stands on: mu and log sigma of some tokens of one block, given those before them.

Contract: tokens are in the block's own order. Conditional and null branch run as one batch against one
cache that the caller owns; a block without guidance runs the conditional rows alone. Nothing here waits
for the device.

Shapes: B pictures, R rows (B, or 2B with the null branch second), N tokens, T some of them,
C token channels, D width, S condition tokens of width E, K key/value heads, H head width.

Cheap passes for guesses: a block whose large products run in bfloat16.

Contract: what a draft gives is a guess and no more; whoever uses it verifies it with the block itself. Hidden states,
norms, attention and the first and last projection keep their precision, so that the error is that of rounding the
weights and the products' inputs to 8 bits of mantissa (about 7e-4 of the data's scale on trained blocks, half of that
of a network all in bfloat16). Where bfloat16 products are native they are several times faster: four times on one core
with avx512_bf16.

Some pictures of a batch on their own: rows leave a computation, and their keys and values come back.

Contract: a narrowed predictor computes for its rows what the whole one would, against a cache of its own that starts as
a copy; nothing it does reaches the whole one's cache until `copy_rows_back`.

Shapes: B pictures of the whole batch, P of them; with guidance the cache has both branches, the null one second.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from starflow.flow.block import AutoregressiveBlock
from starflow.nn.attention import CacheSlice
from starflow.nn.kv_cache import CachePool, CacheShape, KVCache, LayerCache
from starflow.sampling import guidance as rules
from starflow.sampling.guidance import Guidance

InitialGuess = Literal["noise", "zero", "previous", "gaussian", "rounded"]
"""Start of an iteration: the noise, which is what the block before gave; zeros; the last token that is solved; every
token's noise in the Gaussian of that last token; or what going token by token gives with rounded weights."""


class TokenEngine(Protocol):
    """Compiled code that solves a block in place of the network, such as `starflow.sampling.cpu.engine`."""

    def ready(self, predictor: Predictor) -> bool:
        """Whether it may take the next pass of this predictor: it covers the block, and is built or worth building."""
        ...

    def prefill(self, predictor: Predictor) -> None:
        """Write the keys and values of the condition tokens."""
        ...

    def extend(self, predictor: Predictor, hidden_RTD: Tensor, position: int) -> Tensor:
        """Hidden states after all layers of some more tokens, whose keys and values the cache takes."""
        ...

    def solve(self, predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, report: TokenProgress) -> None:
        """Invert the whole block token by token, in place."""
        ...

    def draft(self, predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, tokens: range) -> None:
        """Invert some tokens with rounded weights, in place, as a guess."""
        ...


@dataclass(frozen=True)
class Predictor:
    """One block, ready to be inverted."""

    block: AutoregressiveBlock
    tokens: int
    """N"""
    cache: KVCache
    rotary: Tensor | None
    """Table of the S condition tokens and the block's inputs."""
    condition_RSE: Tensor | None
    """Condition tokens that stand before the block's inputs, or None."""
    class_R1D: Tensor | None
    guidance: Guidance | None
    query_scale: Tensor | None
    """(R, 1, 1, 1) factor on the attention logits, or None."""
    engine: TokenEngine | None = None
    """Compiled code that may take the place of the network, where it covers the block."""

    @staticmethod
    def of(
        block: AutoregressiveBlock,
        batch: int,
        tokens: int,
        conditions: list[Tensor | None],
        rotary: Tensor | None,
        guidance: Guidance | None,
        caches: CachePool,
        engine: TokenEngine | None = None,
    ) -> Predictor:
        """For a batch of pictures of N tokens; `conditions` are those of the branches: one, or with guidance two."""
        given = [condition for condition in conditions if condition is not None]
        condition = torch.cat(given) if given else None
        condition_RSE = None if block.proj_txt is None else condition
        class_R1D = None if block.class_embed is None else block.class_vector(condition)
        inputs = tokens - block.first_predicted + (0 if condition_RSE is None else condition_RSE.shape[1])
        weight, layer = block.proj_in.weight, block.spec.layer
        cache = caches.take(
            CacheShape(block.spec.layers, batch * len(conditions), layer.kv_heads, inputs, layer.head_dim),
            dtype=weight.dtype,
            device=weight.device,
        )
        query_scale = None if guidance is None else guidance.query_scale()
        return Predictor(block, tokens, cache, rotary, condition_RSE, class_R1D, guidance, query_scale, engine)

    @property
    def first(self) -> int:
        """Index of the first token that is predicted; those before it are the noise itself."""
        return self.block.first_predicted

    def prefill(self) -> None:
        """Put the condition's keys and values into the cache, in one pass."""
        if self.condition_RSE is None:
            return
        if self.engine is not None and self.engine.ready(self):
            self.engine.prefill(self)
            return
        prefix_RSD = self.block.prefix(self.condition_RSE)
        assert prefix_RSD is not None
        self._extend(prefix_RSD, 0)

    @property
    def can_round(self) -> bool:
        """Whether the compiled loop is there, and the block's weights have something to round."""
        ready = self.engine is not None and self.engine.ready(self)
        return ready and self.block.proj_in.weight.dtype == torch.float32

    def before(self, x_BNC: Tensor, start: int, stop: int) -> Tensor:
        """The inputs that predict tokens start..stop-1: the tokens before each, and the start token for token 0."""
        if start:
            return x_BNC[:, start - 1 : stop - 1]
        assert self.block.sos_embed is not None
        first = self.block.sos_embed.to(x_BNC.dtype).expand(x_BNC.shape[0], -1, -1)
        return torch.cat((first, x_BNC[:, : stop - 1]), dim=1)

    def predict(self, before_BTC: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """mu and log sigma, (B, T, C) each, of the T tokens from `start`; writes their inputs' keys and values."""
        hidden_RTD = self.write(before_BTC, start)
        if self.guidance is None:
            return self.gaussian(hidden_RTD, None)
        return self.gaussian(hidden_RTD, self.guidance.weights(start, before_BTC.shape[1], self.tokens))

    def gaussian(self, hidden_RTD: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """mu and log sigma, (B, T, C) each, of the layers' outputs, guided by the weights if there are any."""
        outputs = self.block.outputs(hidden_RTD)
        if self.guidance is None or weight is None:
            return self.block.gaussian(outputs)
        outputs_c, outputs_u = outputs.chunk(2)
        if self.guidance.rule == "linear":
            return self.block.gaussian(rules.linear(outputs_c, outputs_u, weight))
        return rules.gaussian(*self.block.gaussian(outputs_c), *self.block.gaussian(outputs_u), weight)

    def write(self, before_BTC: Tensor, start: int) -> Tensor:
        """Hidden states (R, T, D) of the inputs that predict tokens from `start`, in place in the cache."""
        index = start - self.first
        return self._extend(self.in_rows(self.block.embed(before_BTC, index)), self.prefixed + index)

    def in_rows(self, hidden_BTD: Tensor) -> Tensor:
        """Embedded tokens for every branch, (R, T, D)."""
        hidden_RTD = hidden_BTD if self.guidance is None else torch.cat((hidden_BTD, hidden_BTD))
        return hidden_RTD if self.class_R1D is None else hidden_RTD + self.class_R1D

    @property
    def prefixed(self) -> int:
        """Condition tokens before the first."""
        return 0 if self.condition_RSE is None else self.condition_RSE.shape[1]

    def _extend(self, hidden_RTD: Tensor, position: int) -> Tensor:
        if self.engine is not None and self.engine.ready(self):
            return self.engine.extend(self, hidden_RTD, position)
        count = hidden_RTD.shape[1]
        rotary = None if self.rotary is None else self.rotary[position : position + count]
        return self.block.extend(hidden_RTD, rotary, CacheSlice.at(self.cache, position, count, self.query_scale))


@dataclass(frozen=True)
class IterationLimits:
    """How hard a parallel solver tries."""

    tolerance: float = 1e-3
    """Residual ||F(x) - x|| / ||F(x)|| of a sequence within which it counts as solved."""
    segment: int | None = None
    """Tokens solved at once; None is all of them."""
    max_iterations: int | None = None
    """Iterations a segment before it is solved token by token; None is as many as it has tokens, which is exact."""
    guess: InitialGuess = "noise"
    """What a segment's tokens start from."""
    draft: bool = False
    """Start with passes whose products run in bfloat16; see `starflow.sampling.predictor`."""


@dataclass(frozen=True)
class SolverResult:
    """What a solver did."""

    x_BNC: Tensor
    iterations: int
    """Passes over some tokens, drafts aside."""
    residual_B: Tensor
    """||F(x) - x|| / ||F(x)|| of each sequence, verified on the values returned; 0 is exact."""
    drafts: int = 0
    """Passes in lower precision that only gave guesses."""
    single: int = 0
    """Tokens solved one by one because iterating them gave no answer in time."""


TokenProgress = Callable[[int], None]
"""Told the number of tokens solved since the last call."""


def ignore_progress(_tokens: int) -> None:
    """The progress that nobody looks at."""


Solver = Callable[[Predictor, Tensor, IterationLimits, TokenProgress], SolverResult]
"""Noise (B, N, C) to data, both in the block's own order."""


class _Rounded(nn.Module):
    """A linear layer whose product runs in bfloat16; input and output keep theirs."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight.detach().to(torch.bfloat16)
        self.bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(torch.bfloat16), self.weight, self.bias).to(x.dtype)


def draft_of(predictor: Predictor) -> Predictor:
    """The same predictor with the same cache, and rounded products; the predictor itself is left as it is."""
    return dataclasses.replace(predictor, block=_rounded(predictor.block))


def can_draft(predictor: Predictor) -> bool:
    """Whether drafts differ from the block: not where it is in bfloat16 or float16 already."""
    return predictor.block.proj_in.weight.dtype in (torch.float32, torch.float64)


def worth_drafting(predictor: Predictor) -> bool:
    """Whether a draft may be faster: not on x86 processors without AVX-512, where bfloat16 products are emulated."""
    weight = predictor.block.proj_in.weight
    emulated = weight.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    return can_draft(predictor) and not emulated


def _rounded(block: AutoregressiveBlock) -> AutoregressiveBlock:
    """A copy of the block that shares every parameter but those of its layers' linear maps."""
    shared = {id(parameter): parameter for parameter in block.parameters()}
    twin = copy.deepcopy(block, shared)
    for module in list(twin.attn_blocks.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and type(child.weight.data) is Tensor:  # not what is quantised already
                setattr(module, name, _Rounded(child))
    return twin


def select_pictures(predictor: Predictor, pictures_P: Tensor, filled: int) -> Predictor:
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
        condition_RSE=_select(predictor.condition_RSE, rows),
        class_R1D=_select(predictor.class_R1D, rows),
        query_scale=_select(predictor.query_scale, rows),
        guidance=guidance,
    )


def copy_rows_back(some: Predictor, from_P: Tensor, whole: Predictor, to_P: Tensor, start: int, stop: int) -> None:
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
