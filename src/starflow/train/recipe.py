"""Recipes: one YAML file describes a run from images to a pipeline, every key of it typed and checked.

`starflow.train.stages` says what the stages of a run are.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from starflow.config import Dataclass, from_dict, read_mapping, to_dict, unknown_key_message
from starflow.data.buckets import Aspect
from starflow.data.sets.small import SIDE as FASHION_MNIST_SIDE
from starflow.data.views import ViewConfig
from starflow.errors import UserError
from starflow.flow.config import KINDS, NormType, SeqOrder
from starflow.latents.small import SmallAutoencoderConfig
from starflow.train.recipe_keys import default_values, flat_keys, idle_keys
from starflow.train.settings import ReconstructionLoss, TrainSettings
from starflow.train.tasks.decoder import PerceptualName


@dataclass(frozen=True)
class DataRecipe:
    """Where images come from, and how they reach the training.

    Raises:
        UserError: a number that cannot be, or several ratios of a set that has squares only.
    """

    source: Literal["glyphs", "folder", "tar", "parquet", "shapes", "fashion-mnist"] = "folder"
    """A folder of images, tar shards in WebDataset's layout, or parquet files, with any number of images; or a set that
    is kept in memory: the glyph set (`starflow prepare-data glyphs`), coloured shapes drawn by the run, or
    Fashion-MNIST."""
    path: str = ""
    """The folder; for tar shards also a pattern (* or {000..099}) or the URL of a shard. Empty for shapes, and for
    Fashion-MNIST in the folder of Debian's package."""
    shapes: int = 256
    """Number of images to draw where the source is shapes."""
    heldout: float = 0.05
    """Share of the images of a folder, tar or parquet source that is never trained on, by the hash of their names; at
    least one image. A prepared folder and the sets in memory have their own held-out images."""
    aspects: tuple[Aspect, ...] = ("1:1",)
    """Aspect ratios of a folder, tar or parquet source; an image is cropped to the nearest one, at the area of
    views.size squared."""
    latents: Literal["cached", "live"] = "cached"
    """Encode every image once, before the flow's training; or read and encode it whenever it is its turn."""
    window: int = 0
    """0 shuffles all images of an epoch; otherwise blocks of so many neighbours are shuffled, and images within a few
    of them, which reads parquet and URLs nearly in their own order."""
    workers: int = 2
    """Processes beside each training process that read images; 0 is a thread."""
    views: ViewConfig = field(default_factory=ViewConfig)
    """Size and augmentation. For a folder, tar or parquet source only `size`, `flip` (half of the images seen are
    flipped; a cache holds both where `views` is 2 or more) and `seed` count."""

    def __post_init__(self) -> None:
        if not 0 <= self.heldout < 1 or self.window < 0 or self.workers < 0 or not self.aspects:
            raise UserError("expected 0 <= data.heldout < 1, window >= 0, workers >= 0 and one or more aspects")
        if len(self.aspects) > 1 and not self.indexed:
            raise UserError(f"data.aspects names {len(self.aspects)} ratios, but '{self.source}' has squares only")

    @property
    def side(self) -> int:
        """Side in pixels of the run's square images, or the square root of their area."""
        return FASHION_MNIST_SIDE if self.source == "fashion-mnist" else self.views.size

    @property
    def indexed(self) -> bool:
        """Whether the images stay where they are and are read one by one."""
        return self.source in ("folder", "tar", "parquet")


@dataclass(frozen=True)
class JointLoss:
    """What joint training adds to the reconstruction loss; a weight of 0 leaves a term out.

    Raises:
        UserError: a number below 0.
    """

    perceptual: float = 0.0
    """Weight of the distance of features of images and their reconstructions."""
    features: PerceptualName = "mobilenetv2"
    """Network of that distance."""
    adversarial: float = 0.0
    """Weight of a critic's mean score of reconstructions; the critic is trained beside."""
    adversarial_from: int = 500
    """Update at which the critic starts, once there is something to judge."""

    def __post_init__(self) -> None:
        if min(self.perceptual, self.adversarial, self.adversarial_from) < 0:
            raise UserError("expected perceptual, adversarial and adversarial_from >= 0 in autoencoder.joint_loss")


