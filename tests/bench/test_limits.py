"""What is measured of memory is what is predicted, as far as both can know."""

from __future__ import annotations

import sys

import pytest
import torch

from starflow.bench.limits import measure_footprint, track_memory
from starflow.flow import memory
from starflow.flow.config import STARFlowConfig
from starflow.latents import PixelLatents
from starflow.nn.attention import CachePool
from starflow.sampling.cpu.pack import PanelLayout, pack
from starflow.sampling.policy import SampleSettings
from starflow.sampling.sampler import run
from tests.registry import randomised

CONFIG = STARFlowConfig(
    in_channels=3, img_size=8, channels=128, head_dim=32, num_blocks=2, layers_per_block=(1, 2), txt_size=4, txt_dim=16
)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the system's record of memory is Linux's")


@pytest.mark.filterwarnings("ignore:sampling goes on without its compiled loop")
def test_weights_and_caches_are_those_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    model, coder = randomised(CONFIG, 0).requires_grad_(False), PixelLatents()
    noise, condition = torch.randn(4, 3, 8, 8), torch.randn(4, 4, 16)

    def draw(caches: CachePool) -> torch.Tensor:
        return run(model, noise, condition, condition, SampleSettings(2.0), caches=caches).x

    found = measure_footprint(model, coder, 4, draw, guided=True)
    assert (found.weights, found.cache) == (found.predicted.weights, found.predicted.cache)
    assert found.packed == found.autoencoder == 0
    assert found.predicted_peak == found.predicted.peak
    if sys.platform == "linux":
        assert found.peak is not None
        assert found.peak >= found.weights


def test_packed_copies_are_those_predicted() -> None:
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        model = randomised(CONFIG, 0).to(dtype)
        packed = sum(pack(block, PanelLayout(16)).bytes for block in model.iter_blocks())
        predicted = memory.packed_bytes(CONFIG, name)  # type: ignore[arg-type]
        assert predicted <= packed <= 1.01 * predicted, "more than panels filled up"
    assert memory.packed_bytes(CONFIG, "float32", "int8") < memory.packed_bytes(CONFIG, "float32") / 2


@LINUX
def test_a_rise_is_seen_even_where_it_has_passed() -> None:
    with track_memory(torch.device("cpu")) as found:
        torch.ones(2**25).sum()  # 128 MiB
    assert found.bytes is not None
    assert 0.9 * 2**27 < found.bytes < 1.3 * 2**27
