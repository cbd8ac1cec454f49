"""Figures by matplotlib, without a display and without its global state."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from starflow.data.images import make_grid
from starflow.errors import UserError
from starflow.io.files import atomic_write
from starflow.train.run import read_log

POINTS = 100
"""Of a curve, at most: each is a mean over as many updates."""


def figure(rows: int, columns: int, side: float) -> tuple[Any, Any]:
    """A figure and its axes [row][column], `side` inches each.

    Raises:
        UserError: matplotlib is not installed.
    """
    made = _empty_figure(columns * side, rows * side)
    return made, made.subplots(rows, columns, squeeze=False)


def sheet(rows: Mapping[str, Tensor], below: int = 0) -> tuple[Any, list[Any]]:
    """A figure with pictures (N, 3, H, W) in rows under their labels, and `below` axes side by side under them.

    Raises:
        UserError: matplotlib is not installed.
    """
    heights = [1.0] * len(rows) + [3.0] * bool(below)
    made = _empty_figure(6.5, 0.95 * sum(heights))
    grid = made.add_gridspec(len(heights), max(1, below), height_ratios=heights)
    for number, (label, pictures) in enumerate(rows.items()):
        axis = made.add_subplot(grid[number, :])
        axis.imshow(make_grid(pictures, len(pictures)))
        axis.set(xticks=[], yticks=[])
        axis.set_title(label, fontsize=9)
    return made, [made.add_subplot(grid[len(rows), column]) for column in range(below)]


def _empty_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need matplotlib: run pip install 'starflow[evaluation]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def draw_curves(axis: Any, log: Path, names: Mapping[str, str]) -> None:
    """What a training's log.jsonl says over its updates: a line for each name, and dots where it was held out.

    Args:
        axis: of matplotlib.
        log: of a run.
        names: keys of the log without "heldout_", with the words for them.
    """
    lines = read_log(log)
    for key, label in names.items():
        train, heldout = (
            [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            for name in (key, f"heldout_{key}")
        )
        (line,) = axis.plot(*_columns(_means(train)), lw=1, label=label)
        axis.plot(*_columns(heldout), "o" if train else "o-", ms=3, lw=1, color=line.get_color())
    axis.set_xlabel("updates")
    # Below the curves, which fill the axes.
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=2)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _means(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of successive points, at most `POINTS` of them.

    >>> _means([(1, 4.0), (2, 2.0)])
    [(1, 4.0), (2, 2.0)]
    """
    each = -(-len(points) // POINTS)
    parts = [points[start : start + each] for start in range(0, len(points), each)] if points else []
    return [(statistics.fmean(step for step, _ in part), statistics.fmean(v for _, v in part)) for part in parts]


def save(made: Any, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with atomic_write(path) as temporary:
        made.savefig(temporary, format="png", dpi=110)
