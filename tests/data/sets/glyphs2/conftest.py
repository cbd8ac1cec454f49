"""A tiny copy of all packages of "glyphs2": same layouts, a handful of drawings, checksums of their own."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from starflow.data.sets.glyphs.packages import Package
from starflow.data.sets.glyphs2.packages import CLIP_ART, FURNITURE, ICON_PACKAGES, DebianPackage, Packages
from tests.data.conftest import GROUPS, LABELS, FakeRegistry, icon_set, tarball

SQUARE = '<path fill="{0}" d="M6 6h20v20H6z"/>'
FARMER = "1F468-200D-1F33E"
PEOPLE = [
    {
        "hexcode": FARMER,
        "label": "man farmer",
        "tags": ["farm"],
        "group": 1,
        "subgroup": 20,
        "skins": [{"hexcode": "1F468-1F3FF-200D-1F33E", "label": "man farmer: dark skin tone"}],
    }
]

ICONS: dict[str, dict[str, str]] = {
    "noto-v1": {"red-apple": SQUARE.format("#d02020"), "letter-a": SQUARE.format("#000"), "man-farmer": "<path/>"},
    "fxemoji": {"pout": SQUARE.format("#d02020"), "automobile": SQUARE.format("#2040d0")},
    "icon-park": {
        "shield-one": SQUARE.format("#2F88FF") + '<path stroke="#000" stroke-width="2" d="M4 28h24"/>',
        "ring-two": '<circle cx="16" cy="16" r="9" fill="none" stroke="#000" stroke-width="4"/>',
        "add-file": SQUARE.format("#2F88FF"),
        "google": SQUARE.format("#2F88FF"),
    },
    "streamline-color": {
        "anvil": SQUARE.format("#d7e0ff") + '<path fill="#4147d5" d="M6 18h20v8H6z"/>',
        "banjo": SQUARE.format("#ff0000"),
        "anvil-flat": SQUARE.format("#8fbffa") + '<path fill="#2859c5" d="M6 6h20v8H6z"/>',
    },
    "fluent-color": {
        "trophy-16": SQUARE.format("#d0a020"),
        "trophy-48": '<circle cx="16" cy="16" r="10" fill="#d0a020"/>',
        "arrow-square-24": SQUARE.format("#20a020"),
    },
    "game-icons": {
        "dragon": SQUARE.format("currentColor"),
        "wyvern": SQUARE.format("currentColor"),
        "abstract-001": SQUARE.format("currentColor"),
    },
}

SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:dc="d" xmlns:rdf="r" viewBox="0 0 40 20">{}</svg>'
CLIP_ART_FILES = {
    "animals/bugs/farfalla_architetto_01.svg": SVG.format(
        '<dc:title>Farfalla 02</dc:title><path fill="#a020d0" d="M4 4h20v12H4z"/>'
    ),
    "food/apple_bw.svg": SVG.format(
        '<dc:title>Apple</dc:title><circle cx="10" cy="10" r="6" stroke="#000" fill="none"/>'
    ),
    "food/apple_again.svg": SVG.format(
        '<dc:title>Apple</dc:title><circle cx="10" cy="10" r="6" stroke="#000" fill="none"/>'
    ),
    "food/xyzzy.svg": SVG.format('<dc:title>Frobnicate</dc:title><path d="M4 4h20v12H4z"/>'),
    "food/gift_gpl.svg": SVG.format(
        '<dc:title>Apple</dc:title><a rdf="http://creativecommons.org/licenses/GPL/2.0/"/><path d="M0 4h9v12H4z"/>'
    ),
    "logos/apple.svg": SVG.format('<dc:title>Apple</dc:title><path d="M0 0h20v12H4z"/>'),
    "tools/broken.svg": "<svg><dc:title>Anvil</dc:title>",
}

CUBE = """mtllib cube.mtl
v -1 -1 -1
v 1 -1 -1
v 1 1 -1
v -1 1 -1
v -1 -1 1
v 1 -1 1
v 1 1 1
v -1 1 1
usemtl front
f 5 6 7 8
usemtl behind
f 2 1 4 3
usemtl right
f 6 2 3 7
usemtl left
f 1 5 8 4
usemtl top
f 8 7 3 4
usemtl below
f 1 2 6 5
"""
CUBE_COLOURS = {
    "front": (1, 0, 0),
    "behind": (0, 1, 0),
    "right": (0, 0, 1),
    "left": (1, 1, 0),
    "top": (1, 0, 1),
    "below": (0, 1, 1),
}
CUBE_MATERIALS = "".join(f"newmtl {name}\nKd {r} {g} {b}\nKs 0 0 0\n" for name, (r, g, b) in CUBE_COLOURS.items())


def debian(files: Mapping[str, bytes]) -> bytes:
    """A .deb file: an `ar` archive of debian-binary, control.tar and data.tar.xz."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for path, content in files.items():
            entry = tarfile.TarInfo(f"./{path}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    members = {"debian-binary": b"2.0\n", "control.tar": b"odd", "data.tar.xz": data.getvalue()}
    parts = [b"!<arch>\n"]
    for name, content in members.items():
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        parts += [head, content, b"\n" if len(content) % 2 else b""]
    return b"".join(parts)


def png(colour: str) -> bytes:
    picture = Image.new("RGBA", (24, 24))
    ImageDraw.Draw(picture).rectangle((4, 8, 19, 15), fill=colour)
    data = io.BytesIO()
    picture.save(data, format="PNG")
    return data.getvalue()


def catalogue() -> bytes:
    """A furniture catalogue with an armchair and a cube that are kept, and a person and a brand that are not."""
    pieces = [
        ("Armchair", "Living room", "armchair", "Seat"),
        ("Cube", "Office", "cube", ""),
        ("Female", "Characters", "female", ""),
        ("Apple iMac 1998", "Office", "imac", ""),
    ]
    lines, files = ["id=Test"], {}
    for number, (name, kind, stem, tags) in enumerate(pieces, start=1):
        lines += [f"name#{number}={name}", f"category#{number}={kind}", f"tags#{number}={tags}"]
        lines += [f"icon#{number}=/test/{stem}.png", f"model#{number}=/test/{stem}/{stem}.obj", f"creator#{number}=Ann"]
        files[f"test/{stem}.png"] = png("#a06020")
        files[f"test/{stem}/{stem}.obj"] = CUBE.replace("cube.mtl", f"{stem}.mtl").encode()
        files[f"test/{stem}/{stem}.mtl"] = CUBE_MATERIALS.encode()
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("PluginFurnitureCatalog.properties", "\n".join(lines))
        for path, content in files.items():
            archive.writestr(path, content)
    return data.getvalue()


class FakePackages(FakeRegistry):
    """All packages in one folder, with the checksums they really have."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        emoji = [*LABELS[:5], *LABELS[8:], *PEOPLE]
        names = {"".join(chr(int(p, 16)) for p in str(e["hexcode"]).split("-")): {"name": e["label"]} for e in emoji}
        self.put("names", {"data-by-emoji.json": names})
        icons, chars = icon_set()
        icons["icons"] |= {"farmer": {"body": SQUARE.format("#d0a020")}, "dark": {"body": SQUARE.format("#604020")}}
        chars |= {"1f468-200d-1f33e": "farmer", "1f468-1f3ff-200d-1f33e": "dark"}
        self.put("noto", {"icons.json": icons, "chars.json": chars})
        shortcodes: dict[str, Any] = {
            f"en/shortcodes/{name}.json": {} for name in ("github", "iamcal", "joypixels", "emojibase")
        }
        self.put(
            "labels",
            {
                "en/data.json": emoji,
                "meta/groups.json": GROUPS,
                "meta/unicode-names.json": {"1F347": "GRAPES"},
                **shortcodes,
            },
        )
        self.icons: dict[str, Package] = {}
        for name, bodies in ICONS.items():
            self.put_icons(name, bodies)
        self.furniture = self.put_debian(
            FURNITURE, {"usr/share/sweethome3d/furniture/Test.sh3f": catalogue(), "usr/share/doc/copyright": b"CC0"}
        )
        clip_art = {f"usr/share/openclipart/svg/{path}": text.encode() for path, text in CLIP_ART_FILES.items()}
        self.clip_art = self.put_debian(CLIP_ART, clip_art)

    @property
    def packages(self) -> Packages:
        """What `prepare_glyphs2` takes."""
        return Packages(self.sources, self.icons, self.furniture, self.clip_art)

    def put_icons(self, name: str, bodies: Mapping[str, str]) -> None:
        """Replace one icon set."""
        icons = {"width": 32, "height": 32, "icons": {slug: {"body": body} for slug, body in bodies.items()}}
        metadata = {"categories": {"Brand": ["google"], "Life": [slug for slug in bodies if slug != "google"]}}
        data = tarball({"icons.json": icons, "metadata.json": metadata, "chars.json": {}})
        digest = base64.b64encode(hashlib.sha512(data).digest()).decode()
        self.icons[name] = replace(ICON_PACKAGES[name], sha512=digest)
        (self.folder / self.icons[name].file).write_bytes(data)

    def put_debian(self, package: DebianPackage, files: Mapping[str, bytes]) -> DebianPackage:
        """Write a Debian package, and return it with its checksum."""
        data = debian(files)
        (self.folder / package.file).write_bytes(data)
        return replace(package, sha256=hashlib.sha256(data).hexdigest())


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def fake(tmp_path: Path) -> FakePackages:
    folder = tmp_path / "packages"
    folder.mkdir()
    return FakePackages(folder)
