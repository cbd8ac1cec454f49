"""The blocks of a flow on sequences: tokens to noise and back, with conditions, lengths, and gradients of the inverse.

Contract: a sequence that is shorter than N is a prefix of its N tokens. Every block reads the tokens of a sequence
first, in its own order, so that attention, which is causal, never meets the padding, where the map is 0 = 0.
(TarFlow, arXiv 2412.06329, section 2; STARFlow, arXiv 2506.06276, section 3.)

Shapes: R rows, N tokens, T some of them, C token channels, S condition tokens, W width.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, SupportsIndex

import torch
from torch import Tensor, nn

from starflow.errors import UserError
from starflow.flow.block import AutoregressiveBlock, BlockSpec
from starflow.nn.attention import CachePool
from starflow.nn.layers import LayerSpec, rotary_table
from starflow.sampling.predictor import Predictor, SolverOptions, ignore_progress
from starflow.sampling.solvers import solve_sequential

Bound = tuple[float | None, ...]
"""(lower, upper) of one dimension; None where there is none."""

Gradient = Literal["exact", "biased"]
"""How samples are differentiated: see `SequenceDistribution.rsample`."""


CLIP = 8.0
"""Bound on the outputs of a block, so that a standard deviation is changed by a factor of 1,800 at the most."""


@dataclass(frozen=True)
class SequenceFlowConfig:
    """The sizes of a `SequenceFlow`; its arguments are documented there."""

    event_shape: tuple[int, ...]
    context_shape: tuple[int, ...] = ()
    bounds: tuple[Bound, ...] = ()
    variable_length: bool = False
    patch_size: int = 1
    channels: int = 64
    num_blocks: int = 4
    layers_per_block: int = 2
    head_dim: int = 32

    def __post_init__(self) -> None:
        for name in ("event_shape", "context_shape"):
            object.__setattr__(self, name, _whole_shape(name, getattr(self, name)))
        for name in ("patch_size", "channels", "num_blocks", "layers_per_block", "head_dim"):
            object.__setattr__(self, name, _whole_number(name, getattr(self, name)))
        object.__setattr__(self, "bounds", _plain_bounds(self.bounds))
        object.__setattr__(self, "variable_length", bool(self.variable_length))
        for name, shape, ranks in (("event", self.event_shape, (1, 2)), ("context", self.context_shape, (0, 1, 2))):
            if len(shape) not in ranks or min(shape, default=1) < 1:
                raise UserError(f"{name}_shape is {shape}, expected (D,) or (N, C) of numbers above 0")
        for name in ("patch_size", "channels", "num_blocks", "layers_per_block", "head_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.event_shape[0] % self.patch_size:
            raise UserError(f"patch_size {self.patch_size} does not divide {self.event_shape[0]}: choose one that does")
        if self.variable_length and self.patch_size > 1:
            raise UserError(f"patch_size is {self.patch_size} with variable lengths, expected 1")
        if self.channels % self.head_dim or self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd, or does not divide channels {self.channels}: change one")
        check_bounds(self.bounds, self.event_shape[-1])

    @property
    def tokens(self) -> int:
        """N, tokens of a whole event."""
        return self.event_shape[0] // self.patch_size

    @property
    def token_channels(self) -> int:
        """C, numbers of a token."""
        return math.prod(self.event_shape) // self.tokens

    @property
    def context_tokens(self) -> int:
        """Condition tokens of the context: one of a vector, one for each step of a sequence."""
        return 0 if not self.context_shape else 1 if len(self.context_shape) == 1 else self.context_shape[0]

    @property
    def condition_tokens(self) -> int:
        """S, those of the context and of the length."""
        return self.context_tokens + self.variable_length

    def block_spec(self) -> BlockSpec:
        """The sizes of a block. It reads forwards: the flow reverses sequences, each by its own length."""
        heads = self.channels // self.head_dim
        return BlockSpec(
            token_channels=self.token_channels,
            layers=self.layers_per_block,
            layer=LayerSpec(self.channels, heads, heads, self.head_dim, hidden=4 * self.channels),
            backwards=False,
            start_token=True,
            table_tokens=self.tokens,
            condition_dim=self.channels if self.condition_tokens else 0,
            num_classes=0,
            final_norm=True,
            softplus=True,
            clip=CLIP,
        )


def _whole_shape(name: str, given: Iterable[SupportsIndex]) -> tuple[int, ...]:
    """Python's own numbers, which config.json can hold, of what may be NumPy's or a tensor's."""
    try:
        return tuple(int(operator.index(one)) for one in given)
    except TypeError:
        raise UserError(f"{name} is {given!r}, expected whole numbers in parentheses, such as (3,)") from None


