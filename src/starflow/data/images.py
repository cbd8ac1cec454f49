"""Images as tensors, as PIL images and as files.

Tensors are (B, 3, H, W), red first: uint8 in 0..255 on disk and in caches, float in [-1, 1] for networks.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from starflow.errors import UserError
from starflow.io.files import atomic_write

if TYPE_CHECKING:
    from PIL.Image import Image


IMAGE_SUFFIXES = frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .mpo .jp2 .j2k .jpx .jpf .webp .avif .bmp .dib .gif .tif .tiff".split()
    + ".ppm .pgm .pbm .pnm .tga .qoi".split()
)

"""Endings of image files, in lower case: the only list of them, for every source and command."""

WHITE = (255, 255, 255)

ORIENTATION, QUARTER_TURNS = 0x0112, 5

"""The EXIF tag, and its first value that swaps width and height."""

TIFF_WIDTH, TIFF_HEIGHT = 256, 257

"""The tags of a TIFF's stored size."""


class ImageError(UserError):
    """An image that cannot be decoded; `path` names it, `reason` says why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is not a readable image ({reason}): replace it or remove it")
        self.path = path
        self.reason = reason


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 (B, 3, H, W) in 0..255 to float in [-1, 1].

    >>> to_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([-1.0000, -0.6000,  1.0000])
    """
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Convert float (B, 3, H, W) in [-1, 1] to uint8 in 0..255 on the CPU, clamped and rounded.

    >>> to_uint8(torch.tensor([-1.5, -0.6, 1.0]))
    tensor([  0,  51, 255], dtype=torch.uint8)
    """
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def dequantise(images: Tensor, noise: Tensor) -> Tensor:
    """Spread the 8-bit levels of images evenly (uniform dequantisation): (level + noise) / 128 - 1, in [-1, 1).

    Args:
        images: float in [-1, 1], levels of `to_float`; rounded back to the level where float16 has moved them.
        noise: of the same shape, uniform in [0, 1). With it, log P(levels) >= mean of log p(result) - D log 128, in
            nats over the D values of an image.

    >>> dequantise(torch.tensor([-1.0, 1.0]), torch.tensor([0.0, 0.5]))
    tensor([-1.0000,  0.9961])
    """
    levels = ((images.float() + 1) * 127.5).round()
    # float32 would round a noise near 1 up to the next level, and the last level's to 1.
    return torch.minimum((levels + noise) / 128 - 1, (levels + 1) / 128 - 1 - 2**-23)


def to_pil(images: Tensor) -> list[Image]:
    """Convert float (B, 3, H, W) in [-1, 1] to B RGB images."""
    from PIL import Image

    return [Image.fromarray(image.permute(1, 2, 0).numpy(), "RGB") for image in to_uint8(images)]


def from_pil(image: Image) -> Tensor:
    """Convert an image to float (1, 3, H, W) in [-1, 1], upright; transparency is laid on white.

    >>> from PIL import Image
    >>> from_pil(Image.new("RGBA", (8, 4), (255, 0, 0, 0))).amin()  # wholly transparent, so white
    tensor(1.)
    """
    import numpy

    pixels = torch.from_numpy(numpy.array(on_background(upright_colour(image))))
    return to_float(pixels.permute(2, 0, 1)[None])


def upright_colour(image: Image) -> Image:
    """An image of any mode as `open_image` reads a file: upright, as RGB, or RGBA if it has transparency."""
    from PIL import ImageOps

    return _as_colour(ImageOps.exif_transpose(image))


def make_grid(images: Tensor, columns: int, gap: int = 2) -> Image:
    """Lay (B, 3, H, W) in [-1, 1] out as one image on white, `columns` a row, `gap` pixels apart."""
    from PIL import Image

    tiles = to_pil(images)
    width, height = tiles[0].size
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % columns * (width + gap), index // columns * (height + gap)))
    return sheet


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write `make_grid` as a PNG, whole or not at all."""
    save_png(make_grid(images, columns), path)


def png_log_prob(images: Tensor) -> Tensor:
    """The log-probability of each image under the code that PNG is, in nats (N,), float64: -8 ln 2 a byte of its file.

    A lossless code stands for a distribution that knows no picture in advance, only that neighbours are alike: the
    background of a likelihood ratio (Serra et al., arXiv 1909.11480, section 3). Images whose channels are equal are
    written as greys.

    Args:
        images: (N, 3, H, W) uint8.

    Raises:
        UserError: tensors of another type or shape.

    >>> white, noise = torch.full((3, 64, 64), 255), torch.randint(256, (3, 64, 64))
    >>> bits = -png_log_prob(torch.stack([white, noise]).byte()) / math.log(2)
    >>> [round(each) for each in (bits / (3 * 64 * 64)).tolist()]  # bits per dimension
    [0, 8]
    """
    from PIL import Image

    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise UserError(f"images {tuple(images.shape)} of {images.dtype}: expected (N, 3, H, W) of torch.uint8")
    lengths = []
    for image in images.cpu():
        grey = bool((image == image[:1]).all())
        pixels = image[0] if grey else image.permute(1, 2, 0)
        file = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(file, format="PNG", optimize=True)
        lengths.append(file.tell())
    return -8 * math.log(2) * torch.tensor(lengths, dtype=torch.float64, device="cpu")


