"""Folders in every layout, malformed listings, and ImageNet's folders as they come."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from starflow.data.buckets import Buckets
from starflow.data.images import ImageError, open_image
from starflow.data.index import open_source
from starflow.data.sources.base import ImageRecord, unit_hash
from starflow.data.sources.folder import order_classes, read_folder, synset_names, write_index
from starflow.errors import UserError
from tests.data.sources.common import indexed


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
    assert records["images/unlisted.png"].caption == "images"


def test_a_listed_picture_that_is_missing_is_named_when_opened(tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_text('{"file": "gone.png", "caption": "x"}\n')
    (record,) = read_folder(tmp_path)
    with pytest.raises(ImageError, match=r"gone\.png.*no such file"):
        open_image(record.file)


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
    with pytest.raises(UserError, match="holds no pictures"):
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
