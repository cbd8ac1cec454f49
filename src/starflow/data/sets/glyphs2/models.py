"""Draws Wavefront models from all sides with VTK (an optional package, BSD licence), without a screen.

The front of a model faces +z, up is +y, as in Sweet Home 3D. Every side is drawn in the model's own materials;
a few sides more are drawn with its largest material in another colour, if that changes enough of the picture for the
colour to be told.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from starflow.data.sets.glyphs2.drawings import MARGIN, square
from starflow.data.sets.glyphs2.icons import ICON_COLOURS
from starflow.data.sets.glyphs2.wavefront import Material, Surface, read_model
from starflow.data.sources.base import unit_hash

AMBIENT = 0.15
FEATURE_ANGLE = 40.0
MOST_SPECULAR = 0.3
LARGEST_TEXTURE = 1024
VIEW_ANGLE = 22.0
OVERSAMPLING = 2
RECOLOURED_VIEWS = 4
LEAST_RECOLOURED = 0.55
"""Share of what is seen that must take on a colour before a caption calls the thing by it."""
THINNEST = 0.15
"""Height to width, or width to height, of what is seen: what is thinner, such as a window from above, tells nothing."""
LEAST_VISIBLE = 0.01
"""Share of the square, before cropping, that a model must cover: what covers less came out empty or cut."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Side:
    """Where the camera stands: degrees around the model (0 in front, 90 on the viewer's right) and above it."""

    azimuth: float
    elevation: float
    caption: str

    @property
    def mirrors(self) -> bool:
        """Whether a mirror image is seen from the same side."""
        return "left" not in self.caption and "right" not in self.caption


SIDES = (
    Side(0, 15, "from the front"),
    Side(45, 15, "from the front right"),
    Side(90, 15, "from the right"),
    Side(135, 15, "from behind on the right"),
    Side(180, 15, "from behind"),
    Side(225, 15, "from behind on the left"),
    Side(270, 15, "from the left"),
    Side(315, 15, "from the front left"),
    Side(30, 45, "from above"),
    Side(330, 45, "from above"),
    Side(0, 85, "from the top"),
    Side(30, -25, "from below"),
)


@dataclass(frozen=True, slots=True)
class View:
    """One picture of a model: the side, the colour its largest material was given ("" for its own), and the PNG."""

    number: int
    side: Side
    colour: str
    png: bytes


class BadModel(Exception):
    """A model that cannot be read, or that shows nothing."""


def draw_model(
    files: Mapping[str, bytes], model: str, rotation: tuple[float, ...], name: str, size: int
) -> Iterator[View]:
    """All views of a model, from `SIDES` and then recoloured; sides from which it is too thin to tell are left out.

    Args:
        files: the model's files by name: .obj, .mtl, textures.
        model: name of the .obj file.
        rotation: 3x3 matrix, row by row, that turns the model to face +z; or empty.
        name: the colours and sides of the recoloured views are drawn by its hash.
        size: side of the pictures, pixels.

    Raises:
        BadModel: it cannot be read, or shows nothing.
    """
    scene = _Scene(files, model, rotation, size)
    pictures = [scene.picture(side) for side in SIDES]
    if max(_covered(picture) for picture in pictures) < LEAST_VISIBLE:
        raise BadModel("nothing of it is visible")
    told = [number for number, picture in enumerate(pictures) if _slimness(picture) >= THINNEST]
    for number in told:
        yield View(number, SIDES[number], "", _png(pictures[number], size))
    colours = sorted(ICON_COLOURS, key=lambda colour: unit_hash(f"{name}:{colour}"))
    order = sorted(range(len(SIDES)), key=lambda number: unit_hash(f"{name}:{number}"))
    for number, colour in list(zip(order, colours, strict=False))[:RECOLOURED_VIEWS]:
        if number not in told:
            continue
        with_colour = scene.picture(SIDES[number], colour)
        if _changed(pictures[number], with_colour) >= LEAST_RECOLOURED:
            yield View(len(SIDES) + number, SIDES[number], colour, _png(with_colour, size))


