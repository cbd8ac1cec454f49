"""Blocks that come to the device for their work alone: the same numbers, one block at a time, and nothing is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from starflow import StarFlowPipeline, denoise, sample
from starflow.conditioning import ClassLabels
from starflow.flow import model as models
from starflow.flow.block import AutoregressiveBlock, moved_to
from starflow.flow.config import ModelConfig, STARFlowConfig, TarFlowConfig
from starflow.flow.model import Flow
from starflow.latents import PixelLatents
from tests.cli.conftest import CLASSES, random_pipeline
from tests.registry import randomised

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
    """Brings weights that a model does not have where it lies: whatever computed with its own would give NaN."""

    def __init__(self, plain: Flow, away: Flow) -> None:
        self.true = dict(zip(away.modules(), plain.modules(), strict=True))
        self.brought: list[nn.Module] = []
        self.here = 0
        for parameter in away.blocks.parameters():
            parameter.data.fill_(float("nan"))

    @contextmanager
    def bring(self, module: nn.Module, device: torch.device) -> Iterator[None]:
        if isinstance(module, AutoregressiveBlock):
            assert self.here == 0
            self.here += 1
            self.brought.append(module)
        try:
            with moved_to(module, device):
                for copy, true in zip(module.parameters(), self.true[module].parameters(), strict=True):
                    copy.data.copy_(true)
                yield
        finally:
            self.here -= isinstance(module, AutoregressiveBlock)


def places(model: Flow) -> dict[str, tuple[int, str]]:
    return {name: (tensor.data_ptr(), tensor.device.type) for name, tensor in model.state_dict().items()}


def test_both_directions_and_the_score_are_the_same(
    pair: tuple[Flow, Flow, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, away, x, condition = pair
    homes, parameters, blocks = places(away), list(away.parameters()), list(away.blocks)
    seen = Seen(plain, away)
    monkeypatch.setattr(models, "moved_to", seen.bring)
    for ours, theirs in zip(away(x, condition), plain(x, condition), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert seen.brought == blocks
    seen.brought.clear()
    for solver in ("sequential", "jacobi"):
        ours, theirs = (sample(one, x, condition, solver=solver) for one in (away, plain))
        torch.testing.assert_close(ours, theirs)
    assert seen.brought == blocks[::-1] * 2
    seen.brought.clear()
    torch.testing.assert_close(denoise(away, x, condition), denoise(plain, x, condition))
    assert seen.brought == [*blocks, *blocks[::-1]]  # the way back brings them again
    assert places(away) == homes
    assert all(one is other for one, other in zip(away.parameters(), parameters, strict=True))


def test_weights_are_copies_while_a_block_works_and_its_own_after_an_error() -> None:
    block = randomised(CONFIGS[0], 0).blocks[0]
    own = dict(block.named_parameters())
    with pytest.raises(KeyError), moved_to(block, torch.device("cpu")):
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
    sample(model, torch.randn(1, 4, 8, 8, device="cuda"))  # cuBLAS takes its workspaces, and keeps them
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sample(model, torch.randn(1, 4, 8, 8, device="cuda"))
    assert torch.cuda.max_memory_allocated() - before < 1.5 * block
    assert torch.cuda.memory_allocated() == before
