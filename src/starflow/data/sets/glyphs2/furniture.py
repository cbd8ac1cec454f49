"""Sweet Home 3D's furniture: what its five catalogues list, the ready icon of every piece, and its model.

A catalogue (.sh3f) is a zip file: a table of properties (`name#7=Chair`), and for every piece an icon (PNG) and a
folder with the model (Wavefront .obj and .mtl, textures), which is drawn from several sides.

Contract: a model whose views are there is not drawn again. Beside them lies `views.json`, written last: the
pictures' size, and for every view its number, side and colour, or why there is none.
"""

from __future__ import annotations

import importlib.util
import io
import json
import multiprocessing
import re
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from starflow.data.sets.glyphs import captions
from starflow.data.sets.glyphs2.drawings import Drawing, DrawnFile, Raster, is_whole
from starflow.data.sets.glyphs2.models import SIDES, BadModel, draw_model
from starflow.data.sets.glyphs2.packages import DebianArchive
from starflow.data.sets.glyphs2.words import DROPPED, concept_key, corrected, dropped_word, words_of
from starflow.errors import UserError
from starflow.io.files import write_bytes, write_json

CATALOGUES = "usr/share/sweethome3d/furniture"

TABLE = "PluginFurnitureCatalog.properties"

ANIMALS = frozenset("bulldog cat chicken deer dog doll horse rabbit teddy".split())

