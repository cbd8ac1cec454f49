"""What every solver stands on: mu and log sigma of some tokens of one block, given those before them.

Contract: tokens are in the block's own order. Conditional and null branch run as one batch against one
cache that the caller owns; a block without guidance runs the conditional rows alone. Nothing here waits
for the device.

Shapes: B pictures, R rows (B, or 2B with the null branch second), N tokens, T some of them,
C token channels, D width, S condition tokens, K key/value heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from starflow.flow.block import AutoregressiveBlock
from starflow.nn.attention import Continuation
from starflow.nn.cache import CachePool, CacheShape, KVCache
from starflow.sampling import guidance as rules
from starflow.sampling.engine.native import Engine
from starflow.sampling.guidance import Guidance

Guess = Literal["noise", "zero", "previous", "gaussian", "rounded"]
"""Start of an iteration: the noise, which is what the block before gave; zeros; the last token that is solved; every
token's noise in the Gaussian of that last token; or what going token by token gives with rounded weights."""


@dataclass(frozen=True)
class Predictor:
    """One block, ready to be inverted."""

    block: AutoregressiveBlock
    tokens: int
    """N"""
    cache: KVCache
    rotary: Tensor | None
    """Table of the S condition tokens and the block's inputs."""
    prefix_RSD: Tensor | None
    class_R1D: Tensor | None
    guidance: Guidance | None
    query_scale: Tensor | None
    """(R, 1, 1, 1) factor on the attention logits, or None."""
    engine: Engine | None = None
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
        engine: Engine | None = None,
    ) -> Predictor:
        """For a batch of pictures of N tokens; `conditions` are those of the branches: one, or with guidance two."""
        given = [condition for condition in conditions if condition is not None]
        condition = torch.cat(given) if given else None
        prefix_RSD = block.prefix(condition)
        class_R1D = None if block.class_embed is None else block.class_vector(condition)
        inputs = tokens - block.first_predicted + (0 if prefix_RSD is None else prefix_RSD.shape[1])
        weight, layer = block.proj_in.weight, block.spec.layer
        cache = caches.take(
            CacheShape(block.spec.layers, batch * len(conditions), layer.kv_heads, inputs, layer.head_dim),
            dtype=weight.dtype,
            device=weight.device,
        )
        query_scale = None if guidance is None else guidance.query_scale()
        return Predictor(block, tokens, cache, rotary, prefix_RSD, class_R1D, guidance, query_scale, engine)

    @property
    def first(self) -> int:
        """Index of the first token that is predicted; those before it are the noise itself."""
        return self.block.first_predicted

    def prefill(self) -> None:
        """Put the condition's keys and values into the cache, in one pass."""
        if self.prefix_RSD is None:
            return
        if self.engine is not None and self.engine.ready(self):
            self.engine.prefill(self)
        else:
            self._extend(self.prefix_RSD, 0)

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
        return 0 if self.prefix_RSD is None else self.prefix_RSD.shape[1]

    def _extend(self, hidden_RTD: Tensor, position: int) -> Tensor:
        if self.engine is not None and self.engine.ready(self):
            return self.engine.extend(self, hidden_RTD, position)
        count = hidden_RTD.shape[1]
        rotary = None if self.rotary is None else self.rotary[position : position + count]
        return self.block.extend(hidden_RTD, rotary, Continuation.at(self.cache, position, count, self.query_scale))


@dataclass(frozen=True)
class Effort:
    """How hard a parallel solver tries."""

    tolerance: float = 1e-3
    """Residual ||F(x) - x|| / ||F(x)|| of a sequence within which it counts as solved."""
    segment: int | None = None
    """Tokens solved at once; None is all of them."""
    max_iterations: int | None = None
    """Iterations a segment before it is solved token by token; None is as many as it has tokens, which is exact."""
    guess: Guess = "noise"
    """What a segment's tokens start from."""
    draft: bool = False
    """Start with passes whose products run in bfloat16; see `starflow.sampling.draft`."""


@dataclass(frozen=True)
class Solution:
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


Report = Callable[[int], None]
"""Told the number of tokens solved since the last call."""

Solver = Callable[[Predictor, Tensor, Effort, Report], Solution]
"""Noise (B, N, C) to data, both in the block's own order."""
