"""Folders in every layout, malformed listings, and ImageNet's folders as they come."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from starflow.data.buckets import Buckets
from starflow.data.images import IMAGE_SUFFIXES
from starflow.data.index import open_source
from starflow.data.sources.base import ImageRecord, unit_hash
from starflow.data.sources.folder import list_folder, order_classes, read_folder, synset_names, write_index
from starflow.errors import UserError
from tests.data.sources.common import indexed, scanned


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def by_name(folder: Path) -> dict[str, ImageRecord]:
    return {record.name: record for record in read_folder(folder)}


def test_caption_from_the_text_file_beside(tmp_path: Path) -> None:
    picture(tmp_path / "deep" / "a.png")
    (tmp_path / "deep" / "a.txt").write_text("a red\nsquare\n")
    record = by_name(tmp_path)["deep/a.png"]
    assert (record.caption, record.label) == ("a red square", None)


def test_the_sub_folder_is_label_and_caption(tmp_path: Path) -> None:
    picture(tmp_path / "polar_bear" / "a.png")
    picture(tmp_path / "b.JPG")
    records = by_name(tmp_path)
    assert (records["polar_bear/a.png"].label, records["polar_bear/a.png"].caption) == ("polar_bear", "polar bear")
    assert (records["b.JPG"].label, records["b.JPG"].caption) == (None, "")


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv"])
@pytest.mark.parametrize(("file_key", "text_key"), [("file", "caption"), ("file_name", "text")])
def test_captions_from_one_file(tmp_path: Path, name: str, file_key: str, text_key: str) -> None:
    picture(tmp_path / "images" / "a.png")
    picture(tmp_path / "images" / "unlisted.png")
    row = {file_key: "images/a.png", text_key: 'a "red", flat square', "label": "squares"}
    if name.endswith(".jsonl"):
        text = json.dumps(row) + "\n\n"
    else:
        text = f'{file_key},{text_key},label\nimages/a.png,"a ""red"", flat square",squares\n'
    (tmp_path / name).write_text(text)
    records = by_name(tmp_path)
    assert records["images/a.png"].caption == 'a "red", flat square'
    assert records["images/a.png"].label == "squares"
    assert (records["images/unlisted.png"].caption, records["images/unlisted.png"].label) == ("", None)


def left_over(folder: Path) -> dict[str, str]:
    return {one.name: one.reason for one in list_folder(folder).left}


def test_rows_that_name_no_picture_are_counted_and_alone_stop(tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_text(
        '{"file": "gone.png", "caption": "x"}\n{"file": "../a.png", "caption": "y"}\n'
    )
    for _ in range(2):  # nothing there at all, and a picture that no row names
        with pytest.raises(UserError, match=r"none of the 2 rows of .*captions\.jsonl names a file .* 'gone\.png'"):
            read_folder(tmp_path)
        picture(tmp_path / "a.png")
    picture(tmp_path / "gone.png")
    assert {name: record.caption for name, record in by_name(tmp_path).items()} == {"a.png": "", "gone.png": "x"}
    assert left_over(tmp_path) == {"../a.png": "captions that no image takes"}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_table_names_a_picture_in_any_way_and_it_is_there_once(
    tmp_path: Path, suffix: str, form: Literal["NFC", "NFD"]
) -> None:
    other: Literal["NFC", "NFD"] = "NFD" if form == "NFC" else "NFC"
    for n in range(5):
        picture(tmp_path / unicodedata.normalize(other, f"deep/é{n}.png"))
    file = unicodedata.normalize(form, "deep/é")
    names = [
        f"{tmp_path / file}0.png",
        f"./{file}1.png",
        f"deep/../{file}2.png",
        f"{file}3.png".replace("/", "\\"),
        f"{file}4.png",
    ]
    if suffix == ".csv":
        text = "file,caption\n" + "".join(f"{name},picture {n}\n" for n, name in enumerate(names))
    else:
        text = "".join(json.dumps({"file": name, "caption": f"picture {n}"}) + "\n" for n, name in enumerate(names))
    (tmp_path / f"Captions{suffix}").write_text(text)
    captions = {name: record.caption for name, record in by_name(tmp_path).items()}
    assert captions == {unicodedata.normalize(other, f"deep/é{n}.png"): f"picture {n}" for n in range(5)}
    assert left_over(tmp_path) == {}
    source = open_source("folder", str(tmp_path))
    assert all(source.read(one.location) for one in scanned(source)[0])


def test_a_name_that_is_no_utf8_is_read_and_shown(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for n in range(2):
        picture(tmp_path / "a.png", "red").rename(tmp_path / "set" / os.fsdecode(b"\xff%d.png" % n))
    (tmp_path / "set" / os.fsdecode(b"\xff0.txt")).write_text("a red square")
    pictures = indexed(open_source("folder", str(tmp_path / "set")), tmp_path / "index", Buckets(8, 8))
    assert [pictures.entry(n).name for n in range(2)] == ["\\udcff0.png", "\\udcff1.png"]
    assert pictures.entry(0).caption == "a red square"
    assert pictures.read(1)[:, 0, 0].tolist() == [255, 0, 0]


def test_tables_of_sub_folders_and_files_beside(tmp_path: Path) -> None:
    """As the hub's imagefolder has them, and as other trainers do."""
    for n in range(6):
        picture(tmp_path / "train" / f"{n}.png")
    (tmp_path / "train" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a\u2028red apple"}\n' * 2)
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\n")
    (tmp_path / "train" / "1.TXT").write_text("one")
    (tmp_path / "train" / "2.caption").write_text("two")
    (tmp_path / "train" / "3.json").write_text('{"prompt": "three", "label": "number"}')
    (tmp_path / "train" / "4.json").write_text('{"boxes": []}')
    (tmp_path / "train" / "alone.txt").write_text("nobody")
    (tmp_path / "train" / "x.heic").write_bytes(b"")
    records = by_name(tmp_path)
    assert [records[f"train/{n}.png"].caption for n in range(6)] == ["a\u2028red apple", "one", "two", "three", "", ""]
    assert records["train/3.png"].label == "number"
    assert left_over(tmp_path) == {
        "0.png": "further captions of an image: the first is read",
        "train/alone.txt": "captions that no image takes",
        "train/metadata.csv": "tables beside another table (train/metadata.csv)",
        "train/x.heic": "files ending in .heic",
    }


def test_descriptions_without_captions_leave_the_folders_names(tmp_path: Path) -> None:
    picture(tmp_path / "polar_bear" / "a.png")
    (tmp_path / "polar_bear" / "a.json").write_text('{"boxes": []}')
    picture(tmp_path / ".thumbs" / "a.png")
    picture(tmp_path / "__MACOSX" / "a.png")
    (record,) = read_folder(tmp_path)
    assert (record.caption, record.label) == ("polar bear", "polar_bear")


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_every_ending_is_found_in_any_case(tmp_path: Path, suffix: str) -> None:
    for name in (f"a{suffix}", f"b{suffix.upper()}"):
        picture(tmp_path / "new.png").rename(tmp_path / name)
    assert len(read_folder(tmp_path)) == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("captions.jsonl", '{"file": "a.png", "caption": "x"}\n{"file": \n', r"captions\.jsonl, line 2 is not JSON"),
        ("captions.jsonl", '["a.png"]\n', "line 1 holds a list, expected an object"),
        ("captions.jsonl", '{"image": "a.png", "caption": "x"}\n', "keys are image, caption; expected 'file'"),
        ("captions.csv", "file,title\na.png,x\n", "line 2: the keys are file, title"),
        ("index.jsonl", '{"file": "a.png"}\n', "line 1: the key 'caption' is missing"),
        (
            "index.jsonl",
            '{"file": "/a", "caption": "", "label": null, "split": "train", "name": "a", "meta": {}}\n',
            "line 1: /a lies outside of the folder",
        ),
        (
            "index.jsonl",
            '{"file": 3, "caption": "", "label": null, "split": "train", "name": "a", "meta": {}}\n',
            "line 1: a value is of the wrong type",
        ),
        (
            "index.jsonl",
            '{"file": "a", "caption": "", "label": null, "split": "test", "name": "a", "meta": {}}\n',
            "split is 'test', expected 'train' or 'heldout'",
        ),
    ],
)
def test_malformed_listings_name_the_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_folder(tmp_path)


