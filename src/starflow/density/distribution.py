"""`SequenceDistribution`: a flow under a given context, as a distribution of PyTorch; and the bounds of its support.

Contract: the rules of `torch.distributions`. A value has the shape sample shape + batch shape + event shape, and
log-densities are nats. Samples come from the flow's sequential inverse, which is exact. A dimension between two bounds
is a sigmoid of an unbounded number, one with a single bound a softplus (Kucukelbir et al., arXiv 1603.00788, section
2.3, with softplus in the place of exp, which would overflow).

Shapes: S sample shape, B batch shape, E event shape, K numbers of the event's last axis; R rows of all samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, Self, get_args

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.nn import functional as F

from starflow.density.blocks import Bound, Gradient
from starflow.errors import UserError

Shape = torch.Size | list[int] | tuple[int, ...]

NO_SHAPE = torch.Size()


class ConditionalFlow(Protocol):
    """The flow of a distribution: densities and samples of rows, each with its own context and length."""

    @property
    def work_dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def support(self) -> Within: ...

    def check_events(self, x: Tensor, lengths: Tensor | None) -> Tensor: ...

    def log_prob_rows(self, x: Tensor, context: Tensor | None, lengths: Tensor | None) -> Tensor: ...

    def sample_rows(
        self, noise: Tensor, context: Tensor | None, lengths: Tensor | None, gradient: Gradient | None
    ) -> Tensor: ...


class SequenceDistribution(Distribution):
    """p(x | context) of a `SequenceFlow`; calling the flow makes one.

    >>> from starflow.density import SequenceFlow
    >>> flow = SequenceFlow(event_shape=(4, 2), context_shape=(3,), channels=32, num_blocks=2, layers_per_block=1)
    >>> dist = flow(torch.zeros(5, 3))
    >>> dist.batch_shape, dist.event_shape, dist.sample((7,)).shape, dist.log_prob(torch.zeros(4, 2)).shape
    (torch.Size([5]), torch.Size([4, 2]), torch.Size([7, 5, 4, 2]), torch.Size([5]))
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = True

    def __init__(
        self,
        flow: ConditionalFlow,
        context: Tensor | None,
        lengths: Tensor | None,
        batch_shape: torch.Size,
        event_shape: torch.Size,
        validate_args: bool | None = None,
    ) -> None:
        self.flow, self.context, self.lengths = flow, context, lengths
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Where the density is positive: within the flow's bounds, and everywhere without them and in the padding."""
        return Within(self.flow.support.bounds, len(self.event_shape), self.lengths)

    def expand(self, batch_shape: Shape, _instance: object = None) -> Self:
        """The same distribution for a larger batch."""
        batch_shape = torch.Size(batch_shape)
        context, lengths = self._expanded(batch_shape)
        return type(self)(self.flow, context, lengths, batch_shape, self.event_shape, self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value | context) in nats, S + B; what lies in the padding after a sequence's length is not looked at.

        Raises:
            UserError: missing values (NaN), or complex ones.
            ValueError: no tensor, a shape that does not fit, or a value outside the support (if `validate_args`, the
                default; otherwise the log-density there is minus infinity, as it is on a bound itself).
        """
        if not isinstance(value, Tensor):
            raise ValueError(f"the type of the value is {type(value).__name__}, expected a tensor")
        rank = len(self.event_shape)
        events = torch.Size(value.shape[len(value.shape) - rank :])
        if value.dim() < rank or events != self.event_shape:
            raise ValueError(
                f"the value has shape {tuple(value.shape)}, expected one that ends in {tuple(self.event_shape)}"
            )
        shape = self._broadcast(value.shape[: value.dim() - rank])
        value = value.expand(shape + self.event_shape)
        context, lengths = self._rows(shape)
        rows = self.flow.check_events(value.reshape(-1, *self.event_shape), lengths)
        if self._validate_args:
            self._validate_sample(rows.reshape(value.shape))
        return self.flow.log_prob_rows(rows, context, lengths).reshape(shape)

    @torch.no_grad()
    def sample(self, sample_shape: Shape = NO_SHAPE, *, generator: torch.Generator | None = None) -> Tensor:
        """Exact samples S + B + E, without gradients; padding is 0.

        Args:
            sample_shape: S.
            generator: of the noise; None is PyTorch's own, which `torch.manual_seed` sets.
        """
        return self._sample(torch.Size(sample_shape), None, generator)

    def rsample(
        self,
        sample_shape: Shape = NO_SHAPE,
        *,
        gradient: Gradient = "exact",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The samples of `sample`, differentiable with respect to the parameters and the context.

        No second derivatives: `create_graph` is refused in the backward pass.

        Args:
            sample_shape: S.
            gradient: "exact" is the gradient of the sequential inverse, by the implicit function theorem: it costs some
                passes over the blocks, at most N each. "biased" leaves out how each token changes those after it: one
                pass, x = mu + sigma z with the tokens before detached (arXiv 2511.22345), and not the true gradient.
            generator: as for `sample`.

        Raises:
            UserError: another gradient.
        """
        if gradient not in get_args(Gradient):
            raise UserError(f"the gradient is {gradient!r}, expected 'exact' or 'biased'")
        return self._sample(torch.Size(sample_shape), gradient, generator)

    def _sample(self, sample_shape: torch.Size, gradient: Gradient | None, generator: torch.Generator | None) -> Tensor:
        shape = self._extended_shape(sample_shape)
        context, lengths = self._rows(sample_shape + self.batch_shape)
        noise = torch.randn(shape, dtype=self.flow.work_dtype, device=self.flow.device, generator=generator)
        rows = self.flow.sample_rows(noise.reshape(-1, *self.event_shape), context, lengths, gradient)
        return rows.reshape(shape)

    def _broadcast(self, leading: torch.Size) -> torch.Size:
        try:
            return torch.Size(torch.broadcast_shapes(leading, self.batch_shape))
        except RuntimeError:
            found = f"{tuple(leading)} before that of an event, which does not broadcast with {tuple(self.batch_shape)}"
            raise ValueError(f"the value has shape {found}, the batch shape") from None

    def _expanded(self, shape: torch.Size) -> tuple[Tensor | None, Tensor | None]:
        context, lengths = self.context, self.lengths
        if context is not None:
            context = context.expand(shape + context.shape[len(self.batch_shape) :])
        return context, None if lengths is None else lengths.expand(shape)

    def _rows(self, shape: torch.Size) -> tuple[Tensor | None, Tensor | None]:
        """The context (R, ...) and the lengths (R,) of all rows of a shape that the batch shape broadcasts to."""
        context, lengths = self._expanded(shape)
        if context is not None:
            context = context.reshape(-1, *context.shape[len(shape) :])
        return context, None if lengths is None else lengths.reshape(-1)


