"""Results are computed once and written as tables: measurements of every variant and seed, means, and a section.

An experiment is a set of variants, each run with several seeds. The measurements of a variant and seed are a JSON file,
written when they are done: the same command again computes those that are missing, then draws the plot and writes the
tables. What the numbers mean is written by a person, below the generated section of the document.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starflow.config import Dataclass, to_dict
from starflow.errors import UserError
from starflow.io import files

SEEDS = (0, 1, 2)

Measurements = dict[str, Any]
"""Of one variant and seed, ready for JSON."""

Table = list[list[str]]
"""Rows of cells, the heads first."""


def measure_once(
    folder: Path, name: str, compute: Callable[[], Measurements], log: Callable[[str], None]
) -> Measurements:
    """The measurements of that name, from their file or else computed and written."""
    path = folder / "cells" / f"{name}.json"
    if path.is_file():
        found: Measurements = files.read_json(path)
        return found
    log(name)
    found = compute()
    files.write_json(path, found)
    return found


def check_budget(folder: Path, budget: Dataclass) -> None:
    """Note what a folder's measurements are computed with.

    Raises:
        UserError: the folder holds measurements of another budget, which must not be mixed.
    """
    path, now = folder / "budget.json", to_dict(budget)
    before = files.read_json(path) if path.is_file() else now
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        raise UserError(f"{folder} was started with another {changed[0]}: choose another --output, or delete it")
    files.write_json(path, now)


@dataclass(frozen=True)
class Mean:
    """The mean of one measurement over seeds, with its standard error."""

    value: float
    error: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Mean:
        """Of at least one value; a single one has no error."""
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return Mean(statistics.fmean(values), error, len(values))

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.error:.2g}"


def mean_over_seeds(found: Sequence[Measurements], key: str, scale: float = 1.0) -> Mean:
    """The mean of one key's numbers, times `scale`; seeds without one (None) are left out, infinite without any."""
    values = [scale * float(one[key]) for one in found if one[key] is not None]
    return Mean.of(values or [math.inf])


@dataclass(frozen=True)
class Result:
    """An experiment's outcome: tables of what was measured, and what they were measured for."""

    name: str
    title: str
    claim: str
    """What the paper says."""
    tables: list[Table]
    command: str
    values: dict[str, Any]
    """Everything that was measured, for results.json."""


def write_result(folder: Path, result: Result) -> None:
    """Write results.json and section.md in the experiment's folder."""
    files.write_json(folder / "results.json", {"command": result.command, **result.values})
    files.write_text(folder / "section.md", section(result, f"{result.name}.png"))


def section(result: Result, plot: str) -> str:
    """The claim, the tables and the plot as Markdown."""
    parts = [
        f"## {result.title}",
        f"**The claim.** {result.claim}",
        *(markdown_table(table) for table in result.tables),
        f"![{result.title}]({plot})",
        f"Command: `{result.command}`.",
    ]
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """A table as Markdown."""
    heads, *rows = table
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def update_document(path: Path, result: Result, plot: Path) -> None:
    """Write the experiment's section where a document keeps its place, and the plot among the document's images.

    The place lies between `<!-- NAME -->` and `<!-- /NAME -->`; everything else stays as it is, above all the sentences
    that a person wrote below. A document without the place gets it at its end.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else "# Results\n"
    image = path.parent / "images" / f"results-{result.name}.png"
    files.write_bytes(image, plot.read_bytes())
    first, last = f"<!-- {result.name} -->", f"<!-- /{result.name} -->"
    body = f"{first}\n{section(result, f'images/{image.name}')}{last}"
    place = re.compile(f"{re.escape(first)}.*?{re.escape(last)}", re.DOTALL)
    text = place.sub(lambda _: body, text) if place.search(text) else f"{text.rstrip()}\n\n{body}\n"
    files.write_text(path, text)