@dataclass(frozen=True)
class AutoencoderRecipe:
    """The latent space: a small autoencoder trained here, a pretrained one, or plain pixels.

    Raises:
        UserError: a number that cannot be, a pretrained autoencoder without a source, or a kind that cannot be trained
            together with the flow.
    """

    kind: Literal["small", "diffusers_kl", "diffusers_tiny", "pixels"] = "small"
    """Our small autoencoder, AutoencoderKL or AutoencoderTiny of diffusers, or no autoencoder."""
    source: str = ""
    """Folder or hub id of a pretrained autoencoder; empty trains `model` as a stage of this run."""
    channels: int = 3
    """Channels of pixels: 3, or 1 for grey."""
    model: SmallAutoencoderConfig = field(default_factory=SmallAutoencoderConfig)
    """Sizes of the small autoencoder that is trained."""
    noise_min: float = 0.1
    """Smallest standard deviation of the latent noise in training, in those of the latents."""
    noise_max: float = 0.3
    """Largest one; each image draws its own in between."""
    loss: ReconstructionLoss = field(default_factory=ReconstructionLoss)
    """Weights of the reconstruction loss."""
    joint: bool = False
    """Train the autoencoder together with the flow from the first update on, with the constant latent noise
    `objective.noise_std` (SimFlow, arXiv 2512.04084): no stage of its own, no cache, and latents that are not
    standardised."""
    flow_weight: float = 1.0
    """Weight of the flow's nats beside the reconstruction loss in joint training; 1 is the evidence lower bound of a
    decoder whose negative log-likelihood is the reconstruction loss, per pixel and channel."""
    joint_loss: JointLoss = field(default_factory=JointLoss)
    """Perceptual and adversarial terms of joint training, beside `loss`."""
    train: TrainSettings = field(default_factory=lambda: TrainSettings(steps=1000))
    """Training of the small autoencoder."""

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
    """What the flow is told about an image."""

    kind: Literal["text", "embeddings", "class", "none"] = "text"
    """A text encoder's states, a language model's token embeddings (which its own deep block reads), classes, or
    nothing."""
    encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
    """The text encoder or language model: a folder or a hub id; the default is also found as an installed package."""
    tokens: int = 16
    """Condition tokens of a caption; longer captions are cut."""


