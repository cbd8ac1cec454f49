"""The exact map of an affine flow, as pure functions in float32 or float64, without a network.

Contract: sigma is a standard deviation and travels as log sigma. Forward is data to noise,
z = (x - mu) / sigma, with log|det| = -sum log sigma (STARFlow, arXiv 2506.06276, eq. 3 to 5). Tensors that meet in a
function have one shape, or broadcast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SOFTPLUS_SHIFT = 0.541324854612918  # softplus(shift) = 1: a network that says 0 leaves x unchanged
_LINEAR_BELOW = -30.0  # log softplus(y) = y to 5e-14 there, where softplus itself would underflow
_LINEAR_ABOVE = 40.0


def forward(x: Tensor, mu: Tensor, log_sigma: Tensor) -> Tensor:
    """Data to noise, z = (x - mu) / sigma.

    >>> x, mu, log_sigma = torch.tensor([5.0]), torch.tensor([1.0]), torch.tensor([2.0]).log()
    >>> z = forward(x, mu, log_sigma)
    >>> z, inverse(z, mu, log_sigma)
    (tensor([2.]), tensor([5.]))
    """
    return (x - mu) * torch.exp(-log_sigma)


def inverse(z: Tensor, mu: Tensor, log_sigma: Tensor) -> Tensor:
    """Noise to data, x = mu + sigma z."""
    return mu + torch.exp(log_sigma) * z


def log_sigma_of(a: Tensor, *, softplus: bool) -> Tensor:
    """log sigma of the network's scale output a: sigma = softplus(a + shift), which is 1 at a = 0, or exp(a).

    Finite, with a finite gradient, at every finite a.
    """
    if not softplus:
        return a
    y = a + SOFTPLUS_SHIFT
    return torch.where(y < _LINEAR_BELOW, y, F.softplus(y.clamp(min=_LINEAR_BELOW), threshold=_LINEAR_ABOVE).log())


def soft_clip(o: Tensor, limit: float) -> Tensor:
    """limit * tanh(o / limit), which stays within the limit; a limit of 0 is no clip.

    >>> soft_clip(torch.tensor([0.0, 100.0]), 4.0)
    tensor([0., 4.])
    """
    return limit * torch.tanh(o / limit) if limit else o


def log_normal(z: Tensor) -> Tensor:
    """log N(z; 0, I) of each row, constant included, in nats: (B, ...) to (B,).

    >>> log_normal(torch.zeros(1, 2))
    tensor([-1.8379])
    """
    z = z.flatten(1)
    return -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))
