"""`Predictor`: mu and log sigma of some tokens of one block, given the tokens before them. Every solver stands on it.

Contract: tokens are in the block's own order. The conditional and the null branch run as one batch against one cache
that the caller owns; a block without guidance runs the conditional rows alone. Nothing here waits for the device.

Also here: what a solver takes and returns (`SolverOptions`, `SolverResult`), and two ways to derive a predictor from
another. `make_draft` rounds the large products to bfloat16: its predictions are guesses, which whoever uses them
verifies with the block itself. Hidden states, norms, attention and the first and last projection keep their precision,
so that the error is about 7e-4 of the data's scale on trained blocks, half of that of a network all in bfloat16; with
avx512_bf16 the products are four times as fast on one core. `select_pictures` predicts for some pictures of the batch
alone, against a copy of their part of the cache; nothing reaches the whole cache until `copy_rows_back`.

Shapes: B pictures, P some of them, R rows (B, or 2B with the null branch second), N tokens, T some of them, C token
channels, D width, S condition tokens of width E, K key/value heads, H head width.
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
from starflow.nn.attention import CachePool, CacheShape, CacheSlice, KVCache, LayerCache
from starflow.nn.cpu import has_bfloat16
from starflow.nn.quantize import WeightFormat, effective_weight
from starflow.sampling import guidance as rules
from starflow.sampling.guidance import Guidance

InitialGuess = Literal["noise", "zero", "previous", "gaussian", "bfloat16", "int8", "int4"]
"""What an iteration starts from: the noise, which is what the block before gave; zeros; the last token that is solved;
every token's noise in the Gaussian of that last token; or the tokens solved one by one with weights rounded to a
format of fewer bytes."""

RoundedGuess = Literal["bfloat16", "int8", "int4"]

ROUNDED_GUESSES: tuple[RoundedGuess, ...] = ("bfloat16", "int8", "int4")
"""The guesses that are solved with rounded weights, from the most bytes to the fewest."""


@dataclass(frozen=True)
class SolverOptions:
    """What a solver may do; the sequential one, which is exact, needs none of it."""

    tolerance: float = 1e-3
    """Residual ||F(x) - x|| / ||F(x)|| of a sequence within which it counts as solved."""
    segment: int | None = None
    """Tokens solved at once; None is all of them."""
    max_iterations: int | None = None
    """Iterations a segment before it is solved token by token; None is as many as it has tokens, which is exact."""
    guess: InitialGuess = "noise"
    """What a segment's tokens start from."""
    draft: bool = False
    """Whether to start with passes whose large products run in bfloat16; see `make_draft`."""


@dataclass(frozen=True)
class SolverResult:
    """Solved tokens, and what a solver did for them."""

    x_BNC: Tensor
    """Data, in the block's own order."""
    iterations: int
    """Passes over some tokens, not counting drafts."""
    residual_B: Tensor
    """||F(x) - x|| / ||F(x)|| of each sequence, verified on the values returned; 0 is exact."""
    drafts: int = 0
    """Passes of a draft, which only gave guesses."""
    sequential_tokens: int = 0
    """Tokens that were solved one by one because iterating them did not converge in time."""


TokenProgress = Callable[[int], None]
"""Told the number of tokens solved since the last call."""


def ignore_progress(_tokens: int) -> None:
    """The progress that nobody looks at."""