@dataclass(frozen=True)
class FlowRecipe:
    """Options of the flow: those of `STARFlowConfig` or, with kind "tarflow", of `TarFlowConfig`.

    None is an option that the recipe leaves open. It then follows from the model that `train.init_from` names, from the
    latents (in_channels, img_size), from the condition (txt_size, txt_dim, num_classes), or is the default of the
    configuration; see `starflow.train.init_from.complete_flow`. Values are checked when the flow is built.

    Raises:
        UserError: an option of the other kind of flow; the message names the nearest known one.

    Example:
        >>> FlowRecipe(channels=128, layers_per_block=(1, 1, 3)).given()
        {'channels': 128, 'layers_per_block': (1, 1, 3)}
    """

    kind: Literal["starflow", "tarflow"] | None = None
    """The architecture; "starflow" where nothing says otherwise."""
    in_channels: int | None = None
    """Channels of the flow's input."""
    img_size: int | None = None
    """Side of the flow's input, in latents or pixels."""
    patch_size: int | None = None
    """Side of the patch that is one token."""
    channels: int | None = None
    """Width of the blocks."""
    top_block_channels: int | None = None
    """Width of the last block alone."""
    num_blocks: int | None = None
    """Blocks; with a list of layers its length."""
    layers_per_block: int | tuple[int, ...] | None = None
    """Transformer layers: one number for every block, or one each, the first next to the data."""
    head_dim: int | None = None
    """Width of an attention head."""
    num_heads: int | None = None
    """Query heads; otherwise width / head_dim."""
    num_kv_heads: int | None = None
    """Key and value heads, which groups of query heads share."""
    rope: bool | None = None
    """Rotary positions instead of a learned table."""
    pt_seq_len: int | None = None
    """Side in tokens that the positions span."""
    sos: bool | None = None
    """A learned start token."""
    seq_order: SeqOrder | None = None
    """The direction in which the first block reads the tokens."""
    txt_size: int | None = None
    """Condition tokens."""
    txt_dim: int | None = None
    """Width of a condition token."""
    cond_top_only: bool | None = None
    """Only the last block sees the condition."""
    use_softplus: bool | None = None
    """sigma by softplus instead of exp."""
    soft_clip: float | None = None
    """Bound of the outputs, by tanh; 0 is no bound."""
    use_final_norm: bool | None = None
    """A norm after the last layer of a block."""
    norm_type: NormType | None = None
    """Kind of the norms."""
    use_swiglu: bool | None = None
    """Gated MLPs."""
    mlp_hidden: tuple[int, ...] | None = None
    """Hidden widths of the MLPs, one number a block."""
    use_qk_norm: bool | None = None
    """Norms of queries and keys."""
    use_post_norm: bool | None = None
    """Norms after attention and MLP too."""
    use_bias: bool | None = None
    """Biases of the linear layers inside attention and MLP."""
    hf_style_rope: bool | None = None
    """Rotate the pairs (i, i + head_dim / 2) instead of adjacent ones."""
    num_classes: int | None = None
    """Classes of a TarFlow."""

    def __post_init__(self) -> None:
        known = ["kind", *(option.name for option in fields(KINDS[self.kind or "starflow"]))]
        for key in self.given():
            if key not in known:
                raise UserError(unknown_key_message(f"flow.{key}", key, known))

    def given(self) -> dict[str, Any]:
        """The options that the recipe does not leave open."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Objective:
    """Maximum likelihood of noised latents, and what keeps it stable (STARFlow, arXiv 2506.06276, section 3).

    Raises:
        UserError: a number that cannot be.
    """

    noise: Literal["gaussian", "uniform"] = "gaussian"
    """Gaussian noise of `noise_std`; or uniform within a pixel's 8-bit level, which gives exact bits per dimension."""
    noise_std: float = 0.3
    """Standard deviation of the noise added to latents (or pixels), in their units."""
    drop_condition: float = 0.1
    """Share of captions replaced by the null condition, which guidance needs."""
    latent_penalty: float = 1e-4
    """Weight of the mean square of every block's input and intermediate output."""

    def __post_init__(self) -> None:
        if self.noise_std < 0 or not 0 <= self.drop_condition <= 1 or self.latent_penalty < 0:
            raise UserError("expected noise_std >= 0, drop_condition in [0, 1] and latent_penalty >= 0")


@dataclass(frozen=True)
class Recipe:
    """A whole run, from images to a pipeline.

    Example:
        >>> recipe = Recipe("mine", TrainSettings(steps=100), flow=FlowRecipe(channels=64))
        >>> recipe.data.source, recipe.objective.noise_std, recipe.guidance
        ('folder', 0.3, 2.0)
    """

    name: str
    """Name of the model, and of the run's folder where none is given."""
    train: TrainSettings
    """Training of the flow."""
    data: DataRecipe = field(default_factory=DataRecipe)
    """The images."""
    autoencoder: AutoencoderRecipe = field(default_factory=AutoencoderRecipe)
    """The latent space."""
    conditioning: ConditioningRecipe = field(default_factory=ConditioningRecipe)
    """What the flow is told about an image."""
    flow: FlowRecipe = field(default_factory=FlowRecipe)
    """Sizes and options of the flow."""
    objective: Objective = field(default_factory=Objective)
    """What the flow is trained for."""
    prompts: tuple[str, ...] = ()
    """Prompts (or class names) of the sample grids; empty takes the first classes, or with text a few usual prompts."""
    guidance: float = 2.0
    """Guidance weight of the sample grids and of the finished pipeline's default."""
    temperature: float = 1.0
    """Factor on the noise of the sample grids and of the finished pipeline's default; 1 is the model's distribution."""
    candidates: int = 1
    """Images drawn for each one that the sample grids and, by default, the finished pipeline keep."""


@dataclass(frozen=True)
class NetworkSizes:
    """The sizes of a network beside a flow."""

    channels: int = 256
    """Width, a multiple of `head_dim`."""
    layers: int | tuple[int, ...] = 2
    """Transformer layers: of a student, of each of its groups, one number or one each, next to the noise first."""
    head_dim: int = 64
    """Width of an attention head, a multiple of 16."""


