"""Every stage of recipes/tiny.yaml, made much smaller, from nothing to a model, and exact resume of all of it."""

from __future__ import annotations

import json
import os
import signal
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from starflow.conditioning import ClassLabels, TextEncoder
from starflow.data.views import ViewConfig
from starflow.errors import UserError
from starflow.latents import AutoencoderSpec
from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig, load_small, save_small
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.train import loop, stages
from starflow.train.loop import Interrupted
from starflow.train.recipe import AutoencoderRecipe, ConditioningRecipe, DataRecipe, Objective, Recipe, load_recipe
from starflow.train.run import Run, read_log, start_run
from starflow.train.settings import TrainSettings
from starflow.train.stages import Stages, first_autoencoder, train_flow
from tests.conditioning.conftest import t5 as t5  # a fixture

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
    shown = json.loads((whole / "samples" / "step_00000006.json").read_text())
    assert shown == {"prompts": list(recipe.prompts), "guidance": [0.0, recipe.guidance]}
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


PRETRAINED = """
name: pretrained
data: {source: shapes, shapes: 40, views: {size: 8}}
autoencoder: {source: SOURCE}
conditioning: {kind: text, encoder: ENCODER, tokens: 4}
flow: {channels: 16, layers_per_block: [1, 1], head_dim: 16}
train: {steps: 2, batch: 4, warmup: 1, sample_every: 2}
prompts: [a red star]
"""


def test_the_autoencoder_and_the_text_encoder_are_loaded_once(
    tmp_path: Path,
    t5: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = SmallAutoencoderConfig(channels=2, widths=(8,), encoder_pairs=0, decoder_pairs=0)
    save_small(SmallAutoencoder(sizes), tmp_path / "source", 0.1)
    path = tmp_path / "recipe.yaml"
    path.write_text(PRETRAINED.replace("SOURCE", str(tmp_path / "source")).replace("ENCODER", str(t5)))
    loaded: list[str] = []
    load, read = load_small, TextEncoder.from_pretrained

    def counted_load(folder: Path) -> Any:
        loaded.append("autoencoder")
        return load(folder)

    def counted_read(*arguments: Any) -> Any:
        loaded.append("text encoder")
        return read(*arguments)

    monkeypatch.setattr(stages, "load_small", counted_load)
    monkeypatch.setattr(TextEncoder, "from_pretrained", counted_read)
    folder = train_flow(start_run(load_recipe(path), tmp_path / "run", torch.device("cpu"), progress=False))
    assert (folder / "config.json").is_file()
    assert sorted(loaded) == ["autoencoder", "text encoder"]


def test_images_in_memory_are_dropped_once_their_latents_are_cached(tmp_path: Path) -> None:
    recipe = Recipe(
        "pixels",
        TrainSettings(steps=1),
        DataRecipe(source="shapes", shapes=40, views=ViewConfig(size=8)),
        AutoencoderRecipe(kind="pixels"),
        ConditioningRecipe(kind="none"),
    )
    run = start_run(recipe, tmp_path, torch.device("cpu"), progress=False)
    own = Stages(run)
    kept = weakref.ref(own.dataset)
    own.cache_latents()
    assert kept() is None
    assert len(own.dataset) > 0


def test_an_autoencoder_goes_on_at_its_own_sizes_only(tmp_path: Path) -> None:
    sizes = SmallAutoencoderConfig(channels=2, widths=(8,), encoder_pairs=0, decoder_pairs=0)
    network = SmallAutoencoder(sizes)
    save_small(network, tmp_path, 0.1)
    recipe = AutoencoderRecipe(model=sizes, train=TrainSettings(steps=1, init_from=str(tmp_path)))
    first = first_autoencoder(recipe)
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in first.state_dict().items())
    assert first.training
    assert all(parameter.requires_grad for parameter in first.parameters())
    with pytest.raises(UserError, match="give the same sizes"):
        first_autoencoder(replace(recipe, model=replace(sizes, channels=3)))


def test_uniform_noise_is_for_pixels(tmp_path: Path) -> None:
    pixels, small = AutoencoderSpec("pixels", 3, 1), AutoencoderSpec("small", 4, 8)
    assert stages._cleaning(Objective(noise="uniform"), pixels) == "none"
    assert stages._cleaning(Objective(), small) == "tweedie"
    assert stages._cleaning(Objective(), replace(small, noise_std=0.2)) == "decoder"
    with pytest.raises(
        UserError, match="objective.noise is uniform, which is for pixels: the autoencoder is a 'small'"
    ):
        stages._cleaning(Objective(noise="uniform"), small)


def test_a_grid_without_prompts_shows_the_first_classes(recipe: Recipe) -> None:
    silent = replace(recipe, prompts=())
    classes = ClassLabels([f"class {number}" for number in range(10)])
    assert stages._grid_prompts(silent, classes) == [f"class {number}" for number in range(8)]
    assert stages._grid_prompts(replace(silent, prompts=("class 9",)), classes) == ["class 9"]
    assert stages._grid_prompts(silent, None) == [""] * 8


def test_a_set_is_summed_up_and_its_changes_are_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    for n in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / "set" / f"{n}.png")
    (tmp_path / "set" / "captions.csv").write_text("file,caption\n0.png,a cat\ngone.png,a dog\n")
    told: list[str] = []
    monkeypatch.setattr(Run, "notify", lambda run, text: told.append(text))
    data = DataRecipe("folder", str(tmp_path / "set"), views=ViewConfig(size=8), workers=0)
    recipe = Recipe(
        "a",
        TrainSettings(steps=1, warmup=1),
        data=data,
        autoencoder=AutoencoderRecipe("pixels"),
        conditioning=ConditioningRecipe("none"),
    )

    def dataset() -> Any:
        return Stages(start_run(recipe, tmp_path / "run", torch.device("cpu"), progress=False)).dataset

    assert len(dataset()) == 4
    assert told == [
        "pictures: 4, 1 of them held out, 1 with and 3 without a caption, 0 classes; 0 skipped, 1 other files and rows "
        f"not used ({tmp_path / 'run' / 'index' / 'skipped.jsonl'})",
        "warning: 3 of 4 pictures have no caption: 1.png, 2.png, 3.png",
        "not used: 1 captions that no image takes: gone.png",
    ]
    told.clear()
    assert len(dataset()) == 4
    assert told == []
    (tmp_path / "set" / "new.png").write_bytes((tmp_path / "set" / "0.png").read_bytes())
    dataset()
    assert len(told) == 1
    assert "now 5 and 1): this run goes on with what it has read; to read them again, delete" in told[0]
    (tmp_path / "run" / "classes.json").write_text('["set"]')
    dataset()
    assert f"delete {tmp_path / 'run' / 'index'} and {tmp_path / 'run' / 'classes.json'}, or choose" in told[1]
