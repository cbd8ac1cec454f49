"""Memory is predicted for every kind of name: a recipe, a preset, a published repository, and a folder of a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from starflow.bench.memory import BATCHES, SCENARIOS, TRAINING_LAYOUTS, model_shape, predict_memory
from starflow.conditioning import ClassLabels
from starflow.errors import UserError
from starflow.flow import memory
from starflow.flow.config import PRESETS
from starflow.latents import PixelLatents
from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig, SmallLatents
from tests.cli.conftest import CLASSES, random_pipeline

RECIPES = Path(__file__).parents[2] / "recipes"


def test_a_published_repository_is_its_preset() -> None:
    assert model_shape("apple/starflow") == model_shape("apple/starflow@main")
    assert model_shape("apple/starflow").config in [preset.config for preset in PRESETS.values()]
    assert model_shape("apple/starflow").text_encoder == "google/flan-t5-xl"


def test_a_recipe_gives_the_flow_that_it_trains() -> None:
    shape = model_shape(str(RECIPES / "tiny.yaml"))
    assert shape.autoencoder == memory.AUTOENCODERS["small"]
    assert shape.text_encoder == ""
    pixels = model_shape(str(RECIPES / "fashion-mnist.yaml"))
    assert pixels.config.in_channels == 1
    assert pixels.autoencoder == memory.AUTOENCODERS["pixels"]


def test_memory_is_that_of_the_sizes_that_are_trained(tmp_path: Path) -> None:
    fashion = predict_memory(str(RECIPES / "fashion-mnist.yaml"))
    assert (fashion["size"], fashion["sizes"], fashion["tokens"]) == ("28x28", ["28x28"], 196)
    recipe = tmp_path / "wide.yaml"
    recipe.write_text(
        "name: wide\ndata: {source: folder, path: set, aspects: ['16:9', '1:1'], views: {size: 96}}\n"
        "autoencoder: {model: {channels: 4, widths: [8, 8]}}\nflow: {channels: 64}\ntrain: {steps: 2}\n"
    )
    shape, found = model_shape(str(recipe)), predict_memory(str(recipe))
    assert shape.sizes == ((96, 96), (128, 72))  # a factor of 4
    assert (found["tokens"], found["size"]) == (576, "96x96")
    wide = replace(shape, sizes=((128, 80),))
    assert wide.tokens(wide.largest_size) == 32 * 20


def test_a_folder_gives_its_own_parts(tmp_path: Path) -> None:
    network = SmallAutoencoder(SmallAutoencoderConfig(channels=4, widths=(8,), encoder_pairs=1, decoder_pairs=1))
    pipeline = random_pipeline("small", SmallLatents(network, 0.2), ClassLabels(CLASSES))
    pipeline.save_pretrained(tmp_path)
    shape = model_shape(str(tmp_path))
    assert shape.config == pipeline.flow.config
    assert shape.autoencoder is not None
    assert shape.autoencoder.parameters == sum(parameter.numel() for parameter in network.parameters())
    alone = model_shape(str(tmp_path / "flow"))
    assert (alone.config, alone.autoencoder) == (pipeline.flow.config, None)


def test_every_scenario_has_its_own_row(tmp_path: Path) -> None:
    random_pipeline("pixels", PixelLatents(), ClassLabels(CLASSES)).save_pretrained(tmp_path)
    found = predict_memory(str(tmp_path))
    config = model_shape(str(tmp_path)).config
    assert found["parameters"] == memory.parameter_count(config)
    rows = {(row["kind"], row["batch"]): row for row in found["sampling"]}
    assert len(rows) == len(SCENARIOS) * len(BATCHES)
    single = memory.sampling_memory(config, 4, guided=True, autoencoder=memory.AUTOENCODERS["pixels"], denoised=True)
    assert rows["float32", 4]["peak"] == single.peak
    assert rows["bfloat16", 4]["weights"] * 2 == rows["float32", 4]["weights"]
    assert rows["bfloat16 offload", 4]["weights"] < rows["bfloat16", 4]["weights"]
    layouts = [(row["sharding"], row["gpus"]) for row in found["training"]]
    assert layouts == [layout for layout in TRAINING_LAYOUTS for _ in range(2)]
    assert found["available"]["this machine"] > 2**28


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UserError, match="no model 'nowhere'"):
        model_shape("nowhere")
