"""Thousands of generated inputs through the readers and commands: no traceback, and all that went in is used or named.

Each section generates its inputs by hypothesis from one seed, and stops early after STARFLOW_FUZZ_SECONDS (60), so that
a slow machine tries fewer; it prints how many it has tried and what became of them. Run it with `-m slow`.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from starflow.data.buckets import ASPECTS, aspect_size
from starflow.data.images import ImageError, decode_image, image_errors, read_image_size
from starflow.data.index import image_tensor, open_source
from starflow.data.sources.base import ScannedImage, SkippedImage, UnusedFile
from starflow.data.sources.captions import caption_and_label, read_table, sidecar_fields
from starflow.data.sources.folder import list_folder
from starflow.errors import UserError

SEED = 20_251_128

SECONDS = float(os.environ.get("STARFLOW_FUZZ_SECONDS", "60"))

pytestmark = pytest.mark.slow


def fuzz(name: str, inputs: st.SearchStrategy[Any], examples: int, check: Callable[[Any], Iterable[str]]) -> None:
    """Run `check`, which says what became of an input, on so many inputs, and print the counts."""
    counts: Counter[str] = Counter()
    end = time.monotonic() + SECONDS

    @seed(SEED)
    @settings(
        max_examples=examples,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def run(value: Any) -> None:
        if time.monotonic() < end:
            counts.update(["inputs", *check(value)])

    run()
    told = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()) if what != "inputs")
    print(f"\nfuzz {name}: {counts['inputs']} inputs: {told}")
    assert counts["inputs"]


def one_line(error: Exception) -> str:
    """The kind of an error, once it is seen to be one line that a user can read."""
    assert "\n" not in str(error)
    str(error).encode()  # it can be printed
    return "said"


# Data: pictures, captions, tables, folders, tars and parquet files.

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO")

TEXT = st.text(max_size=12) | st.sampled_from(
    ["a cat", "a,b", '"', "a\u2028b", "\ud800", "é", "e\u0301", "\0", "\x85", ""]
)

VALUE = st.none() | st.integers() | st.floats() | TEXT | st.booleans() | st.binary(max_size=6)

FIELDS = st.dictionaries(
    st.sampled_from(["caption", "text", "Label", "cls", "file", "file_name", "txt", "class"]) | TEXT,
    VALUE | st.lists(VALUE, max_size=3) | st.dictionaries(TEXT, VALUE, max_size=2),
    max_size=4,
)

STEMS = st.sampled_from(["1", "2", "é", "e\u0301", "photo.v1", "photo.v2", ".hidden", "captions", "metadata", "a b"])

ENDINGS = st.sampled_from(
    [".png", ".JPG", ".avif", ".txt", ".TXT", ".caption", ".cls", ".json", ".csv", ".jsonl", ".heic", "", ".depth.png"]
)

PLACES = st.sampled_from(["", "cat/", "polar_bear/", ".thumbs/", "__MACOSX/", "cat/deep/", "train/"])


@cache
def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (9, 13, 3), dtype=np.uint8)
    try:
        Image.fromarray(pixels).save(buffer, kind)
    except (OSError, KeyError):  # a Pillow without that format
        return encoded("PNG")
    return buffer.getvalue()


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Some bytes are changed, and the end may be cut off."""
    changed = bytearray(data)
    for place, value in draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=6)):
        changed[place] = value
    return bytes(changed[: draw(st.integers(0, len(data)) | st.just(len(data)))])


PICTURES = st.sampled_from(FORMATS).flatmap(lambda kind: damaged(encoded(kind)) | st.just(encoded(kind)))

CONTENTS = PICTURES | st.binary(max_size=40) | TEXT.map(lambda text: text.encode("utf-8", "replace"))


@pytest.mark.filterwarnings("ignore")  # Pillow's own, of odd metadata
def test_pictures() -> None:
    sizes = [aspect_size(aspect, 64, 8) for aspect in ASPECTS]

    def check(case: tuple[bytes, int]) -> list[str]:
        data, bucket = case
        try:
            size = read_image_size(data, "a")
            with image_errors(Path("a")):
                image = decode_image(data, "a", side=2 * max(sizes[bucket]))
                found = image_tensor(image, sizes[bucket])
        except ImageError as error:
            return [one_line(error)]
        assert found.shape == (3, sizes[bucket][1], sizes[bucket][0])
        assert min(size) > 0
        return ["read"]

    fuzz("pictures", st.tuples(PICTURES | st.binary(max_size=200), st.integers(0, 8)), 2500, check)


def test_fields() -> None:
    def check(case: tuple[dict[str, Any], dict[str, bytes]]) -> list[str]:
        caption, label, note = caption_and_label(case[0])
        fields, _ = sidecar_fields(case[1])
        for text in (caption, label or "", note, caption_and_label(fields).caption):
            text.encode()
        return ["noted" if note else "labelled" if label else "captioned" if caption else "empty"]

    beside = st.dictionaries(st.sampled_from([".txt", ".caption", ".cls", ".json"]), CONTENTS, max_size=3)
    fuzz("fields", st.tuples(FIELDS, beside), 1500, check)


def test_tables() -> None:
    rows = st.lists(st.tuples(TEXT, TEXT), max_size=4)
    texts = (
        rows.map(lambda some: "file,caption\n" + "".join(f"{name},{caption}\n" for name, caption in some))
        | rows.map(lambda some: "file,caption\n" + "".join(f'{name},"{caption}"\n' for name, caption in some))
        | st.lists(FIELDS, max_size=3).map(lambda some: "".join(f"{one}\n" for one in some).replace("'", '"'))
        | st.text(max_size=60)
    ).map(lambda text: text.encode("utf-8", "surrogatepass"))

    def check(case: tuple[bytes, str]) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"captions{case[1]}"
            path.write_bytes(case[0])
            try:
                found = read_table(path)
            except UserError as error:
                return [one_line(error)]
        for row in found:
            caption_and_label(row.fields).caption.encode()
        return ["read"]

    fuzz("tables", st.tuples(texts | st.binary(max_size=60), st.sampled_from([".csv", ".jsonl"])), 1500, check)


