"""Guidance: how a conditional and a null prediction combine, token by token and channel by channel.

Contract: pure functions in at least float32. A weight of 0 gives the conditional prediction.
(gaussian: STARFlow, arXiv 2506.06276, section 3.5; linear: TarFlow, arXiv 2412.06329, section 2.6.)

Shapes: B batch, N tokens of a sequence, T some of them, C token channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["gaussian", "linear"]
Schedule = Literal["constant", "linear"]


@dataclass(frozen=True)
class Guidance:
    """What sampling does with the two predictions of a guided block."""

    weight_B: Tensor
    """w of each picture, at least 0."""
    rule: Rule
    schedule: Schedule
    temperature: float
    """The null branch's attention logits are divided by it; under 1 sharpens."""

    def weights(self, first: int, count: int, tokens: int) -> Tensor:
        """Weight (B or 1, count, 1) of tokens first, .., of a sequence of `tokens`, counted in the block's order.

        With the linear schedule token n has w n / (N - 1), so that guidance grows along the sequence.
        """
        weight = self.weight_B.view(-1, 1, 1)
        if self.schedule == "constant":
            return weight
        return self.weights_at(torch.arange(first, first + count, device=weight.device), tokens)

    def weights_at(self, index_T: Tensor, tokens: int) -> Tensor:
        """As `weights`, of the tokens whose indices a tensor holds."""
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
    """mu and log sigma of p_c^(1+w) / p_u^w, exact where sigma_u >= sigma_c and clamped to stay defined elsewhere."""
    ratio = torch.exp(2 * (log_sigma_c - log_sigma_u).clamp(max=0))  # min(sigma_c / sigma_u, 1)^2
    precision = 1 + weight - weight * ratio  # of the result, in units of sigma_c^-2
    mu = ((1 + weight) * mu_c - weight * ratio * mu_u) / precision
    return mu, log_sigma_c - 0.5 * precision.log()


def linear(outputs_c: Tensor, outputs_u: Tensor, weight: Tensor) -> Tensor:
    """TarFlow's extrapolation of the network's outputs, before they become sigma; breaks down at large w."""
    return outputs_c + weight * (outputs_c - outputs_u)
