"""Recipes: one YAML file describes a run from pictures to a pipeline.

Stages, each a folder of the run: data -> autoencoder -> latents -> flow. A stage whose result is there is skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from starflow.config import from_dict, read_mapping, unknown_key
from starflow.data.views import ViewConfig
from starflow.errors import UserError
from starflow.latents.small import SmallAutoencoderConfig
from starflow.model_config import KINDS
from starflow.train.autoencoder import ReconstructionLoss
from starflow.train.settings import TrainSettings


@dataclass(frozen=True)
class DataRecipe:
    """Where pictures come from."""

    source: Literal["glyphs", "folder", "shapes", "fashion-mnist"] = "folder"
    """The glyph set (`starflow prepare-data glyphs`), any folder of pictures, coloured shapes drawn on the spot, or
    Fashion-MNIST (`path` is the folder of its four files; empty is where Debian's package puts them)."""
    path: str = ""
    """The folder; empty for shapes."""
    shapes: int = 256
    """Number of pictures to draw where the source is shapes."""
    views: ViewConfig = field(default_factory=ViewConfig)


@dataclass(frozen=True)
class AutoencoderRecipe:
    """The latent space: a small autoencoder trained here, a pretrained one, or plain pixels."""

    kind: Literal["small", "diffusers_kl", "diffusers_tiny", "pixels"] = "small"
    source: str = ""
    """Folder or hub id of a pretrained one; empty means: train `model` as a stage of this run."""
    channels: int = 3
    """Of pixels: 3, or 1 for grey."""
    model: SmallAutoencoderConfig = field(default_factory=SmallAutoencoderConfig)
    noise_min: float = 0.1
    noise_max: float = 0.3
    """Range of the latent noise in training, in standard deviations of the latents."""
    loss: ReconstructionLoss = field(default_factory=ReconstructionLoss)
    train: TrainSettings = field(default_factory=lambda: TrainSettings(steps=1000))

    def __post_init__(self) -> None:
        if not 0 <= self.noise_min <= self.noise_max:
            raise UserError(f"expected 0 <= noise_min <= noise_max, got {self.noise_min} and {self.noise_max}")
        if self.kind.startswith("diffusers") and not self.source:
            raise UserError(f"autoencoder kind '{self.kind}' needs a source: a folder or a hub id")


@dataclass(frozen=True)
class ConditioningRecipe:
    """What the flow is told about a picture."""

    kind: Literal["text", "class", "none"] = "text"
    encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Text encoder: a folder or a hub id; the default is also found as an installed package."""
    tokens: int = 16
    """Condition tokens of a caption; longer captions are cut."""


@dataclass(frozen=True)
class Objective:
    """Maximum likelihood of noised latents, and its stabilisers (STARFlow, arXiv 2506.06276, section 3)."""

    noise: Literal["gaussian", "uniform"] = "gaussian"
    """Gaussian, of `noise_std`; or uniform within a pixel's 8-bit level, which makes exact bits per dimension."""
    noise_std: float = 0.3
    """Noise added to latents (or pixels), in their units."""
    drop_condition: float = 0.1
    """Share of captions replaced by the null condition, which guidance needs."""
    latent_penalty: float = 1e-4
    """Weight of the mean square of every block's input and intermediate output."""

    def __post_init__(self) -> None:
        if self.noise_std < 0 or not 0 <= self.drop_condition <= 1 or self.latent_penalty < 0:
            raise UserError("expected noise_std >= 0, drop_condition in [0, 1] and latent_penalty >= 0")


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    name: str
    train: TrainSettings
    """Of the flow."""
    data: DataRecipe = field(default_factory=DataRecipe)
    autoencoder: AutoencoderRecipe = field(default_factory=AutoencoderRecipe)
    conditioning: ConditioningRecipe = field(default_factory=ConditioningRecipe)
    flow: dict[str, Any] = field(default_factory=dict)
    """Options of STARFlowConfig (or, with `kind: tarflow`, of TarFlowConfig); in_channels, img_size and the condition's
    sizes follow from the other sections."""
    objective: Objective = field(default_factory=Objective)
    prompts: tuple[str, ...] = ("a red apple", "a blue car", "a green tree", "a dog")
    """Prompts (or class names) of the sample grids."""
    guidance: float = 2.0
    """Guidance weight of the sample grids and of the finished pipeline's default."""


def load_recipe(path: Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read a recipe; `overrides` maps dotted keys to YAML values, e.g. {"train.lr": "1e-4"}.

    Raises:
        UserError: no such file, unknown key (the nearest is named), wrong value.
    """
    values = read_mapping(path)
    for dotted, text in (overrides or {}).items():
        _override(values, dotted, text)
    recipe = from_dict(Recipe, values)
    _check_flow_keys(recipe.flow)
    return recipe


def _check_flow_keys(options: Mapping[str, Any]) -> None:
    """Values are checked when the model is built, after its latents are known; names are checked at once."""
    kind = options.get("kind", "starflow")
    if kind not in KINDS:
        raise UserError(f"'flow.kind' is {kind!r}, expected one of {', '.join(KINDS)}")
    known = ["kind", *(option.name for option in fields(KINDS[kind]))]
    for key in options:
        if key not in known:
            raise UserError(unknown_key(f"flow.{key}", key, known))


def _override(values: dict[str, Any], dotted: str, text: str) -> None:
    import yaml

    *sections, key = dotted.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"'--{dotted}': '{section}' is no section of the recipe")
        values = inner
    try:
        values[key] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"'--{dotted}' is '{text}', expected a value as YAML writes it, e.g. 0.1 or [1, 2]") from None
