"""The contract of a conditioner, which turns prompts to the condition tokens of a flow, and class labels as one.

Contract, held by every conditioner of this room:

- `encode` gives (B, S, `spec.dim`) float32, S being `spec.size` whatever the prompts: padded positions are zero
  vectors (STARFlow, arXiv 2506.06276: states times the attention mask), which the flow attends like any other.
- `null` gives the condition of "no prompt" in the same shape: the encoding of the empty text, or the class "none".
  An empty prompt is the null.
- One prompt's condition is the same in any batch, up to rounding; a `TextEncoder`'s on a CPU bit for bit.
- `network` holds the weights: move that to a device, and results are on it. Nothing is drawn at random, and no
  gradients are tracked.

`ClassLabels` gives one token, one-hot over the classes and "none", as STARFlow on ImageNet has it (arXiv 2506.06276).
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from starflow.errors import UserError

Kind = Literal["class", "text", "embeddings"]

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class ConditionerSpec:
    """What config.json keeps of a conditioner, enough to build it again.

    Attributes:
        kind: "class" (labels), "text" (an encoder read by transformers) or "embeddings" (of a language model's tokens).
        size: S, condition tokens.
        dim: width of a condition token, the flow's `txt_dim`.
        source: the text encoder's or language model's folder or hub id; empty for classes.
        names: the classes' names in order; empty for text.
        dtype: precision that a text encoder computes in; its states are float32 whatever that is.

    Raises:
        UserError: `size` or `dim` is not positive.
    """

    kind: Kind
    size: int
    dim: int
    source: str = ""
    names: tuple[str, ...] = ()
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        if self.size < 1 or self.dim < 1:
            raise UserError(f"a condition of {self.size} tokens of width {self.dim}: both must be at least 1")


class Conditioner(Protocol):
    """Anything that turns prompts into condition tokens, as the module's docstring says."""

    @property
    def spec(self) -> ConditionerSpec:
        """Its description, as config.json keeps it."""
        ...

    @property
    def network(self) -> nn.Module:
        """The weights, frozen; move this to a device."""
        ...

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts (or class names or numbers) to (B, S, dim).

        Raises:
            UserError: a prompt that this conditioner does not know.
        """
        ...

    def null(self, batch: int) -> Tensor:
        """Give the condition of no prompt, (batch, S, dim)."""
        ...


class ClassLabels:
    """The `Conditioner` over K class names: a class is given by its name, in any case, or by its number.

    Conditions are (B, 1, K + 1), one-hot; the last of the width stands for no class.

    >>> labels = ClassLabels(["cat", "dog"])
    >>> labels.encode(["Dog", "0", ""])[:, 0]
    tensor([[0., 1., 0.],
            [1., 0., 0.],
            [0., 0., 1.]])
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Name the classes, in order.

        Raises:
            UserError: no name, an empty one, or one twice.
        """
        self._spec = ConditionerSpec("class", size=1, dim=len(names) + 1, names=tuple(names))
        self._numbers = {_key(name): number for number, name in enumerate(names)}
        if not names:
            raise UserError("no class names, expected one or more: give each class its own")
        if "" in self._numbers or len(self._numbers) < len(names):
            raise UserError(
                f"{len(names)} class names of which {len(self._numbers)} differ: give each class its own name"
            )
        self._numbers[""] = len(names)
        self.network = _OneHot(len(names) + 1)

    @property
    def spec(self) -> ConditionerSpec:
        """See `Conditioner.spec`."""
        return self._spec

    def number(self, label: str) -> int:
        """Find a class's number, K for the empty label.

        A name wins over a number, so a class called "7" is found by its name.

        Raises:
            UserError: no such class; it names the nearest.
        """
        wanted = _key(label)
        if wanted in self._numbers:
            return self._numbers[wanted]
        count = len(self._spec.names)
        if wanted.isdecimal() and int(wanted) < count:
            return int(wanted)
        raise UserError(f"unknown class '{label}': {self._hint(wanted)} (or a number from 0 to {count - 1})")

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Encode class names or numbers to (B, 1, K + 1).

        Raises:
            UserError: no such class; it names the nearest.
        """
        tokens: Tensor = self.network([self.number(label) for label in prompts])
        return tokens

    def null(self, batch: int) -> Tensor:
        """Give the class "none", (batch, 1, K + 1)."""
        return self.encode([""] * batch)

    def _hint(self, wanted: str) -> str:
        nearest = difflib.get_close_matches(wanted, self._numbers, n=1, cutoff=0.4)
        if nearest:
            return f"did you mean '{self._spec.names[self._numbers[nearest[0]]]}'?"
        return f"known are {', '.join(self._spec.names[:8])}{', ...' if len(self._spec.names) > 8 else ''}"


def _key(name: str) -> str:
    """What equal names have in common: they may differ in case, in blanks around them and in their form of Unicode."""
    return unicodedata.normalize("NFC", name.strip()).casefold()


class _OneHot(nn.Module):
    """One-hot rows of the identity, on the device that the module is moved to."""

    rows: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.eye(width, dtype=torch.float32, device="cpu"), persistent=False)

    def forward(self, numbers: Sequence[int]) -> Tensor:
        return self.rows[list(numbers)].unsqueeze(1)
