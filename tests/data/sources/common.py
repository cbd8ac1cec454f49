"""Small data sets of every kind of source, and how tests scan and index them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from starflow.data import index
from starflow.data.buckets import Buckets
from starflow.data.sources.base import ScannedImage, SkippedImage, Source


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


WRITERS = {"folder": write_files, "tar": write_shards, "parquet": write_parquet}


def scanned(source: Source, *, sizes: bool = True) -> tuple[list[ScannedImage], list[SkippedImage]]:
    found = [one for shard in range(len(source.shards)) for one in source.scan(shard, sizes=sizes)]
    return [one for one in found if isinstance(one, ScannedImage)], [
        one for one in found if isinstance(one, SkippedImage)
    ]


def red(data: bytes) -> int:
    with Image.open(io.BytesIO(data)) as image:
        return int(np.asarray(image.convert("RGB"))[0, 0, 0])


def indexed(
    source: Source, folder: Path, buckets: Buckets, processes: int = 1, heldout: float = 0.05, reads: str = "none"
) -> index.IndexedDataset:
    """The index as so many processes make it, in turn."""
    settings = index.IndexSettings(buckets.aspects, heldout)
    missing = index.missing_parts(source, folder)
    for rank in range(processes):
        for shard in missing[rank::processes]:
            index.scan_shard(source, shard, folder, settings)
    index.join_parts(source, folder, reads)
    return index.IndexedDataset(source, folder, buckets)
