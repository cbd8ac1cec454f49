"""The guided, tempered density is that of what the sampler draws, for every model."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from starflow.edit.density import GuidedFlow, effective_samples, log_density
from starflow.flow import block
from starflow.flow.config import STARFlowConfig
from starflow.flow.model import Flow, STARFlow
from starflow.flow.tokens import in_order
from tests.edit.conftest import STANDARD_ERRORS, far
from tests.registry import Case, cases, randomised


def guided(case: Case, guidance: float, temperature: float) -> GuidedFlow:
    """The density of a case's first row, guided where it can be."""
    condition, null = (None if one is None else one[:1] for one in (case.condition, case.null_condition))
    can = condition is not None and any(case.model.guided_blocks)
    return GuidedFlow(case.model, condition, null, guidance if can else 0.0, temperature)


@settings(max_examples=25, deadline=None)
@given(cases(), st.sampled_from([0.0, 0.7, 3.0]), st.sampled_from([1.0, 0.6]))
def test_decoding_inverts_encoding_and_the_parallel_pass_has_the_draws_density(
    case: Case, guidance: float, temperature: float
) -> None:
    density = guided(case, guidance, temperature)
    with torch.no_grad():
        x = density.decode(case.x)
        z, _ = density.encode(x)
        assert torch.allclose(z, case.x, atol=1e-8)
        everything = torch.ones(1, 1, *x.shape[2:], dtype=torch.bool)
        uniform = torch.rand(x[0].numel(), dtype=x.dtype)
        assert torch.allclose(density.particles(x[:1] * 0, case.x, everything, uniform).x, x, atol=1e-8)
        kept = density.particles(x[:1], case.x * 0, ~everything, uniform)
        assert torch.allclose(kept.x, x[:1].expand_as(x), atol=1e-8)


@settings(max_examples=10, deadline=None)
@given(cases(img_size=4, patch_size=2, in_channels=1), st.sampled_from([0.0, 1.5]), st.sampled_from([1.0, 0.6]))
def test_the_log_determinant_is_autograds(case: Case, guidance: float, temperature: float) -> None:
    density, x = guided(case, guidance, temperature), case.x[:1]
    jacobian = torch.autograd.functional.jacobian(lambda at: density.encode(at)[0], x)
    exact = torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel())).logabsdet
    assert torch.allclose(density.encode(x)[1], exact[None], atol=1e-7)


@settings(max_examples=10, deadline=None)
@given(cases())
def test_unguided_it_is_the_flows_and_a_temperature_widens_it(case: Case) -> None:
    plain, cool = guided(case, 0.0, 1.0), guided(case, 0.0, 0.5)
    x, condition = case.x[:1], plain.condition
    with torch.no_grad():
        assert torch.allclose(log_density(plain, x), case.model.log_prob(x, condition), atol=1e-9)
        z, logdet = case.model(x, condition)
        expected = block.log_normal(z / 0.5) + logdet - x.numel() * math.log(0.5)
        assert torch.allclose(log_density(cool, x), expected, atol=1e-9)


def of_one_block(patch: int) -> Flow:
    config = STARFlowConfig(
        2, 4, channels=48, patch_size=patch, num_blocks=1, layers_per_block=1, head_dim=24, sos=True
    )
    return randomised(config, 0).double().requires_grad_(False)


UNIFORM = torch.linspace(0.05, 0.95, 16, dtype=torch.float64)


@pytest.mark.parametrize("patch", [1, 2])
def test_a_particle_gives_the_hole_the_given_noise_and_keeps_the_rest(patch: int) -> None:
    """With one block, whose input is the data itself."""
    density, generator = GuidedFlow(of_one_block(patch), temperature=0.8), torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 1, 2, 4, 4, generator=generator, dtype=torch.float64)
    hole = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    hole[..., 2:, :2] = True
    made = density.particles(x, z, hole, UNIFORM).x
    assert torch.equal(torch.where(hole, 0, made), torch.where(hole, 0, x))
    found, _ = density.encode(made)
    assert torch.allclose(torch.where(hole, found, 0), torch.where(hole, z, 0), atol=1e-8)


