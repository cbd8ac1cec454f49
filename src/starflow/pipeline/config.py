"""What config.json of a pipeline holds.

Which sizes a model can make, which it was trained at, and what it is told of them.

Sizes are (width, height) in pixels. Rotary positions span the same length at any size (STARFlow, arXiv 2506.06276), so
a model makes sizes that it was not trained at; learned positions are for one size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from starflow.conditioning import ConditionerSpec
from starflow.data.buckets import Aspect, Size, aspect_size, caption_with_ratio, nearest_aspect
from starflow.errors import UserError
from starflow.flow.config import ModelConfig, STARFlowConfig
from starflow.latents import AutoencoderSpec

Cleaning = Literal["decoder", "tweedie", "none"]
"""The ways out of the noise that a sample carries."""


@dataclass(frozen=True)
class PipelineConfig:
    """What config.json of a pipeline holds."""

    name: str
    image_size: int
    """Side in pixels that the model was trained at."""
    noise_std: float
    """Standard deviation of the noise in the flow's training data, in the flow's units."""
    autoencoder: AutoencoderSpec
    conditioner: ConditionerSpec | None = None
    guidance: float = 0.0
    """Default guidance weight."""
    cleaning: Cleaning = "decoder"
    """How samples lose the noise: a decoder trained for it, one Tweedie step before decoding, or not at all (uniform
    noise is gone with rounding; an autoencoder may have the noise in its own latents)."""
    noise: Literal["gaussian", "uniform"] = "gaussian"
    """Of the training data: Gaussian of `noise_std`, or uniform within the levels of 8-bit pixels."""
    aspects: tuple[Aspect, ...] = ()
    """Ratios that the model was trained on, and is told of in the caption; none where it has seen squares only."""
    temperature: float = 1.0
    """Default factor on the noise that is sampled from; see `StarFlowPipeline.__call__`."""
    candidates: int = 1
    """Default number of pictures drawn for each one that is kept; see `starflow.sampling.sampler`."""
    format: int = 1

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(f"temperature is {self.temperature}, expected above 0 (1 is the model's own distribution)")
        if self.candidates < 1:
            raise UserError(f"candidates is {self.candidates}, expected at least 1 (1 keeps what is drawn)")


def multiple(config: PipelineConfig, flow: ModelConfig) -> int:
    """What both sides of a picture must be multiples of, in pixels."""
    return config.autoencoder.factor * flow.patch_size


def check(config: PipelineConfig, flow: ModelConfig, size: Size) -> None:
    """Raises UserError: a size that the model cannot make."""
    width, height = size
    unit = multiple(config, flow)
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


def trained(config: PipelineConfig, flow: ModelConfig) -> list[Size]:
    """The sizes that the model was trained at: a square, or its ratios at that area."""
    unit = multiple(config, flow)
    return [aspect_size(aspect, config.image_size, unit) for aspect in config.aspects or ("1:1",)]


def untrained(config: PipelineConfig, flow: ModelConfig, size: Size) -> str:
    """A sentence for the user where the model was not trained at this size, else nothing."""
    known = trained(config, flow)
    if size in known:
        return ""
    ratios = f" in {len(known)} ratios" if len(known) > 1 else ""
    return (
        f"'{config.name}' was trained at {config.image_size}x{config.image_size} pixels{ratios}, not at "
        f"{size[0]}x{size[1]}: positions are rescaled, and pictures may be worse"
    )


def told(config: PipelineConfig, prompts: Sequence[str], latent_shape: Sequence[int]) -> list[str]:
    """Prompts as the text encoder reads them: with the nearest ratio, where the model is told of it.

    `latent_shape` ends with (h, w). An empty prompt stays the null condition.
    """
    if not config.aspects:
        return list(prompts)
    aspect = nearest_aspect(latent_shape[-1], latent_shape[-2], config.aspects)
    return [caption_with_ratio(prompt, aspect) if prompt else "" for prompt in prompts]
