"""What a data set came to once it was read: counts, the first names of what is odd, and the sentences that say so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES_SHOWN = 3


@dataclass
class SetSummary:
    """Counts over the lines of an index: every image, what was skipped and what was not used.

    >>> summary = SetSummary()
    >>> summary.add({"name": "a.png", "caption": "a cat", "label": None, "at": ["a.png"]})
    >>> summary.add({"name": "b.png", "caption": "", "label": None, "at": ["b.png"]})
    >>> describe_set({**summary.to_json(), "heldout": 1})[1]
    'warning: 1 of 2 pictures have no caption: b.png'
    """

    pictures: int = 0
    captioned: int = 0
    skipped: int = 0
    uncaptioned: list[str] = field(default_factory=list)
    """The first names."""
    labels: Counter[str] = field(default_factory=Counter)
    unused: dict[str, list[Any]] = field(default_factory=dict)
    """By reason, how many and the first name."""
    notes: dict[str, list[Any]] = field(default_factory=dict)
    first_reason: str = ""
    """The first skipped image with its reason, as the end of a sentence."""

    def add(self, line: Mapping[str, Any]) -> None:
        """Count one line of an index."""
        if "unused" in line:
            _count(self.unused, line["reason"], line["unused"])
        elif "skipped" in line:
            self.skipped += 1
            self.first_reason = self.first_reason or f", the first: {line['skipped']}: {line['reason']}"
        else:
            self.pictures += 1
            self.captioned += bool(line["caption"].strip())
            if not line["caption"].strip() and len(self.uncaptioned) < NAMES_SHOWN:
                self.uncaptioned.append(line["name"])
            if line["label"]:
                self.labels[line["label"]] += 1
            if line.get("note"):
                _count(self.notes, line["note"], line["name"])

    def to_json(self) -> dict[str, Any]:
        """What info.json keeps."""
        counts = {"pictures": self.pictures, "captioned": self.captioned, "labelled": self.labels.total()}
        counts |= {"classes": len(self.labels), "skipped": self.skipped}
        return {**counts, "uncaptioned": self.uncaptioned, "unused": self.unused, "notes": self.notes}


def describe_set(info: Mapping[str, Any], where: Path | None = None) -> list[str]:
    """Say what `SetSummary.to_json` has counted: one line for the whole, and a warning for each thing that is odd.

    Args:
        info: the counts, with those of held-out images as `heldout`.
        where: the file that names what was skipped or not used.
    """
    count, captioned = info["pictures"], info["captioned"]
    unused = sum(number for number, _ in info["unused"].values())
    lines = [
        f"pictures: {count}, {info['heldout']} of them held out, {captioned} with and {count - captioned} without a "
        f"caption, {info['classes']} classes; {info['skipped']} skipped, {unused} other files and rows not used"
        + (f" ({where})" if where and (unused or info["skipped"]) else "")
    ]
    if captioned < count:
        more = ", ..." if count - captioned > len(info["uncaptioned"]) else ""
        lines.append(
            f"warning: {count - captioned} of {count} pictures have no caption: {', '.join(info['uncaptioned'])}{more}"
        )
    if 0 < info["labelled"] < count:
        lines.append(f"warning: {count - info['labelled']} of {count} pictures have no class")
    for kind, counts in (("warning", info["notes"]), ("not used", info["unused"])):
        for reason, (number, name) in counts.items():
            lines.append(f"{kind}: {number} {reason}: {name}{', ...' if number > 1 else ''}")
    return lines


def _count(counts: dict[str, list[Any]], reason: str, name: str) -> None:
    entry = counts.setdefault(reason, [0, name])
    entry[0] += 1
