"""The flow is exact, in float64, whatever its options: the properties that make a likelihood a likelihood."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from torch import Tensor

from starflow import sample
from starflow.flow.block import AutoregressiveBlock
from starflow.flow.config import STARFlowConfig, TarFlowConfig
from starflow.flow.model import build
from starflow.flow.tokens import in_order
from tests.registry import Case, cases, randomised

EVERY_OPTION = settings(max_examples=40, derandomize=True)
FEWER = settings(max_examples=16, derandomize=True)


@EVERY_OPTION
@given(case=cases())
def test_noise_maps_back_to_the_data(device: torch.device, case: Case) -> None:
    case = case.to(device)
    z, _ = case.model(case.x, case.condition)
    assert z.dtype == torch.float64
    assert (z - case.x).abs().max() > 0.01, "the map must be no identity, or this proves nothing"
    assert (sample(case.model, z, case.condition) - case.x).abs().max() < 1e-9


@FEWER
@given(case=cases())
def test_log_determinant_is_that_of_autograds_jacobian(device: torch.device, case: Case) -> None:
    case = case.to(device)
    _, logdet = case.model(case.x, case.condition)
    for row in range(len(case.x)):
        condition = None if case.condition is None else case.condition[row : row + 1]
        size = case.x[row].numel()

        def flat(x: Tensor, row: int = row, condition: Tensor | None = condition) -> Tensor:
            z, _ = case.model.forward(x.view(case.x[row : row + 1].shape), condition)
            return z.flatten()

        jacobian = torch.autograd.functional.jacobian(flat, case.x[row].flatten())
        assert jacobian.shape == (size, size)
        sign, expected = torch.linalg.slogdet(jacobian)
        assert sign == 1
        assert abs(logdet[row] - expected) < 1e-8


@FEWER
@given(case=cases())
def test_jacobian_is_triangular_in_each_blocks_own_order(device: torch.device, case: Case) -> None:
    """Token n's z depends on tokens up to n only, and on its own channels one by one."""
    case = case.to(device)
    trace = case.model.trace(case.x[:1], None if case.condition is None else case.condition[:1])
    rotary = case.model.rotary((case.x.shape[2] // _patch(case), case.x.shape[3] // _patch(case)))
    condition = case.model.check_condition(None if case.condition is None else case.condition[:1], 1)
    for block, state in zip(case.model.iter_blocks(), trace.states[:-1], strict=True):
        jacobian = _block_jacobian(block, state.detach(), condition, case.model.block_rotary(block, rotary))
        tokens, channels = state.shape[1:]
        before = torch.ones(tokens, tokens, device=device).tril(-1).bool()
        own = torch.eye(tokens, device=device).bool()
        later = ~(before | own)
        by_token = jacobian.permute(0, 2, 1, 3)  # (n, m, channel of n, channel of m)
        assert (by_token[later] == 0).all()
        diagonal = torch.eye(channels, device=device).bool()
        assert (by_token[own][:, ~diagonal] == 0).all()
        assert (by_token[own][:, diagonal] > 0).all()
        assert (by_token[before] != 0).any(dim=(1, 2)).sum() >= tokens - 2, "blocks that ignore the past prove nothing"


def _patch(case: Case) -> int:
    return case.model.config.patch_size


def _block_jacobian(
    block: AutoregressiveBlock, state: Tensor, condition: Tensor | None, rotary: Tensor | None
) -> Tensor:
    """d z[n, i] / d x[m, j] of shape (N, C, N, C), both in the block's own order."""
    backwards = block.spec.backwards

    def own_order(x_NC: Tensor) -> Tensor:
        z_BNC, _ = block(in_order(x_NC[None], backwards=backwards), condition, rotary)
        return in_order(z_BNC, backwards=backwards)[0]

    jacobian: Tensor = torch.autograd.functional.jacobian(own_order, in_order(state, backwards=backwards)[0])
    return jacobian


@EVERY_OPTION
@given(case=cases())
def test_gradients_reach_every_parameter(device: torch.device, case: Case) -> None:
    """Every single number of every parameter, apart from those that cannot matter by construction."""
    case = case.to(device)
    z, logdet = case.model(case.x, case.condition)
    (0.5 * z.square().sum() - logdet.sum()).backward()
    for name, parameter in case.model.named_parameters():
        assert parameter.grad is not None, name
        reached = parameter.grad != 0
        if name.endswith("attention.qkv.bias"):
            _ignore_key_bias(case, name, reached)
        if name.endswith("pos_embed"):
            _ignore_unread_position(case, name, reached)
        assert reached.all(), f"{name}: {(~reached).sum()} of {reached.numel()} numbers have no gradient"


def _ignore_key_bias(case: Case, name: str, reached: Tensor) -> None:
    """A shift common to all keys leaves a softmax as it is, where no rotation or norm sets the keys apart."""
    block = case.model.get_submodule(".".join(name.split(".")[:2]))
    assert isinstance(block, AutoregressiveBlock)
    layer = block.spec.layer
    inner, keys = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    reached[inner : inner + keys] = True


def _ignore_unread_position(case: Case, name: str, reached: Tensor) -> None:
    """Without a start token the last token is never read, so its position is not either."""
    block = case.model.get_submodule(".".join(name.split(".")[:2]))
    assert isinstance(block, AutoregressiveBlock)
    if not block.spec.start_token:
        reached[0 if block.spec.backwards else -1] = True


def test_log_prob_integrates_to_one() -> None:
    """Two dimensions: one channel, two tokens; a sum over a fine grid is then the integral to many digits."""
    config = STARFlowConfig(
        in_channels=1, img_size=2, channels=32, head_dim=16, num_blocks=3, layers_per_block=1, soft_clip=1.0
    )
    model = randomised(config, 3).double()
    line = torch.linspace(-16, 16, 161, dtype=torch.float64)
    x = torch.cartesian_prod(line, line).view(-1, 1, 1, 2)
    with torch.no_grad():
        log_p = torch.cat([model.log_prob(part) for part in x.split(20_000)])
    assert abs(log_p.exp().sum().item() * 0.2**2 - 1) < 1e-6
    gaussian = -0.5 * x.square().sum((1, 2, 3)) - math.log(2 * math.pi)
    assert (log_p.exp() - gaussian.exp()).abs().max() > 0.01, "it must be no plain Gaussian, or this proves nothing"


def test_a_new_model_is_the_identity() -> None:
    x = torch.randn(2, 4, 4, 4)
    starflow = STARFlowConfig(in_channels=4, img_size=4, channels=64, num_blocks=3, layers_per_block=1)
    tarflow = TarFlowConfig(in_channels=4, img_size=4, patch_size=2, channels=64, num_blocks=3, layers_per_block=1)
    for config in (starflow, tarflow):
        z, logdet = build(config)(x)
        torch.testing.assert_close(z, x, rtol=0, atol=1e-6)
        torch.testing.assert_close(logdet, torch.zeros(2), rtol=0, atol=1e-5)


@settings(max_examples=16, derandomize=True)
@given(case=cases())
def test_states_and_log_sigmas_of_a_trace_explain_its_result(device: torch.device, case: Case) -> None:
    case = case.to(device)
    trace = case.model.trace(case.x, case.condition)
    blocks = len(case.model.blocks)
    assert (len(trace.states), len(trace.log_sigmas)) == (blocks + 1, blocks)
    torch.testing.assert_close(case.model.to_tokens(trace.z)[0], trace.states[-1])
    torch.testing.assert_close(-sum(log_sigma.sum((1, 2)) for log_sigma in trace.log_sigmas), trace.logdet)
