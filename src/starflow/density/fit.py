"""Fitting a density: our own loop for data that fits the memory, and the adapter through which `sbi` trains one.

`fit` is maximum likelihood with early stopping on held-out rows.

The rows are split and shuffled by a generator of the seed, so that the same seed and weights give the same result. The
learning rate is halved when the held-out likelihood has not improved for a third of the patience.

For `sbi` (0.27) a `SequenceFlow` is a neural estimator of posteriors or likelihoods.

    from sbi.inference import NPE
    from starflow.density.fit import sbi_estimator

    trainer = NPE(prior, density_estimator=sbi_estimator("posterior"))
    trainer.append_simulations(theta, x).train()
    posterior = trainer.build_posterior()

The contract is that of `sbi.neural_nets.estimators.ConditionalDensityEstimator`. A posterior's event is theta and its
context is x, a vector (K,) or a sequence (N, C), which needs no embedding network; a likelihood's are the other way
round, but sbi's `NLE` takes vectors alone: flatten a sequence to (N C,) and give `patch_size` C. What is estimated can
be pickled, as sbi's own estimators can."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from starflow.density.blocks import Bound
from starflow.density.sequence_flow import SequenceFlow
from starflow.errors import UserError

LogProb = Callable[[Sequence[Tensor]], Tensor]

"""A function of some rows of every tensor of a data set, to their log-densities (B,) in nats."""

CLIP_NORM = 5.0
"""Norm that a gradient is cut to."""

EVALUATION_ROWS = 4096
"""Held-out rows of one pass."""


@dataclass(frozen=True)
class FitOptions:
    """How long and how to train."""

    seed: int = 0
    """Of the split and the order of rows."""
    max_epochs: int = 200
    batch_size: int = 256
    lr: float = 1e-3
    """Learning rate of Adam at the start."""
    validation_fraction: float = 0.1
    """Share of the rows that is held out."""
    patience: int = 20
    """Epochs without an improvement on held-out rows after which training ends."""
    progress: bool = True
    """Whether a bar is shown, on a terminal."""

    def __post_init__(self) -> None:
        for name in ("max_epochs", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction is {self.validation_fraction}, expected between 0 and 1")
        if not self.lr > 0:
            raise UserError(f"lr is {self.lr}, expected above 0")


@dataclass(frozen=True)
class FitResult:
    """What training did; log-likelihoods are means in nats of a row."""

    heldout_nats: float
    """Of the weights that are kept, which are the best ones."""
    best_epoch: int
    """From 1."""
    train_history: tuple[float, ...]
    """Of each epoch, while the weights changed."""
    heldout_history: tuple[float, ...]
    """After each epoch."""
    seconds: float

    @property
    def epochs(self) -> int:
        """How many were run."""
        return len(self.heldout_history)


def fit(model: nn.Module, log_prob: LogProb, data: Sequence[Tensor], options: FitOptions) -> FitResult:
    """Train a model in place, and leave it with the weights that were best on held-out rows, even when interrupted.

    Args:
        model: whose parameters are trained.
        log_prob: of rows of the data under the model.
        data: tensors of equally many rows; `split_rows` says which are held out.
        options: of training.

    Raises:
        UserError: too few rows, or a likelihood that is not finite.
    """
    train, heldout = split_rows(len(data[0]), options)
    order = torch.Generator("cpu").manual_seed(options.seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=options.lr)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser, mode="max", factor=0.5, patience=max(options.patience // 3, 1), threshold=0.0
    )
    started, best, best_epoch = time.perf_counter(), -math.inf, 0
    kept: dict[str, Tensor] = {}
    train_history: list[float] = []
    heldout_history: list[float] = []
    bar = tqdm(range(1, options.max_epochs + 1), desc="fit", unit="epoch", disable=None if options.progress else True)
    try:
        for epoch in bar:
            shuffled = train[torch.randperm(len(train), generator=order)]
            train_history.append(_train_epoch(model, log_prob, data, shuffled, optimiser, options.batch_size))
            nats = mean_log_prob(log_prob, data, heldout)
            heldout_history.append(nats)
            if not math.isfinite(nats):
                raise UserError(
                    f"the held-out log-likelihood of epoch {epoch} is {nats}, expected a finite one: lower lr"
                )
            if nats > best:
                best, best_epoch = nats, epoch
                kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            schedule.step(nats)
            bar.set_postfix(heldout=f"{nats:.3f}", best=f"{best:.3f}")
            if epoch - best_epoch >= options.patience:
                break
    finally:
        bar.close()
        if kept:
            model.load_state_dict(kept)
    seconds = time.perf_counter() - started
    return FitResult(best, best_epoch, tuple(train_history), tuple(heldout_history), seconds)


def split_rows(count: int, options: FitOptions) -> tuple[Tensor, Tensor]:
    """Indices of the rows to train on, and of those that are held out.

    Raises:
        UserError: fewer than two rows.

    >>> train, heldout = split_rows(10, FitOptions(validation_fraction=0.2))
    >>> len(train), len(heldout), sorted(torch.cat([train, heldout]).tolist()) == list(range(10))
    (8, 2, True)
    """
    if count < 2:
        raise UserError(f"{count} rows to fit, expected at least 2: one is held out")
    shuffled = torch.randperm(count, generator=torch.Generator("cpu").manual_seed(options.seed))
    heldout = min(max(round(count * options.validation_fraction), 1), count - 1)
    return shuffled[heldout:], shuffled[:heldout]


@torch.no_grad()
def mean_log_prob(log_prob: LogProb, data: Sequence[Tensor], rows: Tensor) -> float:
    """The mean log-density of some rows in nats."""
    total = sum(float(log_prob([one[some] for one in data]).double().sum()) for some in rows.split(EVALUATION_ROWS))
    return total / len(rows)


def _train_epoch(
    model: nn.Module,
    log_prob: LogProb,
    data: Sequence[Tensor],
    rows: Tensor,
    optimiser: torch.optim.Optimizer,
    batch_size: int,
) -> float:
    """One pass over the rows; returns their mean log-density while the weights changed."""
    total = 0.0
    for some in rows.split(batch_size):
        nats = log_prob([one[some] for one in data])
        optimiser.zero_grad(set_to_none=True)
        (-nats.mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM, error_if_nonfinite=False)
        optimiser.step()
        total += float(nats.detach().double().sum())
    return total / len(rows)


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
