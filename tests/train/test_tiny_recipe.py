"""recipes/tiny.yaml, made much smaller: every stage from nothing to a model, and exact resume of all of it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.train import loop
from starflow.train.log import read_log
from starflow.train.loop import Interrupted
from starflow.train.recipe import Recipe, load_recipe
from starflow.train.run import start_run
from starflow.train.stages import train_flow

ROOT = Path(__file__).parent.parent.parent
SMALLER = {
    "data.shapes": "60",
    "data.views.size": "16",
    "autoencoder.model": "{channels: 4, widths: [8, 8], encoder_pairs: 1, decoder_pairs: 1}",
    "autoencoder.train.steps": "6",
    "autoencoder.train.batch": "4",
    "autoencoder.train.checkpoint_every": "4",
    "flow.channels": "32",
    "flow.layers_per_block": "[1, 1]",
    "train.steps": "8",
    "train.batch": "4",
    "train.evaluate_every": "5",
    "train.sample_every": "6",
    "train.checkpoint_every": "3",
}
TIMED = ("pictures_per_second", "data_wait", "memory_gib", "tflops", "utilisation")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(ROOT / "recipes" / "tiny.yaml", SMALLER)


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    train_flow(start_run(recipe, folder, torch.device("cpu"), progress=False))
    return folder


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The lines of a log without what depends on the clock."""
    return [{k: v for k, v in line.items() if k not in TIMED} for line in read_log(folder / "log.jsonl")]


def test_every_stage_leaves_its_result(whole: Path, recipe: Recipe) -> None:
    assert [line["step"] for line in numbers(whole / "autoencoder") if "loss" in line] == list(range(1, 7))
    assert [line["step"] for line in numbers(whole) if "loss" in line] == list(range(1, 9))
    for name in ("views.safetensors", "classes.json", "latents/info.json", "best/config.json", "recipe.json"):
        assert (whole / name).is_file()
    assert sorted(path.name for path in (whole / "samples").glob("*.png")) == ["step_00000006.png", "step_00000008.png"]
    pipeline = StarFlowPipeline.from_pretrained(whole / "model")
    image = pipeline("star", seed=1).images[0]
    assert image.size == (16, 16)
    assert pipeline.log_prob(image, "star").dimensions == 4 * 4 * 4
    assert (pipeline.config.name, pipeline.config.guidance) == ("tiny", recipe.guidance)


def test_the_log_and_tensorboard_hold_all_that_is_watched(whole: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]

    updates = [line for line in read_log(whole / "log.jsonl") if "loss" in line]
    watched = {"loss", "squares", "logdet", "penalty", "bits_per_dim", "gradient_norm", "lr", "skipped", *TIMED}
    for line in updates:
        assert line.keys() == {"step", *watched}
        assert 0 < line["utilisation"] < 1
        assert line["pictures_per_second"] > 0
        assert line["memory_gib"] > 0
        assert line["data_wait"] >= 0
    board = event_accumulator.EventAccumulator(str(whole / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    board.Reload()
    heldout = ("loss", "nats_per_dim", "bits_per_dim", "train_nats_per_dim")
    names = {f"train/{name}" for name in watched} | {f"heldout/heldout_{name}" for name in heldout}
    assert set(board.Tags()["scalars"]) == names
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx([line["loss"] for line in updates])
    assert [event.step for event in board.Scalars("heldout/heldout_bits_per_dim")] == [5, 8]
    assert [event.step for event in board.Images("samples")] == [6, 8]


def test_the_recipes_prompts_are_classes_that_it_draws(whole: Path, recipe: Recipe) -> None:
    conditioner = StarFlowPipeline.from_pretrained(whole / "model").conditioner
    assert conditioner is not None
    assert len(conditioner.encode(recipe.prompts)) == len(recipe.prompts)


def test_a_run_that_is_stopped_in_both_trainings_repeats_it(
    recipe: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, stops = loop._update, {"AutoencoderTask": 3, "FlowTask": 4}

    def stopping(task: Any, *rest: Any) -> Any:
        if rest[-1].step == stops.get(type(task).__name__):
            del stops[type(task).__name__]
            os.kill(os.getpid(), signal.SIGINT)
        return update(task, *rest)

    monkeypatch.setattr(loop, "_update", stopping)
    for _ in range(2):
        with pytest.raises(Interrupted, match="the same command resumes"):
            train_flow(start_run(recipe, tmp_path, torch.device("cpu"), progress=False))
    train_flow(start_run(recipe, tmp_path, torch.device("cpu"), progress=False))
    assert not stops
    for stage in (".", "autoencoder"):
        assert numbers(tmp_path / stage) == numbers(whole / stage)
    for weights in (
        "model/flow/model.safetensors",
        "model/autoencoder/model.safetensors",
        "best/flow/model.safetensors",
    ):
        assert (tmp_path / weights).read_bytes() == (whole / weights).read_bytes()


def test_a_finished_run_is_not_trained_again(recipe: Recipe, whole: Path) -> None:
    before = (whole / "log.jsonl").read_text()
    train_flow(start_run(recipe, whole, torch.device("cpu"), progress=False))
    assert (whole / "log.jsonl").read_text() == before
