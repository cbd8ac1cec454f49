"""Recipes: every option of a flow is a typed key, bases lie under what names them, and old runs' recipes still load."""

from __future__ import annotations

import json
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starflow.config import from_dict, to_dict
from starflow.errors import UserError
from starflow.flow.config import KINDS
from starflow.train.recipe import AutoencoderRecipe, DataRecipe, FlowRecipe, Objective, Recipe, load_recipe

GOLDEN = Path(__file__).parent.parent / "golden"
CONFIG_HINTS = {kind: typing.get_type_hints(config) for kind, config in KINDS.items()}


def test_the_flow_has_every_option_of_every_kind_and_no_other() -> None:
    hints = typing.get_type_hints(FlowRecipe)
    assert hints.pop("kind") == typing.Literal["starflow", "tarflow"] | None
    assert hints.keys() == CONFIG_HINTS["starflow"].keys() | CONFIG_HINTS["tarflow"].keys()
    for options in CONFIG_HINTS.values():
        for name, hint in options.items():
            assert hints[name] == hint | None, name
    assert all(option.default is None for option in fields(FlowRecipe))


@given(st.sampled_from(sorted(KINDS)), st.data())
def test_an_option_of_the_other_kind_is_refused(kind: Any, data: st.DataObject) -> None:
    (other,) = CONFIG_HINTS.keys() - {kind}
    foreign = data.draw(st.sampled_from(sorted(CONFIG_HINTS[other].keys() - CONFIG_HINTS[kind].keys())))
    option: dict[str, Any] = {foreign: 1}
    with pytest.raises(UserError, match=f"unknown key 'flow.{foreign}'"):
        FlowRecipe(kind=kind, **option)
    assert FlowRecipe(kind=typing.cast(Any, other), **option).given() == {"kind": other, **option}


@pytest.mark.parametrize(
    ("flow", "parts"),
    [
        ({"chanels": 64}, "unknown key 'flow.chanels': did you mean 'channels'"),
        ({"channels": "wide"}, "'flow.channels' is 'wide', expected int or null"),
        ({"kind": "flow"}, "'flow.kind' is 'flow', expected one of 'starflow', 'tarflow' or null"),
        ({"layers_per_block": [1, "two"]}, r"'flow.layers_per_block' is \[1, 'two'\], expected int or a list of int"),
    ],
)
def test_bad_options_are_refused_when_the_recipe_is_read(tmp_path: Path, flow: dict[str, Any], parts: str) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"name": "a", "train": {"steps": 1}, "flow": flow}))
    with pytest.raises(UserError, match=parts):
        load_recipe(path)


def test_the_recipe_of_an_old_run_is_the_recipe_that_it_was() -> None:
    old = load_recipe(GOLDEN / "run" / "recipe.json")
    assert old == load_recipe(GOLDEN / "recipe.yaml")
    assert old.flow.given() == {"channels": 32, "layers_per_block": (1, 1), "head_dim": 32}
    assert from_dict(Recipe, to_dict(old)) == old


def test_a_base_is_laid_under(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\ntrain: {steps: 5, batch: 2}\nflow: {channels: 64, head_dim: 32}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nname: b\ntrain: {batch: 3}\nflow: {channels: null}\n")
    recipe = load_recipe(tmp_path / "b.yaml", {"train.steps": "6"})
    assert (recipe.name, recipe.train.steps, recipe.train.batch, recipe.flow) == ("b", 6, 3, FlowRecipe(head_dim=32))
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    with pytest.raises(UserError, match="comes back to"):
        load_recipe(tmp_path / "b.yaml")
    (tmp_path / "b.yaml").write_text("base: 3\n")
    with pytest.raises(UserError, match=r"'base' of .* is 3, expected the name of a recipe"):
        load_recipe(tmp_path / "b.yaml")


def test_overrides_lie_over_all(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: a\ntrain: {steps: 5}\n")
    recipe = load_recipe(path, {"train.lr": "2e-4", "flow.layers_per_block": "[1, 2]", "prompts": "[a, b]"})
    assert (recipe.train.lr, recipe.flow.layers_per_block, recipe.prompts) == (2e-4, (1, 2), ("a", "b"))
    with pytest.raises(UserError, match="'name' is no section of the recipe"):
        load_recipe(path, {"name.first": "x"})
    with pytest.raises(UserError, match=r"'--train.lr' is '\[1', expected a value as YAML writes it"):
        load_recipe(path, {"train.lr": "[1"})


@pytest.mark.parametrize(
    ("section", "values", "parts"),
    [
        (DataRecipe, {"heldout": 1.0}, "0 <= data.heldout < 1"),
        (DataRecipe, {"source": "shapes", "aspects": ["1:1", "3:2"]}, "2 ratios, but 'shapes' has squares only"),
        (AutoencoderRecipe, {"noise_min": 0.5}, "0 <= noise_min <= noise_max, got 0.5 and 0.3"),
        (AutoencoderRecipe, {"kind": "diffusers_kl"}, "needs a source"),
        (AutoencoderRecipe, {"kind": "pixels", "joint": True}, "joint training is of an autoencoder of kind 'small'"),
        (AutoencoderRecipe, {"joint": True, "flow_weight": 0}, "a flow_weight above 0"),
        (Objective, {"drop_condition": 1.5}, r"drop_condition in \[0, 1\]"),
    ],
)
def test_what_cannot_be_is_refused(section: Any, values: dict[str, Any], parts: str) -> None:
    with pytest.raises(UserError, match=parts):
        from_dict(section, values)