@dataclass(frozen=True)
class CompanionRecipe:
    """The part of a recipe that a student's and a denoiser's have in common."""

    name: str
    """Of the run's folder, where none is given."""
    teacher: str
    """The model whose flow it is trained beside: bundled name, folder or hub id."""
    train: TrainSettings
    """Training of the network."""
    data: DataRecipe = field(default_factory=DataRecipe)
    """The images, best those that the flow was trained on; encoded once by the model's own parts."""
    latents: str = ""
    """Folder of a latent cache to train from instead of `data`: RUN/latents of the flow's own training."""
    network: NetworkSizes = field(default_factory=NetworkSizes)
    """Sizes of the network."""
    prompts: tuple[str, ...] = ()
    """Prompts (or class names) of the sample grids; empty takes the first classes, or a few usual prompts."""


def load_recipe(path: Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read a recipe from a YAML or JSON file, over its base where it names one.

    Args:
        path: of the file; its key `base` names another recipe, relative to it, whose values lie under its own.
        overrides: YAML values by dotted key, e.g. {"train.lr": "1e-4"}, which lie over all.

    Raises:
        UserError: no such file, unknown key (the nearest is named), wrong value.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "mine.yaml"
        >>> _ = path.write_text("{name: mine, train: {steps: 100}, flow: {channels: 64}}")
        >>> recipe = load_recipe(path, {"train.lr": "1e-3"})
        >>> recipe.train.lr, recipe.flow.channels, recipe.flow.patch_size
        (0.001, 64, None)
    """
    values, layers = read_layers(path, overrides or {})
    return _without_leftovers(from_dict(Recipe, values), layers)


T = TypeVar("T", bound=Dataclass)


def load_recipe_of(kind: type[T], path: Path, overrides: Mapping[str, str] | None = None) -> T:
    """As `load_recipe`, of a recipe of another kind: of a student or a denoiser.

    Raises:
        UserError: as `load_recipe`.
    """
    return from_dict(kind, read_layers(path, overrides or {})[0])


def read_layers(path: Path, overrides: Mapping[str, str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A recipe's values, and the layers that they come from: its bases, itself, and what a caller gives over all."""
    layers = _read_with_bases(path)
    given: dict[str, Any] = {}
    values: dict[str, Any] = copy.deepcopy(_merged(layers))
    for dotted, text in overrides.items():
        _set_dotted(values, dotted, text)
        _set_dotted(given, dotted, text)
    return values, [*layers, given]


def _read_with_bases(path: Path, above: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """A recipe's values after those of the recipe that its key `base` names, relative to it, which they lie over."""
    values = read_mapping(path)
    base = values.pop("base", None)
    if base is None:
        return [values]
    if not isinstance(base, str):
        raise UserError(f"'base' of {path} is {base!r}, expected the name of a recipe beside it")
    if path.resolve() in above:
        raise UserError(f"the base of {path} comes back to {path}: take one of them out")
    return [*_read_with_bases(path.parent / base, (*above, path.resolve())), values]


def _without_leftovers(recipe: Recipe, layers: Sequence[dict[str, Any]]) -> Recipe:
    """The recipe without what it inherits and what only a later layer's switches make idle; a warning names it."""
    left = [key for key in idle_keys(recipe) if _had_effect(key, layers)]
    if not left:
        return recipe
    warnings.warn(f"the recipe's own switches leave {', '.join(left)} without effect: left out", stacklevel=3)
    values, default = to_dict(recipe), default_values(recipe)
    for key in left:
        *sections, last = key.split(".")
        functools.reduce(lambda inner, section: inner[section], sections, values)[last] = default[key]
    return from_dict(Recipe, values)


def _had_effect(key: str, layers: Sequence[dict[str, Any]]) -> bool:
    """Whether a key did something in the recipe as it was up to the layer that gives it."""
    giving = max((number for number, layer in enumerate(layers) if key in flat_keys(layer)), default=-1)
    if giving in (-1, len(layers) - 1):
        return False
    try:
        below = from_dict(Recipe, _merged(layers[: giving + 1]))
    except UserError:  # a base alone need not be whole
        return False
    return key not in idle_keys(below)


def _merged(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every layer's values over those of the layers before it."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, layer)
    return merged


def _merge(base: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `own` over those of `base`, section by section."""
    merged = dict(base)
    for key, value in own.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _set_dotted(values: dict[str, Any], dotted: str, text: str) -> None:
    """Set the value at a dotted key, as YAML writes it."""
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
