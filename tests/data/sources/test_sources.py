"""Folders, tar shards (of files and by URL) and parquet: every picture found once, in order, read again by place."""

from __future__ import annotations

import http.server
import io
import json
import pickle
import re
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from starflow.data import index
from starflow.data.buckets import ASPECTS, Buckets
from starflow.data.images import ImageError
from starflow.data.index import open_source, split_indices
from starflow.data.sources.base import ScannedImage, SkippedImage, Source
from starflow.data.sources.tar import expand_ranges, is_url
from starflow.errors import UserError


def encoded(number: int, size: tuple[int, int] = (12, 12), kind: str = "PNG") -> bytes:
    """A flat picture whose red is its number."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (number, 20, 30)).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path) -> Path:
    """Seven pictures in two shards, with captions of every kind."""
    first = {f"{n}.png": encoded(n) for n in range(3)}
    members: dict[str, bytes] = {}
    for n in range(3):
        members |= {f"{n}.png": first[f"{n}.png"], f"{n}.txt": f"picture\n{n}".encode()}
    write_tar(folder / "a-00.tar", members)
    second: dict[str, bytes] = {"deep/3.cls": b"7"}
    second |= {"deep/3.seg.png": encoded(3), "4.json": json.dumps({"text": "four", "label": 9}).encode()}
    second |= {"4.jpg": encoded(4, kind="JPEG"), "alone.txt": b"no picture", "5.png": encoded(5), "6.webp": encoded(6)}
    second |= {"7.pyd": b"cos\nsystem\n(S'false'\ntR."}
    write_tar(folder / "a-01.tar", second)
    return folder


def write_parquet(folder: Path, count: int = 7, group: int = 3, struct: bool = True) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    pictures = [{"bytes": encoded(n), "path": None} if struct else encoded(n) for n in range(count)]
    table = pyarrow.table({"image": pictures, "text": [f"picture {n}" for n in range(count)], "label": range(count)})
    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, folder / "0.parquet", row_group_size=group)
    return folder


def write_files(folder: Path) -> Path:
    for n in range(7):
        path = folder / f"class {n % 2}" / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(n))
    return folder


def scanned(source: Source, *, sizes: bool = True) -> tuple[list[ScannedImage], list[SkippedImage]]:
    found = [one for shard in range(len(source.shards)) for one in source.scan(shard, sizes=sizes)]
    return [one for one in found if isinstance(one, ScannedImage)], [
        one for one in found if isinstance(one, SkippedImage)
    ]


def red(data: bytes) -> int:
    with Image.open(io.BytesIO(data)) as image:
        return int(np.asarray(image.convert("RGB"))[0, 0, 0])


WRITERS = {"folder": write_files, "tar": write_shards, "parquet": write_parquet}


@pytest.mark.parametrize("sizes", [True, False])
@pytest.mark.parametrize("kind", WRITERS)
def test_every_picture_is_found_and_read_again_in_another_process(tmp_path: Path, kind: str, sizes: bool) -> None:
    source = open_source(kind, str(WRITERS[kind](tmp_path / "set")))  # type: ignore[arg-type]
    found, _ = scanned(source, sizes=sizes)
    again = pickle.loads(pickle.dumps(source))  # as a worker gets it
    reds = [red(again.read(one.location)) for one in found]
    assert sorted(reds)[:3] == [0, 1, 2]
    assert len(found) == 7
    assert all(abs(value - n) <= 2 for n, value in enumerate(sorted(reds)))
    assert len({one.name for one in found}) == 7
    assert {one.size for one in found} == ({(12, 12)} if sizes else {None})
    assert scanned(again, sizes=sizes)[0] == found


def test_fields_of_tar_samples(tmp_path: Path) -> None:
    found, skipped = scanned(open_source("tar", str(write_shards(tmp_path))))
    told = {one.name: (one.caption, one.label) for one in found}
    assert told["a-00.tar/1"] == ("picture 1", None)
    assert told["a-01.tar/deep/3"] == ("7", "7")
    assert told["a-01.tar/4"] == ("four", "9")
    assert told["a-01.tar/5"] == ("", None)
    assert [(one.name, one.reason) for one in skipped] == [
        ("a-01.tar/alone", "the sample holds no picture"),
        ("a-01.tar/7", "the sample holds no picture"),
    ]


@pytest.mark.parametrize("length", [1024, 1200, 1600, 2100, 3000, 4096])
def test_a_shard_that_is_cut_short_gives_what_it_has(tmp_path: Path, length: int) -> None:
    folder = write_shards(tmp_path)
    path = folder / "a-00.tar"
    path.write_bytes(path.read_bytes()[:length])
    found, skipped = scanned(open_source("tar", str(folder)))
    assert found[0].name == ("a-00.tar/0" if length > 2500 else "a-01.tar/deep/3")
    assert skipped[0].name == "a-00.tar"
    assert "a-01.tar/5" in [one.name for one in found]


def test_a_picture_that_is_none_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x.png": b"no picture", "y.png": encoded(1)})
    source = open_source("tar", str(tmp_path / "a.tar"))
    found, skipped = scanned(source)
    assert ([one.name for one in found], skipped) == (["a.tar/y"], [SkippedImage("a.tar/x", "no known image format")])
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:1100])
    with pytest.raises(ImageError, match="cut short at byte"):
        source.read(found[0].location)


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


def test_patterns() -> None:
    assert expand_ranges("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_ranges("{0..1}/{0..1}") == ["0/0", "0/1", "1/0", "1/1"]
    assert not is_url(r"C:\shards\a.tar")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files with ranges, unless the folder's name says not."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not wanted or "plain" in self.path:
            super().do_GET()
            return
        data = (Path(self.directory) / self.path[1:]).read_bytes()[int(wanted[1]) : int(wanted[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    handler = partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_shards_by_url_are_those_of_the_files(tmp_path: Path, served: str) -> None:
    write_shards(tmp_path / "plain")
    write_shards(tmp_path / "set")
    local = open_source("tar", str(tmp_path / "set"))
    remote = open_source("tar", served + "/set/a-{00..01}.tar")
    assert scanned(remote) == scanned(local)
    for one in scanned(local)[0]:
        assert remote.read(one.location) == local.read(one.location)
    without = open_source("tar", served + "/plain/a-00.tar")
    with pytest.raises(ImageError, match="gives no ranges"):
        without.read(scanned(local)[0][0].location)
    gone = open_source("tar", served + "/set/b.tar")
    assert "404" in scanned(gone)[1][0].reason


def test_parquet_of_plain_bytes_and_without_pictures(tmp_path: Path) -> None:
    source = open_source("parquet", str(write_parquet(tmp_path / "a", struct=False)))
    assert [red(source.read(one.location)) for one in scanned(source)[0]] == list(range(7))
    from pyarrow import parquet, table

    (tmp_path / "b").mkdir()
    parquet.write_table(table({"words": ["x"]}), tmp_path / "b" / "0.parquet")
    with pytest.raises(UserError, match="has the columns words: expected one of image, jpg"):
        open_source("parquet", str(tmp_path / "b"))
    (tmp_path / "b" / "0.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match="no whole parquet file"):
        open_source("parquet", str(tmp_path / "b"))


def indexed(source: Source, folder: Path, buckets: Buckets, processes: int = 1) -> index.IndexedDataset:
    """The index as so many processes make it, in turn."""
    settings = index.IndexSettings(buckets.aspects, 0.05)
    missing = index.missing_parts(source, folder)
    for rank in range(processes):
        for shard in missing[rank::processes]:
            index.scan_shard(source, shard, folder, settings)
    index.join_parts(source, folder)
    return index.IndexedDataset(source, folder, buckets)


@pytest.mark.parametrize("kind", WRITERS)
def test_an_index_is_the_same_from_one_process_and_from_three(tmp_path: Path, kind: str) -> None:
    source = open_source(kind, str(WRITERS[kind](tmp_path / "set")))  # type: ignore[arg-type]
    one = indexed(source, tmp_path / "one", Buckets(8, 8))
    three = indexed(source, tmp_path / "three", Buckets(8, 8), processes=3)
    for name in ("pictures.jsonl", "kinds.safetensors", "info.json", "skipped.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
    assert len(one) == len(three) == 7
    again = pickle.loads(pickle.dumps(three))
    assert [int(again.read(n)[0, 0, 0]) for n in range(7)] == [int(one.read(n)[0, 0, 0]) for n in range(7)]
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