def save_png(image: Image, path: Path, text: Mapping[str, str] | None = None) -> None:
    """Write a PNG with `text` in its text chunks, whole or not at all."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def open_image(path: Path) -> Image:
    """Decode an image file, upright, as RGB, or RGBA if it has transparency.

    Raises:
        ImageError: missing, truncated, corrupt, or no image at all.
    """
    return _decode(path, path)


def decode_image(data: bytes, name: str, side: int = 0) -> Image:
    """Decode an image file that is in memory, as `open_image` does; `name` is for messages.

    A JPEG may come reduced by 2, 4 or 8, which is several times as fast, but never below `side` pixels a side; 0 is
    never reduced.

    Raises:
        ImageError: truncated, corrupt, or no image at all.
    """
    return _decode(io.BytesIO(data), Path(name), side)


def read_image_size(file: Path | bytes, name: str) -> tuple[int, int]:
    """Width and height in pixels of an image as it is shown, from its header alone; `name` is for messages.

    Raises:
        ImageError: no image.
    """
    from PIL import Image

    with image_errors(Path(name)), Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        width, height = image.size
        if image.format == "PNG" and "exif" not in image.info:
            return width, height  # to look for EXIF behind the pixels, Pillow would decode them
        exif = image.getexif()
        if image.format == "TIFF":  # some versions of Pillow give the upright size, others the stored one
            width, height = int(exif.get(TIFF_WIDTH, width)), int(exif.get(TIFF_HEIGHT, height))
        orientation = exif.get(ORIENTATION, 1)
        turned = isinstance(orientation, int) and QUARTER_TURNS <= orientation < QUARTER_TURNS + 4
        return (height, width) if turned else (width, height)


def resize_crop(image: Image, size: int) -> Image:
    """Cut out the central square of an image and resize it with antialiasing to `size` pixels a side."""
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def on_background(image: Image, colour: tuple[int, int, int] = WHITE) -> Image:
    """Convert an image to RGB; an RGBA one is laid on the colour."""
    from PIL import Image

    if image.mode != "RGBA":
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, (*colour, 255))
    return Image.alpha_composite(ground, image).convert("RGB")


def _decode(file: Path | io.BytesIO, path: Path, side: int = 0) -> Image:
    from PIL import Image, ImageOps

    with image_errors(path):
        with Image.open(file) as opened:
            if side:
                opened.draft(None, (side, side))
            opened.load()
            image = ImageOps.exif_transpose(opened)
        return _as_colour(image)


@contextmanager
def image_errors(path: Path) -> Iterator[None]:
    """A context in which whatever one image raises becomes an `ImageError` that names it.

    Decoders raise errors of any class on damaged files, and one image must not end a run over millions of them.

    >>> with image_errors(Path("a.png")):
    ...     1 / 0
    Traceback (most recent call last):
    starflow.data.images.ImageError: a.png is not a readable image (division by zero): replace it or remove it
    """
    from PIL import UnidentifiedImageError

    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(path, "no such file") from None
    except UnidentifiedImageError:
        raise ImageError(path, "no known image format") from None
    except Exception as error:  # noqa: BLE001  (decoders raise errors of any class)
        raise ImageError(path, " ".join(str(error).split())[:200] or type(error).__name__) from None


def _as_colour(image: Image) -> Image:
    """Convert any mode to RGB, or RGBA if the image has transparency."""
    if image.mode == "I" and image.getextrema()[1] <= 255:  # type: ignore[operator]  # an array of whole numbers
        image = image.convert("L")
    elif image.mode.startswith("I"):  # 16-bit greys; convert() alone would clip them to white
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    elif image.mode == "F":
        image = _grey_of_floats(image)
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _grey_of_floats(image: Image) -> Image:
    """Convert grey floats to 8 bits; their range shows the scale: up to 1, to 255 or to 65535."""
    import numpy
    from PIL import Image

    values = numpy.nan_to_num(numpy.array(image), posinf=0.0, neginf=0.0)
    highest = values.max(initial=0.0)
    scale = 255 if highest <= 1 else 1 if highest <= 255 else 1 / 256
    return Image.fromarray((values * scale).clip(0, 255).round().astype(numpy.uint8))
