"""Packages: only what has the right checksum is read, and every failure names the package and the remedy."""

from __future__ import annotations

import base64
import shutil
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest

from starflow.data.sets.glyphs.packages import GLYPH_PACKAGES, open_package
from starflow.errors import UserError
from tests.data.conftest import FakeRegistry


def fake_npm(folder: Path, script: str) -> Path:
    """An executable `npm` in its own folder; `script` sees `sys.argv` as npm would."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    npm = bin_folder / "npm"
    npm.write_text(f"#!{sys.executable}\nimport pathlib, shutil, sys\n{script}\n")
    npm.chmod(0o755)
    return bin_folder


def test_checksums_are_whole_and_distinct() -> None:
    sums = {package.sha512 for package in GLYPH_PACKAGES.all()}
    assert len(sums) == 6
    assert all(len(base64.b64decode(sha512, validate=True)) == 64 for sha512 in sums)


def test_reads_from_a_folder(registry: FakeRegistry, tmp_path: Path) -> None:
    opened = open_package(registry.sources.names, registry.folder, tmp_path / "cache")
    assert "\N{RED APPLE}" in opened.json("data-by-emoji.json")
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match=r"unicode-emoji-json-0\.9\.0\.tgz holds no other\.json"):
        opened.json("other.json")


def test_a_wrong_checksum_is_named(registry: FakeRegistry, tmp_path: Path) -> None:
    package = registry.sources.noto
    path = registry.folder / package.file
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"iconify-json-noto-1\.2\.9\.tgz .*has sha512 .*remove it and fetch it again"):
        open_package(package, registry.folder, tmp_path)


def test_a_missing_tarball_names_the_command(registry: FakeRegistry, tmp_path: Path) -> None:
    (registry.folder / registry.sources.render.file).unlink()
    with pytest.raises(UserError, match=r"is missing: run 'npm pack @lobehub/fluent-emoji-3d@1\.1\.0'"):
        open_package(registry.sources.render, registry.folder, tmp_path)


def test_a_file_that_is_no_tarball(registry: FakeRegistry, tmp_path: Path) -> None:
    package = registry.put("noto", {"icons.json": {}})
    path = registry.folder / package.file
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    import hashlib

    sha512 = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    with pytest.raises(UserError, match=r"is not a whole \.tgz file"):
        open_package(replace(package, sha512=sha512), registry.folder, tmp_path)


def test_npm_fetches_once(registry: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = registry.sources.flat
    script = f"""
assert sys.argv[1:4] == ["pack", "{package.name}@{package.version}", "--pack-destination"], sys.argv
shutil.copy(r"{registry.folder / package.file}", sys.argv[4])
"""
    monkeypatch.setenv("PATH", str(fake_npm(tmp_path, script)))
    cache = tmp_path / "cache"
    first = open_package(package, None, cache).read("icons.json")
    monkeypatch.setenv("PATH", "")
    assert open_package(package, None, cache).read("icons.json") == first


def test_npm_that_fetches_something_else(
    registry: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = registry.sources.flat
    script = f'pathlib.Path(sys.argv[4], "{package.file}").write_bytes(b"something else")'
    monkeypatch.setenv("PATH", str(fake_npm(tmp_path, script)))
    with pytest.raises(UserError, match="has sha512"):
        open_package(package, None, tmp_path / "cache")
    assert not (tmp_path / "cache" / package.file).exists()


def test_npm_that_fails(registry: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fake_npm(tmp_path, 'sys.exit("npm error network is unreachable")')))
    with pytest.raises(UserError, match=r"cannot fetch .*network is unreachable.*--tarballs"):
        open_package(registry.sources.flat, None, tmp_path / "cache")


def test_without_npm_the_registry_is_asked(
    registry: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, asked = registry.sources.twemoji, []

    def urlopen(url: str, timeout: float) -> Any:
        asked.append(url)
        return (registry.folder / package.file).open("rb")

    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert open_package(package, None, tmp_path / "cache").read("chars.json")
    assert asked == ["https://registry.npmjs.org/@iconify-json/twemoji/-/twemoji-1.2.5.tgz"]


def test_without_npm_and_network(registry: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(url: str, timeout: float) -> Any:
        raise URLError("no route to host")

    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(UserError, match=r"npm is not installed.*no route to host.*npm pack @iconify-json/noto@1\.2\.9"):
        open_package(registry.sources.noto, None, tmp_path / "cache")
