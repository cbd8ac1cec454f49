"""Wavefront files: all spellings of a face, materials, and what is damaged."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starflow.data.sets.glyphs2.wavefront import GREY, Material, read_materials, read_model
from tests.data.sets.glyphs2.conftest import CUBE, CUBE_COLOURS, CUBE_MATERIALS

SQUARE = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\nvn 0 0 1\n"
CORNER = st.sampled_from(["{v}", "{v}/{t}", "{v}//1", "{v}/{t}/1", "{n}", "{n}/{m}", "{n}/{m}/-1"])


@settings(deadline=None)
@given(st.lists(CORNER, min_size=4, max_size=4))
def test_all_spellings_of_a_face_are_the_same_square(spellings: list[str]) -> None:
    corners = [
        spelling.format(v=number, t=number, n=number - 5, m=number - 5) for number, spelling in enumerate(spellings, 1)
    ]
    (surface,) = read_model({"a.obj": f"{SQUARE}f {' '.join(corners)}\n".encode()}, "a.obj")
    assert surface.material == Material()
    shown = surface.points[surface.faces[0]]
    np.testing.assert_array_equal(shown, [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
    said = [spelling.count("/") > 0 and "//" not in spelling for spelling in spellings]
    for number, has in enumerate(said):
        if has:
            np.testing.assert_array_equal(surface.coordinates[surface.faces[0][number]], shown[number, :2])
    assert (len(surface.coordinates) > 0) == any(said)


def test_one_surface_for_every_material() -> None:
    surfaces = read_model({"cube.obj": CUBE.encode(), "cube.mtl": CUBE_MATERIALS.encode()}, "cube.obj")
    assert {surface.material.colour for surface in surfaces} == {*CUBE_COLOURS.values()}
    assert all(len(surface.faces) == 1 and len(surface.points) == 4 for surface in surfaces)


@pytest.mark.parametrize("face", ["f 1 2", "f 1 2 9", "f 1/9 2/1 3/1", "f -9 1 2"])
def test_a_face_that_makes_no_sense_is_left_out(face: str) -> None:
    assert read_model({"a.obj": f"{SQUARE}{face}\n".encode()}, "a.obj") == []


def test_comments_continued_lines_and_windows_ends() -> None:
    text = "# one\r\nv 0 0 0\r\nv 1 0 0 # end\r\n  v 1 1 0\r\nusemtl none\r\nf 1 \\\r\n 2 3\r\n"
    (surface,) = read_model({"a.obj": text.encode()}, "a.obj")
    assert surface.faces == [[0, 1, 2]]


def test_materials() -> None:
    mtl = b"""
    newmtl red
    Kd 1 0 0
    Ks 0.1 0.4 0.2
    Ns 96
    d 0.25
    newmtl glass
    Tr 0.75
    newmtl wood
    Kd 0.5 0.5 0.5
    map_Kd C:\\Documents and Settings\\Wood fine.JPG
    map_Bump bump.png
    newmtl lost
    Kd 0.2 0.3 x
    map_Kd gone.png
    """
    found = read_materials(mtl, {"wood fine.jpg": b"", "bump.png": b""})
    assert found["red"] == Material((1.0, 0.0, 0.0), 0.4, 96.0, 0.25)
    assert found["glass"] == Material(opacity=0.25)
    assert found["wood"] == Material((1.0, 1.0, 1.0), texture="wood fine.jpg")
    assert found["lost"] == Material(GREY)


@pytest.mark.parametrize("text", ["v 0 zero 0", f"{SQUARE}f 1 two 3", f"{SQUARE}f 1/a 2/b 3/c"])
def test_what_is_no_number_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"could not convert|invalid literal"):
        read_model({"a.obj": text.encode()}, "a.obj")
    with pytest.raises(ValueError, match=r"no file b\.obj"):
        read_model({"a.obj": text.encode()}, "b.obj")