class _Scene:
    """A model that VTK has read, ready to be drawn from any side."""

    def __init__(self, files: Mapping[str, bytes], model: str, rotation: tuple[float, ...], size: int) -> None:
        import vtkmodules.vtkRenderingOpenGL2  # noqa: F401  # registers what draws
        from vtkmodules.vtkCommonCore import vtkLogger
        from vtkmodules.vtkRenderingCore import vtkRenderer, vtkRenderWindow

        vtkLogger.SetStderrVerbosity(vtkLogger.VERBOSITY_OFF)  # it says that there is no screen

        self.side = size * OVERSAMPLING
        self.renderer: Any = vtkRenderer()
        self.window: Any = vtkRenderWindow()
        self.window.SetOffScreenRendering(1)
        self.window.SetSize(self.side, self.side)
        self.window.SetAlphaBitPlanes(1)
        self.window.SetMultiSamples(0)
        self.window.AddRenderer(self.renderer)
        self.renderer.SetBackgroundAlpha(0.0)
        self.renderer.SetUseDepthPeeling(1)
        self.renderer.SetMaximumNumberOfPeels(8)
        try:
            surfaces = read_model(files, model)
        except ValueError as error:
            raise BadModel(f"it cannot be read: {error}") from None
        self.actors = [_actor(surface, files, rotation) for surface in surfaces]
        if not self.actors:
            raise BadModel("it holds no surfaces")
        for actor in self.actors:
            self.renderer.AddActor(actor)
        self.largest = _largest_material(surfaces, self.actors)
        _light(self.renderer)

    def picture(self, side: Side, colour: str = "") -> Pixels:
        """RGBA pixels (size, size, 4), the largest material in `colour` if one is named."""
        from vtkmodules.util.numpy_support import vtk_to_numpy
        from vtkmodules.vtkRenderingCore import vtkWindowToImageFilter

        self._look_from(side)
        with _painted(self.largest, colour):
            self.window.Render()
            grab = vtkWindowToImageFilter()
            grab.SetInput(self.window)
            grab.SetInputBufferTypeToRGBA()
            grab.ShouldRerenderOff()
            grab.ReadFrontBufferOff()
            grab.Update()
        flat = vtk_to_numpy(grab.GetOutput().GetPointData().GetScalars())
        return np.asarray(flat.reshape(self.side, self.side, 4)[::-1]).copy()

    def _look_from(self, side: Side) -> None:
        """Put the camera so far away that the model's bounding sphere fits the picture."""
        bounds = np.array(self.renderer.ComputeVisiblePropBounds()).reshape(3, 2)
        centre, radius = bounds.mean(1), float(np.linalg.norm(np.ptp(bounds, axis=1))) / 2
        azimuth, elevation = np.deg2rad(side.azimuth), np.deg2rad(side.elevation)
        towards = np.array(
            [np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)]
        )
        distance = max(radius, 1e-6) / np.sin(np.deg2rad(VIEW_ANGLE / 2))
        camera = self.renderer.GetActiveCamera()
        camera.SetViewAngle(VIEW_ANGLE)
        camera.SetFocalPoint(*centre)
        camera.SetPosition(*(centre + distance * towards))
        camera.SetViewUp(0, 1, 0)
        self.renderer.ResetCameraClippingRange()


def _actor(surface: Surface, files: Mapping[str, bytes], rotation: tuple[float, ...]) -> Any:
    """A surface as VTK draws it: smooth, but for edges sharper than `FEATURE_ANGLE`."""
    from vtkmodules.vtkFiltersCore import vtkPolyDataNormals, vtkTriangleFilter
    from vtkmodules.vtkRenderingCore import vtkActor, vtkPolyDataMapper

    triangles, normals = vtkTriangleFilter(), vtkPolyDataNormals()
    triangles.SetInputData(_poly_data(surface))
    normals.SetInputConnection(triangles.GetOutputPort())
    normals.SetFeatureAngle(FEATURE_ANGLE)
    normals.ConsistencyOff()
    mapper = vtkPolyDataMapper()
    mapper.SetInputConnection(normals.GetOutputPort())
    actor = vtkActor()
    actor.SetMapper(mapper)
    look, paint = surface.material, actor.GetProperty()
    paint.SetColor(*look.colour)
    paint.SetAmbient(AMBIENT)
    paint.SetSpecular(min(look.specular, MOST_SPECULAR))
    paint.SetSpecularPower(min(max(look.shininess, 1.0), 128.0))
    paint.SetOpacity(look.opacity)
    if look.texture and len(surface.coordinates):
        actor.SetTexture(_texture(files[look.texture]))
    if rotation:
        actor.SetUserMatrix(_matrix(rotation))
    return actor


def _poly_data(surface: Surface) -> Any:
    from vtkmodules.util.numpy_support import numpy_to_vtk, numpy_to_vtkIdTypeArray
    from vtkmodules.vtkCommonCore import vtkPoints
    from vtkmodules.vtkCommonDataModel import vtkCellArray, vtkPolyData

    points, cells, data = vtkPoints(), vtkCellArray(), vtkPolyData()
    points.SetData(numpy_to_vtk(surface.points, deep=True))
    ends = np.cumsum([0, *map(len, surface.faces)]).astype(np.int64)
    corners = np.fromiter((corner for face in surface.faces for corner in face), dtype=np.int64)
    cells.SetData(numpy_to_vtkIdTypeArray(ends, deep=True), numpy_to_vtkIdTypeArray(corners, deep=True))
    data.SetPoints(points)
    data.SetPolys(cells)
    if len(surface.coordinates):
        spots = numpy_to_vtk(surface.coordinates, deep=True)
        data.GetPointData().SetTCoords(spots)
    return data