class Within(constraints.Constraint):
    """The set of events whose numbers lie within the bounds of their column; a closed end belongs to it.

    Of events of given lengths (B,), what follows the first steps may be anything.

    >>> Within([(0.0, None), (None, None)], event_dim=1).check(torch.tensor([[1.0, 7.0], [-1.0, 7.0]]))
    tensor([ True, False])
    """

    def __init__(self, bounds: Sequence[Bound], event_dim: int, lengths: Tensor | None = None) -> None:
        self.bounds, self._rank, self.lengths = tuple(bounds), event_dim, lengths
        super().__init__()

    def __repr__(self) -> str:
        return f"Within({self.bounds or 'no bounds'})"

    @property
    def event_dim(self) -> int:  # type: ignore[override]
        """Axes of an event."""
        return self._rank

    def check(self, value: Tensor) -> Tensor:
        """Which events are inside; a number that is not finite is not, but in the padding."""
        columns = zip(value.unbind(-1), self.bounds or [(None, None)] * value.shape[-1], strict=True)
        inside = torch.stack([_is_within(one, *bound) for one, bound in columns], -1)
        if self.lengths is not None:
            places = torch.arange(value.shape[-self._rank], device=value.device)
            padding = places >= self.lengths[..., None]
            inside = inside | (padding if self._rank == 1 else padding[..., None])
        return inside.flatten(-self._rank).all(-1)


