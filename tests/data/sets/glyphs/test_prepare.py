"""The set, built from tiny tarballs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from starflow.data.images import open_image
from starflow.data.sets.glyphs.captions import Concept
from starflow.data.sets.glyphs.prepare import STYLES, GlyphSummary, prepare_glyphs, split_of
from starflow.data.sources.folder import read_folder
from starflow.errors import UserError
from tests.data.conftest import LABELS, FakeRegistry, icon_set, webp


def prepare(registry: FakeRegistry, output: Path, size: int = 32) -> GlyphSummary:
    return prepare_glyphs(output, registry.folder, size=size, progress=False, sources=registry.sources)


def test_pictures_and_index(registry: FakeRegistry, tmp_path: Path) -> None:
    summary = prepare(registry, tmp_path / "set")
    assert summary.pictures == {"3d": 2, "flat": 3, "noto": 3, "twemoji": 3}
    assert (summary.concepts, summary.rendered, summary.skipped) == (3, 11, ())
    records = {record.name: record for record in read_folder(tmp_path / "set")}
    assert len(records) == 11
    apple = records["noto/1f34e"]
    assert (apple.caption, apple.label) == ("red apple", "food-fruit")
    assert apple.meta["tags"] == "fruit,red"
    assert apple.meta["flip"] == "yes"
    assert apple.file == tmp_path / "set" / "images" / "noto" / "1f34e.png"


def test_pixels_keep_their_transparency(registry: FakeRegistry, tmp_path: Path) -> None:
    prepare(registry, tmp_path / "set")
    for style in STYLES:
        image = open_image(tmp_path / "set" / "images" / style / "1f34e.png")
        assert (image.mode, image.size) == ("RGBA", (32, 32))
        pixels = np.asarray(image)
        assert pixels[0, 0, 3] == 0
        assert pixels[16, 16, 0] > 200
        assert pixels[16, 16, 1] < 50


def test_an_alias_is_drawn_mirrored(registry: FakeRegistry, tmp_path: Path) -> None:
    prepare(registry, tmp_path / "set")
    left = np.asarray(open_image(tmp_path / "set" / "images" / "flat" / "1f3ce.png"))
    right = np.asarray(open_image(tmp_path / "set" / "images" / "flat" / "1f697.png"))
    assert left[..., 3].any()
    np.testing.assert_array_equal(left, right[:, ::-1])


def test_a_second_call_draws_what_is_missing(registry: FakeRegistry, tmp_path: Path) -> None:
    prepare(registry, tmp_path / "set")
    index = (tmp_path / "set" / "index.jsonl").read_text()
    images = tmp_path / "set" / "images"
    whole = (images / "flat" / "1f697.png").read_bytes()
    (images / "noto" / "1f34e.png").unlink()
    (images / "flat" / "1f697.png").write_bytes(b"no PNG")
    assert prepare(registry, tmp_path / "set").rendered == 2
    assert (tmp_path / "set" / "index.jsonl").read_text() == index
    assert (images / "flat" / "1f697.png").read_bytes() == whole
    assert prepare(registry, tmp_path / "set").rendered == 0
    assert prepare(registry, tmp_path / "set", size=16).rendered == 11


def test_corrupt_sources_are_named_skipped_and_counted(registry: FakeRegistry, tmp_path: Path) -> None:
    icons, chars = icon_set(apple="<circle")
    registry.put("twemoji", {"icons.json": icons, "chars.json": chars})
    registry.put("render", {"assets/1f34e.webp": webp()[:60], "assets/1f3ce-fe0f.webp": webp()})
    summary = prepare(registry, tmp_path / "set")
    assert {item.name for item in summary.skipped} == {"twemoji/1f34e", "3d/1f34e"}
    assert all(item.reason for item in summary.skipped)
    assert summary.pictures == {"3d": 1, "flat": 3, "noto": 3, "twemoji": 2}
    assert len(read_folder(tmp_path / "set")) == 9
    written = json.loads((tmp_path / "set" / "summary.json").read_text())
    assert {item["name"] for item in written["skipped"]} == {"twemoji/1f34e", "3d/1f34e"}
    assert not (tmp_path / "set" / "images" / "3d" / "1f34e.png").exists()


def test_a_set_with_nothing_to_draw(registry: FakeRegistry, tmp_path: Path) -> None:
    registry.put("labels", {"en/data.json": [LABELS[-1]], "meta/groups.json": {"groups": {}, "subgroups": {}}})
    with pytest.raises(UserError, match="none of 0 concepts could be drawn"):
        prepare(registry, tmp_path / "set")


def test_summary_and_notice_name_every_source(registry: FakeRegistry, tmp_path: Path) -> None:
    prepare(registry, tmp_path / "set")
    summary = json.loads((tmp_path / "set" / "summary.json").read_text())
    notice = (tmp_path / "set" / "NOTICE").read_text()
    assert [source["sha512"] for source in summary["sources"]] == [p.sha512 for p in registry.sources.all()]
    for package in registry.sources.all():
        assert f"{package.name} {package.version}" in notice
        assert package.licence in notice
    assert "Permission is hereby granted, free of charge" in notice
    assert "creativecommons.org/licenses/by/4.0" in notice


def test_the_output_may_not_be_a_file(registry: FakeRegistry, tmp_path: Path) -> None:
    (tmp_path / "set").write_text("")
    with pytest.raises(UserError, match="is a file, expected a folder"):
        prepare(registry, tmp_path / "set")
    with pytest.raises(UserError, match="size is 0 pixels"):
        prepare(registry, tmp_path / "other", size=0)


def test_a_broken_writing_leaves_no_half_picture(
    registry: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    replace = Path.replace

    def stop_at_the_third(self: Path, target: Path) -> Path:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(target)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare(registry, tmp_path / "set")
    monkeypatch.undo()
    left = [path for path in (tmp_path / "set").rglob("*") if path.is_file()]
    assert sorted(left) == sorted(written)
    for path in left:
        Image.open(path).load()
    assert prepare(registry, tmp_path / "set").rendered == 9


def test_holding_out_is_by_concept_and_by_pair() -> None:
    concepts = [Concept(f"{code:05x}", "x", (), "objects", "tool") for code in range(3000)]
    splits = {concept.code: [split_of(concept, style) for style in STYLES] for concept in concepts}
    whole = [code for code, split in splits.items() if split[0] == ("heldout", "concept")]
    assert 0.025 < len(whole) / len(splits) < 0.045
    assert all(set(splits[code]) == {("heldout", "concept")} for code in whole)
    rest = [split for code, styles in splits.items() if code not in whole for split in styles]
    assert set(rest) == {("train", ""), ("heldout", "pair")}
    assert 0.04 < rest.count(("heldout", "pair")) / len(rest) < 0.06
