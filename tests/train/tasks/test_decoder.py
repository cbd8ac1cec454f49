"""Fine-tuning decoders: crops in place, gradients apart, a frozen encoder, and runs that resume.

Distances of features: nothing between equal pictures, more the further apart, and gradients to the pixels.
"""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from starflow.errors import UserError
from starflow.evaluate import MobileNetV2
from starflow.io.files import read_tensors
from starflow.latents.load import DecoderModule, load_trainable
from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig, SmallLatents, save_small
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.train.log import read_log
from starflow.train.settings import TrainSettings
from starflow.train.tasks.decoder import (
    DecoderLoss,
    DecoderObjective,
    DecoderTask,
    EncodedImages,
    MobileNetDistance,
    load_perceptual,
)
from starflow.train.tasks.decoder_run import DecoderSettings, run_decoder
from tests.cli.conftest import random_pipeline

SETTINGS = TrainSettings(steps=6, batch=4, lr=1e-2, warmup=1, evaluate_every=3, sample_every=6, checkpoint_every=2)
CPU = torch.device("cpu")


def ours() -> SmallLatents:
    torch.manual_seed(0)
    return SmallLatents(
        SmallAutoencoder(SmallAutoencoderConfig(channels=3, widths=(8,), encoder_pairs=1, decoder_pairs=1)), 0.0
    )


def task(noise: float = 0.0, crop: int = 8, loss: DecoderLoss | None = None) -> DecoderTask:
    """Pictures of noise whose latents are the means of 2 x 2 pixels."""
    loss = loss or DecoderLoss(perceptual=0, adversarial=0)
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 16, 16), generator=draw, dtype=torch.uint8)
    pooled = F.avg_pool2d(images.float() / 127.5 - 1, 2).half()
    pictures = EncodedImages(images, pooled, None, [f"p{number}" for number in range(12)])
    autoencoder = ours()
    objective = DecoderObjective(DecoderModule(autoencoder), loss, None)
    return DecoderTask(autoencoder, objective, pictures, pictures, noise, crop, loss, SETTINGS)


def test_latents_and_pixels_are_cut_at_the_same_place() -> None:
    latents, images, use_critic = task().batch(3, range(4))
    assert latents.shape == (4, 3, 4, 4)
    assert images.shape == (4, 3, 8, 8)
    assert not use_critic
    torch.testing.assert_close(F.avg_pool2d(images, 2), latents, rtol=0, atol=1e-3)


def test_a_batch_is_the_same_in_parts() -> None:
    latents, images, _ = task(noise=0.3).batch(2, range(4))
    halves = [task(noise=0.3).batch(2, range(first, first + 2)) for first in (0, 2)]
    assert torch.equal(torch.cat([half[0] for half in halves]), latents)
    assert torch.equal(torch.cat([half[1] for half in halves]), images)


def test_noise_has_its_spread() -> None:
    clean, noisy = task().batch(0, range(4))[0], task(noise=0.5).batch(0, range(4))[0]
    assert float((noisy - clean).std()) == pytest.approx(0.5, rel=0.15)


def test_each_term_trains_its_own_network() -> None:
    """The critic's gradients are those of its hinge alone, the decoder's those of the rest, the critic held still."""
    loss = DecoderLoss(squared=2.0, perceptual=0, adversarial=0.5, adversarial_from=0)
    made = task(loss=loss)
    objective = made.model
    assert isinstance(objective, DecoderObjective)
    assert objective.critic is not None
    latents, images, use_critic = made.batch(0, range(4))
    assert use_critic
    total, terms = objective(latents, images, True)
    total.backward()
    found = {
        name: parameter.grad.clone() for name, parameter in objective.named_parameters() if parameter.grad is not None
    }
    assert set(terms) == {"squared", "adversarial", "critic"}

    objective.zero_grad()
    output = objective.decoder(latents)
    objective.critic.requires_grad_(False)
    (2.0 * (output - images).square().mean() - 0.5 * objective.critic(output).mean()).backward()
    objective.critic.requires_grad_(True)
    real, fake = objective.critic(images), objective.critic(output.detach())
    (F.relu(1 - real).mean() + F.relu(1 + fake).mean()).backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(found[name], parameter.grad, msg=name)


def test_the_critic_waits() -> None:
    made = task(loss=DecoderLoss(perceptual=0, adversarial=0.5, adversarial_from=4))
    assert [made.batch(step, range(4))[2] for step in (3, 4)] == [False, True]
    _, terms = made.loss(made.model, made.batch(3, range(4)))
    assert set(terms) == {"squared"}


