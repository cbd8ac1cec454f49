"""Recipes: one YAML file describes a run from pictures to a pipeline.

Stages, each a folder of the run: data (an index, or views) -> autoencoder -> latents -> flow. A stage whose
result is there is skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from starflow.config import from_dict, read_mapping, unknown_key_message
from starflow.data.buckets import Aspect
from starflow.data.views import ViewConfig
from starflow.errors import UserError
from starflow.flow.config import KINDS
from starflow.latents.small import SmallAutoencoderConfig
from starflow.train.settings import TrainSettings
from starflow.train.tasks.autoencoder import ReconstructionLoss


@dataclass(frozen=True)
class DataRecipe:
    """Where pictures come from, and how they reach the training."""

    source: Literal["glyphs", "folder", "tar", "parquet", "shapes", "fashion-mnist"] = "folder"
    """Any folder of pictures, tar shards in WebDataset's layout, or parquet files, of any number; or a set that is kept
    in memory: the glyph set (`starflow prepare-data glyphs`), coloured shapes drawn on the spot, or Fashion-MNIST."""
    path: str = ""
    """The folder; of tar shards also a pattern (* or {000..099}) or a URL of one. Empty for shapes, and for
    Fashion-MNIST where Debian's package puts it."""
    shapes: int = 256
    """Number of pictures to draw where the source is shapes."""
    heldout: float = 0.05
    """Share of a folder's, tars' or tables' pictures that is never trained on, by the hash of their names; at least one
    picture. A prepared folder and the sets in memory have their own."""
    aspects: tuple[Aspect, ...] = ("1:1",)
    """Ratios of folders, tars and tables; a picture is cropped to the nearest, at the area of views.size squared."""
    latents: Literal["cached", "live"] = "cached"
    """Encode every picture once, before the flow's training; or decode and encode it whenever it is its turn."""
    window: int = 0
    """0 shuffles all pictures of an epoch; else blocks of so many neighbours are shuffled, and pictures within a few of
    them, which reads parquet and URLs nearly in their own order."""
    workers: int = 2
    """Processes beside each training process that decode pictures; 0 is a thread."""
    views: ViewConfig = field(default_factory=ViewConfig)
    """Size and augmentation. Of folders, tars and tables only `size`, `flip` (half of the pictures seen are mirrored;
    a cache holds both where `views` is 2 or more) and `seed` count."""

    def __post_init__(self) -> None:
        if not 0 <= self.heldout < 1 or self.window < 0 or self.workers < 0 or not self.aspects:
            raise UserError("expected 0 <= data.heldout < 1, window >= 0, workers >= 0 and one or more aspects")
        if len(self.aspects) > 1 and not self.indexed:
            raise UserError(f"data.aspects names {len(self.aspects)} ratios, but '{self.source}' has squares only")

    @property
    def indexed(self) -> bool:
        """Whether the pictures stay where they are and are read one by one."""
        return self.source in ("folder", "tar", "parquet")


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
    joint: bool = False
    """Train it together with the flow from the first update on, with the constant latent noise `objective.noise_std`
    (SimFlow, arXiv 2512.04084): no stage of its own, no cache, and latents that are not standardised."""
    flow_weight: float = 1.0
    """In joint training, the weight of the flow's nats beside the reconstruction's; 1 is the evidence lower bound of a
    decoder whose negative log-likelihood is the reconstruction loss, per pixel and channel."""
    train: TrainSettings = field(default_factory=lambda: TrainSettings(steps=1000))

    def __post_init__(self) -> None:
        if not 0 <= self.noise_min <= self.noise_max:
            raise UserError(f"expected 0 <= noise_min <= noise_max, got {self.noise_min} and {self.noise_max}")
        if self.kind.startswith("diffusers") and not self.source:
            raise UserError(f"autoencoder kind '{self.kind}' needs a source: a folder or a hub id")
        if self.joint and (self.kind != "small" or self.flow_weight <= 0):
            raise UserError(
                f"joint training is of an autoencoder of kind 'small', with a flow_weight above 0, got '{self.kind}' "
                f"and {self.flow_weight:g}: change one of them"
            )


@dataclass(frozen=True)
class ConditioningRecipe:
    """What the flow is told about a picture."""

    kind: Literal["text", "embeddings", "class", "none"] = "text"
    """A text encoder's states, a language model's token embeddings (which its own deep block reads), or classes."""
    encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Text encoder or language model: a folder or a hub id; the default is also found as an installed package."""
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
    prompts: tuple[str, ...] = ()
    """Prompts (or class names) of the sample grids; none is the first classes, or with text some of our own."""
    guidance: float = 2.0
    """Guidance weight of the sample grids and of the finished pipeline's default."""
    temperature: float = 1.0
    """Factor on the noise of the sample grids and of the finished pipeline's default; 1 is the model's distribution."""
    candidates: int = 1
    """Pictures drawn for each one of the sample grids and, by default, of the finished pipeline."""


def load_recipe(path: Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read a recipe, over its base where it names one.

    `overrides` maps dotted keys to YAML values, e.g. {"train.lr": "1e-4"}.

    Raises:
        UserError: no such file, unknown key (the nearest is named), wrong value.
    """
    values = _with_base(path)
    for dotted, text in (overrides or {}).items():
        _override(values, dotted, text)
    if isinstance(values.get("flow"), dict):
        values["flow"] = {key: value for key, value in values["flow"].items() if value is not None}
    recipe = from_dict(Recipe, values)
    _check_flow_keys(recipe.flow)
    return recipe


def _with_base(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe's values laid over those of the recipe that its key `base` names, relative to it."""
    values = read_mapping(path)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"'base' of {path} is {base!r}, expected the name of a recipe beside it")
    if path.resolve() in above:
        raise UserError(f"the base of {path} comes back to {path}: take one of them out")
    return _laid_over(_with_base(path.parent / base, (*above, path.resolve())), values)


def _laid_over(base: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` over `base`, section by section; null in `flow` takes an option out."""
    merged = dict(base)
    for key, value in own.items():
        inner = merged.get(key)
        merged[key] = _laid_over(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _check_flow_keys(options: Mapping[str, Any]) -> None:
    """Values are checked when the model is built, after its latents are known; names are checked at once."""
    kind = options.get("kind", "starflow")
    if kind not in KINDS:
        raise UserError(f"'flow.kind' is {kind!r}, expected one of {', '.join(KINDS)}")
    known = ["kind", *(option.name for option in fields(KINDS[kind]))]
    for key in options:
        if key not in known:
            raise UserError(unknown_key_message(f"flow.{key}", key, known))


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
