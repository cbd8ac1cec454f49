"""What every claim's command shares: cells that are computed once, means over seeds, and the written result.

A claim is a table of cells (variant and seed). Each cell's numbers are a JSON file, written when it is done: the same
command again computes those that are missing, then draws the plot and writes the verdict from the numbers.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from starflow.config import Dataclass, to_dict
from starflow.errors import UserError
from starflow.io import files

SEEDS = (0, 1, 2)
SIGNIFICANT = 2.0
"""Standard errors of a difference of means above which it is called one."""

Cell = dict[str, Any]


def cell(folder: Path, name: str, compute: Callable[[], Cell], say: Callable[[str], None]) -> Cell:
    """The numbers of one cell, from its file or else computed and written."""
    path = folder / "cells" / f"{name}.json"
    if path.is_file():
        found: Cell = files.read_json(path)
        return found
    say(name)
    found = compute()
    files.write_json(path, found)
    return found


def keep_budget(folder: Path, budget: Dataclass) -> None:
    """Note what a folder's cells are computed with.

    Raises:
        UserError: the folder holds cells of another budget, which must not be mixed.
    """
    path, now = folder / "budget.json", to_dict(budget)
    before = files.read_json(path) if path.is_file() else now
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        raise UserError(f"{folder} was started with another {changed[0]}: choose another --output, or delete it")
    files.write_json(path, now)


@dataclass(frozen=True)
class Mean:
    """Over seeds."""

    value: float
    error: float
    """Standard error."""
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Mean:
        """Of at least one value; a single one has no error."""
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return Mean(statistics.fmean(values), error, len(values))

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.error:.2g}"


Order = Literal["lower", "higher", "not told apart"]


def compare(first: Mean, second: Mean) -> Order:
    """Whether the first is lower than the second by more than the seeds' noise."""
    gap, error = first.value - second.value, math.hypot(first.error, second.error)
    if abs(gap) <= SIGNIFICANT * error or gap == 0:
        return "not told apart"
    return "lower" if gap < 0 else "higher"


@dataclass(frozen=True)
class Result:
    """A claim's outcome."""

    name: str
    title: str
    claim: str
    """What the paper says."""
    verdict: str
    """What the numbers say; plain sentences."""
    table: list[list[str]]
    """Heads first."""
    command: str
    values: dict[str, Any]


def write_result(folder: Path, result: Result) -> None:
    """results.json and section.md in the claim's folder."""
    files.write_json(folder / "results.json", {"verdict": result.verdict, "command": result.command, **result.values})
    files.write_text(folder / "section.md", section(result, f"{result.name}.png"))


def section(result: Result, picture: str) -> str:
    """The claim as Markdown."""
    heads, *rows = result.table
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    parts = [
        f"## {result.title}",
        f"**The claim.** {result.claim}",
        f"**What was found.** {result.verdict}",
        "\n".join(lines),
        f"![{result.title}]({picture})",
        f"Command: `{result.command}`.",
    ]
    return "\n\n".join(parts) + "\n"


def document(path: Path, result: Result, plot: Path) -> None:
    """Put the claim's section in the place that a document keeps for it, and its plot among the document's images.

    The place lies between `<!-- NAME -->` and `<!-- /NAME -->`; a document without one gets it at its end.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else "# Results\n"
    image = path.parent / "images" / f"results-{result.name}.png"
    files.write_bytes(image, plot.read_bytes())
    first, last = f"<!-- {result.name} -->", f"<!-- /{result.name} -->"
    body = f"{first}\n{section(result, f'images/{image.name}')}{last}"
    place = re.compile(f"{re.escape(first)}.*?{re.escape(last)}", re.DOTALL)
    text = place.sub(lambda _: body, text) if place.search(text) else f"{text.rstrip()}\n\n{body}\n"
    files.write_text(path, text)
