"""The flow's training objective (STARFlow, arXiv 2506.06276, section 3; TarFlow, arXiv 2412.06329, section 2)."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from starflow.flow.model import Flow, Trace

Number = TypeVar("Number", float, Tensor)


class TracedLoss(nn.Module):
    """The objective as a module over a flow, so that one call, compiled or not, covers network and loss."""

    def __init__(self, flow: Flow, latent_penalty: float) -> None:
        super().__init__()
        self.flow = flow
        self.latent_penalty = latent_penalty

    def forward(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noised data (B, C, H, W) -> (loss, 0.5 z^2, log-determinant, penalty), scalars, means over dimensions."""
        trace = self.flow.trace(x, condition)
        squares, logdet = likelihood_terms(trace)
        inner = [state.square().mean() for state in trace.states[1:-1]]
        penalty = torch.stack(inner).sum() if inner else squares.new_zeros(())
        return squares - logdet + self.latent_penalty * penalty, squares, logdet, penalty


def likelihood_terms(trace: Trace) -> tuple[Tensor, Tensor]:
    """Mean over dimensions and pictures of 0.5 z^2, and of the log-determinant; their difference is the loss."""
    return 0.5 * trace.z.square().mean(), trace.logdet.mean() / trace.z[0].numel()


def nats_per_dim(loss: Number) -> Number:
    """Negative log-likelihood per dimension, in nats: the loss (without penalty) and the Gaussian's constant."""
    return loss + 0.5 * math.log(2 * math.pi)


def bits_per_dim(loss: Number) -> Number:
    """`nats_per_dim` in bits; of the noised latents or pixels that the flow models."""
    return nats_per_dim(loss) / math.log(2)
