"""A decoder's run trains the decoder alone, resumes, and gives a pipeline back with the new decoder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from starflow.data.images import to_float
from starflow.data.sources.base import ImageRecord
from starflow.data.views import ViewConfig, make_views
from starflow.errors import UserError
from starflow.evaluate import kernel_distance
from starflow.evaluate.features import FeatureExtractor
from starflow.io.files import read_tensors
from starflow.latents import load_trainable
from starflow.latents.small import save_small
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.train.run import read_log
from starflow.train.tasks import decoder_run
from starflow.train.tasks.decoder import DecoderLoss
from starflow.train.tasks.decoder_run import DecoderSettings, run_decoder
from tests.cli.conftest import random_pipeline
from tests.train.tasks.test_decoder import CPU, SETTINGS, ours


class Means(nn.Module):
    """The mean of every channel, for features."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)).double()


@pytest.fixture(autouse=True)
def in_an_instant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views are drawn and features computed without what takes longer than the training: new processes, MobileNet."""

    def here(records: list[ImageRecord], config: ViewConfig, *, progress: bool, workers: int) -> Any:
        assert workers > 1
        return make_views(records, config, progress=progress)

    monkeypatch.setattr(decoder_run, "make_views", here)
    monkeypatch.setattr(decoder_run, "load_extractor", lambda: FeatureExtractor("means", Means()))
    monkeypatch.setattr(decoder_run, "has_mobilenet", lambda: True)


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
    with Image.open(tmp_path / "run" / "samples" / "step_00000060.png") as grid:
        assert (grid.width // 16, grid.height // 16) == (2, 3), "two held-out images, and two reconstructions of each"
    assert "kid_mobilenetv2 x 1000 at noise 0.3" in report.measures
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


def test_the_report_has_a_kernel_distance_where_features_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (20, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    moved = [0.5 * to_float(batch) for batch in images.split(16)]
    found = decoder_run._kernel_distance(moved, images, 0.3, CPU)
    expected = kernel_distance(Means()(torch.cat(moved)), Means()(to_float(images))).value
    assert found == {"kid_mobilenetv2 x 1000 at noise 0.3": pytest.approx(1000 * expected)}

    def damaged() -> FeatureExtractor:
        raise UserError("another sha256")

    monkeypatch.setattr(decoder_run, "load_extractor", damaged)
    with pytest.raises(UserError, match="another sha256"):
        decoder_run._kernel_distance(moved, images, 0.3, CPU)
    monkeypatch.setattr(decoder_run, "has_mobilenet", lambda: False)
    assert decoder_run._kernel_distance(moved, images, 0.3, CPU) == {}


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
