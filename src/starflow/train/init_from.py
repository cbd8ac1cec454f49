"""What the flow of a recipe begins as: its configuration, completed from what it follows from, and its first weights.

The configuration is completed in one place, `complete_flow`: the recipe's own options lie over those of the model that
`train.init_from` names, and these over what follows from the latents and the condition. `expected_flow` does so from
the recipe alone, before there are images, an encoder or weights.

First weights may come from a model that exists, to fine-tune it or to go on at another size. The new flow has the
source's shape except where its recipe says otherwise. Positions keep spanning what the source was trained on (STARFlow,
arXiv 2506.06276, section on RoPE), so that a larger image is a finer grid over the same span. What a changed condition
leaves without a source (the projection of condition tokens of another width, the vectors of other classes) starts anew;
anything else that does not fit is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starflow.conditioning.base import ConditionerSpec
from starflow.conditioning.text import MINILM, encoder_width
from starflow.errors import UserError
from starflow.flow import checkpoint
from starflow.flow.config import IMAGENET_CLASSES, ModelConfig, STARFlowConfig, config_from_dict, config_to_dict
from starflow.flow.model import STARFlow, TarFlow
from starflow.io import files
from starflow.io.hub import local_or_hub
from starflow.latents.base import AutoencoderSpec
from starflow.pipeline.folder import BUNDLED
from starflow.pipeline.locate import find_pipeline
from starflow.published.convert import GEMMA_FILES, gemma_options, gemma_tensors, is_gemma
from starflow.train.distributed import initialise
from starflow.train.recipe import AutoencoderRecipe, ConditioningRecipe, FlowRecipe, Recipe

ENCODER_WIDTHS = {MINILM: 384, "google/flan-t5-xl": 2048, "google/gemma-2-2b": 2304}
"""Width of a condition token by text encoder, for the encoders that our recipes name."""

_CONDITION_WEIGHTS = re.compile(r"blocks\.\d+\.(proj_txt\.weight|class_embed)")
"""Names of the weights whose shapes follow from the condition."""

_DATA_OPTIONS = frozenset({"in_channels", "img_size", "txt_size", "txt_dim", "num_classes"})
"""Options that follow from the latents and the condition of the new recipe, and never from a source."""


def complete_flow(
    flow: FlowRecipe,
    latents: AutoencoderSpec,
    side: int,
    condition: ConditionerSpec | None,
    initial: Mapping[str, Any] | None = None,
) -> ModelConfig:
    """The configuration of a recipe's flow.

    Args:
        flow: the recipe's own options, which come before all others.
        latents: the autoencoder, whose channels the flow reads.
        side: of the latents, in latents (or pixels, where there is no autoencoder).
        condition: what the flow is told about an image; None is nothing.
        initial: options of the model that the first weights come from; see `initial_options`.

    Raises:
        UserError: options that no flow can have, or a TarFlow with a text as its condition.

    Example:
        >>> latents = AutoencoderSpec("small", channels=12, factor=8)
        >>> own = FlowRecipe(channels=128, layers_per_block=(1, 1, 3))
        >>> config = complete_flow(own, latents, side=4, condition=None)
        >>> config.in_channels, config.img_size, config.num_blocks
        (12, 4, 3)
    """
    options: dict[str, Any] = {"in_channels": latents.channels, "img_size": side, **(initial or {}), **flow.given()}
    if options.get("kind") == "tarflow":
        return config_from_dict({"num_classes": _number_of_classes(condition), **options}, "flow.")
    layers = options.get("layers_per_block")
    if "num_blocks" not in options and isinstance(layers, (list, tuple)):
        options["num_blocks"] = len(layers)
    if condition is not None:
        options = {"txt_size": condition.size, "txt_dim": condition.dim, **options}
    return config_from_dict(options, "flow.")


def _number_of_classes(condition: ConditionerSpec | None) -> int:
    if condition is not None and condition.kind != "class":
        raise UserError("a TarFlow reads class labels, no text: set conditioning.kind to class or none")
    return condition.dim - 1 if condition is not None else 0


def expected_flow(recipe: Recipe) -> tuple[ModelConfig, AutoencoderSpec]:
    """The flow's configuration as the recipe alone tells it, and its autoencoder.

    What only the images or an encoder can tell is taken as known: 1,000 classes as in ImageNet, 4 latent channels at an
    eighth of the side as in sd-vae, and `ENCODER_WIDTHS`. An option in the recipe's flow section (txt_dim, num_classes,
    in_channels) says otherwise.

    Raises:
        UserError: the shape is that of a model or an encoder that is not on this machine, or an option does not fit.

    Example:
        >>> from starflow.train.recipe import DataRecipe
        >>> from starflow.train.settings import TrainSettings
        >>> recipe = Recipe("mine", TrainSettings(steps=10), flow=FlowRecipe(channels=64, layers_per_block=(1, 2)))
        >>> config, autoencoder = expected_flow(recipe)
        >>> autoencoder.kind, config.num_blocks, config.txt_dim
        ('small', 2, 384)
    """
    latents = _expected_latents(recipe.autoencoder)
    side = recipe.data.side // latents.factor
    condition = _expected_condition(recipe.conditioning, recipe.flow)
    return complete_flow(recipe.flow, latents, side, condition, _local_options(recipe)), latents


def _expected_latents(recipe: AutoencoderRecipe) -> AutoencoderSpec:
    if recipe.kind == "pixels":
        return AutoencoderSpec("pixels", channels=recipe.channels, factor=1)
    if recipe.kind == "small":
        return AutoencoderSpec("small", channels=recipe.model.channels, factor=recipe.model.factor)
    return AutoencoderSpec(recipe.kind, channels=4, factor=8, source=recipe.source)


def _expected_condition(recipe: ConditioningRecipe, flow: FlowRecipe) -> ConditionerSpec | None:
    if recipe.kind == "none":
        return None
    if recipe.kind == "class":
        return ConditionerSpec("class", size=1, dim=IMAGENET_CLASSES + 1)
    return ConditionerSpec(recipe.kind, size=recipe.tokens, dim=flow.txt_dim or _encoder_width(recipe.encoder))


def _encoder_width(encoder: str) -> int:
    folder = Path(encoder).expanduser()
    if encoder in ENCODER_WIDTHS:
        return ENCODER_WIDTHS[encoder]
    if (folder / "config.json").is_file():
        return encoder_width(folder)
    raise UserError(
        f"the width of '{encoder}' is not known before it is here: give its folder, or flow.txt_dim in the recipe"
    )


def _local_options(recipe: Recipe) -> dict[str, Any]:
    """Options of the model that the recipe goes on from, where that is on this machine."""
    source = recipe.train.init_from
    if source and (source in BUNDLED or Path(source).expanduser().is_dir()):
        return initial_options(source, recipe.flow)
    if source and recipe.flow.channels is None:
        raise UserError(
            f"the recipe's flow has the shape of '{source}', which is not on this machine: put its folder there, or "
            "name a preset"
        )
    return {}


def patch_size_of(recipe: Recipe) -> int:
    """Side of the flow's patches, from the recipe or else from the model that it goes on from.

    Raises:
        UserError: `train.init_from` names no model.
    """
    source = recipe.train.init_from
    if recipe.flow.patch_size is not None or not source:
        return recipe.flow.patch_size or 1
    return int(initial_options(source, recipe.flow).get("patch_size", 1))


@dataclass(frozen=True)
class InitialWeights:
    """What a source gives to a new flow: its options, and some or all of the weights."""

    source: str
    options: dict[str, Any]
    """As `initial_options` gives them."""
    tensors: dict[str, Tensor]
    partial: bool = False
    """Whether the weights are of a part of the flow only; the rest then starts anew."""


def read_initial(source: str, flow: FlowRecipe) -> InitialWeights:
    """Options and weights of a bundled model, of a pipeline's, run's or flow's folder, of a hub id, or of a Gemma.

    Args:
        source: the name, folder or id; a Gemma-style language model gives the deep block alone.
        flow: the recipe's own options; of a Gemma, `layers_per_block` says how many layers are taken.

    Raises:
        UserError: there is nothing of that name, or it is none of these.
    """
    folder = _flow_folder(source)
    options = _options_in(folder, flow)
    if is_gemma(folder):
        whole = options | flow.given()
        tensors = gemma_tensors(folder, whole["num_blocks"] - 1, whole["layers_per_block"][-1])
        return InitialWeights(source, options, tensors, partial=True)
    _, tensors = checkpoint.load(folder)
    return InitialWeights(source, options, tensors)


def initial_options(source: str, flow: FlowRecipe) -> dict[str, Any]:
    """Options that a source gives to a new flow, without reading its weights; see `read_initial`.

    Those that follow from the data are left out, and rotary positions span what the source's do.

    Raises:
        UserError: as `read_initial`.

    Example:
        >>> initial_options("glyphs", FlowRecipe())["layers_per_block"]
        [1, 1, 1, 6]
    """
    return _options_in(_flow_folder(source), flow)


def _options_in(folder: Path, flow: FlowRecipe) -> dict[str, Any]:
    if is_gemma(folder):
        layers = flow.layers_per_block
        return gemma_options(folder, layers if isinstance(layers, tuple) else None)
    config = config_from_dict(files.read_json(folder / checkpoint.CONFIG_NAME))
    options = {key: value for key, value in config_to_dict(config).items() if key not in _DATA_OPTIONS}
    if isinstance(config, STARFlowConfig) and config.rope:
        options["pt_seq_len"] = config.span
    return options


def _flow_folder(source: str) -> Path:
    """The folder that holds the flow's own config.json and weights."""
    folder = Path(source).expanduser()
    if source not in BUNDLED and not folder.is_dir():
        if source.count("/") != 1 or folder.is_absolute() or source.startswith("."):
            find_pipeline(source)  # says what is expected
        folder = local_or_hub(source, required=("config.json",), optional=(*GEMMA_FILES, "flow/*", "flow/config.json"))
    elif source in BUNDLED:
        folder = find_pipeline(source)
    for inner in (folder, folder / "model"):
        if (inner / "flow" / "config.json").is_file():
            return inner / "flow"
    if not (folder / "config.json").is_file():
        raise UserError(f"train.init_from is '{source}', which holds no model: expected a config.json in it")
    return folder


