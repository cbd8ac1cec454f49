"""`fit`: maximum likelihood with early stopping on held-out rows, for data that fits the memory.

The rows are split and shuffled by a generator of the seed, so that the same seed and weights give the same result. The
learning rate is halved when the held-out likelihood has not improved for a third of the patience.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

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
        if not 0 < self.lr < math.inf:
            raise UserError(f"lr is {self.lr}, expected above 0 and finite")


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

    Before the end of the first epoch, those are the weights that it came with.

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
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_history: list[float] = []
    heldout_history: list[float] = []
    bar = tqdm(range(1, options.max_epochs + 1), desc="fit", unit="epoch", disable=None if options.progress else True)
    try:
        for epoch in bar:
            shuffled = train[torch.randperm(len(train), generator=order, device="cpu")]
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
    shuffled = torch.randperm(count, generator=torch.Generator("cpu").manual_seed(options.seed), device="cpu")
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