def _whole_number(name: str, given: SupportsIndex) -> int:
    try:
        return int(operator.index(given))
    except TypeError:
        raise UserError(f"{name} is {given!r}, expected a whole number") from None


def _plain_bounds(bounds: Sequence[Bound]) -> tuple[Bound, ...]:
    """Likewise, of numbers or None."""
    try:
        return tuple(tuple(None if one is None else float(one) for one in bound) for bound in bounds)
    except (TypeError, ValueError):
        raise UserError(f"bounds are {bounds!r}, expected (lower, upper) for each of the last axis") from None


def check_bounds(bounds: Sequence[Bound], dimensions: int) -> None:
    """Refuse bounds that do not fit.

    Raises:
        UserError: not one pair for each dimension, or a lower bound that is not below the upper one.
    """
    if bounds and len(bounds) != dimensions:
        raise UserError(f"{len(bounds)} bounds, expected {dimensions}: one (lower, upper) for each of the last axis")
    for place, bound in enumerate(bounds):
        if len(bound) != 2:
            raise UserError(f"bound {place} is {bound}, expected (lower, upper), None where there is none")
        lower, upper = bound
        known = [one for one in bound if one is not None]
        if not all(map(math.isfinite, known)):
            raise UserError(f"bound {place} is {bound}, expected finite numbers: give None where there is none")
        if lower is not None and upper is not None and not lower < upper:
            raise UserError(f"bound {place} is {bound}, expected the lower one below the upper one")


class ContextEncoder(nn.Module):
    """Contexts and lengths to condition tokens (R, S, W)."""

    def __init__(self, config: SequenceFlowConfig) -> None:
        super().__init__()
        width = config.channels
        inputs = config.context_shape[-1] if config.context_shape else 0
        self.embed = nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width)) if inputs else None
        self.places = nn.Parameter(torch.randn(config.context_tokens, width) * 1e-2) if inputs else None
        self.length_embed = nn.Embedding(config.tokens + 1, width) if config.variable_length else None

    def forward(self, context: Tensor | None, lengths: Tensor | None) -> Tensor | None:
        parts: list[Tensor] = []
        if self.embed is not None and self.places is not None:
            assert context is not None
            rows = context.to(self.places.dtype).reshape(len(context), len(self.places), context.shape[-1])
            parts.append(self.embed(rows) + self.places)
        if self.length_embed is not None:
            assert lengths is not None
            parts.append(self.length_embed(lengths)[:, None])
        return torch.cat(parts, dim=1) if parts else None


