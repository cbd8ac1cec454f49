"""Reads Wavefront models (.obj with .mtl and textures) into arrays: one surface for every material.

Format: http://paulbourke.net/dataformats/obj/ and .../mtl/. Read are positions, texture coordinates, faces of any
number of corners, in all their spellings (`1`, `1/2`, `1//3`, `1/2/3`, negative ones), and of materials the diffuse
and specular colours, opacity and the diffuse texture. Normals are not: many files have none, or wrong ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

GREY = (0.8, 0.8, 0.8)


@dataclass(frozen=True, slots=True)
class Material:
    """How a surface looks: colours (r, g, b) and opacity in 0..1, and its texture's file name, if it has one."""

    colour: tuple[float, float, float] = GREY
    specular: float = 0.0
    shininess: float = 10.0
    opacity: float = 1.0
    texture: str = ""


@dataclass(frozen=True, slots=True)
class Surface:
    """All faces of one material.

    Attributes:
        material: how they look.
        points: (N, 3) corners.
        coordinates: (N, 2) where the corners lie in the texture; empty, (0, 2), if the faces do not say.
        faces: of every face the numbers of its corners.
    """

    material: Material
    points: NDArray[np.float64]
    coordinates: NDArray[np.float64]
    faces: list[list[int]]


@dataclass(slots=True)
class _Faces:
    """The faces of one material while they are read; `corners` numbers every (point, coordinate) used."""

    corners: dict[tuple[int, int], int] = field(default_factory=dict)
    faces: list[list[int]] = field(default_factory=list)


def read_model(files: Mapping[str, bytes], model: str) -> list[Surface]:
    """The surfaces of a model; faces that make no sense are left out.

    Args:
        files: its files by name.
        model: name of the .obj file.

    Raises:
        ValueError: a position or a face is not made of numbers, or there is no file of that name.
    """
    if model not in files:
        raise ValueError(f"no file {model}")
    materials: dict[str, Material] = {}
    for name, data in files.items():
        if name.lower().endswith(".mtl"):
            materials |= read_materials(data, files)
    points: list[list[float]] = []
    coordinates: list[list[float]] = []
    parts: dict[str, _Faces] = {}
    used = ""
    for line in _lines(files[model]):
        word, _, rest = line.partition(" ")
        if word == "v":
            points.append([float(value) for value in rest.split()[:3]])
        elif word == "vt":
            coordinates.append([float(value) for value in (*rest.split(), "0")[:2]])
        elif word == "usemtl":
            used = rest.strip()
        elif word == "f":
            _add_face(parts.setdefault(used, _Faces()), rest.split(), len(points), len(coordinates))
    places = np.array(points, dtype=np.float64).reshape(-1, 3)
    spots = np.array(coordinates, dtype=np.float64).reshape(-1, 2)
    return [
        _surface(materials.get(name, Material()), part, places, spots) for name, part in parts.items() if part.faces
    ]


def read_materials(mtl: bytes, files: Mapping[str, bytes]) -> dict[str, Material]:
    """The materials of a .mtl file by name; textures that are not among the files are left out."""
    known = {PurePosixPath(name).name.lower(): name for name in files}
    found: dict[str, dict[str, str]] = {}
    values: dict[str, str] = {}
    for line in _lines(mtl):
        word, _, rest = line.partition(" ")
        if word == "newmtl":
            values = found.setdefault(rest.strip(), {})
        else:
            values[word.lower()] = rest.strip()
    return {name: _material(values, known) for name, values in found.items()}


def _material(values: Mapping[str, str], known: Mapping[str, str]) -> Material:
    (transparency,) = _numbers(values.get("tr", ""), (0.0,))
    (opacity,) = _numbers(values.get("d", ""), (1 - transparency,))
    texture = known.get(re.split(r"[\\/]", values.get("map_kd", ""))[-1].strip().lower(), "")
    red, green, blue = (1.0, 1.0, 1.0) if texture else _numbers(values.get("kd", ""), GREY)
    return Material(
        colour=(red, green, blue),  # a texture's own colours, not darkened by the material's
        specular=max(_numbers(values.get("ks", ""), (0.0, 0.0, 0.0))),
        shininess=_numbers(values.get("ns", ""), (10.0,))[0],
        opacity=min(max(opacity, 0.0), 1.0),
        texture=texture,
    )


def _numbers(text: str, default: tuple[float, ...]) -> tuple[float, ...]:
    try:
        found = tuple(float(value) for value in text.split()[: len(default)])
    except ValueError:
        return default
    return found if len(found) == len(default) else default


def _lines(data: bytes) -> list[str]:
    """The lines without comments and indents; one that ends in a backslash goes on in the next."""
    text = data.decode("latin-1").replace("\\\n", " ").replace("\\\r\n", " ").replace("\t", " ")
    return [kept for line in text.splitlines() if (kept := line.partition("#")[0].strip())]


def _add_face(part: _Faces, corners: list[str], points: int, coordinates: int) -> None:
    numbers = []
    for corner in corners:
        point, _, rest = corner.partition("/")
        spot = rest.partition("/")[0]
        key = (_number(point, points), _number(spot, coordinates) if spot else -1)
        if not 0 <= key[0] < points or key[1] >= coordinates:
            return
        numbers.append(part.corners.setdefault(key, len(part.corners)))
    if len(numbers) >= 3:
        part.faces.append(numbers)


def _number(text: str, count: int) -> int:
    """From 1 on, or from the last one back, to from 0 on."""
    value = int(text)
    return value - 1 if value > 0 else count + value


def _surface(
    material: Material, part: _Faces, points: NDArray[np.float64], coordinates: NDArray[np.float64]
) -> Surface:
    corners = np.array(list(part.corners), dtype=np.int64)
    spots = coordinates[:0]
    if len(coordinates) and (corners[:, 1] >= 0).any():
        spots = np.where(corners[:, 1:] >= 0, coordinates[np.maximum(corners[:, 1], 0)], 0.0)
    return Surface(material, points[corners[:, 0]], spots, part.faces)