def _is_within(x: Tensor, lower: float | None, upper: float | None) -> Tensor:
    inside = x.isfinite()
    inside = inside if lower is None else inside & (x >= lower)
    return inside if upper is None else inside & (x <= upper)


def to_unbounded(x: Tensor, bounds: Sequence[Bound]) -> tuple[Tensor, Tensor]:
    """Bounded numbers to unbounded ones, with log |du/dx| of each; -inf for a number that is not within its bounds.

    Args:
        x: (..., K).
        bounds: K pairs, or none at all.

    Returns:
        u (..., K), finite everywhere, and log |du/dx| (..., K).

    >>> u, log_slope = to_unbounded(torch.tensor([0.5, 7.0]), [(0.0, 1.0), (None, None)])
    >>> u, log_slope.exp()
    (tensor([0., 7.]), tensor([4., 1.]))
    """
    if not bounds:
        return x, torch.zeros_like(x)
    columns = [_one_to_unbounded(column, *bound) for column, bound in zip(x.unbind(-1), bounds, strict=True)]
    return torch.stack([u for u, _ in columns], -1), torch.stack([log_slope for _, log_slope in columns], -1)


def to_bounded(u: Tensor, bounds: Sequence[Bound]) -> Tensor:
    """The inverse of `to_unbounded`, (..., K), between the bounds and never on one, whatever is rounded."""
    if not bounds:
        return u
    columns = [_one_to_bounded(column, *bound) for column, bound in zip(u.unbind(-1), bounds, strict=True)]
    return torch.stack(columns, -1)


def _one_to_unbounded(x: Tensor, lower: float | None, upper: float | None) -> tuple[Tensor, Tensor]:
    if lower is None and upper is None:
        return x, torch.zeros_like(x)
    inside = (x > (-math.inf if lower is None else lower)) & (x < (math.inf if upper is None else upper))
    x = torch.where(inside, x, _interior(lower, upper))  # so that values and gradients outside are finite
    if lower is not None and upper is not None:
        from_below, to_above = (x - lower).log(), (upper - x).log()
        u, log_slope = from_below - to_above, math.log(upper - lower) - from_below - to_above
    else:
        distance = x - lower if lower is not None else upper - x  # type: ignore[operator]
        log_share = torch.log(
            -torch.expm1(-distance)
        )  # softplus^-1(y) = y + log(1 - exp(-y)), of slope 1/(1 - exp(-y))
        u, log_slope = distance + log_share, -log_share
        u = u if lower is not None else -u
    return u, torch.where(inside, log_slope, -math.inf)


def _one_to_bounded(u: Tensor, lower: float | None, upper: float | None) -> Tensor:
    if lower is not None and upper is not None:
        x = lower + (upper - lower) * torch.sigmoid(u)
    elif lower is not None:
        x = lower + F.softplus(u, threshold=40.0)  # the default threshold of 20 is off by 2e-9
    elif upper is not None:
        x = upper - F.softplus(-u, threshold=40.0)
    else:
        return u
    least, most = (
        None if one is None else _next(one, to, x.dtype) for one, to in ((lower, math.inf), (upper, -math.inf))
    )
    return x.clamp(least, most)  # what rounds to a bound would have a density of 0


def _next(bound: float, towards: float, dtype: torch.dtype) -> float:
    """The number beside a bound in a precision."""
    ends = torch.tensor([bound, towards], dtype=dtype, device="cpu")
    return float(torch.nextafter(ends[0], ends[1]))


def _interior(lower: float | None, upper: float | None) -> float:
    if lower is not None and upper is not None:
        return (lower + upper) / 2
    return lower + 1 if lower is not None else (upper - 1 if upper is not None else 0.0)
