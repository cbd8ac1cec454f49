"""The set "glyphs2", built from tiny packages."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from starflow.data.images import open_image
from starflow.data.sets.glyphs2.drawings import STYLES
from starflow.data.sets.glyphs2.prepare import Glyphs2Summary, prepare_glyphs2, split_of
from starflow.data.sources.base import ImageRecord
from starflow.data.sources.folder import read_folder
from starflow.errors import UserError
from tests.data.sets.glyphs2.conftest import FakePackages, read_lines


def prepare(fake: FakePackages, output: Path, **options: Any) -> Glyphs2Summary:
    settings: dict[str, Any] = {"size": 32, "models": False, "progress": False} | options
    return prepare_glyphs2(output, fake.folder, packages=fake.packages, **settings)


def records_of(folder: Path) -> dict[str, ImageRecord]:
    return {record.name: record for record in read_folder(folder)}


def test_pictures_of_every_source(fake: FakePackages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("nothing is fetched if a folder of packages is given")

    monkeypatch.setattr(subprocess, "run", no_network)
    summary = prepare(fake, tmp_path / "set")
    records = records_of(tmp_path / "set")
    assert len(records) == sum(summary.pictures.values()) == sum(summary.groups.values()) == summary.drawn - 1
    assert set(summary.groups) == {"emoji", "people", "objects", "icons"}
    said = {name: (record.caption, record.meta["phrase"]) for name, record in records.items()}
    assert said["noto/1f34e"] == ("red apple", "Noto emoji of")
    assert said["noto-v1/red-apple"] == ("red apple", "blob emoji of")
    assert said["furniture/Test/armchair"] == ("armchair", "3D model of")
    assert said["clip-art/animals/bugs/farfalla_architetto_01"] == ("butterfly", "clip art of")
    assert said["clip-art/food/apple_again"] == ("apple", "black and white clip art of")
    assert said["game-icons/dragon"] == ("dragon", "silhouette of")
    for record in records.values():
        image = open_image(record.file)
        assert (image.mode, image.size) == ("RGBA", (32, 32))
        assert np.asarray(image)[..., 3].any()


def test_meta_names_style_concept_and_sampling_group(fake: FakePackages, tmp_path: Path) -> None:
    prepare(fake, tmp_path / "set")
    for record in records_of(tmp_path / "set").values():
        meta = record.meta
        assert {"style", "family", "concept", "sampling_group", "group", "subgroup", "tags", "flip"} <= set(meta)
        assert meta["family"] == STYLES[meta["style"]].family
        assert meta["say_style"] == "always" or meta["sampling_group"] != "icons"
    records = records_of(tmp_path / "set")
    assert records["clip-art/food/apple_again"].meta["say_style"] == "always", "a plain apple is an emoji's"
    assert records["furniture/Test/armchair"].meta["say_style"] == "sometimes"
    assert records["furniture/Test/armchair"].meta["creator"] == "Ann"


def test_people_have_role_sex_and_tone(fake: FakePackages, tmp_path: Path) -> None:
    prepare(fake, tmp_path / "set")
    dark = records_of(tmp_path / "set")["noto/1f468-1f3ff-200d-1f33e"]
    assert dark.caption == "man farmer with dark skin tone"
    found = {key: dark.meta[key] for key in ("sampling_group", "role", "sex", "skin_tone", "concept")}
    assert found == {
        "sampling_group": "people",
        "role": "farmer",
        "sex": "man",
        "skin_tone": "dark skin tone",
        "concept": "farmer",
    }
    light = records_of(tmp_path / "set")["noto/1f468-200d-1f33e"]
    assert (light.split, light.meta.get("heldout_kind")) == (dark.split, dark.meta.get("heldout_kind"))


def test_what_is_left_out_is_counted_and_named(fake: FakePackages, tmp_path: Path) -> None:
    summary = prepare(fake, tmp_path / "set")
    rows = {row["name"]: row["reason"] for row in read_lines(tmp_path / "set" / "skipped.jsonl")}
    assert rows["icon-park/google"] == "category Brand"
    assert rows["game-icons/abstract-001"] == "the set's own pattern"
    assert rows["furniture/Test/female"] == "people"
    assert rows["furniture/Test/imac"] == "sign, brand or unclear name"
    assert rows["clip-art/food/xyzzy.svg"] == "no English name"
    assert rows["clip-art/food/gift_gpl.svg"] == "licence"
    assert "clip-art/tools/broken" in {one.name for one in summary.skipped} & set(rows), "it could not be drawn"
    assert rows["game-icons/wyvern"] == "nearly the same as game-icons/dragon"
    assert len(rows) == sum(summary.left_out.values()) + len(summary.skipped)
    assert summary.left_out["icon-park: category"] == 1
    assert summary.left_out["clip-art: no English name"] == 1


def test_a_second_call_draws_what_is_missing(fake: FakePackages, tmp_path: Path) -> None:
    drawn = prepare(fake, tmp_path / "set").drawn
    index = (tmp_path / "set" / "index.jsonl").read_text()
    assert prepare(fake, tmp_path / "set").drawn == 0
    images = tmp_path / "set" / "images"
    whole = (images / "noto" / "1f34e.png").read_bytes()
    (images / "noto" / "1f34e.png").unlink()
    (images / "game-icons" / "dragon.png").write_bytes(b"no PNG")
    assert prepare(fake, tmp_path / "set").drawn == 2
    assert (tmp_path / "set" / "index.jsonl").read_text() == index
    assert (images / "noto" / "1f34e.png").read_bytes() == whole
    assert prepare(fake, tmp_path / "set", size=16).drawn == drawn


def test_summary_and_notice_name_every_source(fake: FakePackages, tmp_path: Path) -> None:
    prepare(fake, tmp_path / "set")
    summary = json.loads((tmp_path / "set" / "summary.json").read_text())
    notice = (tmp_path / "set" / "NOTICE").read_text()
    sums = {source["name"]: source.get("sha512") or source["sha256"] for source in summary["sources"]}
    assert sums["openclipart-svg"] == fake.clip_art.sha256
    for package in fake.packages.all():
        assert package.name in sums
        assert f"{package.name} {package.version}" in notice
    assert summary["refused"]


def test_a_style_can_be_left_out_of_training(fake: FakePackages, tmp_path: Path) -> None:
    prepare(fake, tmp_path / "set", held_out_style="twemoji")
    for record in records_of(tmp_path / "set").values():
        kind = record.meta.get("heldout_kind", "")
        assert (record.meta["style"] == "twemoji") == (kind == "style")
        assert (record.split == "heldout") == bool(kind)
    with pytest.raises(UserError, match="no style is called 'noot', expected one of 3d, flat, noto"):
        prepare(fake, tmp_path / "set", held_out_style="noot")


def test_sheets_are_pictures_of_every_style(fake: FakePackages, tmp_path: Path) -> None:
    summary = prepare(fake, tmp_path / "set", sheets=1)
    sheets = list((tmp_path / "set" / "sheets").glob("*.png"))
    assert {path.name.rpartition("-")[0].rpartition("-")[0] for path in sheets} == set(summary.pictures)
    for path in sheets:
        assert Image.open(path).width == 8 * 120


def test_holding_out_is_by_concept_and_by_family() -> None:
    families = sorted({style.family for style in STYLES.values()})
    splits = {f"thing {n}": {family: split_of(f"thing {n}", family) for family in families} for n in range(1500)}
    kinds: dict[str, int] = defaultdict(int)
    for by_family in splits.values():
        whole = {kind for _, kind in by_family.values()}
        assert whole == {"concept"} or "concept" not in whole, "in all families or in none"
        for split, kind in by_family.values():
            assert (split == "heldout") == bool(kind)
            kinds[kind] += 1
    total = sum(kinds.values())
    assert 0.02 < kinds["concept"] / total < 0.04
    assert 0.04 < kinds["pair"] / (total - kinds["concept"]) < 0.06


def test_bad_input(fake: FakePackages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, expected a folder"):
        prepare(fake, tmp_path / "file")
    with pytest.raises(UserError, match="size is 0 pixels"):
        prepare(fake, tmp_path / "set", size=0)
    (fake.folder / fake.icons["game-icons"].file).unlink()
    with pytest.raises(UserError, match="is missing: run 'npm pack @iconify-json/game-icons@1.2.4'"):
        prepare(fake, tmp_path / "set")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'starflow\[glyphs\]'"):
        prepare(fake, tmp_path / "set")


@pytest.mark.slow
def test_workers_make_no_difference(fake: FakePackages, tmp_path: Path) -> None:
    one, two = prepare(fake, tmp_path / "one"), prepare(fake, tmp_path / "two", workers=2)
    assert one == two
    for path in (tmp_path / "one" / "images").rglob("*.png"):
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == other.read_bytes()
