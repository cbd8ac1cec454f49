"""The contract between a prompt and the flow's condition tokens.

Contract, held by every adapter of this room:

- `encode` gives (B, S, `spec.dim`) float32, S being `spec.size` whatever the prompts: padded positions are zero
  vectors (STARFlow, arXiv 2506.06276: states times the attention mask), which the flow attends like any other.
- `null` gives the condition of "no prompt" in the same shape: the encoding of the empty text, or the class "none".
  An empty prompt is the null.
- One prompt's condition is the same in any batch, up to rounding.
- `network` holds the weights: move that to a device, and results are on it. Nothing is drawn at random, and no
  gradients are tracked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

from starflow.errors import UserError

Kind = Literal["class", "text", "embeddings"]


@dataclass(frozen=True)
class ConditionerSpec:
    """What config.json keeps of a conditioner, enough to build it again.

    Attributes:
        kind: "class" (labels), "text" (an encoder read by transformers) or "embeddings" (of a language model's tokens).
        size: S, condition tokens.
        dim: width of a condition token, the flow's `txt_dim`.
        source: the text encoder's or language model's folder or hub id; empty for classes.
        names: the classes' names in order; empty for text.
    """

    kind: Kind
    size: int
    dim: int
    source: str = ""
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.size < 1 or self.dim < 1:
            raise UserError(f"a condition of {self.size} tokens of width {self.dim}: both must be at least 1")


class Conditioner(Protocol):
    """Anything that turns prompts into condition tokens, as the module's docstring says."""

    @property
    def spec(self) -> ConditionerSpec: ...

    @property
    def network(self) -> nn.Module: ...

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts (or class names or numbers) to (B, S, dim).

        Raises:
            UserError: a prompt that this conditioner does not know.
        """
        ...

    def null(self, batch: int) -> Tensor:
        """The condition of no prompt, (batch, S, dim)."""
        ...
