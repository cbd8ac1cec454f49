"""Packages: Debian's archives read back, checksums held, licences named."""

from __future__ import annotations

import base64
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starflow.data.sets.glyphs2.drawings import STYLES
from starflow.data.sets.glyphs2.packages import (
    CLIP_ART,
    LICENCES,
    REFUSED,
    DebianArchive,
    DebianPackage,
    Packages,
    notice_text,
    open_debian,
)
from starflow.errors import UserError
from tests.data.sets.glyphs2.conftest import FakePackages, debian

NAMES = st.text("abcdefgh-", min_size=1, max_size=12)


@settings(deadline=None)
@given(st.dictionaries(NAMES, st.binary(max_size=200), max_size=6))
def test_an_archive_gives_back_its_files(files: dict[str, bytes]) -> None:
    archive = DebianArchive(debian({f"usr/share/{name}.svg": data for name, data in files.items()}), "x.deb")
    assert list(archive.under("usr/share", ".svg")) == sorted((f"{name}.svg", data) for name, data in files.items())
    assert list(archive.under("usr/share", ".png")) == []
    assert list(archive.under("usr/shar", ".svg")) == []


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_other_bytes_are_a_user_error(data: bytes) -> None:
    with pytest.raises(UserError, match=r"x\.deb is not a whole \.deb file"):
        DebianArchive(data, "x.deb")


@settings(deadline=None)
@given(st.integers(1, 100))
def test_an_archive_that_is_cut_short_is_a_user_error(missing: int) -> None:
    data = debian({"a": b"0123456789" * 20})
    with pytest.raises(UserError, match=r"not a whole \.deb file"):
        DebianArchive(data[: -missing - 1], "x.deb")


def test_a_wrong_checksum_is_told(fake: FakePackages, tmp_path: Path) -> None:
    path = fake.folder / fake.furniture.file
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match="has sha256 .* expected .*: remove it and fetch it again"):
        open_debian(fake.furniture, fake.folder, tmp_path)


def test_a_missing_package_says_in_one_line_what_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="apt-get download openclipart-svg=1:0.18.dfsg-19") as error:
        open_debian(CLIP_ART, tmp_path, tmp_path)
    assert str(tmp_path / "openclipart-svg_1%3a0.18+dfsg-19_all.deb") in str(error.value)
    assert "https://packages.debian.org/openclipart-svg" in str(error.value)
    assert "\n" not in str(error.value)


def test_without_apt_the_page_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"apt-get is not installed.*packages\.debian\.org"):
        open_debian(CLIP_ART, None, tmp_path)


def test_what_apt_fetches_is_checked_and_kept(
    fake: FakePackages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    apt = tools / "apt-get"
    apt.write_text(f'#!/bin/sh\necho "$2" > "{tmp_path}/asked"\ncp "{fake.folder / fake.clip_art.file}" .\n')
    apt.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(apt))
    archive = open_debian(fake.clip_art, None, tmp_path / "cache")
    assert (tmp_path / "asked").read_text().strip() == "openclipart-svg=1:0.18+dfsg-19"
    assert len(list(archive.under("usr/share/openclipart", ".svg"))) == 7
    apt.unlink()
    assert open_debian(fake.clip_art, None, tmp_path / "cache").file == fake.clip_art.file


def test_the_notice_names_every_package_and_what_was_refused() -> None:
    packages, notice = Packages(), notice_text(Packages())
    for package in packages.all():
        assert f"{package.name} {package.version}" in notice
        assert package.licence in LICENCES
        assert package.art.rstrip(".") in notice
    for name in REFUSED:
        assert name in notice
    assert "Permission is hereby granted, free of charge" in notice


def test_checksums_have_their_length_and_no_two_are_alike() -> None:
    packages = Packages().all()
    sums = [bytes.fromhex(p.sha256) if isinstance(p, DebianPackage) else base64.b64decode(p.sha512) for p in packages]
    assert {len(found) for found in sums} == {32, 64}
    assert len(set(sums)) == len(packages) == 24


def test_every_icon_set_has_a_style() -> None:
    assert set(Packages().icons) <= set(STYLES)
