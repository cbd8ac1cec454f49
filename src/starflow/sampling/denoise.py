"""Denoising a sample by one Tweedie step on the model's own score (STARFlow, arXiv 2506.06276, section 3.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from starflow.errors import UserError
from starflow.flow.memory import denoised_at_once
from starflow.flow.model import Flow
from starflow.flow.tokens import check_tensor


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
    pieces = zip(x.split(at_once), [None] * len(x) if condition is None else condition.split(at_once), strict=False)
    with torch.inference_mode(mode=False), torch.enable_grad():
        return torch.cat([_denoise(model, noisy, given, sigma) for noisy, given in pieces])


def _denoise(model: Flow, x: Tensor, condition: Tensor | None, sigma: float) -> Tensor:
    noisy = x.detach().to(model.work_dtype).clone().requires_grad_()  # clones leave a caller's inference mode
    given = None if condition is None else condition.detach().clone()
    (score,) = torch.autograd.grad(model.log_prob(noisy, given).sum(), noisy)
    return (noisy + sigma**2 * score).detach()