class SequenceBlocks(nn.Module):
    """Blocks of alternating order between tokens (R, N, C) and noise, and the encoder of their conditions."""

    def __init__(self, config: SequenceFlowConfig) -> None:
        super().__init__()
        self.config = config
        self.context_encoder = ContextEncoder(config)
        self.blocks = nn.ModuleList(AutoregressiveBlock(config.block_spec()) for _ in range(config.num_blocks))

    def forward(self, x_RNC: Tensor, context: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Data to noise, both 0 in the padding; and log |det dz/dx| (R,) in nats."""
        logdet = x_RNC.new_zeros(len(x_RNC))
        condition = self.context_encoder(context, lengths)
        for block, backwards in self._ordered():
            x_RNC = reverse(x_RNC, lengths) if backwards else x_RNC
            x_RNC, log_sigma = self._pass(block, x_RNC, condition, lengths)
            x_RNC = reverse(x_RNC, lengths) if backwards else x_RNC
            logdet = logdet - log_sigma.flatten(1).sum(1)
        return x_RNC, logdet

    def inverse(
        self, z_RNC: Tensor, context: Tensor | None, lengths: Tensor | None, gradient: Gradient | None
    ) -> Tensor:
        """Noise to data, both 0 in the padding; differentiable where `gradient` says how."""
        condition, caches = self.context_encoder(context, lengths), CachePool()
        for block, backwards in reversed(list(self._ordered())):
            z_RNC = reverse(z_RNC, lengths) if backwards else z_RNC
            x_RNC = self._solve(block, z_RNC, condition, lengths, caches)
            if gradient is not None and torch.is_grad_enabled():
                forward = functools.partial(self._pass, block, condition=condition, lengths=lengths)
                x_RNC = _without_padding(differentiable_inverse(forward, x_RNC, z_RNC, gradient), lengths)
            z_RNC = reverse(x_RNC, lengths) if backwards else x_RNC
        return z_RNC

    def _pass(
        self, block: AutoregressiveBlock, x_RNC: Tensor, condition: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One block, data to noise, in its own order: z and log sigma, both 0 in the padding."""
        z_RNC, log_sigma = block(x_RNC, condition, self._rotary(x_RNC))
        return _without_padding(z_RNC, lengths), _without_padding(log_sigma, lengths)

    @torch.no_grad()
    def _solve(
        self,
        block: AutoregressiveBlock,
        z_RNC: Tensor,
        condition: Tensor | None,
        lengths: Tensor | None,
        caches: CachePool,
    ) -> Tensor:
        """The inverse of `_pass`, token by token, without gradients."""
        rows, tokens, _ = z_RNC.shape
        predictor = Predictor.of(block, rows, tokens, [condition], self._rotary(z_RNC), None, caches)
        x_RNC = solve_sequential(predictor, z_RNC, SolverOptions(), ignore_progress).x_BNC
        return _without_padding(x_RNC, lengths)

    def _ordered(self) -> Iterator[tuple[AutoregressiveBlock, bool]]:
        """Every block from the data to the noise, and whether it reads backwards."""
        for number, block in enumerate(self.blocks):
            assert isinstance(block, AutoregressiveBlock)
            yield block, number % 2 == 1

    def _rotary(self, like: Tensor) -> Tensor:
        """Angles of the condition tokens and the inputs, one after another, on one axis."""
        config = self.config
        places = torch.arange(config.condition_tokens + config.tokens, device=like.device, dtype=like.dtype)
        nowhere = torch.zeros_like(places)
        return rotary_table(torch.stack((nowhere, nowhere, places), 1), config.head_dim, config.head_dim // 2)


def within(lengths: Tensor, tokens: int) -> Tensor:
    """(R, N), true for the first tokens of each row."""
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]


def _without_padding(x_RNC: Tensor, lengths: Tensor | None) -> Tensor:
    return x_RNC if lengths is None else torch.where(within(lengths, x_RNC.shape[1])[..., None], x_RNC, 0.0)


def reverse(x_RNC: Tensor, lengths: Tensor | None) -> Tensor:
    """Every sequence from its end; padding stays where it is. The function is its own inverse."""
    if lengths is None:
        return x_RNC.flip(1)
    place = torch.arange(x_RNC.shape[1], device=x_RNC.device)
    source_RN = torch.where(place < lengths[:, None], lengths[:, None] - 1 - place, place)
    return x_RNC.gather(1, source_RN[..., None].expand_as(x_RNC))


def differentiable_inverse(
    forward: Callable[[Tensor], tuple[Tensor, Tensor]], x_RNC: Tensor, z_RNC: Tensor, gradient: Gradient
) -> Tensor:
    """x = forward^-1(z) as a function of z and of what `forward` depends on, for an x that is known already.

    With J = dz/dx, which is triangular with 1 / sigma on its diagonal, dx = J^-1 (dz - dforward). The backward pass
    solves J^T v = g by v <- v + sigma (g - J^T v), which is exact after N steps, as what is off the diagonal is
    nilpotent, and is left as soon as it no longer changes. Without a step, v = sigma g is the biased gradient.

    Args:
        forward: gives z and log sigma (R, N, C), in the order in which token n depends on those before it.
        x_RNC: with forward(x) = z.
        z_RNC: the noise.
        gradient: "exact" or "biased".

    Raises:
        UserError: in the backward pass, if it is to be differentiated itself.
    """
    point = x_RNC.detach().requires_grad_()
    image, log_sigma = forward(point)
    sigma, steps = log_sigma.detach().exp(), x_RNC.shape[1] if gradient == "exact" and len(x_RNC) else 0
    enough = 4 * torch.finfo(x_RNC.dtype).eps

    def solve(g_RNC: Tensor | None) -> Tensor | None:
        if g_RNC is None:  # nothing that is differentiated depends on the samples
            return None
        if torch.is_grad_enabled():  # with create_graph
            raise UserError("samples have first derivatives alone, expected no create_graph: differentiate log_prob")
        v_RNC = sigma * g_RNC
        for _ in range(steps):
            (moved,) = torch.autograd.grad(image, point, v_RNC, retain_graph=True)
            change = sigma * (g_RNC - moved)
            v_RNC = v_RNC + change
            if bool(change.abs().max() <= enough * v_RNC.abs().max()):
                break
        return v_RNC

    residual = z_RNC - image
    step = residual - residual.detach()  # its value is 0; its gradient is that of dz - dforward
    step.register_hook(solve)
    return x_RNC.detach() + step
