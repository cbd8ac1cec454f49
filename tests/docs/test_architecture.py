"""The picture of the architecture agrees with the imports, and nothing on it overlaps."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import pytest
from PIL import ImageFont

from docs.draw_architecture import ABOUT, NOT_DRAWN, PACKAGE, PICTURE, TIERS, arrows, draw, read_imports
from tests.test_imports import ROOT, files, read, room_of, rooms_imported

Graph = dict[str, set[str]]
SVG = "{http://www.w3.org/2000/svg}"
COMMITTED = PICTURE.read_text(encoding="utf-8")


def imports() -> Graph:
    """The graph of rooms as tests/test_imports.py reads it, which knows more forms of imports."""
    graph: Graph = {}
    for path in files():
        room = room_of(path)
        if room not in NOT_DRAWN:
            package = ".".join(["starflow", *path.split("/")[:-1]])
            found = read((ROOT / path).read_text(), package).found
            targets = {target for one in found for target in rooms_imported(one)}
            graph.setdefault(room, set()).update(targets - {room, *NOT_DRAWN})
    return graph


def reached(graph: Graph) -> Graph:
    """What each room reaches over any number of imports."""
    closed = {room: set(targets) for room, targets in graph.items()}
    for middle in closed:
        for room in closed:
            if middle in closed[room]:
                closed[room] |= closed[middle]
    return closed


def drawn(svg: str) -> tuple[Graph, set[str]]:
    """The arrows and the rooms of a picture."""
    root = ElementTree.fromstring(svg)
    graph: Graph = {}
    for path in root.iter(f"{SVG}path"):
        if "data-from" in path.attrib:
            graph.setdefault(path.attrib["data-from"], set()).add(path.attrib["data-to"])
    return graph, {group.attrib["data-room"] for group in root.iter(f"{SVG}g") if "data-room" in group.attrib}


def test_the_committed_picture_is_that_of_the_imports() -> None:
    assert draw(read_imports(PACKAGE)) == COMMITTED, "the imports have changed: run `make docs` and commit the picture"


def test_its_rooms_and_what_they_reach_are_those_of_the_imports() -> None:
    graph, rooms = drawn(COMMITTED)
    expected = imports()
    assert rooms == set(expected)
    assert reached({room: graph.get(room, set()) for room in rooms}) == reached(expected)


def test_no_arrow_follows_from_others() -> None:
    graph, rooms = drawn(COMMITTED)
    whole = reached({room: graph.get(room, set()) for room in rooms})
    for room, targets in graph.items():
        for target in targets:
            less = {one: graph.get(one, set()) - ({target} if one == room else set()) for one in rooms}
            assert reached(less) != whole, f"{room} -> {target} is implied"


def test_arrows_in_closed_form() -> None:
    chain: Graph = {"cli": {"flow", "nn", "pipeline"}, "pipeline": {"flow", "nn"}, "flow": {"nn"}, "nn": set()}
    assert arrows(chain) == [("cli", "pipeline"), ("flow", "nn"), ("pipeline", "flow")]


def test_an_import_that_goes_up_is_refused() -> None:
    with pytest.raises(SystemExit, match="nn imports flow, which stands above it"):
        draw({"flow": set(), "nn": {"flow"}})


def test_a_room_without_a_place_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"no place for \['attic'\]"):
        draw({"attic": set()})
    assert {room for _, row in TIERS for room in row} == set(ABOUT)


def everything() -> str:
    """A picture of all rooms there will be, with many imports."""
    below = [list(row) for _, row in TIERS]
    graph = {
        room: set(below[tier + 1]) if tier + 1 < len(below) else set() for tier, row in enumerate(below) for room in row
    }
    graph["cli"].add("density")
    graph["pipeline"].add("data")
    graph["data"].add("errors")
    return draw(graph)


@pytest.mark.parametrize("svg", [COMMITTED, everything()], ids=["now", "everything"])
def test_nothing_overlaps(svg: str) -> None:
    root = ElementTree.fromstring(svg)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    boxes: dict[str, tuple[float, float, float, float]] = {}
    for group in root.iter(f"{SVG}g"):
        if "data-room" in group.attrib:
            (rect,) = group.iter(f"{SVG}rect")
            x, y, w, h = (float(rect.attrib[key]) for key in ("x", "y", "width", "height"))
            boxes[group.attrib["data-room"]] = (x, y, x + w, y + h)
            for text in group.iter(f"{SVG}text"):
                assert width_of(text) < w - 8, text.text
    for left, top, right, bottom in boxes.values():
        assert 0 < left < right < width
        assert 0 < top < bottom < height
        assert [(a, b, c, d) for a, b, c, d in boxes.values() if a < right and c > left and b < bottom and d > top] == [
            (left, top, right, bottom)
        ]
    for path in root.iter(f"{SVG}path"):
        if "data-from" in path.attrib:
            others = [
                box for room, box in boxes.items() if room not in (path.attrib["data-from"], path.attrib["data-to"])
            ]
            for x, y in points(path.attrib["d"]):
                assert not any(a < x < c and b < y < d for a, b, c, d in others), path.attrib


def width_of(text: ElementTree.Element) -> float:
    """In DejaVu, which is wider than what a browser usually takes."""
    weight = "-Bold" if "font-weight" in text.attrib else ""
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"DejaVuSans{weight}.ttf"
    return ImageFont.truetype(str(font), 100).getlength(text.text or "") * float(text.attrib["font-size"]) / 100


def points(path: str) -> list[tuple[float, float]]:
    """Points along a path of straight lines and cubic curves."""
    numbers = [[float(one) for one in part.split()] for part in re.findall(r"[MLC]([^MLC]+)", path)]
    x, y = numbers[0]
    found = []
    for part in numbers[1:]:
        curve = [x, y, *part] if len(part) == 6 else [x, y, x, y, *part, *part]
        for t in (step / 40 for step in range(41)):
            weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
            found.append(tuple(sum(w * curve[2 * i + axis] for i, w in enumerate(weights)) for axis in (0, 1)))
        x, y = part[-2:]
    return found  # type: ignore[return-value]