@dataclass(frozen=True)
class Predictor:
    """One block with a cache and a condition, ready to be inverted.

    A solver calls `prefill` once, and then `predict` for tokens whose predecessors are known:

    >>> import torch
    >>> from starflow.flow.config import STARFlowConfig
    >>> from starflow.flow.model import STARFlow
    >>> model = STARFlow(STARFlowConfig(2, 4, 32, num_blocks=2, layers_per_block=1, head_dim=16))
    >>> tokens, grid = model.to_tokens(torch.randn(3, 2, 4, 4))
    >>> block = next(model.iter_blocks())
    >>> rotary = model.block_rotary(block, model.rotary(grid))
    >>> predictor = Predictor.of(block, 3, 16, [None], rotary, None, CachePool())
    >>> predictor.prefill()
    >>> mu, log_sigma = predictor.predict(predictor.inputs(tokens, 0, 5), 0)
    >>> mu.shape, log_sigma.shape
    (torch.Size([3, 5, 2]), torch.Size([3, 5, 2]))
    """

    block: AutoregressiveBlock
    tokens: int
    """N, of a whole sequence."""
    cache: KVCache
    """Keys and values of the condition and of the tokens that were predicted from; its rows are R."""
    rotary: Tensor | None
    """Angles of the S condition tokens and the block's inputs."""
    condition_RSE: Tensor | None
    """Condition tokens that stand before the block's inputs, or None."""
    class_R1D: Tensor | None
    """The class's vector, which is added to every token, or None."""
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
        """The predictor of a block for a batch of pictures.

        Args:
            block: to be inverted.
            batch: B.
            tokens: N of each picture.
            conditions: of the branches, as `block` takes them: one, or with guidance the null condition after it.
            rotary: angles of the condition tokens and the block's inputs.
            guidance: None where the block is not guided.
            caches: the cache is taken from here.
            engine: compiled code, if there is any.
        """
        given = [condition for condition in conditions if condition is not None]
        condition_RSE = None if block.proj_txt is None else torch.cat(given)
        class_R1D = None if block.class_embed is None else torch.cat([block.class_vector(one) for one in given])
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
        """Write the condition's keys and values into the cache, in one pass."""
        if self.condition_RSE is None:
            return
        if self.engine is not None and self.engine.ready(self):
            self.engine.prefill(self)
            return
        prefix_RSD = self.block.prefix(self.condition_RSE)
        assert prefix_RSD is not None
        self._extend(prefix_RSD, 0)

    @property
    def rounded_guesses(self) -> tuple[RoundedGuess, ...]:
        """The formats of fewer bytes than the block's own to guess with; none without the compiled loop."""
        if self.engine is None or not self.engine.ready(self):
            return ()
        own = self.block.weight_form
        return ROUNDED_GUESSES[ROUNDED_GUESSES.index(own) + 1 :] if own in ROUNDED_GUESSES else ROUNDED_GUESSES

    def inputs(self, x_BNC: Tensor, start: int, stop: int) -> Tensor:
        """The inputs (B, T, C) that predict tokens start..stop-1: the token before each, or the start token."""
        if start:
            return x_BNC[:, start - 1 : stop - 1]
        assert self.block.sos_embed is not None
        first = self.block.sos_embed.to(x_BNC.dtype).expand(x_BNC.shape[0], -1, -1)
        return torch.cat((first, x_BNC[:, : stop - 1]), dim=1)

    def predict(self, inputs_BTC: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """mu and log sigma, (B, T, C) each, of T tokens from `start`; the cache takes their inputs' keys and values."""
        hidden_RTD = self.hidden_states(inputs_BTC, start)
        if self.guidance is None:
            return self.gaussian(hidden_RTD, None)
        return self.gaussian(hidden_RTD, self.guidance.weights(start, inputs_BTC.shape[1], self.tokens))

    def gaussian(self, hidden_RTD: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """mu and log sigma, (B, T, C) each, of the layers' outputs, guided by the weights if there are any."""
        outputs = self.block.outputs(hidden_RTD)
        if self.guidance is None or weight is None:
            return self.block.gaussian(outputs)
        outputs_c, outputs_u = outputs.chunk(2)
        if self.guidance.rule == "linear":
            return self.block.gaussian(rules.linear(outputs_c, outputs_u, weight))
        return rules.gaussian(*self.block.gaussian(outputs_c), *self.block.gaussian(outputs_u), weight)

    def hidden_states(self, inputs_BTC: Tensor, start: int) -> Tensor:
        """Hidden states (R, T, D) after all layers of the inputs that predict tokens from `start`; see `predict`."""
        index = start - self.first
        return self._extend(self.repeat_for_branches(self.block.embed(inputs_BTC, index)), self.prefix_length + index)

    def repeat_for_branches(self, hidden_BTD: Tensor) -> Tensor:
        """Embedded tokens for every branch, (R, T, D)."""
        hidden_RTD = hidden_BTD if self.guidance is None else torch.cat((hidden_BTD, hidden_BTD))
        return hidden_RTD if self.class_R1D is None else hidden_RTD + self.class_R1D

    @property
    def prefix_length(self) -> int:
        """S, the condition tokens that stand before the block's inputs in the cache."""
        return 0 if self.condition_RSE is None else self.condition_RSE.shape[1]

    def _extend(self, hidden_RTD: Tensor, position: int) -> Tensor:
        if self.engine is not None and self.engine.ready(self):
            return self.engine.extend(self, hidden_RTD, position)
        count = hidden_RTD.shape[1]
        rotary = None if self.rotary is None else self.rotary[position : position + count]
        return self.block.extend(hidden_RTD, rotary, CacheSlice.at(self.cache, position, count, self.query_scale))


class TokenEngine(Protocol):
    """Compiled code that computes in place of the network, such as `starflow.sampling.cpu.engine.CpuEngine`."""

    def ready(self, predictor: Predictor) -> bool:
        """Whether it may take the next pass of this predictor: it covers the block, and is built or worth building."""
        ...

    def prefill(self, predictor: Predictor) -> None:
        """Write the keys and values of the condition tokens."""
        ...

    def extend(self, predictor: Predictor, hidden_RTD: Tensor, position: int) -> Tensor:
        """Hidden states after all layers of some more tokens, whose keys and values the cache takes."""
        ...

    def solve(self, predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, progress: TokenProgress) -> None:
        """Invert the whole block token by token, in place."""
        ...

    def guess(self, predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, tokens: range, form: WeightFormat) -> None:
        """Invert some tokens with weights rounded to a format, in place, as a guess."""
        ...


Solver = Callable[[Predictor, Tensor, SolverOptions, TokenProgress], SolverResult]
"""Inverts a block: noise (B, N, C) to data, both in the block's own order."""


class _BFloat16Linear(nn.Module):
    """A linear layer whose product runs in bfloat16, while its input and output keep their precision."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = effective_weight(linear).detach().to(torch.bfloat16)
        self.bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(torch.bfloat16), self.weight, self.bias).to(x.dtype)


def make_draft(predictor: Predictor) -> Predictor:
    """A predictor of the same block and cache whose large products run in bfloat16; `predictor` is left as it is."""
    return dataclasses.replace(predictor, block=_with_bfloat16_products(predictor.block))


def can_draft(predictor: Predictor) -> bool:
    """Whether a draft differs from the block: it does not where the block is in bfloat16 or float16 already."""
    return predictor.block.proj_in.weight.dtype in (torch.float32, torch.float64)


def worth_drafting(predictor: Predictor) -> bool:
    """Whether a draft may be faster: not where bfloat16 products are emulated."""
    return can_draft(predictor) and has_bfloat16(predictor.block.proj_in.weight.device)


def _with_bfloat16_products(block: AutoregressiveBlock) -> AutoregressiveBlock:
    """A copy of the block that shares every parameter but those of its layers' linear maps."""
    shared = {id(parameter): parameter for parameter in block.parameters()}
    twin = copy.deepcopy(block, shared)
    for module in list(twin.attn_blocks.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and type(child.weight.data) is Tensor:  # not what is quantised already
                setattr(module, name, _BFloat16Linear(child))
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
