"""Token maps: they add up to the log-density, and closed forms of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from starflow.flow.maps import token_log_prob
from starflow.flow.model import Flow, STARFlow, TarFlow
from starflow.model_config import STARFlowConfig, TarFlowConfig


def starflow() -> STARFlow:
    return STARFlow(
        STARFlowConfig(
            in_channels=2, img_size=4, channels=16, patch_size=2, num_blocks=3, layers_per_block=1, head_dim=16
        )
    )


def tarflow() -> TarFlow:
    return TarFlow(
        TarFlowConfig(
            in_channels=2, img_size=4, channels=16, patch_size=2, num_blocks=3, layers_per_block=1, head_dim=16
        )
    )


def randomised(flow: Flow) -> Flow:
    torch.manual_seed(0)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if isinstance(flow, TarFlow):
        flow.var.uniform_(0.5, 2.0)
    return flow.double()


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("make", [starflow, tarflow])
def test_a_map_adds_up_to_the_log_density(make: object) -> None:
    flow = randomised(make())  # type: ignore[operator]
    x = data(3, 2, 4, 4)
    maps = token_log_prob(flow, x)
    assert maps.shape == (3, 2, 2)
    torch.testing.assert_close(maps.sum((1, 2)), flow.log_prob(x), rtol=0, atol=1e-10)


def test_a_new_flow_gives_each_token_the_gaussians_density() -> None:
    flow = starflow().double()
    x = data(2, 2, 4, 4)
    expected = (-0.5 * (x**2 + math.log(2 * math.pi))).sum(1).unfold(1, 2, 2).unfold(2, 2, 2).sum((-1, -2))
    torch.testing.assert_close(token_log_prob(flow, x), expected, rtol=0, atol=1e-12)


def test_a_strange_token_stands_out() -> None:
    """The sharpest cell is where the picture was changed: an identity flow reads every token by itself."""
    x = torch.zeros(1, 2, 4, 4)
    x[0, :, 2:, :2] = 5.0
    assert int(token_log_prob(starflow(), x).flatten().argmin()) == 2


def test_an_affine_flows_density_is_the_closed_form() -> None:
    """Constant mu and sigma in one block: log N(x; mu, sigma^2), whichever token."""
    flow = STARFlow(
        STARFlowConfig(
            in_channels=2, img_size=4, channels=16, num_blocks=1, layers_per_block=1, head_dim=16, soft_clip=0,
            use_softplus=False, use_final_norm=False,
        )
    ).double()  # fmt: skip
    log_sigma, mu = torch.tensor([0.3, -0.7]).double(), torch.tensor([1.5, -0.25]).double()
    block = next(flow.stack())
    with torch.no_grad():
        block.proj_out.bias.copy_(torch.cat([log_sigma, mu]))  # weights are zero: outputs do not depend on the input
    x = data(3, 2, 4, 4)
    gaussian = torch.distributions.Normal(mu.view(2, 1, 1), log_sigma.exp().view(2, 1, 1))
    torch.testing.assert_close(token_log_prob(flow, x), gaussian.log_prob(x).sum(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(flow.log_prob(x), gaussian.log_prob(x).sum((1, 2, 3)), rtol=0, atol=1e-12)
