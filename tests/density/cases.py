"""Small flows on vectors and sequences with random weights, in float64, and data for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from starflow.density import SequenceFlow, SequenceFlowConfig

SMALL: dict[str, Any] = {"channels": 16, "head_dim": 8, "num_blocks": 3, "layers_per_block": 1}
BOUNDS = ((None, None), (0.0, 1.0), (-2.0, None), (None, 3.0))
"""Of four kinds, from which a case takes as many as it has columns."""


@dataclass(frozen=True)
class Case:
    """A flow with weights that are no identity, and five events with what they are conditioned on."""

    flow: SequenceFlow
    x: Tensor
    context: Tensor | None
    lengths: Tensor | None

    def __repr__(self) -> str:
        return f"Case({self.config})"

    @property
    def config(self) -> SequenceFlowConfig:
        return self.flow.config


def make_flow(
    event_shape: tuple[int, ...], context_shape: tuple[int, ...] = (), seed: int = 0, **options: Any
) -> SequenceFlow:
    """A flow in float64 whose every parameter is random, and which is standardised by other numbers than 0 and 1."""
    torch.manual_seed(seed)
    flow = SequenceFlow(event_shape, context_shape, **{**SMALL, **options}).double().requires_grad_(False)
    for name, parameter in flow.named_parameters():
        if name.endswith("proj_out.weight"):
            parameter.normal_(std=0.2 / parameter.shape[1] ** 0.5)  # sigma well off 1, Jacobians well conditioned
        elif name.endswith(("sos_embed", "pos_embed", "places")):
            parameter.normal_()
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
    flow.shift.normal_()
    flow.scale.uniform_(0.5, 2.0)
    flow.context_shift.normal_()
    flow.context_scale.uniform_(0.5, 2.0)
    flow.standardised.fill_(True)
    return flow.requires_grad_()


def inside(x: Tensor, flow: SequenceFlow) -> Tensor:
    """Standard normal numbers, moved into the bounds of their column."""
    columns = []
    for column, (lower, upper) in zip(x.unbind(-1), flow.config.bounds or [(None, None)] * x.shape[-1], strict=True):
        if lower is not None and upper is not None:
            column = lower + (upper - lower) * (0.5 + torch.atan(column) / math.pi)
        elif lower is not None:
            column = lower + column.exp()
        elif upper is not None:
            column = upper - column.exp()
        columns.append(column)
    return torch.stack(columns, -1)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Vectors and sequences, with and without context, bounds, lengths and patches."""
    patch = draw(st.sampled_from([1, 1, 2]))
    steps = patch * draw(st.integers(1, 4))
    channels = draw(st.sampled_from([0, 1, 3]))
    event_shape = (steps, channels) if channels else (steps,)
    context_shape = draw(st.sampled_from([(), (3,), (2, 3)]))
    bounds = tuple(BOUNDS[n % 4] for n in range(event_shape[-1])) if draw(st.booleans()) else ()
    variable = patch == 1 and draw(st.booleans())
    seed = draw(st.integers(0, 99))
    flow = make_flow(event_shape, context_shape, seed, bounds=bounds, patch_size=patch, variable_length=variable)
    x = inside(torch.randn(5, *event_shape, dtype=torch.float64), flow)
    context = torch.randn(5, *context_shape, dtype=torch.float64) if context_shape else None
    lengths = torch.randint(1, steps + 1, (5,)) if variable else None
    return Case(flow, x, context, lengths)


def within(case: Case) -> Tensor:
    """(5, *event_shape), true where there is no padding."""
    if case.lengths is None:
        return torch.ones_like(case.x, dtype=torch.bool)
    known = torch.arange(case.x.shape[1]) < case.lengths[:, None]
    return known.view(*known.shape, *[1] * (case.x.dim() - 2)).expand_as(case.x)


def check_fit(
    samples: Tensor, log_prob: Callable[[Tensor], Tensor], truth: Tensor, exact: Tensor, widest: float, learned: float
) -> None:
    """A fitted density is near the known one in nats, and its samples are no further away than those nats allow.

    Of the known density, a normal whose largest deviation is s, any density at k nats is at a Wasserstein distance of
    s sqrt(2 k) at most (Talagrand 1996), and so are its means and deviations. To it come five standard errors of the
    draws. So the second part holds for a good fit and for a poor one; the first says that a tenth of what there was to
    learn may be missing.

    Args:
        samples: (N, K) of the fit.
        log_prob: of the fit.
        truth: draws (M, K) of the known density, which is log-concave where it is no normal.
        exact: their log-densities (M,).
        widest: s.
        learned: nats between the known density and what would be believed without the data.
    """
    each = exact - log_prob(truth).detach()
    nats = float(each.mean())
    assert -5 * float(each.std()) / math.sqrt(len(truth)) < nats < 0.1 * learned
    draws = 5 * widest * (1 / math.sqrt(len(samples)) + 1 / math.sqrt(len(truth)))
    reach = widest * math.sqrt(2 * max(nats, 0.0)) + draws
    assert (samples.mean(0) - truth.mean(0)).abs().max() < reach
    assert (samples.std(0) - truth.std(0)).abs().max() < reach
