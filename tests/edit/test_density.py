"""The guided, tempered density is that of what the sampler draws, for every model."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starflow.edit.density import GuidedFlow, log_density
from starflow.flow import block
from tests.registry import Case, cases


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
        halfway = density.halfway(x)
        assert torch.allclose(halfway.nats_BN.sum(1) + halfway.logdet, log_density(density, x), atol=1e-8)
        everything = torch.ones_like(halfway.nats_BN[0], dtype=torch.bool)
        assert torch.allclose(density.redraw(halfway.u_BND * 0, halfway.z_BND, everything, density.grid_of(x)), x)
        kept = density.redraw(halfway.u_BND, halfway.z_BND * 0, ~everything, density.grid_of(x))
        assert torch.allclose(kept, x, atol=1e-8)


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


@settings(max_examples=10, deadline=None)
@given(cases(), st.data())
def test_a_redraw_keeps_the_known_tokens(case: Case, data: st.DataObject) -> None:
    density = guided(case, 0.7, 0.8)
    with torch.no_grad():
        here = density.halfway(case.x)
        tokens = here.u_BND.shape[1]
        hole = torch.tensor(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
        there = density.halfway(density.redraw(here.u_BND, torch.randn_like(here.z_BND), hole, density.grid_of(case.x)))
    assert torch.allclose(there.u_BND[:, ~hole], here.u_BND[:, ~hole], atol=1e-8)
    if bool(hole.any()):
        assert not torch.allclose(there.u_BND[:, hole], here.u_BND[:, hole], atol=1e-3)


@pytest.mark.parametrize("patch", [1, 2])
def test_a_token_belongs_to_the_hole_where_any_of_its_latents_does(patch: int) -> None:
    from starflow.flow.config import STARFlowConfig
    from starflow.flow.model import STARFlow

    flow = STARFlow(STARFlowConfig(1, 4, channels=48, patch_size=patch, num_blocks=1, layers_per_block=1, head_dim=24))
    hole = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    hole[..., 2, 1] = True
    assert GuidedFlow(flow).tokens_of(hole).nonzero().flatten().tolist() == [9 if patch == 1 else 2]
