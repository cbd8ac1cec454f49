"""Guidance combines a conditional and a null prediction, token by token and channel by channel.

Contract: pure functions in at least float32. A weight of 0 gives the conditional prediction. `gaussian` is STARFlow's
rule (arXiv 2506.06276, section 3.5), `linear` TarFlow's (arXiv 2412.06329, section 2.6).

Shapes: B batch, N tokens of a sequence, T some of them, C token channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["gaussian", "linear"]
"""How two predictions combine: as Gaussians, or by extrapolating the network's outputs."""

Schedule = Literal["constant", "linear"]
"""How the weight goes along the sequence; "linear" is annealed guidance."""


@dataclass(frozen=True)
class Guidance:
    """What sampling does with the two predictions of a guided block.

    >>> annealed = Guidance(torch.tensor([1.0, 3.0]), "gaussian", "linear", 1.0)
    >>> annealed.weights(0, 3, 3).squeeze(2).tolist()
    [[0.0, 0.5, 1.0], [0.0, 1.5, 3.0]]
    """

    weight_B: Tensor
    """w of each picture, at least 0."""
    rule: Rule
    schedule: Schedule
    temperature: float
    """The null branch's attention logits are divided by it; under 1 sharpens."""

    def weights(self, first: int, count: int, tokens: int) -> Tensor:
        """Weights (B, count, 1), or (B, 1, 1) for all, of `count` tokens from `first` of a sequence of `tokens`.

        Tokens are counted in the block's order. With the linear schedule token n has w n / (N - 1), so that guidance
        grows along the sequence.
        """
        weight = self.weight_B.view(-1, 1, 1)
        if self.schedule == "constant":
            return weight
        return self.weights_at(torch.arange(first, first + count, device=weight.device), tokens)

    def weights_at(self, index_T: Tensor, tokens: int) -> Tensor:
        """As `weights`, of the tokens whose indices a tensor (T,) holds."""
        weight = self.weight_B.view(-1, 1, 1)
        if self.schedule == "constant":
            return weight
        return weight * (index_T.to(weight.dtype) / max(tokens - 1, 1)).view(1, -1, 1)

    def query_scale(self) -> Tensor | None:
        """(2B, 1, 1, 1) factor on the attention logits, null rows second; None where the temperature is 1."""
        if self.temperature == 1:
            return None
        ones = torch.ones_like(self.weight_B)
        return torch.cat((ones, ones / self.temperature)).view(-1, 1, 1, 1)


def gaussian(
    mu_c: Tensor, log_sigma_c: Tensor, mu_u: Tensor, log_sigma_u: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """mu and log sigma of the normal distribution p_c^(1+w) / p_u^w (STARFlow, arXiv 2506.06276, section 3.5).

    Exact where sigma_u >= sigma_c; elsewhere the ratio of the two is clamped to 1, so that it stays defined. All
    tensors are (B, T, C), the weight may be (B, T, 1).

    >>> one, zero = torch.ones(1), torch.zeros(1)
    >>> gaussian(one, zero, zero, zero, torch.tensor(2.0))  # equal variances: the mean is extrapolated
    (tensor([3.]), tensor([0.]))
    """
    ratio = torch.exp(2 * (log_sigma_c - log_sigma_u).clamp(max=0))  # min(sigma_c / sigma_u, 1)^2
    precision = 1 + weight - weight * ratio  # of the result, in units of sigma_c^-2
    mu = ((1 + weight) * mu_c - weight * ratio * mu_u) / precision
    return mu, log_sigma_c - 0.5 * precision.log()


def linear(outputs_c: Tensor, outputs_u: Tensor, weight: Tensor) -> Tensor:
    """Extrapolation of the network's outputs before they become mu and sigma (TarFlow, arXiv 2412.06329, section 2.6).

    It breaks down at large weights.

    >>> linear(torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor(2.0))
    tensor([2.])
    """
    return outputs_c + weight * (outputs_c - outputs_u)
