"""The density that a pipeline gives of a picture: of which numbers it is, the noise that belongs to it, and its units.

Contract: a density is that of the flow's own input, the picture's latent with the noise of the training added under a
seed, in nats, the Gaussian's constant included. A model of evenly dequantised pixels gives log-probabilities of the
8-bit picture instead, as a lower bound (Theis et al., arXiv 1511.01844, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from starflow.data.images import dequantise
from starflow.errors import UserError
from starflow.flow.model import STARFlow, TarFlow, token_log_prob
from starflow.latents import Autoencoder
from starflow.pipeline.config import PipelineConfig
from starflow.pipeline.inputs import check_prompts, check_range, check_seed, check_seeds, check_whole, read_image
from starflow.sampling.sampler import noise_from_seeds

if TYPE_CHECKING:
    from PIL.Image import Image


class Measurable(Protocol):
    """What a density needs of a pipeline; `StarFlowPipeline` fills it in."""

    flow: STARFlow | TarFlow
    autoencoder: Autoencoder
    config: PipelineConfig

    @property
    def device(self) -> torch.device: ...
    @property
    def density_space(self) -> str: ...
    def log_probs(self, images: Tensor, prompts: str | Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, int]: ...
    def _condition(self, prompts: Sequence[str], shape: Sequence[int] = ...) -> tuple[Tensor | None, Tensor | None]: ...
    def _check_pass(self, latents: Tensor, prompts: Sequence[str]) -> Tensor: ...


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

        Raises:
            UserError: another number of draws.
        """
        if len(values) != len(self.values):
            raise UserError(f"{len(values)} values beside {len(self.values)} draws: take those of as many draws")
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


class PictureLikelihood:
    """The methods that give densities of pictures, for a pipeline to inherit."""

    def log_prob(
        self: Measurable, image: Image | str | Path, prompt: str = "", *, seed: int = 0, draws: int = 1
    ) -> LogProb:
        """Exact log-density of a picture's latent with the model's training noise added under `seed`.

        Args:
            image: of Pillow's, or a file; its sides must fit the model.
            prompt: what it is said to show.
            seed: of the noise; draw d has the seed `seed + d`.
            draws: of the noise, to average over.

        Raises:
            UserError: no picture, sides that do not fit the model, no draws, or a density that is not finite.
        """
        check_whole("draws", draws)
        picture, prompts = read_image(image).to(self.device), check_prompts(prompt, 1)
        first = check_seed(seed, draws)
        found = [self.log_probs(picture, prompts, [first + draw]) for draw in range(draws)]
        if not all(bool(nats.isfinite().all()) for nats, _ in found):
            self._check_pass(self.autoencoder.encode(picture), prompts)
        return LogProb.mean_of(torch.cat([nats for nats, _ in found]), found[0][1], self.density_space)

    @property
    def density_space(self: Measurable) -> str:
        """What `log_prob` is the density of; see `LogProb.space`."""
        return density_space(self.config)

    @torch.no_grad()
    def log_probs(
        self: Measurable, images: Tensor, prompts: str | Sequence[str], seeds: Sequence[int]
    ) -> tuple[Tensor, int]:
        """`log_prob` of pictures (B, 3, H, W) in [-1, 1]: nats (B,), and the dimensions of each latent.

        Raises:
            UserError: no such tensor, not a prompt for each or for all, or not a seed for each.
        """
        noised = add_training_noise(self.autoencoder.encode(check_range(images, self.device)), self.config, seeds)
        condition, _ = self._condition(check_prompts(prompts, len(noised)), noised.shape)
        return log_probs(self.flow, self.config, noised, condition), math.prod(noised.shape[1:])

    @torch.no_grad()
    def log_prob_maps(self: Measurable, images: Tensor, prompts: str | Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Each token's part of `log_probs`, in nats (B, h, w); see `starflow.flow.model`."""
        noised = add_training_noise(self.autoencoder.encode(check_range(images, self.device)), self.config, seeds)
        condition, _ = self._condition(check_prompts(prompts, len(noised)), noised.shape)
        return log_prob_maps(self.flow, self.config, noised, condition)
