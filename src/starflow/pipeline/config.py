"""The configuration of a pipeline (its config.json), and what of a call follows from it: sizes and defaults.

Sizes are (width, height) in pixels. Rotary positions span the same length at any size (STARFlow, arXiv 2506.06276), so
a model makes sizes that it was not trained at; learned positions are for one size.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from starflow.conditioning import ConditionerSpec
from starflow.data.buckets import Aspect, Size, sizes_of
from starflow.data.sources.base import HELDOUT_SHARE
from starflow.errors import UserError
from starflow.flow.config import ModelConfig, STARFlowConfig
from starflow.latents import AutoencoderSpec
from starflow.sampling.student import Student, StudentConfig

FORMAT = 1
"""The newest format of config.json that is read."""

Cleaning = Literal["decoder", "tweedie", "denoiser", "none"]
"""How samples lose the noise of the training data: see `PipelineConfig.cleaning`."""


@dataclass(frozen=True)
class PipelineConfig:
    """The contents of a pipeline's config.json: its parts, the noise of its training, and the defaults of a call."""

    name: str
    """Of the model, for messages and cards."""
    image_size: int
    """Side in pixels of the square that the model was trained at, or of one with the area of its ratios; ask
    `default_size` and `trained_sizes` for what it draws."""
    noise_std: float
    """Standard deviation of the noise in the flow's training data, in the flow's units."""
    autoencoder: AutoencoderSpec
    """Which autoencoder, and where it lies."""
    conditioner: ConditionerSpec | None = None
    """Which encoder of prompts, and where it lies; None for a model that takes no prompt."""
    guidance: float = 0.0
    """Default guidance weight."""
    cleaning: Cleaning = "decoder"
    """How samples lose the noise: by a decoder trained for it, by one Tweedie step before decoding, by a learned
    denoiser, or not at all (uniform noise is gone with rounding; an autoencoder may have the noise in its own
    latents)."""
    noise: Literal["gaussian", "uniform"] = "gaussian"
    """Kind of noise in the training data: Gaussian of `noise_std`, or uniform within the levels of 8-bit pixels."""
    aspects: tuple[Aspect, ...] = ()
    """Ratios that the model was trained on, which captions name where there are several; empty is squares only."""
    heldout: float = HELDOUT_SHARE
    """Share of the images of a plain folder that was not trained on, by the hash of their names."""
    temperature: float = 1.0
    """Default factor on the noise that is sampled from; see `StarFlowPipeline.__call__`."""
    candidates: int = 1
    """Default number of pictures drawn for each one that is kept; see `starflow.sampling.sampler`."""
    format: int = FORMAT
    """Version of this file's layout."""

    def __post_init__(self) -> None:
        if isinstance(self.temperature, str) or not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(f"temperature is {self.temperature}, expected above 0 (1 is the model's own distribution)")
        if self.candidates < 1:
            raise UserError(f"candidates is {self.candidates}, expected at least 1 (1 keeps what is drawn)")


def size_multiple(config: PipelineConfig, flow: ModelConfig) -> int:
    """The number of pixels that both sides of a picture must be multiples of.

    >>> flow = STARFlowConfig(4, 32, 64, num_blocks=2, layers_per_block=1, patch_size=2)
    >>> size_multiple(PipelineConfig("latent", 256, 0.3, AutoencoderSpec("diffusers_kl", 4, 8)), flow)
    16
    """
    return config.autoencoder.factor * flow.patch_size


def check_size(config: PipelineConfig, flow: ModelConfig, size: Size) -> None:
    """Raises UserError: a size that the model cannot make."""
    width, height = size
    unit = size_multiple(config, flow)
    if width < unit or height < unit or width % unit or height % unit:
        near = [max(1, round(side / unit)) * unit for side in size]
        raise UserError(
            f"size {width}x{height} cannot be made: both sides must be multiples of {unit} pixels, "
            f"e.g. {near[0]}x{near[1]}"
        )
    learned = not isinstance(flow, STARFlowConfig) or not flow.rope
    side = config.image_size
    if learned and size != (side, side):
        raise UserError(
            f"size {width}x{height} cannot be made: '{config.name}' has learned positions, which are for "
            f"{side}x{side} alone; leave the size out"
        )


def latent_shape(config: PipelineConfig, flow: ModelConfig, size: Size | None = None) -> tuple[int, int, int]:
    """The shape (C, h, w) of the latent of a picture of `size`, or of the size that the model was trained at.

    Raises:
        UserError: a size that the model cannot make.

    >>> flow = STARFlowConfig(4, 32, 64, num_blocks=2, layers_per_block=1)
    >>> latent_shape(PipelineConfig("latent", 256, 0.3, AutoencoderSpec("diffusers_kl", 4, 8)), flow, (512, 256))
    (4, 32, 64)
    """
    width, height = size or default_size(config, flow)
    check_size(config, flow, (width, height))
    factor = config.autoencoder.factor
    return flow.in_channels, height // factor, width // factor