def test_no_folder_a_file_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing, expected a folder"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a file, expected a folder"):
        read_folder(picture(tmp_path / "a.png"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "0.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds no pictures \(1 \.tar\), .* set data\.source"):
        read_folder(tmp_path / "empty")


def test_the_split_depends_on_the_name_alone(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(2000)]
    share = np.mean([unit_hash(name) < 0.05 for name in names])
    assert 0.035 < share < 0.065
    held = next(name for name in names if unit_hash(name) < 0.05)
    picture(tmp_path / held)
    assert by_name(tmp_path)[held].split == "heldout"
    picture(tmp_path / "another.png")
    assert by_name(tmp_path)[held].split == "heldout"


def test_index_round_trip(tmp_path: Path) -> None:
    records = [
        ImageRecord(tmp_path / "images" / "a.png", "red apple", "food-fruit", "train", "flat/a", {"style": "flat"}),
        ImageRecord(tmp_path / "images" / "b.png", "piñata", None, "heldout", "flat/b", {}),
    ]
    write_index(tmp_path, records)
    assert read_folder(tmp_path) == records


MAPPING = """\
n01440764 tench, Tinca tinca
n01531178 goldfinch, Carduelis carduelis
n02012849 crane
n03126707 crane
n02113799 standard poodle
"""


def test_classes_are_called_by_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "train"
    for synset in ("n02012849", "n01440764", "n03126707"):
        (folder / synset).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(folder / synset / f"{synset}_1.JPEG", "JPEG")
    (tmp_path / "LOC_synset_mapping.txt").write_text(MAPPING)
    pictures = indexed(open_source("folder", str(folder)), tmp_path / "index", Buckets(8, 8))
    assert pictures.classes() == ["tench", "crane (n02012849)", "crane (n03126707)"], "in the synsets' order"
    told = {pictures.entry(n).label: pictures.entry(n).caption for n in range(3)}
    assert told == {name: name for name in pictures.classes()}


def test_without_a_mapping_the_ids_are_the_names(tmp_path: Path) -> None:
    assert synset_names(tmp_path, ["n01440764"]) == {}
    (tmp_path / "words.txt").write_text(MAPPING.replace(" ", "\t", 1))
    assert synset_names(tmp_path, ["n01440764"]) == {"n01440764": "tench"}
    assert synset_names(tmp_path, ["n01440764", "tench"]) == {}, "other folders beside synsets: names are names"


def test_numbers_are_ordered_as_numbers() -> None:
    assert order_classes(["10", "9", "2"]) == ["2", "9", "10"]
    assert order_classes(["10", "b", "a"]) == ["10", "a", "b"]
    assert order_classes(["2", "01", "1"]) == ["01", "1", "2"]  # in every process
    assert order_classes(["9" * 5000, "10", "9"]) == ["10", "9", "9" * 5000]  # int takes no such number


def test_records_have_imagenets_names_and_the_folder_is_summed_up(tmp_path: Path) -> None:
    for synset in ("n01440764", "n02012849"):
        picture(tmp_path / "train" / synset / "1.png")
    (tmp_path / "train" / "words.txt").write_text(MAPPING)
    told: list[str] = []
    records = read_folder(tmp_path / "train", told.append)
    assert [(one.label, one.caption) for one in records] == [("tench", "tench"), ("crane", "crane")]
    heldout = sum(record.split == "heldout" for record in records)
    assert told == [
        f"pictures: 2, {heldout} of them held out, 2 with and 0 without a caption, 2 classes; 0 skipped, "
        "0 other files and rows not used"
    ]
