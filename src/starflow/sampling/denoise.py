"""Denoising of a sample by the flow's own score: computed, as one Tweedie step, or learned by a network of its own.

The Tweedie step (STARFlow, arXiv 2506.06276, section 3.3) takes a backward pass through the whole flow. A `Denoiser`
has learned that score from such passes (flow-score matching, STARFlow-V, arXiv 2511.20462), and takes one pass of its
own, small network: an approximation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from starflow.errors import UserError
from starflow.flow.memory import denoised_at_once
from starflow.flow.model import Flow
from starflow.flow.tokens import check_tensor
from starflow.sampling.student import Companion, CompanionConfig


def denoise(model: Flow, x: Tensor, condition: Tensor | None = None, sigma: float = 0.3) -> Tensor:
    """x + sigma^2 * grad_x log p(x | condition): the mean of the clean picture given the noisy one.

    Large pictures are taken one by one, as the backward pass needs what every layer computed.

    Args:
        model: the flow; its parameters get no gradient.
        x: (B, C, H, W), a sample, or data with noise of standard deviation `sigma`.
        condition: as for `model(x, condition)`; the score is conditional and unguided.
        sigma: standard deviation of the noise that the model was trained with, in x's units.

    Returns:
        (B, C, H, W), in at least float32.

    Raises:
        UserError: negative sigma, or a shape that the model cannot take.

    >>> from starflow.flow.config import STARFlowConfig
    >>> from starflow.flow.model import STARFlow
    >>> new = STARFlow(STARFlowConfig(2, 4, 32, num_blocks=2, layers_per_block=1, head_dim=16))
    >>> x = torch.ones(1, 2, 4, 4)
    >>> cleaned = denoise(new, x, sigma=0.5)  # a new model's density is N(0, 1), whose score is -x
    >>> torch.allclose(cleaned, 0.75 * x)
    True
    """
    if not (sigma >= 0 and math.isfinite(sigma)):
        raise UserError(f"sigma is {sigma}, expected a standard deviation of at least 0")
    check_tensor("the input", x)
    several = condition is None or len(condition) == len(x)  # or the model says what is wrong
    at_once = denoised_at_once(math.prod(x.shape[2:]) // model.config.patch_size**2) if several else len(x)
    conditions = [None] * len(x) if condition is None else condition.split(at_once)
    pieces = zip(x.split(at_once), conditions, strict=False)
    return torch.cat(
        [one.detach().to(model.work_dtype) + sigma**2 * score_of(model, one, given) for one, given in pieces]
    )


def score_of(model: Flow, x: Tensor, condition: Tensor | None = None) -> Tensor:
    """grad_x log p(x | condition) of every picture of x (B, C, H, W), in at least float32; no parameter's gradient.

    Raises:
        UserError: a shape that the model cannot take.
    """
    with torch.inference_mode(mode=False), torch.enable_grad():
        noisy = x.detach().to(model.work_dtype).clone().requires_grad_()  # clones leave a caller's inference mode
        given = None if condition is None else condition.detach().clone()
        (score,) = torch.autograd.grad(model.log_prob(noisy, given).sum(), noisy)
    assert isinstance(score, Tensor)
    return score


@dataclass(frozen=True)
class DenoiserConfig(CompanionConfig):
    """A denoiser's sizes, and the noise that it takes off."""

    noise_std: float = 0.3
    """Standard deviation of that noise, in the flow's units."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.noise_std > 0:
            raise UserError(f"noise_std is {self.noise_std}, expected above 0: a flow without noise needs no denoiser")


class Denoiser(Companion):
    """A network s(x) that approximates -sigma grad_x log p(x | condition); a new one is 0.

    >>> from starflow.flow.config import STARFlowConfig
    >>> from starflow.flow.model import STARFlow
    >>> from starflow.sampling.student import inputs_of
    >>> flow = STARFlow(STARFlowConfig(2, 4, 32, num_blocks=2, layers_per_block=1, head_dim=16))
    >>> denoiser = Denoiser(DenoiserConfig(**inputs_of(flow), channels=32, layers=(2,), head_dim=16))
    >>> x = torch.ones(1, 2, 4, 4)
    >>> torch.equal(denoiser.clean(x), x)
    True
    """

    kind = "denoiser"
    config_class = DenoiserConfig
    config: DenoiserConfig

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__(config)
        self.proj_out = nn.Linear(config.channels, config.token_channels)  # without a norm, which would lose sizes
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """s(x) of noised latents (B, C, H, W), float32.

        Raises:
            UserError: a shape that the flow cannot take either.
        """
        tokens, grid = self.to_tokens(x)
        hidden = self.transformer(tokens, grid, self.check_condition(condition, len(x)))[-1]
        return self.from_tokens(self.proj_out(hidden).float(), grid)

    @torch.no_grad()
    def clean(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """x - sigma s(x), latents (B, C, H, W) without the noise, float32."""
        s: Tensor = self(x, condition)
        return x.float() - self.config.noise_std * s
