"""The index of a source: the same from any number of processes, split, ordered and bucketed."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from starflow.data.buckets import ASPECTS, Aspect, Buckets, Size, aspect_size
from starflow.data.images import ImageError
from starflow.data.index import ViewDataset, changes_since, image_tensor, open_source, split_indices
from starflow.data.sets.small import SHAPES, draw_shapes
from starflow.data.sources.base import unit_hash
from starflow.errors import UserError
from tests.data.sources.common import WRITERS, encoded, indexed, write_files, write_tar


@pytest.mark.parametrize(
    ("kind", "path", "message"),
    [
        ("folder", "nowhere", "no folder of pictures at 'nowhere'"),
        ("tar", "nowhere/*.tar", r"no \.tar files at 'nowhere/\*\.tar'"),
        ("tar", "pipe:cat shard.tar", "pipe: is not read, expected http: or https:"),
        ("tar", "s3://bucket/a.tar", "s3: is not read"),
        ("tar", "http://host/a.tar.gz", "is compressed"),
        ("tar", "http://host/a-{5..3}.tar", "runs backwards"),
        ("parquet", "nowhere", r"no \.parquet files at 'nowhere'"),
    ],
)
def test_bad_paths(kind: str, path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(kind, path)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", WRITERS)
def test_an_index_is_the_same_from_one_process_and_from_three(tmp_path: Path, kind: str) -> None:
    source = open_source(kind, str(WRITERS[kind](tmp_path / "set")))  # type: ignore[arg-type]
    one = indexed(source, tmp_path / "one", Buckets(8, 8))
    three = indexed(source, tmp_path / "three", Buckets(8, 8), processes=3)
    for name in ("pictures.jsonl", "kinds.safetensors", "info.json", "skipped.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
    assert len(one) == len(three) == 7
    again = pickle.loads(pickle.dumps(three))
    reds = [int(one.read(n)[0, 0, 0]) for n in range(7)]
    assert [int(again.read(n)[0, 0, 0]) for n in range(7)] == reds
    assert max(abs(red - n) for n, red in enumerate(sorted(reds))) <= 2, "the pixels are those of the source"
    assert not list((tmp_path / "one").glob("part-*")), "parts are removed"


def test_of_few_pictures_one_is_held_out(tmp_path: Path) -> None:
    pictures = indexed(open_source("folder", str(write_files(tmp_path / "set"))), tmp_path / "index", Buckets(8, 8))
    (heldout,), (train,) = split_indices(pictures, heldout=True), split_indices(pictures, heldout=False)
    assert (len(heldout), len(train)) == (1, 6)
    assert pictures.classes() == ["class 0", "class 1"]
    assert set(pictures.substitutes(int(train[2]))) == set(train.tolist())
    assert pictures.substitutes(int(train[2]))[0] == int(train[3])


def test_one_picture_is_too_few(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"y.png": encoded(1)})
    with pytest.raises(UserError, match="1 pictures in 1 shards"):
        indexed(open_source("tar", str(tmp_path)), tmp_path / "index", Buckets(8, 8))


def test_pictures_go_to_the_nearest_of_nine_ratios(tmp_path: Path) -> None:
    sizes = {"wide": (42, 18), "square": (20, 21), "tall": (9, 16), "phone": (40, 60)}
    for name, size in sizes.items():
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"{name}.png").write_bytes(encoded(9, size))
        (tmp_path / "set" / f"{name}.txt").write_text(name)
    turned = Image.new("RGB", (16, 9))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "set" / "turned.jpg", exif=exif)
    (tmp_path / "set" / "broken.png").write_bytes(b"nothing")
    buckets = Buckets(64, 8, ASPECTS)
    pictures = indexed(open_source("folder", str(tmp_path / "set")), tmp_path / "index", buckets)
    assert len(pictures) == 5
    found = {pictures.entry(n).name.split(".")[0]: n for n in range(5)}
    aspects = {name: ASPECTS[pictures.entry(n).bucket] for name, n in found.items()}
    assert aspects == {"wide": "21:9", "square": "1:1", "tall": "9:16", "phone": "2:3", "turned": "9:16"}
    for name, number in found.items():
        width, height = buckets.size(ASPECTS.index(aspects[name]))
        assert pictures.read(number).shape == (3, height, width)
    assert pictures.entry(found["tall"]).caption == "tall\n in a 9:16 aspect ratio.\n"
    assert pictures.entry(found["turned"]).caption == "", "an empty caption stays the null condition"
    skipped = (tmp_path / "index" / "skipped.jsonl").read_text()
    assert json.loads(skipped) == {"skipped": "broken.png", "reason": "no known image format"}


def test_an_image_is_scaled_to_cover_and_its_middle_is_cut_out() -> None:
    stripes = np.zeros((20, 80, 3), dtype=np.uint8)
    stripes[:, :30], stripes[:, 30:50], stripes[:, 50:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    found = image_tensor(Image.fromarray(stripes), (10, 10))
    assert found.shape == (3, 10, 10)
    assert found.dtype == torch.uint8
    assert found[1].min() > 230, "the middle square alone is green"
    wide = image_tensor(Image.fromarray(stripes), (40, 10))
    assert wide.shape == (3, 10, 40)
    assert wide[:, 5, [2, 20, 37]].T.tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


@settings(max_examples=60, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 700), st.integers(1, 700)),
    side=st.sampled_from([16, 224, 256]),
    aspect=st.sampled_from(ASPECTS),
)
@example(size=(640, 480), side=256, aspect="5:4")
@example(size=(116, 116), side=224, aspect="1:1")
@example(size=(1, 700), side=256, aspect="21:9")
def test_an_image_of_any_size_fits_any_bucket(size: Size, side: int, aspect: Aspect) -> None:
    width, height = aspect_size(aspect, side, 8)
    found = image_tensor(Image.new("RGB", size, (9, 20, 30)), (width, height))
    assert found.shape == (3, height, width)
    assert found.flatten(1).unique(dim=1).T.tolist() == [[9, 20, 30]]


def test_an_image_that_raises_anything_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source("folder", str(write_files(tmp_path / "set")))
    pictures = indexed(source, tmp_path / "index", Buckets(8, 8))
    monkeypatch.setattr(source, "read", lambda location: 1 / 0)
    with pytest.raises(ImageError, match=re.escape(f"{pictures.entry(2).name} is not a readable image (division")):
        pictures.read(2)


def test_views_are_a_data_set_of_one_bucket() -> None:
    views = draw_shapes(40, 8, seed=0)
    images = ViewDataset(views)
    (train,), (heldout,) = split_indices(images, heldout=False), split_indices(images, heldout=True)
    assert sorted([*train.tolist(), *heldout.tolist()]) == list(range(len(images)))
    assert heldout.tolist() == [19, 39]
    assert all(images.entry(index).heldout for index in heldout.tolist())
    entry = images.entry(21)
    assert (entry.name, entry.caption, entry.label) == (views.names[21], views.captions[21], views.labels[21])
    assert torch.equal(images.read(21), views.images[21])
    assert images.classes() == sorted(SHAPES)
    assert images.buckets.size(entry.bucket) == (8, 8)


def test_a_picture_that_can_be_read_is_held_out(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "set")
    names = sorted((path.relative_to(folder).as_posix() for path in folder.rglob("*.png")), key=unit_hash)
    for name in names[:3]:
        (folder / name).write_bytes(b"nothing")
    source = open_source("folder", str(folder))
    for n, share in enumerate((1e-9, unit_hash(names[1]) + 1e-9)):  # nothing held out by chance, and two broken ones
        pictures = indexed(source, tmp_path / str(n), Buckets(8, 8), heldout=share)
        heldout = {pictures.entry(int(i)).name for i in split_indices(pictures, heldout=True)[0]}
        assert heldout == {*([] if n == 0 else names[:2]), names[3]}


def test_changes_since_the_index_are_noticed(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "set")
    (folder / "class 0" / "0.txt").write_text("a cat")
    indexed(open_source("folder", str(folder)), tmp_path / "index", Buckets(8, 8))
    assert changes_since(open_source("folder", str(folder)), tmp_path / "index") == ""
    (folder / "class 0" / "0.txt").write_text("a dog")
    os.utime(folder / "class 0" / "0.txt", (1, 1))
    message = changes_since(open_source("folder", str(folder)), tmp_path / "index")
    assert "then 7 pictures and 1 other files, now 7 and 1" in message
    (folder / "new.png").write_bytes(encoded(9))
    assert "now 8 and 1" in changes_since(open_source("folder", str(folder)), tmp_path / "index")


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_changed_shards_are_noticed(tmp_path: Path, kind: str) -> None:
    folder = WRITERS[kind](tmp_path / "set")
    indexed(open_source(kind, str(folder)), tmp_path / "index", Buckets(8, 8))  # type: ignore[arg-type]
    again = open_source(kind, str(folder))  # type: ignore[arg-type]
    assert changes_since(again, tmp_path / "index") == ""
    os.utime(again.shards[0], (1, 1))
    assert changes_since(again, tmp_path / "index")


def test_what_the_model_reads_must_be_there_and_is_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for n in range(3):
        folder.mkdir(exist_ok=True)
        (folder / f"{n}.png").write_bytes(encoded(n))
    with pytest.raises(UserError, match="conditioning.kind is text, and none of 3 pictures has a caption"):
        indexed(open_source("folder", str(folder)), tmp_path / "index", Buckets(8, 8), reads="text")
    assert not list((tmp_path / "index").glob("part-*"))
    (folder / "captions.jsonl").write_text('{"file": "0.png", "caption": "a cat"}\n')
    with pytest.raises(UserError, match="conditioning.kind is class, and none of 3 pictures has a class .captions go"):
        indexed(open_source("folder", str(folder)), tmp_path / "index", Buckets(8, 8), reads="class")
    pictures = indexed(open_source("folder", str(folder)), tmp_path / "index", Buckets(8, 8), reads="text")
    assert [pictures.entry(n).caption for n in range(3)] == ["a cat", "", ""]


def test_pictures_found_unreadable_later_are_added_to_the_list_once(tmp_path: Path) -> None:
    pictures = indexed(open_source("folder", str(write_files(tmp_path / "set"))), tmp_path / "index", Buckets(8, 8))
    for _ in range(2):
        pictures.add_skipped([("a\u2028.png", "broken")])
        pictures.add_skipped(iter([("b.png", "too"), ("a\u2028.png", "broken")]))
    lines = (tmp_path / "index" / "skipped.jsonl").read_text().strip().split("\n")
    assert [json.loads(line)["skipped"] for line in lines] == ["a\u2028.png", "b.png"]


def test_captions_with_any_separator_survive_the_index(tmp_path: Path) -> None:
    write_files(tmp_path / "set")
    captions = ["a\u2028b", "a\x85b", "a\x1cb\x0b", 'a "b"\nc', "grün", "\ud83c\udf4e"]
    rows = [{"file": f"class {n % 2}/{n}.png", "caption": caption} for n, caption in enumerate(captions)]
    (tmp_path / "set" / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pictures = indexed(open_source("folder", str(tmp_path / "set")), tmp_path / "index", Buckets(8, 8))
    found = {pictures.entry(n).name: pictures.entry(n).caption for n in range(7)}
    expected = {row["file"]: row["caption"].encode("utf-16", "surrogatepass").decode("utf-16") for row in rows}
    assert found == {**expected, "class 0/6.png": ""}
