"""Figures by matplotlib, without a display and without its global state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starflow.errors import UserError
from starflow.io.files import atomic_write


def figure(rows: int, columns: int, side: float) -> tuple[Any, Any]:
    """A figure and its axes [row][column], `side` inches each.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need matplotlib: run pip install 'starflow[evaluation]'") from None
    made = Figure(figsize=(columns * side, rows * side), layout="constrained")
    return made, made.subplots(rows, columns, squeeze=False)


def save(made: Any, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with atomic_write(path) as temporary:
        made.savefig(temporary, format="png", dpi=110)
