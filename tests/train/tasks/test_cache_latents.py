"""Encoding once: any number of processes, stopped anywhere, gives one cache; training draws from its posterior."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Generator, Tensor, nn

from starflow.conditioning import ClassLabels
from starflow.data import latent_cache
from starflow.data.buckets import Buckets
from starflow.data.index import IndexedDataset, open_source
from starflow.data.latent_cache import CachedLatents
from starflow.errors import UserError
from starflow.io.files import read_tensors
from starflow.latents import AutoencoderSpec
from starflow.train.distributed import World
from starflow.train.tasks import cache_latents as stage
from starflow.train.tasks.cache_latents import CacheJob, cache_latents, cache_parts
from tests.cli.conftest import Run as Cli
from tests.cli.conftest import run  # noqa: F401  # a fixture
from tests.data.sources.common import indexed
from tests.train.distributed.launch import finish, torchrun


class Means:
    """An autoencoder of means over 8 x 8 pixels with a posterior; it may stop as a killed process does."""

    receptive_radius = 0

    def __init__(self, last: int = 10**9) -> None:
        self.network: nn.Module = nn.Identity()
        self.seen, self.last = 0, last

    @property
    def spec(self) -> AutoencoderSpec:
        return AutoencoderSpec("means", channels=3, factor=8)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.seen += len(images)
        if self.seen > self.last:
            raise KeyboardInterrupt
        mean = nn.functional.avg_pool2d(images, 8)
        return mean, mean.abs()

    def encode(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        raise AssertionError("the mean alone would lose the spread")

    def decode(self, latents: Tensor) -> Tensor:
        return latents


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> IndexedDataset:
    """Forty pictures of two classes and two shapes, one of them broken; parts of four."""
    monkeypatch.setattr(stage, "PART_SIZE", 4)
    monkeypatch.setattr(latent_cache, "PART_SIZE", 4)
    folder = tmp_path / "set"
    for n in range(40):
        (folder / f"class {n % 2}").mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (16, 16) if n % 3 else (28, 12), (6 * n, 0, 0))
        image.putpixel((0, 0), (0, 255, 0))
        image.save(folder / f"class {n % 2}" / f"{n:02d}.png")
    broken = folder / "class 1" / "05.png"
    broken.write_bytes(broken.read_bytes()[:60])  # the header is whole
    return indexed(open_source("folder", str(folder)), tmp_path / "index", Buckets(16, 8, ("21:9", "1:1")))


def fill(pictures: IndexedDataset, folder: Path, autoencoder: Means, *, flipped: bool = False) -> list[str]:
    said: list[str] = []
    conditioner = ClassLabels(["class 0", "class 1"])
    job = CacheJob(pictures, autoencoder, conditioner, folder, flipped)
    cache_latents(job, {"what": "test"}, World(), show_progress=False, notify=said.append)
    return said


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("info.json", "times.json")}


def test_latents_that_are_not_finite_are_not_cached(pictures: IndexedDataset, tmp_path: Path) -> None:
    class Diverged(Means):
        def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
            mean, std = super().posterior(images)
            return mean * torch.nan, std

    with pytest.raises(UserError, match=r"latents of .* pictures are not finite, class ./.*png first"):
        fill(pictures, tmp_path / "cache", Diverged())
    assert not list((tmp_path / "cache").glob("latents*"))


def test_means_and_spreads_of_every_readable_picture(pictures: IndexedDataset, tmp_path: Path) -> None:
    said = fill(pictures, tmp_path / "cache", Means())
    found = CachedLatents(tmp_path / "cache")
    assert len(found) == 39
    assert said[0].startswith("skipped class 1/05.png: ")
    assert "39 pictures and 2 conditions" in said[1]
    assert "1 skipped" in said[1]
    assert found.side == 2
    for numbers in found.indices("train"):
        mean, std = found.posterior(numbers)
        assert std is not None
        assert torch.equal(std, mean.abs())
        for number, own in zip(numbers.tolist(), mean, strict=True):
            picture = found.entry(number)
            red = 6 * int(picture.name[-6:-4]) / 127.5 - 1
            assert float(own[0, -1, -1]) == pytest.approx(red, abs=1e-3)
            assert found.conditions(torch.tensor([number]))[0, 0].argmax() == int(picture.name[6])
    info = found.info
    assert (info["pictures"], info["skipped"], info["conditions"], info["what"]) == (39, 1, 2, "test")
    assert info["raw_bytes"] == 39 * 3 * 16 * 16
    total = sum(path.stat().st_size for pattern in ("latents-*", "states-*") for path in found.folder.glob(pattern))
    assert info["bytes_per_picture"] == pytest.approx(total / 39, abs=0.1)
    assert info["pictures_per_second"] > 0


def test_stopped_in_the_middle_it_goes_on_with_the_rest(pictures: IndexedDataset, tmp_path: Path) -> None:
    fill(pictures, tmp_path / "whole", Means())
    with pytest.raises(KeyboardInterrupt):
        fill(pictures, tmp_path / "cache", Means(last=17))
    kept = sorted((tmp_path / "cache").glob("latents-*"))
    assert 3 <= len(kept) <= 5
    with pytest.raises(UserError, match="no finished latent cache"):
        CachedLatents(tmp_path / "cache")
    second = Means()
    fill(pictures, tmp_path / "cache", second)
    assert second.seen == 39 - sum(len(read_tensors(path)["numbers"]) for path in kept)
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_flipped_images_are_of_the_training_alone(pictures: IndexedDataset, tmp_path: Path) -> None:
    fill(pictures, tmp_path / "cache", Means(), flipped=True)
    found = CachedLatents(tmp_path / "cache")
    count = {split: sum(map(len, found.indices(split))) for split in ("train", "heldout")}
    plain = len(cache_parts(CacheJob(pictures, Means(), None, tmp_path)))
    assert plain < len(list((tmp_path / "cache").glob("latents-*")))
    assert count["train"] == 2 * (39 - count["heldout"])
    numbers = found.indices("train")[1]
    mean, _ = found.posterior(numbers)
    half = len(numbers) // 2
    assert torch.equal(mean[half:], mean[:half].flip(-1)), "the green corner is on the other side"


RECIPE = """
name: cached
data: {{source: folder, path: {path}, workers: 0, views: {{size: 16, views: 1}}}}
autoencoder: {{kind: pixels}}
conditioning: {{kind: class}}
flow: {{channels: 16, layers_per_block: [1, 1], patch_size: 4, head_dim: 16}}
train: {{steps: 3, batch: 4}}
prompts: []
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    folder = tmp_path / "many"
    for n in range(3000):
        path = folder / f"class {n % 2}" / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (n % 256, n // 256, 0)).save(path)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(path=folder))
    return path


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_killed_and_resumed_by_two_processes_it_is_that_of_one(run: Cli, recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    result = run("cache-latents", recipe, "--output", tmp_path / "one")
    assert result.code == 0
    command = [sys.executable, "-m", "starflow", "cache-latents", str(recipe), "--output", str(tmp_path / "two")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "two").glob("latents/latents-*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "two" / "latents" / "info.json").exists()
    finish(torchrun(2, "starflow", "cache-latents", recipe, "--output", tmp_path / "two"))
    assert contents(tmp_path / "two" / "latents") == contents(tmp_path / "one" / "latents")
    info = json.loads((tmp_path / "two" / "latents" / "info.json").read_text())
    assert info["pictures"] == 3000
