"""Draw the rooms of the package and who imports whom, from the imports themselves.

    python docs/draw_architecture.py [FILE.svg]      # docs/images/architecture.svg by default; `make docs` does it

An arrow from A to B says that a file of A imports a file of B. An arrow that follows from others (A to B where A also
reaches B through C) is left out, so that the picture can be read. Where a room stands is laid out by hand below; which
arrows there are is read from the syntax trees, and an arrow that would go up is an error.
"""

from __future__ import annotations

import ast
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "src" / "starflow"
PICTURE = HERE / "images" / "architecture.svg"

ABOUT = {
    "cli": "the commands",
    "serve": "HTTP and web page",
    "bench": "speed, measured",
    "train": "recipes and runs",
    "evaluate": "distances, scores",
    "pipeline": "StarFlowPipeline",
    "edit": "inpaint and vary",
    "density": "vectors, sequences",
    "data": "pictures, captions",
    "conditioning": "prompts to tokens",
    "latents": "pixels to latents",
    "published": "published weights",
    "sampling": "noise to data",
    "flow": "data to noise",
    "nn": "Transformer layers",
    "config": "typed settings",
    "io": "files, weights, hub",
    "errors": "a user's mistake",
}
"""Every room that is drawn, and what is in it, in a few words."""

NOT_DRAWN = ("__init__", "__main__", "__version__", "bundled")

TIERS: tuple[tuple[str, dict[str, float]], ...] = (
    ("use", {"cli": 0, "serve": 3}),
    ("train and\nmeasure", {"bench": 0, "train": 1, "evaluate": 2}),
    ("all parts\nin one", {"pipeline": 2}),
    ("uses of\nthe flow", {"edit": 2, "density": 4}),
    ("parts of\na pipeline", {"data": 0, "conditioning": 1, "latents": 2, "published": 3, "sampling": 4}),
    ("the model", {"flow": 3}),
    ("foundation", {"io": 0.5, "config": 2, "nn": 3}),
    ("", {"errors": 1.25}),
)
"""From the top: what a row is called, and its rooms, each with the column that it stands in."""

COLUMN, ROW, BOX_WIDTH, BOX_HEIGHT = 156, 98, 142, 56
LEFT, TOP, MARGIN = 104, 28, 20
COLOURS = ("#3b4cc0", "#2f6fc4", "#1f8ac0", "#12998f", "#2f9e63", "#7a9a2e", "#b9812a", "#8c8c8c")
ARROW = "#5b6675"


@dataclass(frozen=True)
class Box:
    """A room on the picture; x and y are its centre, in pixels."""

    room: str
    tier: int
    x: float
    y: float
    colour: str

    @property
    def top(self) -> float:
        return self.y - BOX_HEIGHT / 2

    @property
    def bottom(self) -> float:
        return self.y + BOX_HEIGHT / 2


Arrow = tuple[str, str]


def main(arguments: Sequence[str]) -> None:
    path = Path(arguments[0]) if arguments else PICTURE
    text = draw(read_imports(PACKAGE))
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def read_imports(package: Path) -> dict[str, set[str]]:
    """The rooms that each room imports, itself aside; imports inside functions and for types count too."""
    graph: dict[str, set[str]] = {}
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        if room in NOT_DRAWN:
            continue
        found = set(_rooms_named(ast.parse(path.read_text(encoding="utf-8"))))
        graph.setdefault(room, set()).update(found - {room, *NOT_DRAWN})
    return graph


