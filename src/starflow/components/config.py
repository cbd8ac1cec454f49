"""What config.json of a pipeline holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from starflow.conditioning import ConditionerSpec
from starflow.data.buckets import Aspect
from starflow.errors import UserError
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
    """Default number of pictures drawn for each one that is kept; see `starflow.sampling.candidates`."""
    format: int = 1

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(f"temperature is {self.temperature}, expected above 0 (1 is the model's own distribution)")
        if self.candidates < 1:
            raise UserError(f"candidates is {self.candidates}, expected at least 1 (1 keeps what is drawn)")
