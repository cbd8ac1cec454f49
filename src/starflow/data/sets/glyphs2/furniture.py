"""Sweet Home 3D's furniture: what its five catalogues list, the ready icon of every piece, and its model.

A catalogue (.sh3f) is a zip file: a table of properties (`name#7=Chair`), and for every piece an icon (PNG) and a
folder with the model (Wavefront .obj and .mtl, textures).
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from starflow.data.sets.glyphs2.drawings import Drawing, Raster
from starflow.data.sets.glyphs2.packages import DebianArchive
from starflow.data.sets.glyphs2.words import DROPPED, concept_key, corrected, dropped_word, words_of
from starflow.errors import UserError

CATALOGUES = "usr/share/sweethome3d/furniture"
TABLE = "PluginFurnitureCatalog.properties"
ANIMALS = frozenset("dog cat horse rabbit deer bulldog teddy doll".split())

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
