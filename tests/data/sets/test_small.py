"""IDX files and the digits: what is read, and what is refused by name."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from starflow.data.sets.small import CLASSES, DEBIAN, is_fashion_mnist, read_digits, read_fashion_mnist
from starflow.errors import UserError


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


def write_set(folder: Path, train: int, test: int, *, zipped: bool = True) -> dict[str, np.ndarray]:
    """Four files of random pictures."""
    draw = np.random.default_rng(0)
    found = {}
    for part, count in (("train", train), ("t10k", test)):
        found[f"{part}-images-idx3-ubyte"] = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        found[f"{part}-labels-idx1-ubyte"] = (np.arange(count) % 10).astype(np.uint8)
    for name, array in found.items():
        data = idx(array)
        (folder / f"{name}{'.gz' if zipped else ''}").write_bytes(gzip.compress(data) if zipped else data)
    return found


@pytest.mark.parametrize("zipped", [True, False])
def test_both_parts_are_read(tmp_path: Path, zipped: bool) -> None:
    written = write_set(tmp_path, train=12, test=3, zipped=zipped)
    assert is_fashion_mnist(tmp_path)
    views = read_fashion_mnist(tmp_path)
    assert views.images.shape == (15, 3, 28, 28)
    assert views.splits == ["train"] * 12 + ["heldout"] * 3
    assert views.labels[:11] == [*CLASSES, CLASSES[0]]
    assert len(set(views.names)) == 15
    for channel in range(3):
        assert torch.equal(views.images[12:, channel], torch.from_numpy(written["t10k-images-idx3-ubyte"]))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    write_set(tmp_path, train=4, test=2, zipped=False)
    images, labels = tmp_path / "t10k-images-idx3-ubyte", tmp_path / "t10k-labels-idx1-ubyte"
    whole = images.read_bytes()
    for path, data, part in (
        (images, whole[:-5], "its head says"),
        (images, b"\x89PNG" + whole, "starts with 89504e47"),
        (images, b"", "starts with nothing"),
        (labels, idx(np.zeros(3, dtype=np.uint8)), r"labels \(3,\)"),
        (labels, idx(np.full(2, 11, dtype=np.uint8)), "up to 11"),
    ):
        before = path.read_bytes()
        path.write_bytes(data)
        with pytest.raises(UserError, match=part):
            read_fashion_mnist(tmp_path)
        path.write_bytes(before)
    images.unlink()
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(whole)[:40])
    with pytest.raises(UserError, match="cannot be read"):
        read_fashion_mnist(tmp_path)


def test_an_empty_folder_names_the_package(tmp_path: Path) -> None:
    assert not is_fashion_mnist(tmp_path)
    with pytest.raises(UserError, match="apt install dataset-fashion-mnist"):
        read_fashion_mnist(tmp_path)


def test_the_published_set() -> None:
    if not DEBIAN.is_dir():
        pytest.skip("dataset-fashion-mnist is not installed")
    views = read_fashion_mnist()
    assert len(views) == 70_000
    assert views.splits.count("heldout") == 10_000
    assert all(views.labels.count(name) == 7_000 for name in CLASSES)
    assert float(views.images[:60_000, 0].float().mean()) == pytest.approx(72.94, abs=0.01)  # 0.2860 of 255


def test_digits(tmp_path: Path) -> None:
    rows = np.zeros((3, 785), dtype=int)
    rows[1, 5], rows[:, -1] = 200, (7, 0, 9)
    text = "\n".join(",".join(map(str, row)) for row in rows)
    (tmp_path / "d.csv.gz").write_bytes(gzip.compress(text.encode()))
    views = read_digits(tmp_path / "d.csv.gz")
    assert views.labels == ["7", "0", "9"]
    assert set(views.splits) == {"heldout"}
    assert int(views.images[1, 2, 0, 5]) == 200
    assert int(views.images.sum()) == 600
    (tmp_path / "d.csv.gz").write_bytes(gzip.compress(b"1,2\n"))
    with pytest.raises(UserError, match="rows of 2 numbers"):
        read_digits(tmp_path / "d.csv.gz")
    (tmp_path / "d.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="no gzipped CSV"):
        read_digits(tmp_path / "d.csv.gz")
