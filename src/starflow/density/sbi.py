"""The adapter to `sbi` (0.27): a `SequenceFlow` as its neural estimator of posteriors or likelihoods.

    from sbi.inference import NPE
    from starflow.density.sbi import sbi_estimator

    trainer = NPE(prior, density_estimator=sbi_estimator("posterior"))
    trainer.append_simulations(theta, x).train()
    posterior = trainer.build_posterior()

Contract: that of `sbi.neural_nets.estimators.ConditionalDensityEstimator`. A posterior's event is theta and its context
is x, a vector (K,) or a sequence (N, C), which needs no embedding network; a likelihood's are the other way round, but
sbi's `NLE` takes vectors alone: flatten a sequence to (N C,) and give `patch_size` C. What is estimated can be pickled,
as sbi's own estimators can.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from starflow.density.blocks import Bound
from starflow.density.sequence_flow import SequenceFlow
from starflow.errors import UserError

Target = Literal["posterior", "likelihood"]
"""What is estimated: p(theta | x) or p(x | theta)."""

BuildEstimator = Callable[[Tensor, Tensor], Any]
"""Takes the training rows of theta (R, ...) and x (R, ...) and returns a `ConditionalDensityEstimator`."""


def sbi_estimator(
    target: Target,
    *,
    bounds: tuple[Bound, ...] = (),
    patch_size: int = 1,
    channels: int = 64,
    num_blocks: int = 4,
    layers_per_block: int = 2,
    head_dim: int = 32,
) -> BuildEstimator:
    """What `NPE`, for a posterior, and `NLE`, for a likelihood, take as `density_estimator`.

    Args:
        target: "posterior" or "likelihood".
        bounds: of the event's last axis, as for `SequenceFlow`. With a uniform prior's, no posterior leaks out of it.
        patch_size: of the tokens of an event, as for `SequenceFlow`.
        channels: width of the blocks.
        num_blocks: of alternating order.
        layers_per_block: Transformer layers of each.
        head_dim: width of an attention head.

    Raises:
        UserError: another target, or, when sbi builds the estimator, sizes that do not fit.
    """
    if target not in ("posterior", "likelihood"):
        raise UserError(f"the target is {target!r}, expected 'posterior' for NPE or 'likelihood' for NLE")

    def build(theta: Tensor, x: Tensor) -> Any:
        event, context = (theta, x) if target == "posterior" else (x, theta)
        flow = SequenceFlow(
            tuple(event.shape[1:]),
            tuple(context.shape[1:]),
            bounds=bounds,
            patch_size=patch_size,
            channels=channels,
            num_blocks=num_blocks,
            layers_per_block=layers_per_block,
            head_dim=head_dim,
        )
        flow.standardise(event, context)
        return _estimator_class()(flow, event.shape[1:], context.shape[1:])

    return build


@functools.cache
def _estimator_class() -> Any:
    """A subclass of sbi's base class, which is imported only here."""
    from sbi.neural_nets.estimators import ConditionalDensityEstimator

    class SequenceFlowEstimator(ConditionalDensityEstimator):  # type: ignore[misc]
        """A `SequenceFlow`, which is `net`, under sbi's names and shapes."""

        def log_prob(self, input: Tensor, condition: Tensor) -> Tensor:  # noqa: A002
            """(S, B, *event) or (B, *event), under (B, *context), to (S, B) nats; -inf outside the bounds."""
            events, contexts, _ = self._broadcast_and_align(input, condition)
            shape = events.shape[:2]
            rows = self.net.check_events(events.reshape(-1, *self.input_shape), None)
            nats: Tensor = self.net.log_prob_rows(rows, contexts.reshape(-1, *self.condition_shape), None)
            return nats.reshape(shape)

        def loss(self, input: Tensor, condition: Tensor) -> Tensor:  # noqa: A002
            """Negative log-densities (B,) of events (B, *event) under (B, *context)."""
            return -self.log_prob(input[None], condition)[0]

        def sample(self, sample_shape: torch.Size, condition: Tensor) -> Tensor:
            """Samples (*sample_shape, B, *event) under (B, *context)."""
            samples: Tensor = self.net(condition).sample(sample_shape)
            return samples

    SequenceFlowEstimator.__qualname__ = SequenceFlowEstimator.__name__  # pickle finds it by `__getattr__` below
    return SequenceFlowEstimator


def __getattr__(name: str) -> Any:
    if name == "SequenceFlowEstimator":
        return _estimator_class()
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
