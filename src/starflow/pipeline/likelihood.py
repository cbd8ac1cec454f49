"""The density that a pipeline gives of a picture: of which numbers it is, the noise that belongs to it, and its units.

Contract: a density is that of the flow's own input, the picture's latent with the noise of the training added under a
seed, in nats, the Gaussian's constant included. A model of evenly dequantised pixels gives log-probabilities of the
8-bit picture instead, as a lower bound (Theis et al., arXiv 1511.01844, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from starflow.data.images import dequantise
from starflow.flow.model import STARFlow, TarFlow, token_log_prob
from starflow.pipeline.config import PipelineConfig
from starflow.pipeline.inputs import check_seeds
from starflow.sampling.sampler import noise_from_seeds


@dataclass(frozen=True)
class LogProb:
    """The exact log-density of one noised latent (or of noised pixels, where there is no autoencoder).

    Of "8-bit pixels" it is a log-probability: the mean over uniform dequantisations, a lower bound (Theis et al.,
    arXiv 1511.01844, section 3.1).
    """

    nats: float
    """log p(x | prompt), natural logarithm, the Gaussian's constant included."""
    bits_per_dim: float
    """-nats / (dimensions ln 2), of the flow's own input."""
    dimensions: int
    """Numbers in the flow's input: channels times height times width of the latent."""
    space: str
    """What the density is of: "noised latent", "noised pixels" or "8-bit pixels"."""
    draws: int = 1
    """Draws of the noise that nats is the mean of."""
    standard_error: float | None = None
    """Of nats, over the draws; None for a single one."""
    values: tuple[float, ...] = field(default=(), repr=False)
    """nats of each draw."""

    @staticmethod
    def mean_of(nats: Tensor, dimensions: int, space: str) -> LogProb:
        """The mean over draws of the noise, with its standard error.

        Args:
            nats: (draws,) log-densities of one picture.
            dimensions: of the flow's input.
            space: what the density is of.

        >>> found = LogProb.mean_of(torch.tensor([-61.0, -67.0]), dimensions=64, space="noised latent")
        >>> found.nats, round(found.bits_per_dim, 4), round(found.standard_error, 3)
        (-64.0, 1.4427, 3.0)
        """
        values, draws = nats.double(), len(nats)
        mean = float(values.mean())
        error = float(values.std()) / math.sqrt(draws) if draws > 1 else None
        each = tuple(values.tolist())
        return LogProb(mean, -mean / (dimensions * math.log(2)), dimensions, space, draws, error, each)

    def minus(self, values: Sequence[float]) -> tuple[float, float | None]:
        """The mean difference to another picture's or prompt's nats under the same draws, and its standard error.

        >>> found = LogProb.mean_of(torch.tensor([-61.0, -67.0]), dimensions=64, space="noised latent")
        >>> found.minus([-63.0, -68.0])
        (1.5, 0.5)
        """
        pairs = torch.tensor(self.values, dtype=torch.float64, device="cpu") - torch.tensor(
            list(values), dtype=torch.float64, device="cpu"
        )
        return float(pairs.mean()), float(pairs.std()) / math.sqrt(len(pairs)) if len(pairs) > 1 else None


def density_space(config: PipelineConfig) -> str:
    """What the density of a pipeline is of; see `LogProb.space`.

    >>> from starflow.latents import AutoencoderSpec
    >>> density_space(PipelineConfig("digits", 28, 0.0, AutoencoderSpec("pixels", 1, 1), noise="uniform"))
    '8-bit pixels'
    """
    if config.autoencoder.kind != "pixels":
        return "noised latent"
    return "8-bit pixels" if config.noise == "uniform" else "noised pixels"


def add_training_noise(latents: Tensor, config: PipelineConfig, seeds: Sequence[int]) -> Tensor:
    """Latents (B, C, h, w) as the flow was trained on them: each with the noise of its seed.

    Raises:
        UserError: not one seed for each, or one that no generator takes.
    """
    seeds = check_seeds(seeds, len(latents))
    if config.noise == "uniform":
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        shape = latents.shape[1:]
        draws = [torch.rand(shape, generator=one, dtype=torch.float32, device="cpu") for one in generators]
        return dequantise(latents, torch.stack(draws).to(latents.device))
    return latents + config.noise_std * noise_from_seeds(seeds, tuple(latents.shape[1:])).to(latents.device)


def log_probs(flow: STARFlow | TarFlow, config: PipelineConfig, noised: Tensor, condition: Tensor | None) -> Tensor:
    """Log-densities (B,) in nats of noised latents (B, C, h, w)."""
    return flow.log_prob(noised, condition) - math.prod(noised.shape[1:]) * _nats_per_level(config)


def log_prob_maps(flow: STARFlow | TarFlow, config: PipelineConfig, noised: Tensor, condition: Tensor | None) -> Tensor:
    """Each token's part of `log_probs`, in nats (B, h, w); see `starflow.flow.model.token_log_prob`."""
    maps = token_log_prob(flow, noised, condition)
    return maps - math.prod(noised.shape[1:]) / math.prod(maps.shape[1:]) * _nats_per_level(config)


def _nats_per_level(config: PipelineConfig) -> float:
    """log of the levels in a unit of the flow's input, which turns a density into a probability of a level."""
    return math.log(128) if config.noise == "uniform" else 0.0