def test_folders() -> None:
    """Every file is an image, a text that describes one, or named with a reason, and each is one of these once."""
    table = st.lists(
        st.tuples(PLACES, STEMS, st.sampled_from([".png", ".JPG"]), st.text("abc", max_size=3)), max_size=4
    )
    tables = st.tuples(PLACES, st.sampled_from(["captions.csv", "Metadata.CSV"]), table).map(
        lambda one: (
            f"{one[0]}{one[1]}",
            ("file,caption\n" + "".join(f'"{p}{s}{e}",{c}\n' for p, s, e, c in one[2])).encode(),
        )
    )
    files = st.tuples(PLACES, STEMS, ENDINGS, CONTENTS).map(lambda one: ("".join(one[:3]), one[3]))
    trees = st.tuples(st.lists(files, max_size=8), st.lists(tables, max_size=2)).map(lambda one: dict(one[0] + one[1]))

    def check(tree: dict[str, bytes]) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            for name, data in tree.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            try:
                listing = list_folder(Path(folder))
                found = list(open_source("folder", folder).scan(0, sizes=True))
            except UserError as error:
                return [one_line(error)]
            images = {str(one.file.relative_to(folder)) for one in listing.records}
        rows = ("captions that no image takes", "further captions of an image: the first is read")
        left = [one.name for one in listing.left if one.reason not in rows or one.name in tree]
        texts = set(listing.texts)
        assert images | texts | set(left) >= set(tree), "nothing is lost"
        assert not images & texts
        assert not images.intersection(one.name for one in listing.left if one.reason not in rows)
        assert len(found) == len(listing.records) + len(listing.left)
        return ["read"]

    fuzz("folders", trees, 1200, check)


def test_tars() -> None:
    members = st.lists(
        st.tuples(PLACES, STEMS, ENDINGS, CONTENTS).map(lambda one: ("".join(one[:3]), one[3])), max_size=8
    )

    def packed(some: list[tuple[str, bytes]]) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name, data in some:
                info = tarfile.TarInfo(name or "x")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return buffer.getvalue()

    def check(case: tuple[list[tuple[str, bytes]], bytes | None]) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "0.tar"
            path.write_bytes(case[1] if case[1] is not None else packed(case[0]))
            source = open_source("tar", str(path))
            found = list(source.scan(0, sizes=True))
            images = [one for one in found if isinstance(one, ScannedImage)]
            for one in images:
                assert source.read(one.location)
        assert len({one.name for one in images}) == len(images)
        for name in [one.name for one in found]:
            name.encode()
        if case[1] is not None:
            return ["damaged"]
        pictures = [name for name, _ in case[0] if name.lower().endswith((".png", ".jpg", ".avif"))]
        named = [
            one for one in found if isinstance(one, UnusedFile) and one.name.lower().endswith((".png", ".jpg", ".avif"))
        ]
        broken = [one for one in found if isinstance(one, SkippedImage) and not isinstance(one, UnusedFile)]
        broken = [one for one in broken if one.reason != "the sample holds no picture"]
        assert len(images) + len(broken) + len(named) == len(pictures), "every picture is used or named, once"
        return ["read"]

    broken = members.flatmap(lambda some: damaged(packed(some)))
    fuzz("tars", st.tuples(members, st.none() | broken), 1000, check)


def test_parquet() -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    pictures = PICTURES | st.none() | st.binary(max_size=9)
    struct = st.fixed_dictionaries({"bytes": pictures, "path": st.none() | st.just("a.png")})
    columns = st.integers(1, 4).flatmap(
        lambda rows: st.fixed_dictionaries(
            {},
            optional={
                "image": st.lists(pictures, min_size=rows, max_size=rows)
                | st.lists(struct, min_size=rows, max_size=rows)
                | st.lists(st.just("http://host/a.png"), min_size=rows, max_size=rows)
                | st.lists(st.lists(pictures, max_size=2), min_size=rows, max_size=rows),
                "jpg": st.lists(pictures, min_size=rows, max_size=rows),
                "caption": st.lists(st.none() | st.text("a\u2028é", max_size=3), min_size=rows, max_size=rows),
                "TEXT": st.lists(st.lists(st.text("ab", max_size=3), max_size=2), min_size=rows, max_size=rows),
                "label": st.lists(st.none() | st.integers(-1, 4), min_size=rows, max_size=rows),
            },
        )
    )

    def check(case: tuple[list[dict[str, list[Any]]], bool]) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            for number, values in enumerate(case[0]):
                table = pyarrow.table(values)
                if case[1]:
                    info = '{"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}'
                    table = table.replace_schema_metadata({"huggingface": info})
                parquet.write_table(table, Path(folder) / f"{number}.parquet", row_group_size=2)
            try:
                source = open_source("parquet", folder)
            except UserError as error:
                return [one_line(error)]
            found = [one for shard in range(len(source.shards)) for one in source.scan(shard, sizes=True)]
            for one in found:
                if isinstance(one, ScannedImage):
                    assert source.read(one.location)
        rows = sum(len(next(iter(values.values()))) for values in case[0] if values)
        assert len(found) == rows, "every row is used or named, once"
        assert len({one.name for one in found}) == len(found)
        return ["read"]

    fuzz("parquet", st.tuples(st.lists(columns, min_size=1, max_size=2), st.booleans()), 600, check)
