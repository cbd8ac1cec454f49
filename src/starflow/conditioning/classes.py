"""Class labels as conditions: one token, one-hot over the classes and "none" (spec of STARFlow on ImageNet)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from starflow.conditioning.base import ConditionerSpec
from starflow.errors import UserError


class ClassLabels:
    """Reads a class by its name (in any case) or its number; the last of the width, K, stands for no class.

    Conditions are (B, 1, K + 1), one-hot. K is the number of names.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Raises UserError: no name, an empty one, or one twice."""
        self._spec = ConditionerSpec("class", size=1, dim=len(names) + 1, names=tuple(names))
        self._numbers = {name.casefold(): number for number, name in enumerate(names)}
        if not names or "" in self._numbers or len(self._numbers) < len(names):
            raise UserError(
                f"{len(names)} class names of which {len(self._numbers)} differ: give each class its own name"
            )
        self._numbers[""] = len(names)
        self.network = _OneHot(len(names) + 1)

    @property
    def spec(self) -> ConditionerSpec:
        return self._spec

    def number(self, label: str) -> int:
        """The class's number, K for the empty label.

        A name wins over a number, so a class called "7" is found by its name.

        Raises:
            UserError: no such class; it names the nearest.
        """
        wanted = label.strip().casefold()
        if wanted in self._numbers:
            return self._numbers[wanted]
        count = len(self._spec.names)
        if wanted.isdecimal() and int(wanted) < count:
            return int(wanted)
        raise UserError(f"unknown class '{label}': {self._hint(wanted)} (or a number from 0 to {count - 1})")

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Class names or numbers to (B, 1, K + 1).

        Raises:
            UserError: no such class; it names the nearest.
        """
        tokens: Tensor = self.network([self.number(label) for label in prompts])
        return tokens

    def null(self, batch: int) -> Tensor:
        """The class "none", (batch, 1, K + 1)."""
        return self.encode([""] * batch)

    def _hint(self, wanted: str) -> str:
        nearest = difflib.get_close_matches(wanted, self._numbers, n=1, cutoff=0.4)
        if nearest:
            return f"did you mean '{self._spec.names[self._numbers[nearest[0]]]}'?"
        return f"known are {', '.join(self._spec.names[:8])}{', ...' if len(self._spec.names) > 8 else ''}"


class _OneHot(nn.Module):
    """The rows of the identity, on the device that the module is moved to."""

    rows: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.eye(width), persistent=False)

    def forward(self, numbers: Sequence[int]) -> Tensor:
        return self.rows[list(numbers)].unsqueeze(1)