def test_bad_settings() -> None:
    with pytest.raises(UserError, match="crops of 7 px"):
        task(crop=7)
    with pytest.raises(UserError, match="crops of 32 px"):
        task(crop=32)
    with pytest.raises(UserError, match="squared weight above 0"):
        DecoderLoss(squared=0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    for number in range(60):
        colours = torch.randint(0, 256, (4, 4, 3), generator=draw, dtype=torch.uint8).numpy()
        Image.fromarray(colours).resize((16, 16), Image.Resampling.BILINEAR).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def settings(tmp_path: Path, data: Path) -> DecoderSettings:
    save_small(ours().network, tmp_path / "source", 0.0)
    loss = DecoderLoss(perceptual=0, adversarial=0)
    return DecoderSettings(
        str(tmp_path / "source"), str(data), SETTINGS, noise_std=0.3, size=16, crop=8, heldout=2, loss=loss
    )


def test_a_run_trains_the_decoder_and_nothing_else(settings: DecoderSettings, tmp_path: Path) -> None:
    longer = replace(settings, train=replace(SETTINGS, steps=60))
    report = run_decoder(longer, tmp_path / "run", CPU, show_progress=False)
    before, after = report.measures["PSNR at noise 0.3 (dB)"]
    assert after > before + 0.2
    assert report.count >= 2
    source, made = (
        read_tensors(folder / "model.safetensors") for folder in (tmp_path / "source", tmp_path / "run" / "model")
    )
    for name, tensor in source.items():
        assert torch.equal(made[name], tensor) == (not name.startswith("decoder")), name
    assert load_trainable(str(tmp_path / "run" / "model")).spec.noise_std == 0.3
    curve = [
        line["heldout_psnr_noise_0.3"] for line in read_log(tmp_path / "run" / "log.jsonl") if "heldout_loss" in line
    ]
    assert curve[-1] > curve[0]
    written = json.loads((tmp_path / "run" / "report.json").read_text())
    assert written["measures"]["PSNR at noise 0.3 (dB)"] == [before, after]


def test_a_run_in_two_parts_is_the_same_run(settings: DecoderSettings, tmp_path: Path) -> None:
    whole = replace(settings, loss=DecoderLoss(perceptual=0, adversarial=0.1, adversarial_from=1))
    run_decoder(whole, tmp_path / "whole", CPU, show_progress=False)
    run_decoder(
        replace(whole, train=replace(SETTINGS, steps=4, schedule="trapezoid", decay=0.0)),
        tmp_path / "parts",
        CPU,
        show_progress=False,
    )
    flat = replace(whole, train=replace(SETTINGS, schedule="trapezoid", decay=0.0))
    run_decoder(flat, tmp_path / "parts", CPU, show_progress=False)
    run_decoder(flat, tmp_path / "once", CPU, show_progress=False)
    one, two = (read_tensors(tmp_path / name / "model" / "model.safetensors") for name in ("parts", "once"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=0, msg=name)


def test_another_runs_folder_is_refused(settings: DecoderSettings, tmp_path: Path) -> None:
    run_decoder(settings, tmp_path / "run", CPU, show_progress=False)
    with pytest.raises(UserError, match="another noise_std"):
        run_decoder(replace(settings, noise_std=0.2), tmp_path / "run", CPU, show_progress=False)


def test_fewer_pictures_spread_over_both_splits(settings: DecoderSettings, tmp_path: Path) -> None:
    report = run_decoder(replace(settings, pictures=7, report=2), tmp_path / "run", CPU, show_progress=False)
    assert report.count == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "views.jsonl").read_text().splitlines()]
    assert [line["split"] for line in lines] == ["train"] * 7 + ["heldout"] * 2
    assert len({line["name"] for line in lines}) == 9
    with pytest.raises(UserError, match="another pictures"):
        run_decoder(replace(settings, pictures=8, report=2), tmp_path / "run", CPU, show_progress=False)


def test_a_pipeline_comes_back_with_its_new_way_out(settings: DecoderSettings, tmp_path: Path) -> None:
    made = random_pipeline("ours", ours(), None)
    assert made.config.cleaning == "tweedie"
    made.save_pretrained(tmp_path / "pipeline")
    run_decoder(
        replace(settings, model=str(tmp_path / "pipeline"), noise_std=None), tmp_path / "run", CPU, show_progress=False
    )
    again = StarFlowPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert again.config.cleaning == "decoder"
    assert again.config.autoencoder.noise_std == made.config.noise_std
    assert again(num_images=1).images[0].size == (8, 8)


def pictures(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_equal_pictures_are_at_no_distance_and_others_are() -> None:
    torch.manual_seed(0)
    distance = MobileNetDistance(MobileNetV2().eval().requires_grad_(False), CPU)
    one, two = pictures(0), pictures(1)
    assert float(distance(one, one)) == 0
    assert float(distance(one, two)) > float(distance(one, 0.9 * one + 0.1 * two)) > 0
    assert float(distance(one, two)) == pytest.approx(float(distance(two, one)))
    moved = one.clone().requires_grad_()
    distance(moved, two).backward()
    assert moved.grad is not None
    assert float(moved.grad.abs().sum()) > 0


def test_lpips_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    class LPIPS(nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
            return F.mse_loss(one, two, reduction="none").mean((1, 2, 3), keepdim=True) * self.weight

    package: Any = types.ModuleType("lpips")
    package.LPIPS = LPIPS
    monkeypatch.setitem(sys.modules, "lpips", package)
    one, two = pictures(0), pictures(1)
    assert float(load_perceptual("lpips", CPU)(one, two)) == pytest.approx(float(F.mse_loss(one, two)))
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match="pip install lpips"):
        load_perceptual("lpips", CPU)
