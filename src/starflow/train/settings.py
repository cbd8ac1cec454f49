"""The settings of a training, the same for every stage: optimisation, schedule, precision, processes and seeds."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from starflow.errors import UserError
from starflow.nn.cpu import multiplies_bfloat16


@dataclass(frozen=True)
class ParallelSettings:
    """How several processes (torchrun) share a model, and what is traded for memory.

    Raises:
        UserError: a number that cannot be.
    """

    layout: Literal["replicated", "sharded", "hybrid"] = "replicated"
    """Every process holds all weights; or a part of them (FSDP2); or a part within a group of processes, replicated
    over the groups. One process alone always holds all."""
    shard_size: int = 0
    """Processes of a hybrid group; 0 is those of one host."""
    accumulate: int = 1
    """Micro-batches that a process's share of the batch is cut into, one after the other, before an update."""
    checkpoint_attention: bool = False
    """Compute attention again in the backward pass instead of keeping its activations."""
    checkpoint_mlp: bool = False
    """The same for the MLPs, which hold most of a layer's activations."""
    timeout: float = 600.0
    """Seconds after which an update gives up on a process that does not answer."""

    def __post_init__(self) -> None:
        if self.accumulate < 1 or self.shard_size < 0 or self.timeout <= 0:
            raise UserError("expected accumulate >= 1, shard_size >= 0 and timeout > 0")


@dataclass(frozen=True)
class TrainSettings:
    """Optimisation, schedule and logging of one stage.

    Defaults of betas, eps and weight decay are those of STARFlow (arXiv 2506.06276, appendix).

    Raises:
        UserError: a number that cannot be; the message names its key.

    Example:
        >>> settings = TrainSettings(steps=1000, batch=8, parallel=ParallelSettings(accumulate=2))
        >>> settings.rows(rank=1, size=2)
        [range(4, 6), range(6, 8)]
    """

    steps: int
    """Updates in all."""
    batch: int = 32
    """Images per update, over all processes and micro-batches."""
    lr: float = 1e-4
    """Learning rate after the warm-up."""
    min_lr: float = 0.0
    """Learning rate at the last update."""
    schedule: Literal["cosine", "trapezoid"] = "cosine"
    """Cosine from lr to min_lr, or constant until the last `decay` of the steps and then linear to min_lr."""
    decay: float = 0.3
    """Share of the steps that a trapezoid decays over."""
    warmup: int = 100
    """Updates over which the learning rate rises linearly from zero."""
    betas: tuple[float, ...] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    eps: float = 1e-8
    """Term in the denominator of AdamW."""
    weight_decay: float = 1e-4
    """Decoupled weight decay, of matrices only."""
    clip: float = 1.0
    """Largest gradient norm; larger ones are scaled down."""
    skip_above: float = 10.0
    """An update whose gradient norm is more than this many times its running value is skipped, once 100 updates have
    been seen; 0 is never."""
    average: float = 0.999
    """Decay per update of the averaged weights, reached from below as (1 + t) / (10 + t)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the network's passes; "auto" is bfloat16 on a device that multiplies it, else float32. Losses are float32."""
    compile: bool = False
    """Compile every Transformer layer with torch.compile."""
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    evaluate_every: int = 500
    """Updates between held-out evaluations of the averaged weights; the best average is kept in best/."""
    evaluate_pictures: int = 0
    """Held-out images, and as many training ones, that an evaluation of a flow reads, at most; 0 is all held out."""
    sample_every: int = 500
    """Updates between sample grids."""
    checkpoint_every: int = 200
    """Updates between checkpoints; the newest two are kept."""
    peak_tflops: float = 0.0
    """The device's peak, in 10^12 floating-point operations a second, which the log's utilisation is a share of; 0
    measures a large matrix product at the start."""
    wandb: str = ""
    """A Weights & Biases project to log to beside TensorBoard; needs the package wandb."""
    init_from: str = ""
    """Where the first weights come from instead of chance: the bundled model's name, a folder or a hub id. A flow may
    also take a Gemma-style language model for its deep block."""
    seed: int = 0
    """Seed of the first weights, the order of the data and every draw."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "evaluate_every", "sample_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"'{name}' is {getattr(self, name)}, expected at least 1")
        if self.evaluate_pictures < 0:
            raise UserError(f"'evaluate_pictures' is {self.evaluate_pictures}, expected at least 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"'betas' is {list(self.betas)}, expected two numbers in [0, 1)")
        if self.lr <= 0 or self.min_lr < 0 or self.min_lr > self.lr:
            raise UserError(f"expected 0 <= min_lr <= lr and lr > 0, got lr {self.lr} and min_lr {self.min_lr}")
        if not 0 <= self.decay <= 1 or not 0 <= self.average < 1 or self.clip <= 0:
            raise UserError("expected 0 <= decay <= 1, 0 <= average < 1 and clip > 0")
        if self.skip_above and self.skip_above <= 1:
            raise UserError(f"'skip_above' is {self.skip_above}, expected more than 1, or 0 for never")

    def rows(self, rank: int, size: int) -> list[range]:
        """The rows of the batch that a process sees, one range a micro-batch.

        Raises:
            UserError: the batch cannot be cut into equal parts.
        """
        parts = size * self.parallel.accumulate
        if self.batch % parts:
            raise UserError(
                f"train.batch is {self.batch}, expected a multiple of {parts} ({size} processes x "
                f"{self.parallel.accumulate} accumulated parts): every part has the same number of pictures"
            )
        each = self.batch // parts
        first = rank * self.parallel.accumulate
        return [range((first + part) * each, (first + part + 1) * each) for part in range(self.parallel.accumulate)]


def network_dtype(settings: TrainSettings, device: torch.device) -> torch.dtype:
    """bfloat16 where the settings ask for it, or leave it open and the device multiplies it; else float32.

    Example:
        >>> network_dtype(TrainSettings(steps=1, precision="float32"), torch.device("cpu"))
        torch.float32
    """
    low = settings.precision == "bfloat16" or (settings.precision == "auto" and multiplies_bfloat16(device))
    return torch.bfloat16 if low else torch.float32


def network_precision(settings: TrainSettings, device: torch.device) -> AbstractContextManager[object]:
    """A context that casts the network to `network_dtype`; weights, optimiser and losses stay in float32."""
    if network_dtype(settings, device) == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


@dataclass(frozen=True)
class ReconstructionLoss:
    """A weighted sum of reconstruction errors of images in [-1, 1].

    Example:
        >>> loss, terms = ReconstructionLoss()(torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4))
        >>> float(loss), sorted(terms)
        (11.0, ['absolute', 'gradient', 'squared'])
    """

    squared: float = 10.0
    """Weight of the mean squared error."""
    absolute: float = 1.0
    """Weight of the mean absolute error."""
    gradient: float = 0.5
    """Weight of the mean absolute error of horizontal and vertical differences, which keeps edges."""

    def __call__(self, output: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Decoded and original images (B, 3, H, W) -> scalar loss, and its terms without weights."""
        error = (output - target).float()
        squared, absolute = error.square().mean(), error.abs().mean()
        gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = self.squared * squared + self.absolute * absolute + self.gradient * gradient
        return loss, {"squared": squared, "absolute": absolute, "gradient": gradient}


def generator(seed: int, purpose: str, step: int) -> torch.Generator:
    """A CPU generator for one purpose at one step; different purposes never share numbers.

    Example:
        >>> one, other = generator(0, "noise", 7), generator(0, "noise", 7)
        >>> bool(torch.equal(torch.randn(3, generator=one), torch.randn(3, generator=other)))
        True
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