def _rooms_named(tree: ast.Module) -> Iterator[str]:
    """The rooms of every absolute import (the package has no others, which tests/test_imports.py holds)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "starflow":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("starflow."):
            yield (node.module or "").split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("starflow."))


def arrows(graph: dict[str, set[str]]) -> list[Arrow]:
    """The imports that do not follow from others: the transitive reduction."""
    below = {room: _reached(graph, room) for room in graph}
    return sorted(
        (room, target)
        for room, targets in graph.items()
        for target in targets
        if not any(target in below.get(other, set()) for other in targets - {target})
    )


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph.get(waiting.pop(), set()) - seen
        seen |= new
        waiting += new
    return seen


def place(rooms: set[str]) -> dict[str, Box]:
    """The boxes of the rooms that exist; a row without any takes no space."""
    known = {room for _, row in TIERS for room in row}
    if rooms - known:
        raise SystemExit(f"draw_architecture.py: no place for {sorted(rooms - known)}: add them to ABOUT and TIERS")
    used = [row for _, row in TIERS if rooms & set(row)]
    boxes = {}
    for tier, row in enumerate(used):
        colour = COLOURS[next(i for i, (_, other) in enumerate(TIERS) if other is row)]
        for room in rooms & set(row):
            x = LEFT + COLUMN * row[room] + BOX_WIDTH / 2
            boxes[room] = Box(room, tier, x, TOP + ROW * tier + BOX_HEIGHT / 2, colour)
    return boxes


def draw(graph: dict[str, set[str]]) -> str:
    """The picture as SVG. Every room is a `<g data-room>`, every arrow a `<path data-from data-to>`."""
    boxes = place(set(graph) | {target for targets in graph.values() for target in targets})
    drawn = arrows(graph)
    for start, end in drawn:
        if boxes[start].tier > boxes[end].tier:
            raise SystemExit(f"draw_architecture.py: {start} imports {end}, which stands above it")
    width = max(box.x for box in boxes.values()) + BOX_WIDTH / 2 + MARGIN
    height = max(box.bottom for box in boxes.values()) + TOP
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            f'height="{height:g}" font-family="system-ui, -apple-system, \'Segoe UI\', Helvetica, Arial, sans-serif">',
            "<title>The rooms of starflow and what they import</title>",
            f'<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="9" markerHeight="9" '
            f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 1 L9 5 L0 9 z" fill="{ARROW}"/></marker></defs>',
            f'<rect width="{width:g}" height="{height:g}" rx="14" fill="#ffffff"/>',
            *_bands(boxes, width),
            f'<g fill="none" stroke="{ARROW}" stroke-width="1.5" marker-end="url(#head)">',
            *(_arrow(boxes, drawn, arrow) for arrow in drawn),
            "</g>",
            *(_box(box) for box in sorted(boxes.values(), key=lambda box: (box.tier, box.x))),
            "</svg>",
            "",
        ]
    )


def _bands(boxes: dict[str, Box], width: float) -> Iterator[str]:
    """A tinted band behind each row, with the row's name at its left."""
    for name, row in TIERS:
        present = [boxes[room] for room in row if room in boxes]
        if not present:
            continue
        box = present[0]
        yield (
            f'<rect x="{MARGIN / 2:g}" y="{box.top - 13:g}" width="{width - MARGIN:g}" height="{BOX_HEIGHT + 26:g}" '
            f'rx="10" fill="{box.colour}" fill-opacity="0.07"/>'
        )
        lines = name.split("\n")
        for number, line in enumerate(lines):
            y = box.y + 4 + 16 * (number - (len(lines) - 1) / 2)
            yield f'<text x="{MARGIN}" y="{y:g}" font-size="12.5" fill="{box.colour}">{escape(line)}</text>'


def _box(box: Box) -> str:
    return (
        f'<g data-room="{box.room}"><rect x="{box.x - BOX_WIDTH / 2:g}" y="{box.top:g}" width="{BOX_WIDTH}" '
        f'height="{BOX_HEIGHT}" rx="9" fill="#ffffff" stroke="{box.colour}" stroke-width="1.6"/>'
        f'<text x="{box.x:g}" y="{box.y - 3:g}" text-anchor="middle" font-size="17" font-weight="650" '
        f'fill="{box.colour}">{box.room}</text><text x="{box.x:g}" y="{box.y + 17:g}" text-anchor="middle" '
        f'font-size="12" fill="#3d4550">{escape(ABOUT[box.room])}</text></g>'
    )


def _arrow(boxes: dict[str, Box], drawn: Sequence[Arrow], arrow: Arrow) -> str:
    start, end = (boxes[room] for room in arrow)
    if start.tier == end.tier:
        side = 1 if end.x > start.x else -1
        path = f"M{start.x + side * BOX_WIDTH / 2:g} {start.y:g} L{end.x - side * (BOX_WIDTH / 2 + 1):g} {end.y:g}"
    else:
        points = [(_port(boxes, drawn, arrow, out=True), start.bottom)]
        for tier in range(start.tier + 1, end.tier):
            points += _way_through(boxes, tier, start, end)
        points.append((_port(boxes, drawn, arrow, out=False), end.top - 1))
        path = f"M{points[0][0]:g} {points[0][1]:g}"
        for (x, y), (next_x, next_y) in itertools.pairwise(points):
            middle = (y + next_y) / 2
            path += f" C{x:g} {middle:g} {next_x:g} {middle:g} {next_x:g} {next_y:g}"
    return f'<path data-from="{arrow[0]}" data-to="{arrow[1]}" d="{path}"/>'


def _port(boxes: dict[str, Box], drawn: Sequence[Arrow], arrow: Arrow, *, out: bool) -> float:
    """Where an arrow leaves or enters its box: those of one side stand apart, in the order of their other ends."""
    here, there = (0, 1) if out else (1, 0)
    box = boxes[arrow[here]]
    beside = [one for one in drawn if one[here] == box.room and boxes[one[there]].tier != box.tier]
    beside.sort(key=lambda one: boxes[one[there]].x)
    step = min(24.0, (BOX_WIDTH - 36) / max(len(beside) - 1, 1))
    return box.x + step * (beside.index(arrow) - (len(beside) - 1) / 2)


def _way_through(boxes: dict[str, Box], tier: int, start: Box, end: Box) -> list[tuple[float, float]]:
    """Two points, above and below a row that an arrow passes, where no box stands: the nearest to a straight line."""
    row = [box for box in boxes.values() if box.tier == tier]
    share = (tier - start.tier) / (end.tier - start.tier)
    wanted = start.x + share * (end.x - start.x)
    clear = BOX_WIDTH / 2 + 12
    candidates = [wanted, start.x, end.x, *(box.x + side * clear for box in row for side in (-1, 1))]
    free = [x for x in candidates if all(abs(x - box.x) >= clear for box in row)]
    x = min(free, key=lambda x: abs(x - wanted))
    return [(x, row[0].top), (x, row[0].bottom)]


if __name__ == "__main__":
    main(sys.argv[1:])
