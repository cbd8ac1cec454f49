"""Tar shards, of files and by URL: captions, shards that are cut short, patterns, ranges of bytes."""

from __future__ import annotations

import http.server
import io
import re
import tarfile
import threading
from collections.abc import Iterator
from email.message import Message
from functools import partial
from pathlib import Path
from typing import NoReturn
from urllib.error import HTTPError, URLError
from urllib.request import Request

import pytest

from starflow.data.images import ImageError
from starflow.data.index import open_source
from starflow.data.sources import tar
from starflow.data.sources.base import SkippedImage
from starflow.data.sources.tar import expand_ranges, is_url, read_range
from starflow.errors import UserError
from tests.data.sources.common import encoded, red, scanned, write_shards, write_tar


def test_fields_of_tar_samples(tmp_path: Path) -> None:
    found, skipped = scanned(open_source("tar", str(write_shards(tmp_path))))
    told = {one.name: (one.caption, one.label) for one in found}
    assert told["a-00.tar/1"] == ("picture 1", None)
    assert told["a-01.tar/deep/3"] == ("7", "7")
    assert told["a-01.tar/4"] == ("four", "9")
    assert told["a-01.tar/5"] == ("", None)
    assert [(one.name, one.reason) for one in skipped] == [
        ("a-01.tar/alone", "the sample holds no picture"),
        ("a-01.tar/7.pyd", "files ending in .pyd"),
    ]


@pytest.mark.parametrize(
    ("members", "found", "unused"),
    [
        (["1.depth.png", "1.jpg", "1.txt"], {"1": "1.txt"}, ["1.depth.png"]),
        (["1.mask.png", "1.png"], {"1": ""}, ["1.mask.png"]),
        (["p.v1.jpg", "p.v2.jpg", "z.jpg", "p.txt"], {"p.v1": "p.txt", "p.v2": "p.txt", "z": ""}, []),
        (["p.v1.jpg", "p.v2.jpg", "p.v2.txt"], {"p.v1": "", "p.v2": "p.v2.txt"}, []),
        (["p.jpg", "p.v2.jpg", "p.v2.txt", "p.txt"], {"p": "p.txt", "p.v2": "p.v2.txt"}, []),
        (["1.jpg", "1.jpg", "2.jpg", "1.txt"], {"1": "1.txt", "1 (2)": "", "2": ""}, []),
        (["1.jpg", "2.jpg", "1.TXT", "2.caption"], {"1": "1.TXT", "2": "2.caption"}, []),
        (["1.jpg", "1.png", "1.npy"], {"1": ""}, ["1.png", "1.npy"]),
        (
            ["__MACOSX/._1.jpg", "._1.jpg", "1.avif", "1.other.txt"],
            {"1": ""},
            ["__MACOSX/._1.jpg", "._1.jpg", "1.other.txt"],
        ),
    ],
)
def test_members_become_images_or_are_named(
    tmp_path: Path, members: list[str], found: dict[str, str], unused: list[str]
) -> None:
    """The captions here are the names of the members that they are read from."""
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as archive:
        for number, name in enumerate(members):
            text = name.lower().endswith((".txt", ".caption"))
            data = name.encode() if text else encoded(number)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    source = open_source("tar", str(path))
    images, left = scanned(source, sizes=False)
    assert {one.name: one.caption for one in images} == {f"0.tar/{name}": text for name, text in found.items()}
    assert sorted(one.name for one in left) == sorted(f"0.tar/{name}" for name in unused)
    picked = [red(source.read(one.location)) for one in images]
    assert len(set(picked)) == len(images), "each image has its own bytes"
    stems = [members[number].rpartition(".")[0] for number in picked]
    assert sorted(stems) == sorted(one.name[len("0.tar/") :].removesuffix(" (2)") for one in images)