# Signs on the ground, cars by their makers, and names in no known English.
_LEFT_OUT = re.compile(
    r"arrow |parking slot|pedestrian crossing|^tool$|^tools?$|vw |peugeot|renault|seat leon|chevrolet|ford |yamaha|"
    r"smart car|playstation|apple i|rubik|frame |bill \d|concept sedan|mannequin|class seat|barnum|puff$|bootie",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of a catalogue.

    Attributes:
        key: unique, "catalogue/model".
        name: what it is, "armchair".
        kind: the catalogue's category, "Living room".
        tags: other words for it.
        creator: who made the model, for attribution.
        icon: path of its picture in the catalogue's zip file.
        model: path of its .obj file there.
        rotation: the 3x3 matrix, row by row, that turns the model upright with its front to the viewer; or empty.
    """

    key: str
    name: str
    kind: str
    tags: tuple[str, ...]
    creator: str
    icon: str
    model: str
    rotation: tuple[float, ...] = ()


class Catalogue:
    """One .sh3f file."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name = name.removesuffix(".sh3f")
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
            table = self._zip.read(TABLE).decode("latin-1")
        except (zipfile.BadZipFile, KeyError) as error:
            raise UserError(f"{name} is no furniture catalogue ({error}): fetch the package again") from None
        self._properties = dict(re.findall(r"^([A-Za-z]+#\d+)=(.*?)\r?$", table, flags=re.MULTILINE))

    def pieces(self) -> Iterator[Piece | tuple[str, str]]:
        """The pieces that are kept, or (name, why it is left out), in the catalogue's order."""
        numbers = sorted(int(key.partition("#")[2]) for key in self._properties if key.startswith("name#"))
        for number in numbers:
            name, kind = self._of("name", number), self._of("category", number)
            model = self._of("model", number).lstrip("/")
            key = f"{self.name}/{PurePosixPath(model).stem}"
            reason = _why_left_out(name, kind)
            thing = corrected(_plain(name), "furniture")
            for file in (PurePosixPath(key).name, key):
                if corrected(file, "furniture files") != file:
                    thing = corrected(file, "furniture files")
            if reason or thing is None:
                yield key, reason or "unclear or wrong name"
                continue
            tags = tuple(tag.strip().lower() for tag in self._of("tags", number).split(",") if tag.strip())
            rotation = tuple(float(value) for value in self._of("modelRotation", number).split())
            yield Piece(
                key=key,
                name=thing,
                kind=kind,
                tags=tuple(tag for tag in tags if tag not in ("blend swap", "double", "single")),
                creator=self._of("creator", number),
                icon=self._of("icon", number).lstrip("/"),
                model=model,
                rotation=rotation if len(rotation) == 9 else (),
            )

    def read(self, path: str) -> bytes:
        """One file of the catalogue.

        Raises:
            UserError: it is not there.
        """
        try:
            return self._zip.read(path)
        except KeyError:
            raise UserError(f"{self.name}.sh3f holds no {path}: fetch the package again") from None

    def model_files(self, piece: Piece) -> dict[str, bytes]:
        """The files of a piece's model, by name: all that lie in its folder."""
        folder = f"{PurePosixPath(piece.model).parent}/"
        names = [name for name in self._zip.namelist() if name.startswith(folder) and not name.endswith("/")]
        return {name.removeprefix(folder): self._zip.read(name) for name in names}

    def _of(self, field: str, number: int) -> str:
        text = self._properties.get(f"{field}#{number}", "")
        return re.sub(r"\\u([0-9a-fA-F]{4})", lambda found: chr(int(found[1], 16)), text).strip()


def read_catalogues(archive: DebianArchive) -> list[Catalogue]:
    """All catalogues of the package, by name."""
    return [Catalogue(name, data) for name, data in archive.under(CATALOGUES, ".sh3f")]


def icon_drawings(catalogue: Catalogue) -> Iterator[Drawing | tuple[str, str]]:
    """The ready picture of every piece, or (name, why it is left out)."""
    for piece in catalogue.pieces():
        if isinstance(piece, tuple):
            yield piece
            continue
        yield Drawing(
            name=f"furniture/{piece.key}",
            caption=piece.name,
            style="furniture",
            concept=concept_key(piece.name),
            kind=piece.kind.lower(),
            art=Raster(catalogue.read(piece.icon), crop=True),
            tags=piece.tags,
            flip=True,
            extra={"creator": piece.creator, "model": piece.key},
        )


def _why_left_out(name: str, kind: str) -> str:
    if kind == "Characters" and ANIMALS.isdisjoint(words_of(name)):
        return "people"
    if _LEFT_OUT.search(name):
        return "sign, brand or unclear name"
    word = dropped_word(name, DROPPED)
    return f"word '{word}'" if word else ""


def _plain(name: str) -> str:
    """The name in lower case, without the numbers and dashes of a shop's catalogue."""
    return re.sub(r" - .*|(?<=[a-z])\d+$", "", name).strip().lower()


NOTES = "views.json"

# Sides from which a thing is usually shown: a caption need not say them.
USUAL = frozenset({"from the front right", "from the front left", "from above"})

Task = tuple[Piece, dict[str, bytes], Path]


def model_views(
    catalogues: list[Catalogue], images: Path, *, size: int, workers: int, progress: bool
) -> Iterator[Drawing | tuple[str, str]]:
    """Draw what is missing below `images`; the views, or (model, why there are none), in the catalogues' order.

    Raises:
        UserError: VTK is not installed, or broke down.
    """
    if importlib.util.find_spec("vtkmodules") is None:
        raise UserError(
            "drawing the views of models needs the package vtk, which is not installed: "
            "pip install 'starflow[models]', or leave them out with --model-views leave-out"
        )
    from tqdm import tqdm

    pieces = [(c, piece) for c in catalogues for piece in c.pieces() if not isinstance(piece, tuple)]
    missing = [(c, piece) for c, piece in pieces if not _is_drawn(images / "model" / piece.key, size)]
    tasks = ((piece, catalogue.model_files(piece), images / "model" / piece.key) for catalogue, piece in missing)
    done = _draw(tasks, size, workers)
    for _ in tqdm(done, total=len(missing), desc="models", unit="model", disable=not progress):
        pass
    for _, piece in pieces:
        yield from _views_of(piece, _notes(images / "model" / piece.key))


def _draw(tasks: Iterator[Task], size: int, workers: int) -> Iterator[None]:
    """Draw models, in any order, in other processes if there are several workers."""
    if workers <= 1:
        yield from map(partial(_draw_one, size=size), tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = []
        try:
            for task in tasks:  # few at a time: a model's files take some megabytes
                waiting.append(pool.submit(_draw_one, task, size))
                if len(waiting) > 2 * workers:
                    yield waiting.pop(0).result()
            for future in waiting:
                yield future.result()
        except BrokenProcessPool:
            raise UserError("a process that draws models broke down: run the command again, it goes on") from None


def _draw_one(task: Task, size: int) -> None:
    """Draw a model's views to their files, then its notes; runs in a worker."""
    piece, files, folder = task
    views: list[dict[str, Any]] = []
    reason = ""
    try:
        for view in draw_model(files, PurePosixPath(piece.model).name, piece.rotation, piece.key, size):
            write_bytes(folder / f"{view.number:02d}.png", view.png)
            views.append({"number": view.number, "side": SIDES.index(view.side), "colour": view.colour})
    except BadModel as error:
        reason = str(error)
    write_json(folder / NOTES, {"size": size, "views": views, "reason": reason})


def _is_drawn(folder: Path, size: int) -> bool:
    notes = _notes(folder)
    return notes["size"] == size and all(
        is_whole(folder / f"{view['number']:02d}.png", size) for view in notes["views"]
    )


def _notes(folder: Path) -> dict[str, Any]:
    try:
        notes: dict[str, Any] = json.loads((folder / NOTES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"size": 0, "views": [], "reason": "it was not drawn"}
    return notes


def _views_of(piece: Piece, notes: dict[str, Any]) -> Iterator[Drawing | tuple[str, str]]:
    if not notes["views"]:
        yield f"model/{piece.key}", notes["reason"]
    for view in notes["views"]:
        side, colour = SIDES[view["side"]], view["colour"]
        extra = {"creator": piece.creator, "view": side.caption, "model": piece.key}
        if side.caption in USUAL:
            extra["say_view"] = "sometimes"
        if colour:
            extra["paint"] = colour
        yield Drawing(
            name=f"model/{piece.key}/{view['number']:02d}",
            caption=captions.recoloured(piece.name, colour) if colour else piece.name,
            style="model",
            concept=concept_key(piece.name),
            kind=piece.kind.lower(),
            art=DrawnFile(),
            tags=piece.tags,
            flip=side.mirrors,
            extra=extra,
        )