def of_four_tokens() -> Flow:
    """One block of four scalar tokens that depend much on each other."""
    config = STARFlowConfig(
        1, 2, channels=48, num_blocks=1, layers_per_block=1, head_dim=24, sos=True, txt_size=2, txt_dim=5
    )
    flow = randomised(config, 0).double().requires_grad_(False)
    next(flow.iter_blocks()).proj_out.weight.mul_(15)
    return flow


def log_tokens(density: GuidedFlow, x: Tensor) -> Tensor:
    """What each token of one block adds to log p(x), in raster order, (B, N) in nats."""
    tokens_BND, grid = density.flow.to_tokens(x)
    block = next(density.flow.iter_blocks())
    z_BND, log_sigma = density._forward(0, block, tokens_BND, grid)
    last = density._last_log_scale(z_BND)
    log_scale = in_order(log_sigma, backwards=block.spec.backwards) + last
    return (-0.5 * (z_BND * torch.exp(-last)).square() - log_scale - 0.5 * math.log(2 * math.pi)).sum(-1)


def moments_by_quadrature(guided: GuidedFlow, plain: GuidedFlow, x: Tensor, hole: Tensor) -> Tensor:
    """Means of the hole's two values and of their product, under one density times the other's of the known part."""
    line = torch.linspace(-10, 14, 61, dtype=torch.float64)
    both = torch.cartesian_prod(line, line)
    points = x.expand(len(both), -1, -1, -1).clone()
    points[hole.expand_as(points)] = both.flatten()
    inside = hole.flatten()
    nats = log_tokens(guided, points)[:, inside].sum(1) + log_tokens(plain, points)[:, ~inside].sum(1)
    return (nats - nats.max()).softmax(0) @ torch.cat((both, both.prod(1, keepdim=True)), 1)


@pytest.mark.parametrize(("guidance", "temperature"), [(0.0, 1.0), (0.5, 0.8)])
def test_weighted_particles_are_draws_given_what_is_known(
    guidance: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against quadrature on one block, with known tokens between those of the hole; wrong where particles with weights
    lose these or are not drawn anew with their own keys and values.
    """
    generator = torch.Generator().manual_seed(1)
    condition, null = torch.randn(2, 1, 2, 5, generator=generator, dtype=torch.float64)
    flow = of_four_tokens()
    density, plain = GuidedFlow(flow, condition, null, guidance, temperature), GuidedFlow(flow, condition)
    x = 4 * torch.randn(1, 1, 2, 2, generator=generator, dtype=torch.float64)  # unlikely, so that the weights differ
    hole = torch.tensor([False, True, False, True]).view(1, 1, 2, 2)  # the block goes backwards: the first is in it
    truth = moments_by_quadrature(density, plain, x, hole)

    def distance() -> float:
        """Of means over runs from the truth, in standard errors."""
        means = []
        for _ in range(10):
            z = torch.randn(500, 1, 2, 2, generator=generator, dtype=torch.float64)
            found = density.particles(x, z, hole, torch.rand(4, generator=generator, dtype=torch.float64))
            values = found.x[hole.expand_as(found.x)].view(-1, 2)
            means.append(found.log_weight.softmax(0) @ torch.cat((values, values.prod(1, keepdim=True)), 1))
        return far(torch.stack(means), truth)

    assert distance() < STANDARD_ERRORS
    with monkeypatch.context() as broken:
        broken.setattr("starflow.edit.density.systematic", lambda log_weight, _: torch.arange(len(log_weight)))
        assert distance() > 2 * STANDARD_ERRORS
    if not guidance:
        monkeypatch.setattr("starflow.edit.density.select_pictures", lambda predictor, *_: predictor)
        assert distance() > 2 * STANDARD_ERRORS


@pytest.mark.parametrize("patch", [1, 2])
def test_a_token_belongs_to_the_hole_where_any_of_its_latents_does(patch: int) -> None:
    flow = STARFlow(STARFlowConfig(1, 4, channels=48, patch_size=patch, num_blocks=1, layers_per_block=1, head_dim=24))
    hole = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    hole[..., 2, 1] = True
    assert GuidedFlow(flow).tokens_of(hole).nonzero().flatten().tolist() == [9 if patch == 1 else 2]


def test_effective_samples_count_equal_weights_and_a_single_one() -> None:
    assert effective_samples(torch.full((8,), -700.0)) == pytest.approx(8)
    assert effective_samples(torch.tensor([0.0, -1000, -1000])) == pytest.approx(1)
