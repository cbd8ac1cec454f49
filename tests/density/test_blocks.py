"""The blocks of a flow on sequences are exact: round trip, Jacobian, padding, and the gradients of the inverse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from starflow.density.blocks import SequenceBlocks, SequenceFlowConfig, check_bounds, reverse, within
from starflow.errors import UserError
from starflow.flow.block import inverse
from tests.density.cases import SMALL, Case, cases, make_flow
from tests.density.cases import within as inside_lengths

FEWER = settings(max_examples=25, derandomize=True, deadline=None)


@FEWER
@given(case=cases())
def test_noise_maps_back_to_the_data(case: Case) -> None:
    z, _ = case.flow.to_noise(case.x, case.context, case.lengths)
    known = inside_lengths(case)
    assert z.dtype == torch.float64
    assert (z - case.x)[known].abs().max() > 0.01, "the map must be no identity, or this proves nothing"
    back = case.flow.sample_rows(z, case.context, case.lengths, None)
    assert (back - case.x)[known].abs().max() < 1e-8
    assert (back[~known] == 0).all()


@FEWER
@given(case=cases())
def test_log_determinant_is_that_of_autograds_jacobian(case: Case) -> None:
    """Over what is no padding: bounds, standardisation and blocks together."""
    _, logdet = case.flow.to_noise(case.x, case.context, case.lengths)
    for row in range(2):
        one = slice(row, row + 1)
        known = inside_lengths(case)[row].flatten()
        given_ = [None if tensor is None else tensor[one] for tensor in (case.context, case.lengths)]

        def flat(free: Tensor, one: slice = one, known: Tensor = known, given_: list[Any] = given_) -> Tensor:
            x = case.x[one].flatten().masked_scatter(known, free)
            return case.flow.to_noise(x.view_as(case.x[one]), *given_)[0].flatten()[known]

        jacobian = torch.autograd.functional.jacobian(flat, case.x[row].flatten()[known])
        sign, expected = torch.linalg.slogdet(jacobian)
        assert abs(sign) == 1
        assert abs(logdet[row] - expected) < 1e-8


def test_what_lies_in_the_padding_changes_nothing() -> None:
    """Not the noise, not the log-determinant, and no gradient reaches it: in every block, as orders alternate."""
    flow = make_flow((6, 2), variable_length=True, num_blocks=4)
    lengths = torch.tensor([1, 2, 5, 6])
    x = torch.randn(4, 6, 2, dtype=torch.float64).requires_grad_()
    known = within(lengths, 6)[..., None]
    z, logdet = flow.to_noise(x, None, lengths)
    (gradient,) = torch.autograd.grad(z.sum() + logdet.sum(), x)
    assert (gradient.masked_select(~known) == 0).all()
    assert (gradient.masked_select(known) != 0).all()
    other = torch.where(known, x, 1e3 * torch.randn_like(x))
    for one, same in zip(flow.to_noise(other, None, lengths), (z, logdet), strict=True):
        assert torch.equal(one, same)


def test_a_short_sequence_is_read_as_if_it_were_whole() -> None:
    """A flow of N = 6 on 3 steps does what its blocks do on 3 steps alone: attention never meets the padding."""
    flow = make_flow((6, 2), variable_length=True, num_blocks=4)
    lengths = torch.tensor([3, 3])
    x = torch.randn(2, 6, 2, dtype=torch.float64)
    long, logdet = flow.blocks(x.masked_fill(~within(lengths, 6)[..., None], 0.0), None, lengths)
    tokens, total = x[:, :3], 0.0
    condition = flow.blocks.context_encoder(None, lengths)
    for block, backwards in flow.blocks._ordered():
        tokens = tokens.flip(1) if backwards else tokens
        tokens, log_sigma = block(tokens, condition, flow.blocks._rotary(x)[:4])
        tokens = tokens.flip(1) if backwards else tokens
        total = total - log_sigma.sum((1, 2))
    torch.testing.assert_close(long[:, :3], tokens)
    torch.testing.assert_close(logdet, total)


def test_the_length_is_a_condition() -> None:
    flow = make_flow((6, 2), variable_length=True)
    x = torch.zeros(2, 6, 2, dtype=torch.float64)
    z, _ = flow.to_noise(x, None, torch.tensor([3, 4]))
    assert not torch.allclose(z[0, :3], z[1, :3])


def sequential_inverse(blocks: SequenceBlocks, z: Tensor, context: Tensor | None, lengths: Tensor | None) -> Tensor:
    """The inverse as its definition has it, token by token and differentiable throughout."""
    condition = blocks.context_encoder(context, lengths)
    for block, backwards in reversed(list(blocks._ordered())):
        z = reverse(z, lengths) if backwards else z
        x = torch.zeros_like(z)
        for n in range(z.shape[1]):
            hidden = block.embed(block.first_inputs(x), 0)
            prefix = block.prefix(condition)
            hidden = hidden if prefix is None else torch.cat((prefix, hidden), 1)
            hidden = block.run_layers(hidden, blocks._rotary(z))[:, -z.shape[1] :]
            mu, log_sigma = block.gaussian(block.outputs(hidden))
            new = inverse(z, mu, log_sigma)[:, n : n + 1]
            x = torch.cat((x[:, :n], new, x[:, n + 1 :]), 1)
        if lengths is not None:
            x = torch.where(within(lengths, x.shape[1])[..., None], x, 0.0)
        z = reverse(x, lengths) if backwards else x
    return z


def gradients(x: Tensor, weight: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad((x * weight).sum(), inputs, allow_unused=True)
    return [
        torch.zeros_like(one) if gradient is None else gradient for one, gradient in zip(inputs, found, strict=True)
    ]


@settings(max_examples=12, derandomize=True, deadline=None)
@given(case=cases())
def test_gradients_of_samples_are_those_of_the_sequential_inverse(case: Case) -> None:
    """Of every parameter, of the context and of the noise, in float64, by autograd through the loop over tokens."""
    blocks, config = case.flow.blocks, case.config
    z = torch.randn(5, config.tokens, config.token_channels, dtype=torch.float64)
    if case.lengths is not None:
        z = torch.where(within(case.lengths, config.tokens)[..., None], z, 0.0)
    z.requires_grad_()
    context = None if case.context is None else case.context.requires_grad_()
    weight = torch.randn_like(z)
    inputs = [z, *blocks.parameters(), *([] if context is None else [context])]
    x = blocks.inverse(z, context, case.lengths, "exact")
    expected = sequential_inverse(blocks, z, context, case.lengths)
    torch.testing.assert_close(x, expected, atol=1e-8, rtol=1e-8)
    found = gradients(x, weight, inputs)
    assert max(float(one.abs().max()) for one in found) > 1e-3
    for one, other in zip(found, gradients(expected, weight, inputs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-7)


def test_the_biased_gradient_is_that_of_mu_and_sigma_with_the_tokens_before_detached() -> None:
    """x = mu(sg x_<n) + sigma(sg x_<n) z, block by block; it differs from the exact one."""
    flow = make_flow((5, 2), (3,), num_blocks=1)
    z, context = torch.randn(4, 5, 2, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    x = flow.blocks.inverse(z, context, None, "biased")
    (block, _), *_ = flow.blocks._ordered()
    hidden = block.embed(block.first_inputs(x.detach()), 0)
    prefix = block.prefix(flow.blocks.context_encoder(context, None))
    assert prefix is not None
    hidden = torch.cat((prefix, hidden), 1)
    mu, log_sigma = block.gaussian(block.outputs(block.run_layers(hidden, flow.blocks._rotary(z))[:, -5:]))
    pseudo = inverse(z, mu, log_sigma)
    weight, parameters = torch.randn_like(z), list(flow.blocks.parameters())
    torch.testing.assert_close(x, pseudo)
    biased = gradients(x, weight, parameters)
    for one, other in zip(biased, gradients(pseudo, weight, parameters), strict=True):
        torch.testing.assert_close(one, other)
    exact = gradients(flow.blocks.inverse(z, context, None, "exact"), weight, parameters)
    assert not all(map(torch.allclose, exact, biased))


def test_reverse_in_closed_form() -> None:
    x = torch.arange(8).view(2, 4, 1)
    assert reverse(x, torch.tensor([3, 1]))[..., 0].tolist() == [[2, 1, 0, 3], [4, 5, 6, 7]]
    assert torch.equal(reverse(x, None), x.flip(1))


def test_a_new_flow_is_the_identity() -> None:
    blocks = SequenceBlocks(SequenceFlowConfig((4, 2), (3,), **SMALL))
    x = torch.randn(2, 4, 2)
    z, logdet = blocks(x, torch.randn(2, 3), None)
    torch.testing.assert_close(z, x, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logdet, torch.zeros(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"event_shape": ()}, r"event_shape is \(\), expected \(D,\) or \(N, C\)"),
        ({"event_shape": (4, 0)}, "event_shape is"),
        ({"event_shape": 4}, r"event_shape is 4, expected whole numbers in parentheses, such as \(3,\)"),
        ({"event_shape": (4.0,)}, r"event_shape is \(4.0,\), expected whole numbers"),
        ({"event_shape": (4,), "num_blocks": 2.5}, "num_blocks is 2.5, expected a whole number"),
        ({"event_shape": (2,), "bounds": (0.0, 1.0)}, r"bounds are \(0.0, 1.0\), expected \(lower, upper\) for each"),
        ({"event_shape": (4,), "context_shape": (1, 2, 3)}, "context_shape is"),
        ({"event_shape": (4,), "num_blocks": 0}, "num_blocks is 0, expected at least 1"),
        ({"event_shape": (5,), "patch_size": 2}, "patch_size 2 does not divide 5"),
        ({"event_shape": (4,), "patch_size": 2, "variable_length": True}, "patch_size is 2 with variable lengths"),
        ({"event_shape": (4,), "channels": 48}, "head_dim 32 is odd, or does not divide channels 48"),
        ({"event_shape": (2,), "bounds": ((0.0, 1.0),)}, "1 bounds, expected 2"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SequenceFlowConfig(**options)


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        ((0.0,), r"expected \(lower, upper\)"),
        ((1.0, 1.0), "the lower one below the upper one"),
        ((0.0, float("inf")), "expected finite numbers: give None"),
    ],
)
def test_bounds_that_do_not_fit(bound: tuple[float, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_bounds([bound], 1)
