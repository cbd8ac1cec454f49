"""First weights from a model that is there: to fine-tune it, or to go on at another size.

The new flow has the source's shape, but for what its recipe says otherwise; positions go on spanning what the source
was trained on (STARFlow, arXiv 2506.06276, section on RoPE), so a larger picture is a finer grid over the same span.
What a changed condition leaves without a source (the projection of condition tokens of another width, the vectors of
other classes) starts anew; anything else that does not fit is an error.

The flow that a recipe would train, from the recipe alone: before there are pictures, an encoder or weights.

What only the pictures or an encoder can say is taken as known: 1,000 classes as in ImageNet, 4 latent channels at an
eighth of the side as in sd-vae, and the widths of the encoders that our recipes name. An option in the recipe's flow
section (txt_dim, num_classes, in_channels) says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starflow.conditioning.text import MINILM, encoder_width
from starflow.errors import UserError
from starflow.flow import checkpoint
from starflow.flow.config import ModelConfig, STARFlowConfig, config_from_dict, config_to_dict
from starflow.flow.model import STARFlow, TarFlow
from starflow.io import files
from starflow.io.hub import local_or_hub
from starflow.latents.base import AutoencoderSpec
from starflow.pipeline.locate import BUNDLED, find_pipeline
from starflow.published.gemma import GEMMA_FILES, gemma_options, gemma_tensors, is_gemma
from starflow.train.distributed.sharding import initialise
from starflow.train.recipe import ConditioningRecipe, Recipe

_OF_THE_CONDITION = re.compile(r"blocks\.\d+\.(proj_txt\.weight|class_embed)")

_FROM_ELSEWHERE = frozenset({"in_channels", "img_size", "txt_size", "txt_dim", "num_classes"})
"""Options that follow from the latents and the condition of the new recipe."""


@dataclass(frozen=True)
class InitialWeights:
    """What a source says of a flow: some of its options, and some of its weights."""

    source: str
    options: dict[str, Any]
    tensors: dict[str, Tensor]
    partial: bool = False
    """Whether the weights are of a part of the flow only; the rest then starts anew."""


def read_initial(source: str, own: Mapping[str, Any]) -> InitialWeights:
    """The flow of a bundled name, a pipeline's, run's or flow's folder, or a hub id; or a Gemma-style language model.

    Args:
        source: where it is.
        own: the recipe's flow section, which the source's options lie under.

    Raises:
        UserError: nothing of that name, or none of these.
    """
    folder = _flow_folder(source)
    if is_gemma(folder):
        options = _options_in(folder, own)
        tensors = gemma_tensors(folder, options["num_blocks"] - 1, options["layers_per_block"][-1])
        return InitialWeights(source, options, tensors, partial=True)
    _, tensors = checkpoint.load(folder)
    return InitialWeights(source, _options_in(folder, own), tensors)


def initial_options(source: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the flow that `read_initial` would read, without reading its weights.

    Raises:
        UserError: as there.
    """
    return _options_in(_flow_folder(source), own)


def _options_in(folder: Path, own: Mapping[str, Any]) -> dict[str, Any]:
    if is_gemma(folder):
        listed = own.get("layers_per_block")
        found = gemma_options(folder, tuple(listed) if isinstance(listed, (list, tuple)) else None)
    else:
        found = _options(config_from_dict(files.read_json(folder / checkpoint.CONFIG_NAME)))
    return {**found, **own}


def _flow_folder(source: str) -> Path:
    """Where the flow's own config.json and weights are."""
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


def initial_patch(source: str) -> int:
    """Patch side of the flow that `read_initial` would read, without reading its weights.

    Raises:
        UserError: nothing of that name.
    """
    folder = _flow_folder(source)
    return 1 if is_gemma(folder) else int(files.read_json(folder / checkpoint.CONFIG_NAME).get("patch_size", 1))


def _options(config: ModelConfig) -> dict[str, Any]:
    """Options of a new flow of the same shape, its positions spanning what the source's do."""
    options = {key: value for key, value in config_to_dict(config).items() if key not in _FROM_ELSEWHERE}
    if isinstance(config, STARFlowConfig) and config.rope:
        options["pt_seq_len"] = config.span
    return options


def load_initial(flow: STARFlow | TarFlow, initial: InitialWeights, seed: int, device: torch.device) -> list[str]:
    """Give a flow on the meta device real weights on `device`, float32; returns the names of those that start anew.

    Raises:
        UserError: the flow has weights that the source has not, or of other shapes.
    """
    flow.to_empty(device=device)
    expected = flow.state_dict()
    fits = {
        name for name, tensor in initial.tensors.items() if expected.get(name, torch.empty(0)).shape == tensor.shape
    }
    fresh = [name for name in expected if name not in fits]
    foreign = [name for name in initial.tensors if name not in fits]
    wrong = [] if initial.partial else [name for name in fresh if not _OF_THE_CONDITION.fullmatch(name)]
    wrong += [name for name in foreign if not _OF_THE_CONDITION.fullmatch(name) and name not in wrong]
    if wrong:
        shown = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise UserError(
            f"train.init_from: {len(wrong)} weights of '{initial.source}' and of the recipe's flow differ ({shown}): "
            "leave the recipe's flow section out, or keep to the source's options"
        )
    if fresh:
        initialise(flow, seed)
    flow.load_state_dict({name: initial.tensors[name] for name in fits}, strict=False)
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


CLASSES = 1000

WIDTHS = {MINILM: 384, "google/flan-t5-xl": 2048, "google/gemma-2-2b": 2304}
"""Of condition tokens, by encoder."""


def flow_config_of(recipe: Recipe) -> tuple[ModelConfig, str]:
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
        return encoder_width(folder)
    raise UserError(
        f"the width of '{encoder}' is not known before it is here: give its folder, or flow.txt_dim in the recipe"
    )
