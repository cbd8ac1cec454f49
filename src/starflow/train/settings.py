"""What a training run is told, for every stage alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from starflow.errors import UserError


@dataclass(frozen=True)
class TrainSettings:
    """Optimisation, schedule and reporting of one stage.

    Defaults of betas, eps and weight decay are those of STARFlow (arXiv 2506.06276, appendix).
    """

    steps: int
    """Updates in all."""
    batch: int = 32
    """Pictures per update."""
    lr: float = 1e-4
    """Learning rate after warm-up."""
    min_lr: float = 0.0
    """Learning rate at the last update."""
    schedule: Literal["cosine", "trapezoid"] = "cosine"
    """Cosine from lr to min_lr, or constant until the last `decay` of the steps and then linear to min_lr."""
    decay: float = 0.3
    """Share of the steps that a trapezoid decays over."""
    warmup: int = 100
    """Updates over which the learning rate rises linearly from zero."""
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    clip: float = 1.0
    """Largest gradient norm; larger ones are scaled down."""
    average: float = 0.999
    """Decay per update of the averaged weights, reached from below as (1 + t) / (10 + t)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the network; "auto" is bfloat16 on a GPU that has it, else float32. Losses are always float32."""
    compile: bool = False
    """Compile the network with torch.compile."""
    evaluate_every: int = 500
    """Updates between held-out evaluations of the averaged weights; the best average is kept apart."""
    sample_every: int = 500
    """Updates between pictures."""
    checkpoint_every: int = 200
    """Updates between checkpoints; the newest two are kept."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "evaluate_every", "sample_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"'{name}' is {getattr(self, name)}, expected at least 1")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"'betas' is {list(self.betas)}, expected two numbers in [0, 1)")
        if self.lr <= 0 or self.min_lr < 0 or self.min_lr > self.lr:
            raise UserError(f"expected 0 <= min_lr <= lr and lr > 0, got lr {self.lr} and min_lr {self.min_lr}")
        if not 0 <= self.decay <= 1 or not 0 <= self.average < 1 or self.clip <= 0:
            raise UserError("expected 0 <= decay <= 1, 0 <= average < 1 and clip > 0")
