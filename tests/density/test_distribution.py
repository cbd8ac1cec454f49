"""The distribution keeps the rules of torch.distributions, and its density integrates to 1 over its support."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    Normal,
    SigmoidTransform,
    SoftplusTransform,
    kl_divergence,
    register_kl,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from starflow.density import SequenceDistribution, SequenceFlow
from starflow.density.blocks import Bound, Gradient
from starflow.density.distribution import Within, to_bounded, to_unbounded
from starflow.errors import UserError
from tests.density.cases import BOUNDS, SMALL, inside, make_flow

KINDS = st.sampled_from(BOUNDS)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(bound=KINDS, u=st.floats(-30, 30))
def test_bounds_round_trip_with_the_slope_of_autograd(bound: Bound, u: float) -> None:
    start = torch.tensor([u], dtype=torch.float64, requires_grad=True)
    x = to_bounded(start, [bound])
    (slope,) = torch.autograd.grad(x.sum(), start)
    back, log_slope = to_unbounded(x.detach(), [bound])
    assert torch.isclose(back, start, atol=1e-6 * math.exp(min(abs(u) / 2, 20)), rtol=1e-6).all()
    assert torch.isclose(log_slope, -slope.log(), atol=1e-6 * math.exp(min(abs(u) / 2, 20))).all()
    assert bool(Within([bound], 1).check(x))


def test_bounds_are_torchs_own_transforms() -> None:
    u = torch.linspace(-5, 5, 11, dtype=torch.float64)[:, None]
    for bound, transform in (((0.0, 1.0), SigmoidTransform()), ((0.0, None), SoftplusTransform())):
        x = to_bounded(u, [bound])
        torch.testing.assert_close(x, transform(u))
        torch.testing.assert_close(to_unbounded(x, [bound])[1], -transform.log_abs_det_jacobian(u, x))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("bound", BOUNDS)
def test_the_density_integrates_to_one(bound: Bound) -> None:
    flow = make_flow((1,), (2,), bounds=(bound,), num_blocks=2)
    x = to_bounded(torch.linspace(-35, 35, 7001, dtype=torch.float64)[:, None], [bound])
    nats = flow(torch.tensor([0.3, -1.0])).log_prob(x)
    assert abs(torch.trapezoid(nats.nan_to_num(neginf=-1e9).exp(), x[:, 0]) - 1) < 1e-3
    assert nats.max() - nats.min() > 1


def test_a_new_flow_that_is_standardised_is_a_normal_in_closed_form() -> None:
    flow = SequenceFlow((3, 2), **SMALL).double()
    flow.shift.copy_(torch.tensor([1.0, -2.0]))
    flow.scale.copy_(torch.tensor([0.5, 3.0]))
    normal = Independent(Normal(flow.shift.expand(3, 2), flow.scale.expand(3, 2)), 2)
    x = torch.randn(7, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(flow().log_prob(x), normal.log_prob(x), atol=1e-6, rtol=1e-6)


@settings(max_examples=15, derandomize=True, deadline=None)
@given(sample=st.lists(st.integers(1, 3), max_size=2), batch=st.lists(st.integers(1, 3), max_size=2))
def test_shapes_are_those_of_torch(sample: list[int], batch: list[int]) -> None:
    flow = make_flow((4, 2), (3,), num_blocks=1)
    dist = flow(torch.randn(*batch, 3))
    normal = Independent(Normal(torch.zeros(*batch, 4, 2), 1.0), 2)
    assert (dist.batch_shape, dist.event_shape) == (normal.batch_shape, normal.event_shape)
    x = dist.sample(tuple(sample))
    assert x.shape == normal.sample(tuple(sample)).shape == dist.rsample(tuple(sample)).shape
    assert dist.log_prob(x).shape == normal.log_prob(x).shape
    assert dist.log_prob(torch.zeros(4, 2)).shape == normal.log_prob(torch.zeros(4, 2)).shape
    assert not x.requires_grad
    assert dist.rsample().requires_grad


@pytest.mark.parametrize(("sample", "batch"), [((0,), (2,)), ((3,), (0,)), ((0,), ()), ((2, 0), (2,))])
def test_no_rows_are_rows_too(sample: tuple[int, ...], batch: tuple[int, ...]) -> None:
    flow = make_flow((4, 2), (3,), num_blocks=2)
    dist = flow(torch.randn(*batch, 3))
    x = dist.rsample(sample)
    assert x.shape == dist.sample(sample).shape == (*sample, *batch, 4, 2)
    assert dist.log_prob(x).shape == (*sample, *batch)
    x.sum().backward()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(4, 4, 2), r"shape \(4,\) before that of an event, which does not broadcast with \(5,\)"),
        (torch.zeros(4, 3), r"the value has shape \(4, 3\), expected one that ends in \(4, 2\)"),
        (torch.zeros(4, 2).numpy(), "is ndarray, expected a tensor"),
        (torch.zeros(4, 2, dtype=torch.complex64), "complex"),
    ],
)
def test_values_that_do_not_fit(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_flow((4, 2), (3,))(torch.zeros(5, 3)).log_prob(value)


def test_expand_repeats_the_distribution() -> None:
    flow = make_flow((4, 2), (3,), num_blocks=2)
    context = torch.randn(2, 3)
    wide = flow(context).expand((5, 2))
    assert isinstance(wide, SequenceDistribution)
    assert wide.batch_shape == (5, 2)
    x = torch.randn(5, 2, 4, 2, dtype=torch.float64)
    torch.testing.assert_close(wide.log_prob(x), flow(context).log_prob(x))
    torch.testing.assert_close(wide.log_prob(x), flow(context.expand(5, 2, 3)).log_prob(x))


def test_rows_do_not_depend_on_their_batch() -> None:
    flow = make_flow((4, 2), (3,), variable_length=True)
    context, lengths = torch.randn(6, 3), torch.tensor([4, 2, 1, 3, 4, 2])
    x = torch.randn(6, 4, 2, dtype=torch.float64)
    together = flow(context, lengths).log_prob(x)
    alone = torch.stack([flow(c, n).log_prob(one) for c, n, one in zip(context, lengths, x, strict=True)])
    torch.testing.assert_close(together, alone)


def test_samples_follow_the_generator_and_the_density() -> None:
    """E[-log p] over samples is the entropy: close to a Monte Carlo of the noise through the log-determinant."""
    flow = make_flow((2, 2), num_blocks=2)
    first, again = (flow().sample((3,), generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, flow().sample((3,), generator=torch.Generator().manual_seed(2)))
    x = flow().sample((4000,), generator=torch.Generator().manual_seed(3))
    z, _ = flow.to_noise(x, None, None)
    assert z.mean(0).abs().max() < 0.08
    assert (z.std(0) - 1).abs().max() < 0.05


def test_many_samples_are_drawn_in_parts_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = make_flow((3,), (2,), variable_length=True)
    dist = flow(torch.randn(5, 2), torch.tensor([1, 2, 3, 3, 3]))
    whole = dist.sample((4,), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("starflow.density.sequence_flow.SAMPLED_AT_ONCE", 7)
    torch.testing.assert_close(dist.sample((4,), generator=torch.Generator().manual_seed(0)), whole)


def test_rsample_has_the_values_of_sample_and_gradients_through_bounds() -> None:
    """d E[x] / d shift of a new flow is the mean slope of its bounds, in closed form for a sigmoid."""
    flow = SequenceFlow((2,), bounds=((0.0, 1.0), (None, None)), **SMALL).double()
    flow.shift.requires_grad_()
    dist = flow()
    x = dist.rsample((50,), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(x.detach(), dist.sample((50,), generator=torch.Generator().manual_seed(0)))
    (gradient,) = torch.autograd.grad(x.sum(0).unbind()[0] + x.sum(0).unbind()[1], flow.shift)
    expected = torch.stack([(x[:, 0] * (1 - x[:, 0])).sum(), torch.tensor(50.0, dtype=torch.float64)])
    torch.testing.assert_close(gradient, expected)


def test_another_gradient_is_an_error() -> None:
    with pytest.raises(UserError, match="the gradient is 'exakt', expected 'exact' or 'biased'"):
        make_flow((3,))().rsample(gradient="exakt")


@pytest.mark.parametrize("gradient", ["exact", "biased"])
def test_second_derivatives_of_samples_are_refused_and_not_guessed(gradient: Gradient) -> None:
    """Where attention has second derivatives, those of the density are right, and those of samples would not be."""
    flow = make_flow((3,), (2,), num_blocks=2)
    context = torch.randn(2, dtype=torch.float64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(lambda given: flow(given).log_prob(torch.zeros(3)), (context,))
        with pytest.raises(UserError, match="samples have first derivatives alone"):
            torch.autograd.grad(flow(context).rsample(gradient=gradient).sum(), context, create_graph=True)


def test_samples_pass_torchs_own_check_of_gradients() -> None:
    """By finite differences, and where what follows has no gradient to give."""
    flow = make_flow((3,), (2,), bounds=((0.0, 1.0), (None, None), (2.0, None)))
    context = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)

    def draw(given: torch.Tensor) -> torch.Tensor:
        dist: SequenceDistribution = flow(given)
        return dist.rsample((2,), generator=torch.Generator().manual_seed(0))

    assert torch.autograd.gradcheck(draw, (context,))


def test_values_outside_the_support() -> None:
    flow = make_flow((2,), bounds=((0.0, 1.0), (None, None)))
    outside = torch.tensor([[0.5, 7.0], [1.5, 0.0]], dtype=torch.float64)
    assert flow().support.check(outside).tolist() == [True, False]
    with pytest.raises(ValueError, match=r"support \(Within\(\(\(0.0, 1.0\), \(None, None\)\)\)\)"):
        SequenceDistribution(flow, None, None, torch.Size(), torch.Size([2]), validate_args=True).log_prob(outside)
    free = SequenceDistribution(flow, None, None, torch.Size(), torch.Size([2]), validate_args=False)
    assert free.log_prob(outside).isfinite().tolist() == [True, False]
    assert free.log_prob(outside)[1] == -math.inf


@pytest.mark.parametrize("bound", [(0.0, 1.0), (1000.0, 1001.0), (0.1, 0.3), (5.0, None), (None, 0.0)])
@pytest.mark.parametrize("shift", [-200.0, -12.0, 12.0, 200.0])
def test_no_sample_is_rounded_to_a_bound(bound: Bound, shift: float) -> None:
    """In float32 a sigmoid is 1 from 17 on; the density is 0 there, and of no sample of its own."""
    flow = SequenceFlow((1,), bounds=(bound,), **SMALL)
    flow.shift.fill_(shift)
    x = flow().sample((500,), generator=torch.Generator().manual_seed(0))
    lower, upper = (
        torch.tensor(end if one is None else one) for one, end in zip(bound, (-math.inf, math.inf), strict=True)
    )
    assert ((x > lower) & (x < upper)).all()
    assert flow().log_prob(x).isfinite().all()


def test_missing_values_are_an_error_that_says_why() -> None:
    flow = make_flow((4,), variable_length=True)
    x = torch.tensor([1.0, math.nan, 2.0, math.nan], dtype=torch.float64)
    with pytest.raises(
        UserError, match=r"1 values are missing \(NaN\), expected none: blocks read an event from both ends"
    ):
        flow(lengths=torch.tensor(3)).log_prob(x)
    padded = torch.tensor([1.0, 3.0, math.nan, math.nan], dtype=torch.float64)
    assert flow(lengths=torch.tensor(2)).log_prob(padded).isfinite()
    with pytest.raises(ValueError, match=r"shape \(3,\), expected one that ends in \(4,\)"):
        flow(lengths=torch.tensor(3)).log_prob(x[:3])


def test_padding_is_sampled_as_zeros_and_ignored_within_bounds() -> None:
    flow = make_flow((4, 2), bounds=((1.0, 2.0), (None, None)), variable_length=True)
    dist = flow(lengths=torch.tensor([1, 4]))
    x = dist.sample((3,))
    assert (x[:, 0, 1:] == 0).all()
    assert (x[:, 1, :, 0] > 1).all()
    assert dist.log_prob(x).isfinite().all()  # though 0 is outside the bounds


@pytest.mark.parametrize("event_shape", [(4,), (4, 2)])
def test_padding_belongs_to_the_support(event_shape: tuple[int, ...]) -> None:
    """So that what checks values by it takes the flow's own samples; what is read is still checked."""
    flow = make_flow(event_shape, bounds=((1.0, 2.0),) * event_shape[-1], variable_length=True)
    dist = flow(lengths=torch.tensor([1, 4]))
    x = dist.sample((3,))
    assert dist.support.check(x).all()
    mixture = MixtureSameFamily(Categorical(torch.ones(2)), dist, validate_args=True)
    whole = x[:, 1]  # read by one of the two up to its first step
    torch.testing.assert_close(mixture.log_prob(whole), (dist.log_prob(x[:, 1:]) - math.log(2)).logsumexp(-1))
    x[:, :, 1] = 7.0
    assert dist.support.check(x).tolist() == [[True, False]] * 3


def test_inside_of_the_cases_is_inside() -> None:
    flow = make_flow((4,), bounds=BOUNDS)
    assert flow.support.check(inside(torch.randn(100, 4), flow)).all()


def test_torchs_own_functions_take_it() -> None:
    """A Monte Carlo divergence registered by a user finds the class, and Independent-like code its shapes."""

    @register_kl(SequenceDistribution, SequenceDistribution)  # type: ignore[untyped-decorator]
    def divergence(p: SequenceDistribution, q: SequenceDistribution) -> torch.Tensor:
        x = p.rsample((64,))
        return (p.log_prob(x) - q.log_prob(x)).mean(0)

    flow = make_flow((3,), (2,), num_blocks=1)
    context = torch.randn(2, 2)
    assert kl_divergence(flow(context), flow(context)).abs().max() < 1e-9
    assert kl_divergence(flow(context), flow(context + 1)).shape == (2,)