def test_a_folder_of_shards_counts_what_else_lies_there(tmp_path: Path) -> None:
    for place in ("a", "b"):
        write_tar(tmp_path / "set" / place / "0.tar", {"1.png": encoded(1)})
    (tmp_path / "set" / "README.md").write_text("words")
    images, left = scanned(open_source("tar", str(tmp_path / "set")))
    assert [one.name for one in images] == ["a/0.tar/1", "b/0.tar/1"], "two images never share a name"
    assert [(one.name, one.reason) for one in left] == [("README.md", "files ending in .md")]
    (tmp_path / "set" / "1.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match="1.tar.gz is compressed"):
        open_source("tar", str(tmp_path / "set"))


def test_links_in_an_archive_are_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"x.png": encoded(1)})
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("y.png")
        link.type, link.linkname = tarfile.LNKTYPE, "x.png"
        archive.addfile(link)
    images, left = scanned(open_source("tar", str(path)))
    assert [one.name for one in images] == ["a.tar/x"]
    assert left == [SkippedImage("a.tar/y.png", "a link or sparse member of the archive")]


@pytest.mark.parametrize("length", [1024, 1200, 1600, 2100, 3000, 4096])
def test_a_shard_that_is_cut_short_gives_what_it_has(tmp_path: Path, length: int) -> None:
    folder = write_shards(tmp_path)
    path = folder / "a-00.tar"
    path.write_bytes(path.read_bytes()[:length])
    found, skipped = scanned(open_source("tar", str(folder)))
    assert found[0].name == ("a-00.tar/0" if length > 2500 else "a-01.tar/deep/3")
    assert "a-00.tar" in [one.name for one in skipped]
    assert "a-01.tar/5" in [one.name for one in found]


def test_what_lies_behind_a_damaged_header_or_the_end_of_an_archive_is_named(tmp_path: Path) -> None:
    """tarfile takes both for the end, so that whatever follows would be lost without a word."""
    path = write_tar(tmp_path / "a.tar", {f"{number}.png": encoded(number) for number in range(4)})
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        header = archive.getmembers()[2].offset
    path.write_bytes(whole[: header + 148] + b"?" + whole[header + 149 :])  # the checksum
    damaged = SkippedImage("a.tar", f"no header at byte {header}, and what follows is not read")
    images, left = scanned(open_source("tar", str(path)))
    assert [one.name for one in images] == ["a.tar/0"]
    assert left == [SkippedImage("a.tar/1", "its shard is cut short here"), damaged]
    path.write_bytes(whole + whole)
    images, left = scanned(open_source("tar", str(path)))
    assert [one.name for one in images] == ["a.tar/0", "a.tar/1", "a.tar/2"]
    assert "what follows is not read" in left[-1].reason
    path.write_bytes(whole + bytes(10 * 512))  # as tar pads it
    assert (len(scanned(open_source("tar", str(path)))[0]), scanned(open_source("tar", str(path)))[1]) == (4, [])


def test_a_picture_that_is_none_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x.png": b"no picture", "y.png": encoded(1)})
    source = open_source("tar", str(tmp_path / "a.tar"))
    found, skipped = scanned(source)
    assert ([one.name for one in found], skipped) == (["a.tar/y"], [SkippedImage("a.tar/x", "no known image format")])
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:1100])
    with pytest.raises(ImageError, match="cut short at byte"):
        source.read(found[0].location)


def test_patterns() -> None:
    assert expand_ranges("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_ranges("{0..1}/{0..1}") == ["0/0", "0/1", "1/0", "1/1"]
    for endless in ("{0..99999999999}.tar", "{0..9999}{0..9999}.tar", f"{{0..{'9' * 5000}}}.tar"):
        with pytest.raises(UserError, match="stands for over 1,000,000 shards"):
            expand_ranges(endless)
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


def test_a_range_is_asked_for_again_while_the_server_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults of the network and of the server are tried again; what the server refuses is not."""
    asked: list[str] = []

    def answer(*codes: int) -> None:
        waiting = list(codes)

        def urlopen(request: Request, timeout: float) -> NoReturn:
            asked.append(request.headers["Range"])
            code = waiting.pop(0)
            if code == 0:
                raise URLError("connection reset")
            raise HTTPError(request.full_url, code, "no", Message(), None)

        asked.clear()
        monkeypatch.setattr(tar, "urlopen", urlopen)

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    answer(503, 0, 500, 503)
    with pytest.raises(OSError, match="503"):
        read_range("http://host/a.tar", 5, 10)
    assert asked == ["bytes=5-14"] * tar.MAX_TRIES
    answer(404)
    with pytest.raises(OSError, match="404"):
        read_range("http://host/a.tar", 5, 10)
    assert len(asked) == 1