def _texture(data: bytes) -> Any:
    """A texture; None if its file cannot be decoded."""
    from vtkmodules.util.numpy_support import numpy_to_vtk
    from vtkmodules.vtkCommonDataModel import vtkImageData
    from vtkmodules.vtkRenderingCore import vtkTexture

    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("RGBA" if opened.has_transparency_data else "RGB")
    except (OSError, ValueError, SyntaxError):
        return None
    image.thumbnail((LARGEST_TEXTURE, LARGEST_TEXTURE))
    pixels = np.asarray(image)[::-1]
    picture = vtkImageData()
    picture.SetDimensions(image.width, image.height, 1)
    picture.GetPointData().SetScalars(numpy_to_vtk(pixels.reshape(-1, pixels.shape[2]), deep=True))
    texture = vtkTexture()
    texture.SetInputData(picture)
    texture.InterpolateOn()
    texture.MipmapOn()
    return texture


def _largest_material(surfaces: list[Surface], actors: list[Any]) -> list[Any]:
    """What is drawn in the material that has the largest area; see-through ones do not count."""
    areas: dict[Material, float] = {}
    for surface in surfaces:
        if surface.material.opacity >= 0.9:
            areas[surface.material] = areas.get(surface.material, 0.0) + _area(surface)
    largest = max(areas, key=lambda material: areas[material], default=None)
    return [actor for surface, actor in zip(surfaces, actors, strict=True) if surface.material == largest]


def _area(surface: Surface) -> float:
    """The area of all faces, each taken as a fan of triangles."""
    fans = [(face[0], one, other) for face in surface.faces for one, other in pairwise(face[1:])]
    first, second, third = (surface.points[[fan[corner] for fan in fans]] for corner in range(3))
    return float(np.linalg.norm(np.cross(second - first, third - first), axis=-1).sum()) / 2


@contextmanager
def _painted(actors: list[Any], colour: str) -> Iterator[None]:
    """Within the block the surfaces have one colour, without textures; "" changes nothing."""
    from vtkmodules.vtkRenderingCore import vtkProperty

    before = [(actor, actor.GetProperty(), actor.GetTexture()) for actor in actors if colour]
    for actor, own, _ in before:
        paint = vtkProperty()
        paint.DeepCopy(own)
        paint.SetColor(*(level / 255 for level in ICON_COLOURS[colour]))
        paint.SetSpecular(min(own.GetSpecular(), 0.2))
        actor.SetProperty(paint)
        actor.SetTexture(None)
    try:
        yield
    finally:
        for actor, own, texture in before:
            actor.SetProperty(own)
            actor.SetTexture(texture)


def _light(renderer: Any) -> None:
    """A key light from the upper left of the camera and a weaker one from the right."""
    from vtkmodules.vtkRenderingCore import vtkLight

    renderer.RemoveAllLights()
    renderer.AutomaticLightCreationOff()
    for position, intensity in (((-0.6, 0.8, 1.0), 0.95), ((0.8, 0.1, 0.8), 0.4)):
        light = vtkLight()
        light.SetLightTypeToCameraLight()
        light.SetPosition(*position)
        light.SetIntensity(intensity)
        renderer.AddLight(light)


def _matrix(rotation: tuple[float, ...]) -> Any:
    from vtkmodules.vtkCommonMath import vtkMatrix4x4

    matrix = vtkMatrix4x4()
    for row in range(3):
        for column in range(3):
            matrix.SetElement(row, column, rotation[3 * row + column])
    return matrix


def _covered(picture: Pixels) -> float:
    return float((picture[..., 3] > 16).mean())


def _slimness(picture: Pixels) -> float:
    """The shorter side of the box around what is seen to its longer one; 0 if nothing is."""
    rows, columns = np.nonzero(picture[..., 3] > 8)
    if not len(rows):
        return 0.0
    sides = (np.ptp(rows) + 1, np.ptp(columns) + 1)
    return float(min(sides) / max(sides))


def _changed(first: Pixels, second: Pixels) -> float:
    """Share of the visible pixels whose colour differs clearly."""
    visible = (first[..., 3] > 127) & (second[..., 3] > 127)
    differs = np.abs(first[..., :3].astype(int) - second[..., :3]).sum(-1) > 40
    return float((visible & differs).sum() / max(1, visible.sum()))


def _png(picture: Pixels, size: int) -> bytes:
    image = Image.fromarray(picture)
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()
    png = io.BytesIO()
    square(image.crop(box), size, MARGIN).save(png, format="PNG", compress_level=3)
    return png.getvalue()