def trained_sizes(config: PipelineConfig, flow: ModelConfig) -> list[Size]:
    """The sizes that the model was trained at, the default one first: a square, or its ratios at that area.

    >>> flow = STARFlowConfig(4, 32, 64, num_blocks=2, layers_per_block=1)
    >>> wide = PipelineConfig("wide", 256, 0.3, AutoencoderSpec("diffusers_kl", 4, 8), aspects=("16:9", "1:1"))
    >>> trained_sizes(wide, flow)
    [(256, 256), (344, 192)]
    """
    return sizes_of(config.aspects or ("1:1",), config.image_size, size_multiple(config, flow))


def default_size(config: PipelineConfig, flow: ModelConfig) -> Size:
    """The size of a picture that nobody gives one: a square, or the first trained ratio where no square was trained.

    >>> flow = STARFlowConfig(4, 32, 64, num_blocks=2, layers_per_block=1)
    >>> wide = PipelineConfig("wide", 256, 0.3, AutoencoderSpec("diffusers_kl", 4, 8), aspects=("16:9", "9:16"))
    >>> default_size(wide, flow), default_size(dataclasses.replace(wide, aspects=("16:9", "1:1")), flow)
    ((344, 192), (256, 256))
    """
    return trained_sizes(config, flow)[0]


def untrained_size_warning(config: PipelineConfig, flow: ModelConfig, size: Size) -> str:
    """A sentence for the user where the model was not trained at this size, else ""."""
    known = trained_sizes(config, flow)
    if size in known:
        return ""
    width, height = known[0]
    ratios = f" in {len(known)} ratios" if len(known) > 1 else ""
    return (
        f"'{config.name}' was trained at {width}x{height} pixels{ratios}, not at "
        f"{size[0]}x{size[1]}: positions are rescaled, and pictures may be worse"
    )


def with_sampling_options(
    config: PipelineConfig, temperature: float | None, candidates: int | None, student: StudentConfig | None = None
) -> PipelineConfig:
    """The configuration with a call's temperature and number of candidates, None being the model's own, or a student's.

    Raises:
        UserError: a temperature of 0 or less, or no candidates.
    """
    if student is not None:
        config = dataclasses.replace(config, temperature=student.temperature, candidates=1)
    return dataclasses.replace(
        config,
        temperature=config.temperature if temperature is None else check_number("temperature", temperature),
        candidates=config.candidates if candidates is None else candidates,
    )


def own_guidance(config: PipelineConfig, student: Student | None = None) -> float:
    """The guidance weight that a model draws at by default, or that its student does."""
    own = None if student is None else student.config.guidance
    return config.guidance if own is None else own


def check_number(name: str, value: Any) -> float:
    """One number, as Python, numpy or a tensor has it.

    Raises:
        UserError: a text, a truth value, several numbers, or none.

    >>> check_number("temperature", torch.tensor(0.5))
    0.5
    """
    try:
        if isinstance(value, str | bytes | bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{name} is {value!r}, expected one number") from None


def guidance_weights(guidance: float | Sequence[float] | Tensor, pictures: int) -> Tensor:
    """The guidance weight of each picture, (pictures,) in float64 on the CPU.

    Raises:
        UserError: neither one weight for all nor one a picture.

    >>> guidance_weights(2.0, 3).tolist()
    [2.0, 2.0, 2.0]
    """
    try:
        if isinstance(guidance, bool):
            raise TypeError
        weights = torch.as_tensor(guidance, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise UserError(
            f"guidance is {guidance!r}, expected one weight, or one for each of {pictures} pictures"
        ) from None
    if weights.shape not in ((), (1,), (pictures,)):
        got = f"{len(weights)} weights" if weights.ndim == 1 else f"shape {tuple(weights.shape)}"
        raise UserError(f"guidance has {got}, expected one weight, or one for each of {pictures} pictures")
    return weights.expand(pictures)


def choose_cleaning(
    config: PipelineConfig, asked: Cleaning | None, decoder: AutoencoderSpec, *, replaced: bool, denoiser: bool
) -> Cleaning:
    """The cleaning that a call asks for, or else the one that fits the decoder.

    Args:
        config: of the pipeline.
        asked: by the call; None leaves the choice.
        decoder: what turns latents into pictures.
        replaced: whether it stands in the place of the model's own.
        denoiser: whether the model has one.

    Raises:
        UserError: a Tweedie step for a model without Gaussian noise, or a denoiser that is not there.
    """
    if asked is not None and asked not in get_args(Cleaning):
        raise UserError(f"cleaning is {asked!r}, expected one of {', '.join(map(repr, get_args(Cleaning)))}")
    trained = decoder.noise_std > 0
    if asked == "tweedie" and not config.noise_std:
        raise UserError(f"cleaning is 'tweedie', but '{config.name}' was trained without Gaussian noise: use 'none'")
    chosen = asked or config.cleaning
    if chosen == "denoiser" and not denoiser:
        raise UserError(
            f"cleaning is 'denoiser', but '{config.name}' has none: train one by `starflow train-denoiser`, or use "
            "'tweedie'"
        )
    if asked == "decoder" and config.noise_std and not trained:
        warnings.warn("cleaning is 'decoder', but the decoder was not trained for noise: it stays", stacklevel=4)
    if asked is not None or not replaced or config.cleaning == "none":
        return chosen
    if config.cleaning == "denoiser" and not trained:
        return "denoiser"
    return "decoder" if trained else "tweedie"
