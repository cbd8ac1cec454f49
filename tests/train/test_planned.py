"""A recipe's flow is known before its pictures are."""

from __future__ import annotations

from pathlib import Path

import pytest

from starflow.errors import UserError
from starflow.presets import preset
from starflow.train.planned import planned_flow
from starflow.train.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
PUBLISHED = {
    "starflow-imagenet-256": ("starflow-xl", "diffusers_kl"),
    "starflow-t2i": ("starflow-t2i-3b", "diffusers_kl"),
    "tarflow-imagenet-64": ("tarflow-imagenet-64", "pixels"),
}


def planned(name: str, **overrides: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.yaml", {key.replace("__", "."): value for key, value in overrides.items()})


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_is_its_preset(name: str) -> None:
    known, kind = PUBLISHED[name]
    assert planned_flow(planned(name)) == (preset(known).config, kind)


def test_what_the_recipe_says_goes_first() -> None:
    config, kind = planned_flow(planned("tiny", flow__txt_dim="7"))
    assert (kind, config.img_size, config.in_channels, config.num_blocks) == ("small", 4, 12, 3)
    assert (vars(config)["txt_size"], vars(config)["txt_dim"]) == (1, 7)
    config, _ = planned_flow(planned("tiny", conditioning__kind="none", data__views__size="64"))
    assert (config.img_size, vars(config)["txt_size"]) == (8, 0)


def test_a_recipe_that_goes_on_has_the_shape_of_what_it_goes_on_from() -> None:
    config, _ = planned_flow(planned("finetune-glyphs"))
    assert (config.channels, vars(config)["layers_per_block"]) == (192, (1, 1, 1, 6))
    config, _ = planned_flow(planned("starflow-imagenet-512"))
    assert (config.channels, config.img_size) == (2048, 64)


def test_a_shape_that_only_an_absent_model_knows_is_refused() -> None:
    with pytest.raises(UserError, match="has the shape of 'google/gemma-2-2b', which is not on this machine"):
        planned_flow(planned("starflow-t2i-gemma"))
    with pytest.raises(UserError, match=r"the width of 'owner/encoder' is not known .* flow.txt_dim"):
        planned_flow(planned("starflow-t2i", conditioning__encoder="owner/encoder"))
