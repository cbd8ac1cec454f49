"""A tiny copy of the six packages: same layout, a handful of emoji, checksums of its own."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from starflow.data.sets.glyphs.packages import GLYPH_PACKAGES, GlyphPackages, Package

SIZE = 32

RED_DISC = '<circle cx="16" cy="16" r="12" fill="#e02020"/>'
LEFT_HALF = '<path fill="#2040d0" d="M0 0h16v32H0z"/>'
GROUPS = {
    "groups": {"1": "people-body", "4": "food-drink", "5": "travel-places", "8": "symbols", "9": "flags"},
    "subgroups": {
        "20": "hands",
        "42": "food-fruit",
        "54": "transport-ground",
        "58": "time",
        "85": "arrow",
        "98": "country-flag",
    },
}


def label(hexcode: str, name: str, group: int, subgroup: int, *tags: str) -> dict[str, Any]:
    return {"hexcode": hexcode, "label": name, "tags": list(tags), "group": group, "subgroup": subgroup}


LABELS = [
    label("1F34E", "red apple", 4, 42, "fruit", "red"),
    label("1F347", "grapes", 4, 42, "fruit"),
    label("1F697", "automobile", 5, 54, "car", "vehicle"),
    label("1F3CE-FE0F", "racing car", 5, 54, "race"),
    label("1F550", "one o’clock", 5, 58, "clock"),
    label("1F44B", "waving hand", 1, 20, "hello"),
    label("1F44B-1F3FB", "waving hand: light skin tone", 1, 20),
    label("1F468-200D-1F33E", "man farmer", 1, 20),
    label("27A1-FE0F", "right arrow", 8, 85, "arrow"),
    label("1F1EB-1F1F7", "flag: France", 9, 98),
    {"hexcode": "1F1E6", "label": "regional indicator A"},
]


def webp(colour: str = "red") -> bytes:
    picture = Image.new("RGBA", (SIZE, SIZE))
    ImageDraw.Draw(picture).ellipse((6, 6, 25, 25), fill=colour)
    data = io.BytesIO()
    picture.save(data, format="WEBP", lossless=True)
    return data.getvalue()


def icon_set(**bodies: str) -> tuple[dict[str, Any], dict[str, str]]:
    icons = {
        "width": 32,
        "height": 32,
        "icons": {"red-apple": {"body": bodies.get("apple", RED_DISC)}, "left-car": {"body": LEFT_HALF}},
        "aliases": {"car": {"parent": "left-car", "hFlip": True}, "automobile": {"parent": "car"}},
    }
    chars = {
        "1f34e": "red-apple",
        "1f697": "automobile",
        "1f3ce": "left-car",
        "27a1": "left-car",
        "1f347": "no-such-icon",
    }
    return icons, chars


def tarball(members: Mapping[str, bytes | Any]) -> bytes:
    """A .tgz as npm makes it: everything below package/; values that are no bytes are written as JSON."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for path, content in members.items():
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            entry = tarfile.TarInfo(f"package/{path}")
            entry.size = len(raw)
            archive.addfile(entry, io.BytesIO(raw))
    return data.getvalue()


class FakeRegistry:
    """Six tarballs in a folder, with the checksums they really have."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sources: GlyphPackages = GLYPH_PACKAGES
        icons, chars = icon_set()
        emoji = {"".join(chr(int(p, 16)) for p in str(e["hexcode"]).split("-")): {"name": e["label"]} for e in LABELS}
        self.put("render", {"assets/1f34e.webp": webp(), "assets/1f3ce-fe0f.webp": webp("blue")})
        for part in ("flat", "noto", "twemoji"):
            self.put(part, {"icons.json": icons, "chars.json": chars})
        self.put("names", {"data-by-emoji.json": emoji})
        self.put("labels", {"en/data.json": LABELS, "meta/groups.json": GROUPS})

    def put(self, part: str, members: Mapping[str, bytes | Any]) -> Package:
        """Replace one package's tarball, and its checksum."""
        data = tarball(members)
        package: Package = replace(
            getattr(self.sources, part), sha512=base64.b64encode(hashlib.sha512(data).digest()).decode()
        )
        self.sources = replace(self.sources, **{part: package})
        (self.folder / package.file).write_bytes(data)
        return package


@pytest.fixture
def registry(tmp_path: Path) -> FakeRegistry:
    folder = tmp_path / "tarballs"
    folder.mkdir()
    return FakeRegistry(folder)
