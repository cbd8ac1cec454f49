"""The autoencoder's task: its measure, its noise, and that training works."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from starflow.data.index import ViewDataset
from starflow.data.sets.small import draw_shapes
from starflow.data.views import TrainingViews
from starflow.errors import UserError
from starflow.evaluate import psnr
from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig, load_small
from starflow.train.loader import TrainingLoader, batch_order
from starflow.train.loop import fit
from starflow.train.settings import ReconstructionLoss, TrainSettings
from starflow.train.tasks.autoencoder import AutoencoderTask


def make_task(steps: int = 40, precision: str = "float32") -> AutoencoderTask:
    torch.manual_seed(0)
    views = draw_shapes(60, 16, seed=0)
    settings = TrainSettings(
        steps=steps,
        batch=16,
        lr=4e-3,
        warmup=2,
        average=0.9,
        precision=precision,  # type: ignore[arg-type]
        evaluate_every=steps,
        sample_every=steps,
        checkpoint_every=steps,
    )
    model = SmallAutoencoder(SmallAutoencoderConfig(channels=8, widths=(16, 16), encoder_pairs=1, decoder_pairs=1))
    return AutoencoderTask(model, make_loader(views, settings), (0.1, 0.3), ReconstructionLoss(), settings)


def make_loader(views: TrainingViews, settings: TrainSettings) -> TrainingLoader:
    pictures = ViewDataset(views)
    return TrainingLoader(pictures, batch_order(pictures, settings.batch, settings.seed, 0), settings.rows(0, 1))


def test_noise_is_within_its_range_and_repeats() -> None:
    task = make_task()
    images = torch.zeros(64, 3, 16, 16)
    first = task._latent_noise(images, torch.Generator().manual_seed(3))
    again = task._latent_noise(images, torch.Generator().manual_seed(3))
    assert torch.equal(first, again)
    spread = first.flatten(1).std(dim=1)
    assert spread.min() > 0.05
    assert spread.max() < 0.4
    assert spread.max() - spread.min() > 0.1


def test_training_improves_reconstruction_and_is_saved(tmp_path: Path) -> None:
    task = make_task()
    before = task.evaluate(task.model.eval())["psnr_noise_0.2"]
    fit(task, task.settings, tmp_path, show_progress=False)
    saved = load_small(tmp_path / "model")
    assert saved.spec.noise_std == pytest.approx(0.2)
    images = task.heldout.float() / 127.5 - 1
    assert float(psnr(saved.decode(saved.encode(images)), images).mean()) > before + 3
    assert (tmp_path / "samples" / "step_00000040.png").stat().st_size > 500


def test_bfloat16_gives_float32_losses_close_to_float32() -> None:
    low, full = make_task(precision="bfloat16"), make_task()
    loss, _ = low.loss(low.model, low.batch(0, range(16)))
    expected, _ = full.loss(full.model, full.batch(0, range(16)))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(expected), rel=0.02)
    assert float(loss) != float(expected)


def test_no_held_out_pictures_is_refused() -> None:
    views = draw_shapes(60, 16, seed=0)
    with pytest.raises(UserError, match="60 training and 0 held-out pictures"):
        make_loader(replace(views, splits=["train"] * 60), TrainSettings(steps=1))
