"""Models: every side is the side that its caption says, and a named colour is the colour that is seen."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from starflow.data.sets.glyphs2.icons import ICON_COLOURS
from starflow.data.sets.glyphs2.models import SIDES, BadModel, View, draw_model
from tests.data.sets.glyphs2.conftest import CUBE, CUBE_COLOURS, CUBE_MATERIALS

SIZE = 48
FILES = {"cube.obj": CUBE.encode(), "cube.mtl": CUBE_MATERIALS.encode()}
PLAIN = {
    "cube.obj": "".join(f"{line}\n" for line in CUBE.splitlines() if not line.startswith("usemtl")).encode(),
    "cube.mtl": b"newmtl grey\nKd 0.6 0.6 0.6\nKs 0 0 0\n",
}


def draw(files: dict[str, bytes], rotation: tuple[float, ...] = ()) -> list[View]:
    pytest.importorskip("vtkmodules")
    return list(draw_model(files, "cube.obj", rotation, "test/cube", SIZE))


def pixels(view: View) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(view.png)).convert("RGBA")).astype(float)


def seen(view: View, colour: tuple[int, int, int]) -> float:
    """Share of what is visible that has the hue of a colour of zeros and ones."""
    rgba = pixels(view)
    visible = rgba[..., 3] > 200
    levels = rgba[visible][:, :3] / np.maximum(rgba[visible][:, :3].max(-1, keepdims=True), 1)
    return float((np.abs(levels - np.array(colour)).max(-1) < 0.25).mean())


@pytest.mark.parametrize(
    ("caption", "face"),
    [
        ("from the front", "front"),
        ("from behind", "behind"),
        ("from the right", "right"),
        ("from the left", "left"),
        ("from the top", "top"),
    ],
)
def test_a_side_shows_its_face(caption: str, face: str) -> None:
    view = next(view for view in draw(FILES) if view.side.caption == caption and not view.colour)
    shares = {name: seen(view, colour) for name, colour in CUBE_COLOURS.items()}
    assert max(shares, key=lambda name: shares[name]) == face
    assert shares[face] > 0.6


@pytest.mark.parametrize(
    ("caption", "faces"),
    [
        ("from the front right", {"front", "right"}),
        ("from the front left", {"front", "left"}),
        ("from behind on the right", {"behind", "right"}),
        ("from behind on the left", {"behind", "left"}),
        ("from above", {"front", "top"}),
        ("from below", {"front", "below"}),
    ],
)
def test_a_corner_shows_both_its_faces(caption: str, faces: set[str]) -> None:
    for view in (view for view in draw(FILES) if view.side.caption == caption and not view.colour):
        shares = {name: seen(view, colour) for name, colour in CUBE_COLOURS.items()}
        assert all(shares[face] > 0.1 for face in faces), shares


def test_a_rotation_turns_the_model_to_the_front() -> None:
    to_the_back = (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
    front = draw(FILES, to_the_back)[0]
    assert seen(front, CUBE_COLOURS["behind"]) > 0.6


def test_twelve_sides_then_the_recoloured_ones() -> None:
    views = draw(PLAIN)
    assert [view.side for view in views[:12]] == list(SIDES)
    assert len({view.number for view in views}) == len(views) == 16
    for view in views[12:]:
        wanted = np.array(ICON_COLOURS[view.colour], dtype=float)
        rgba = pixels(view)
        found = rgba[rgba[..., 3] > 200][:, :3].mean(0)
        assert np.argmax(found) == np.argmax(wanted) or np.ptp(wanted) < 20, view.colour
    assert [view.png for view in views] == [view.png for view in draw(PLAIN)], "the same every time"


def test_a_side_that_is_too_thin_is_left_out() -> None:
    flat = PLAIN["cube.obj"].replace(b" -1\n", b" -0.02\n").replace(b" 1\n", b" 0.02\n")
    seen_from = {view.side.caption for view in draw(PLAIN | {"cube.obj": flat})}
    assert {"from the front", "from behind", "from above"} <= seen_from
    assert seen_from.isdisjoint({"from the left", "from the right", "from the top"})


def test_a_small_part_does_not_lend_the_thing_its_colour() -> None:
    assert [view.colour for view in draw(FILES) if view.colour] == [], "of six faces one is painted"


def test_a_texture_is_read_and_a_lost_one_is_not_missed() -> None:
    picture = Image.new("RGB", (4, 4), (0, 200, 0))
    data = io.BytesIO()
    picture.save(data, format="PNG")
    lines = []
    for line in CUBE.splitlines():
        points = line.split()[1:]
        textured = " ".join(f"{point}/{number}" for number, point in enumerate(points, start=1))
        lines.append(f"f {textured}" if line.startswith("f ") else line)
    faces = "\n".join(["vt 0 0", "vt 1 0", "vt 1 1", "vt 0 1", *lines, ""])
    with_texture = CUBE_MATERIALS.replace("newmtl front\n", "newmtl front\nmap_Kd C:\\wood\\Green.png\n")
    files = {"cube.obj": faces.encode(), "cube.mtl": with_texture.encode()}
    assert seen(draw(files)[0], (1, 0, 0)) > 0.6, "the texture is not there: its own red"
    assert seen(draw(files | {"green.png": data.getvalue()})[0], (1, 0, 0)) < 0.1


def test_nothing_to_see_is_told() -> None:
    with pytest.raises(BadModel, match=r"no surfaces|nothing of it is visible"):
        draw({"cube.obj": b"v 0 0 0\n", "cube.mtl": b""})
    with pytest.raises(BadModel, match="it cannot be read"):
        draw({"cube.obj": b"v one two three\n"})
