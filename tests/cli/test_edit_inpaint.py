"""`starflow inpaint` and `starflow edit`: files with their settings, JSON, and mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.conftest import Run, fails


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.radial_gradient("L").resize((20, 12)).convert("RGB").save(path)
    return path


def test_inpaint_writes_pictures_with_their_settings(run: Run, classes: Path, photo: Path, tmp_path: Path) -> None:
    mask = tmp_path / "mask.png"
    Image.new("L", (20, 12), 0).save(mask)
    wrong = run("inpaint", photo, "--mask", mask, "--model", classes, "--output", tmp_path / "out")
    fails(wrong, "the mask repaints nothing", "--invert-mask")
    given = ("--mask", mask, "--invert-mask", "--prompt", "star", "--num-images", 2, "--steps", 2, "--candidates", 2)
    done = run("inpaint", photo, *given, "--seed", 7, "--model", classes, "--output", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert [Path(row["path"]).name for row in told["images"]] == ["star-0007.png", "star-0008.png"]
    assert told["images"][0].keys() == {"path", "seed", "nats", "acceptance", "effective_samples", "nats_per_dim"}
    assert told["seconds"] > 0
    assert any("inverted" in note for note in told["notes"])
    with Image.open(told["images"][0]["path"]) as image:
        assert image.size == (20, 12)
        expected = {"prompt": "star", "seed": "7", "method": "auto", "steps": "2", "temperature": "1", "guidance": "1"}
        assert {key: image.text[key] for key in expected} == expected  # type: ignore[attr-defined]


def test_inpaint_says_what_it_read_and_where_it_wrote(run: Run, classes: Path, photo: Path, tmp_path: Path) -> None:
    given = ("--box", "3,3,5,5", "--steps", 1, "--candidates", 1, "--output", tmp_path / "one.png")
    done = run("inpaint", photo, *given, "--model", classes)
    assert done.code == 0, done.err
    assert "note: the box 3,3,5,5 is repainted" in done.err
    assert "the picture is 20x12; the model sees its" in done.err
    assert done.out.startswith(f"{tmp_path / 'one.png'}  log p ")


MISTAKES = [
    (("inpaint", "PHOTO", "--box", "1,2"), "--box is '1,2', expected x,y,width,height"),
    (("inpaint", "PHOTO", "--box", "1,2,3,4", "--mask", "m.png"), "both --mask and --box"),
    (("inpaint", "PHOTO"), "no mask: give one"),
    (("inpaint", "PHOTO", "--mask", "nowhere.png"), "nowhere.png is not a readable image (no such file)"),
    (("inpaint", "PHOTO", "--box", "1,2,3,4", "--num-images", "0"), "--num-images is 0"),
    (("inpaint", "PHOTO", "--box", "1,2,3,4", "--guidance", "-1"), "--guidance is -1"),
    (("edit", "PHOTO", "--strength", "3"), "--strength is 3, expected 0"),
    (("edit", "PHOTO", "--variations", "2", "--interpolate", "PHOTO"), "both --variations and --interpolate"),
    (("edit", "PHOTO", "--interpolate", "PHOTO", "--strength", "0.2"), "--interpolate takes no --mask"),
    (("edit", "PHOTO", "--variations", "2", "--to", "star"), "--variations keep the prompt"),
    (("edit", "PHOTO", "--feather", "-2"), "--feather is -2"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes_are_told_in_a_line(
    run: Run, classes: Path, photo: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    given = [photo if word == "PHOTO" else word for word in words]
    fails(run(*given, "--model", classes, "--output", tmp_path / "out"), message)


def test_edit_writes_an_edit_variations_and_a_way(run: Run, classes: Path, photo: Path, tmp_path: Path) -> None:
    common = ("--model", classes, "--output", tmp_path / "out", "--json")
    edited = run("edit", photo, "--from", "star", "--to", "circle", "--strength", 0.5, *common)
    varied = run("edit", photo, "--from", "star", "--variations", 3, *common)
    way = run("edit", photo, "--from", "star", "--interpolate", photo, "--to", "square", "--steps", 4, *common)
    for done, count in ((edited, 1), (varied, 3), (way, 4)):
        assert done.code == 0, done.err
        rows = json.loads(done.out)["images"]
        assert len({row["path"] for row in rows}) == count
        assert all(Path(row["path"]).is_file() for row in rows)
        assert all(row["acceptance"] is None for row in rows)
    with Image.open(json.loads(varied.out)["images"][0]["path"]) as image:
        assert image.text["strength"] == "0.3"  # type: ignore[attr-defined]
        assert image.size == (20, 12)
