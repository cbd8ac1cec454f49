"""Blocks that come to the device for their work alone: the same numbers, one block at a time, and nothing is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tests.cli.conftest import CLASSES, random_pipeline
from tests.registry import randomised
from torch import Tensor, nn

from starflow import StarFlowPipeline, denoise, sample
from starflow.conditioning import ClassLabels
from starflow.flow import model as models
from starflow.flow.model import Flow
from starflow.flow.offload import brought_to
from starflow.latents import PixelLatents
from starflow.model_config import ModelConfig, STARFlowConfig, TarFlowConfig

CONFIGS: list[ModelConfig] = [
    STARFlowConfig(in_channels=2, img_size=4, channels=48, head_dim=24, num_blocks=3, layers_per_block=(1, 1, 2),
                   txt_size=3, txt_dim=5),
    TarFlowConfig(in_channels=2, img_size=4, patch_size=2, channels=64, num_blocks=2, layers_per_block=1,
                  num_classes=3),
]  # fmt: skip


@pytest.fixture(params=CONFIGS, ids=["starflow", "tarflow"])
def pair(request: pytest.FixtureRequest, device: torch.device) -> tuple[Flow, Flow, Tensor, Tensor]:
    """A model on the device, one that is offloaded to it, data and a condition."""
    plain, away = (randomised(request.param, 0).requires_grad_(False) for _ in range(2))
    x = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)).to(device)
    condition = torch.tensor([0, 2]) if isinstance(request.param, TarFlowConfig) else torch.randn(2, 3, 5)
    return plain.to(device), away.offload(device), x, condition.to(device)


class Seen:
    """Which blocks were brought, and that none was while another was there."""

    def __init__(self) -> None:
        self.brought: list[nn.Module] = []
        self.here = 0

    @contextmanager
    def bring(self, module: nn.Module, device: torch.device) -> Iterator[None]:
        assert self.here == 0
        self.here += 1
        self.brought.append(module)
        with brought_to(module, device):
            yield
        self.here -= 1


def test_both_directions_and_the_score_are_the_same(
    pair: tuple[Flow, Flow, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, away, x, condition = pair
    homes = {name: (tensor.data_ptr(), tensor.device.type) for name, tensor in away.state_dict().items()}
    parameters = list(away.parameters())
    seen = Seen()
    monkeypatch.setattr(models, "brought_to", seen.bring)
    for ours, theirs in zip(away(x, condition), plain(x, condition), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert seen.brought == list(away.blocks)
    seen.brought.clear()
    for solver in ("sequential", "jacobi"):
        torch.testing.assert_close(
            sample(away, x, condition, solver=solver), sample(plain, x, condition, solver=solver)
        )
    assert seen.brought == [*reversed(list(away.blocks))] * 2
    seen.brought.clear()
    torch.testing.assert_close(denoise(away, x, condition), denoise(plain, x, condition))
    assert seen.brought == [*away.blocks, *reversed(list(away.blocks))]  # the way back brings them again
    after = {name: (tensor.data_ptr(), tensor.device.type) for name, tensor in away.state_dict().items()}
    assert after == homes
    assert all(one is other for one, other in zip(away.parameters(), parameters, strict=True))


def test_weights_are_copies_while_a_block_works_and_its_own_after_an_error() -> None:
    block = randomised(CONFIGS[0], 0).blocks[0]
    own = dict(block.named_parameters())
    with pytest.raises(KeyError), brought_to(block, torch.device("cpu")):
        for name, parameter in block.named_parameters():
            assert parameter.data_ptr() != own[name].data_ptr()
            assert torch.equal(parameter, own[name])
        raise KeyError
    assert all(parameter is own[name] for name, parameter in block.named_parameters())


def test_a_pipeline_with_offload_draws_the_same(device: torch.device, tmp_path: Path) -> None:
    random_pipeline("classes", PixelLatents(), ClassLabels(CLASSES)).save_pretrained(str(tmp_path))
    plain = StarFlowPipeline.from_pretrained(str(tmp_path), device)
    away = StarFlowPipeline.from_pretrained(str(tmp_path), device, offload=True)
    assert away.device == device
    assert next(away.flow.parameters()).device.type == "cpu"
    ours, theirs = (one("star", solver="sequential").latents for one in (away, plain))
    torch.testing.assert_close(ours, theirs)
    image = plain("star").images[0]
    assert away.log_prob(image, "star").nats == pytest.approx(plain.log_prob(image, "star").nats, rel=1e-4)


@pytest.mark.gpu
def test_only_the_block_at_work_is_in_the_devices_memory() -> None:
    config = STARFlowConfig(in_channels=4, img_size=8, channels=1024, num_blocks=4, layers_per_block=2)
    model = randomised(config, 0).requires_grad_(False).offload("cuda")
    block = sum(parameter.nbytes for parameter in model.blocks[0].parameters())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sample(model, torch.randn(1, 4, 8, 8, device="cuda"))
    assert torch.cuda.max_memory_allocated() - before < 1.5 * block
    assert torch.cuda.memory_allocated() == before
