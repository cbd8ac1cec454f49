"""Pictures that are encoded when it is their turn: the batches of the cached training, and what the log says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.train.test_cache import Means, fill
from tests.train.test_cache import pictures as pictures  # a fixture

from starflow.conditioning import ClassLabels
from starflow.data.index import IndexedPictures
from starflow.data.latent_cache import read_cache
from starflow.flow.model import STARFlow
from starflow.model_config import STARFlowConfig
from starflow.train.distributed.world import World
from starflow.train.flow import FlowTask
from starflow.train.live import FeedSettings, LiveFlowTask, LiveLatents
from starflow.train.loop import fit, read_log
from starflow.train.recipe import Objective
from starflow.train.settings import TrainSettings

CONFIG = STARFlowConfig(
    in_channels=3, img_size=2, channels=16, num_blocks=2, layers_per_block=1, head_dim=16, txt_size=1, txt_dim=3
)
SETTINGS = TrainSettings(steps=5, batch=4, warmup=1, evaluate_every=2, sample_every=100, checkpoint_every=2)


def live_task(pictures: IndexedPictures, how: FeedSettings | None = None, world: World | None = None) -> LiveFlowTask:
    latents = LiveLatents(pictures, Means(), ClassLabels(["class 0", "class 1"]))
    torch.manual_seed(0)
    nothing = lambda flow, path: None  # noqa: E731
    return LiveFlowTask(STARFlow(CONFIG), latents, Objective(), SETTINGS, nothing, nothing, world, how)


def test_it_sees_what_the_cached_training_sees(pictures: IndexedPictures, tmp_path: Path) -> None:
    broken = tmp_path / "set" / "class 1" / "05.png"
    Image.new("RGB", (16, 16)).save(broken)  # a cache leaves out what a live batch replaces
    fill(pictures, tmp_path / "cache", Means())
    live, cache = live_task(pictures), read_cache(tmp_path / "cache")
    nothing = lambda flow, path: None  # noqa: E731
    cached = FlowTask(STARFlow(CONFIG), cache, Objective(), SETTINGS, nothing, nothing)
    for step in range(12):
        for mine, other in zip(live.batch(step, range(4)), cached.batch(step, range(4)), strict=True):
            assert mine is not None
            assert other is not None
            assert torch.allclose(mine, other, atol=2e-3)
        assert live.batch_names(step, range(4)) == cached.batch_names(step, range(4))
    a, b = live.evaluate(live.model), cached.evaluate(cached.model)
    assert a == pytest.approx(b, abs=1e-3)


def test_a_resumed_live_run_is_the_uninterrupted_one(pictures: IndexedPictures, tmp_path: Path) -> None:
    how = FeedSettings(mirror=True, say=lambda _: None)
    fit(live_task(pictures, how), SETTINGS, tmp_path / "whole", show_progress=False)
    from dataclasses import replace

    fit(live_task(pictures, how), replace(SETTINGS, steps=2), tmp_path / "cut", show_progress=False)
    (tmp_path / "cut" / "checkpoints").rename(tmp_path / "kept")
    task = live_task(pictures, how)
    (tmp_path / "again").mkdir()
    (tmp_path / "kept").rename(tmp_path / "again" / "checkpoints")
    fit(task, SETTINGS, tmp_path / "again", show_progress=False)
    whole = [line["squares"] for line in read_log(tmp_path / "whole" / "log.jsonl") if "loss" in line]
    again = [line["squares"] for line in read_log(tmp_path / "again" / "log.jsonl") if "loss" in line]
    assert again == whole[2:]


def test_unreadable_pictures_are_counted_in_the_log(pictures: IndexedPictures, tmp_path: Path) -> None:
    said: list[str] = []
    task = live_task(pictures, FeedSettings(say=said.append))
    for step in range(15):
        _, terms = task.loss(task.model, task.batch(step, range(4)))
    assert float(terms["unreadable"]) == 1.0
    assert len(said) == 1
    assert said[0].startswith("skipped class 1/05.png")


def test_half_of_the_pictures_are_mirrored(pictures: IndexedPictures) -> None:
    plain, turned = live_task(pictures), live_task(pictures, FeedSettings(mirror=True, say=lambda _: None))
    shares = []
    for step in range(12):
        a, b = plain._images(step, range(4))[0], turned._images(step, range(4))[0]
        for one, other in zip(a, b, strict=True):
            assert torch.equal(one, other) or torch.equal(one.flip(-1), other)
            shares.append(not torch.equal(one, other))
        (part,) = (turned._images(step, range(2, 4))[0],)
        assert torch.equal(part, b[2:]), "whoever draws it"
    assert 10 < sum(shares) < 38
