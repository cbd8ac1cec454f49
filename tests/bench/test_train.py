"""The speed of training is measured and reported; the numbers themselves are the machine's."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from starflow.bench.train import architecture, measure
from starflow.cli.bench import train_table
from starflow.errors import UserError
from starflow.flow.config import STARFlowConfig, TarFlowConfig
from starflow.train.distributed import World
from starflow.train.settings import TrainSettings

SMALL = STARFlowConfig(
    in_channels=2, img_size=4, channels=32, num_blocks=2, layers_per_block=1, head_dim=32, txt_size=2, txt_dim=4
)


@pytest.mark.parametrize("config", [SMALL, TarFlowConfig(3, 8, 2, 64, 2, 1, num_classes=5)])
def test_the_figures_fit_each_other(config: STARFlowConfig | TarFlowConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that every look moves on by a second, and a product of a known rate."""
    ticks = itertools.count()
    monkeypatch.setattr("starflow.bench.train.time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    monkeypatch.setattr("starflow.bench.train.MatrixProduct.rate", lambda _: 1e12)
    speed = measure(config, TrainSettings(precision="float32", steps=3, batch=4), World())
    assert (speed.first_update, speed.update) == (3.0, 3.0)
    assert speed.forward == speed.backward == speed.optimiser == 1.0
    assert speed.product_flops_per_second == 1e12
    assert speed.share == speed.best_share == pytest.approx(speed.flops_per_second / 1e12)
    assert speed.pictures_per_second == pytest.approx(4 / speed.update)
    assert speed.flops_per_second == pytest.approx(speed.pictures_per_second * speed.flops_per_picture)
    assert speed.precision == "float32"
    assert train_table(speed).splitlines()[-1].startswith("share")


def test_architectures_by_name() -> None:
    from starflow.flow.model import build

    with torch.device("meta"):
        model = build(architecture("57m"))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(57e6, rel=0.01)
    assert architecture("starflow-xl").channels == 2048
    with pytest.raises(UserError, match="no architecture 'xl': expected 57m or one of starflow-t2i-3b"):
        architecture("xl")