def load_initial(flow: STARFlow | TarFlow, initial: InitialWeights, seed: int, device: torch.device) -> list[str]:
    """Give a flow on the meta device its first weights, float32, on `device`.

    Returns:
        The names of the weights that the source does not give, which start anew from `seed`.

    Raises:
        UserError: the flow has weights that the source has not, or of other shapes.
    """
    flow.to_empty(device=device)
    expected = flow.state_dict()
    fitting = {
        name for name, tensor in initial.tensors.items() if expected.get(name, torch.empty(0)).shape == tensor.shape
    }
    fresh = [name for name in expected if name not in fitting]
    foreign = [name for name in initial.tensors if name not in fitting]
    wrong = [] if initial.partial else [name for name in fresh if not _CONDITION_WEIGHTS.fullmatch(name)]
    wrong += [name for name in foreign if not _CONDITION_WEIGHTS.fullmatch(name) and name not in wrong]
    if wrong:
        shown = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise UserError(
            f"train.init_from: {len(wrong)} weights of '{initial.source}' and of the recipe's flow differ ({shown}): "
            "leave the recipe's flow section out, or keep to the source's options"
        )
    if fresh:
        initialise(flow, seed)
    flow.load_state_dict({name: initial.tensors[name] for name in fitting}, strict=False)
    return fresh


def autoencoder_folder(source: str) -> Path:
    """The folder of an autoencoder: itself, or that of a pipeline (a bundled name, a folder, a hub id).

    Raises:
        UserError: no such model, or its autoencoder is not in its folder.
    """
    folder = find_pipeline(source)
    for inner in (folder, folder / "autoencoder", folder / "model" / "autoencoder", folder / "model"):
        if (inner / "config.json").is_file() and "autoencoder" not in files.read_json(inner / "config.json"):
            return inner
    raise UserError(f"'{source}' holds no autoencoder: expected a folder that one was trained into, or a model of ours")
