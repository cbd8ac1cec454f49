"""The flow that a recipe would train, from the recipe alone: before there are pictures, an encoder or weights.

What only the pictures or an encoder can say is taken as known: 1,000 classes as in ImageNet, 4 latent channels at an
eighth of the side as in sd-vae, and the widths of the encoders that our recipes name. An option in the recipe's flow
section (txt_dim, num_classes, in_channels) says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starflow.conditioning.text import MINILM, width_of
from starflow.errors import UserError
from starflow.latents.base import AutoencoderSpec
from starflow.model_config import ModelConfig, config_from_dict
from starflow.train.init_from import initial_options
from starflow.train.recipe import ConditioningRecipe, Recipe
from starflow.weights.hub import BUNDLED

CLASSES = 1000
WIDTHS = {MINILM: 384, "google/flan-t5-xl": 2048, "google/gemma-2-2b": 2304}
"""Of condition tokens, by encoder."""


def planned_flow(recipe: Recipe) -> tuple[ModelConfig, str]:
    """The flow's configuration, and the kind of its autoencoder.

    Raises:
        UserError: the shape is that of a model or an encoder that is not on this machine, or an option does not fit.
    """
    latents = _latents(recipe)
    own = _own_options(recipe)
    options: dict[str, Any] = {
        "in_channels": latents.channels,
        "img_size": recipe.data.views.size // latents.factor,
        **_condition(recipe.conditioning, own),
        **own,
    }
    layers = options.get("layers_per_block")
    if options.get("kind") != "tarflow" and isinstance(layers, (list, tuple)):
        options.setdefault("num_blocks", len(layers))
    return config_from_dict(options), latents.kind


def _latents(recipe: Recipe) -> AutoencoderSpec:
    coder = recipe.autoencoder
    if coder.kind == "pixels":
        return AutoencoderSpec("pixels", channels=coder.channels, factor=1)
    if coder.kind == "small":
        return AutoencoderSpec("small", channels=coder.model.channels, factor=coder.model.factor)
    return AutoencoderSpec(coder.kind, channels=4, factor=8, source=coder.source)


def _own_options(recipe: Recipe) -> Mapping[str, Any]:
    """The recipe's options, over those of the model that it goes on from where that is here."""
    source = recipe.train.init_from
    if source and (source in BUNDLED or Path(source).expanduser().is_dir()):
        return initial_options(source, recipe.flow)
    if source and "channels" not in recipe.flow:
        raise UserError(
            f"the recipe's flow has the shape of '{source}', which is not on this machine: put its folder there, or "
            "name a preset"
        )
    return recipe.flow


def _condition(recipe: ConditioningRecipe, own: Mapping[str, Any]) -> dict[str, Any]:
    """Options that follow from what the flow is told about a picture."""
    if own.get("kind") == "tarflow":
        return {"num_classes": CLASSES if recipe.kind == "class" else 0}
    if recipe.kind == "none":
        return {}
    if recipe.kind == "class":
        return {"txt_size": 1, "txt_dim": CLASSES + 1}
    return {"txt_size": recipe.tokens, "txt_dim": int(own.get("txt_dim") or _width(recipe.encoder))}


def _width(encoder: str) -> int:
    folder = Path(encoder).expanduser()
    if encoder in WIDTHS:
        return WIDTHS[encoder]
    if (folder / "config.json").is_file():
        return width_of(folder)
    raise UserError(
        f"the width of '{encoder}' is not known before it is here: give its folder, or flow.txt_dim in the recipe"
    )
