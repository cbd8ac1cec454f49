"""`starflow likelihood`: exact log-likelihoods of pictures."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from starflow.cli.options import Argument, Flag
from starflow.cli.values import Device, check_seed, parse_size, pick_device
from starflow.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from starflow.pipeline import LogProb, StarFlowPipeline


@dataclass(frozen=True)
class LikelihoodOptions:
    """Print the exact log-likelihood of pictures under a model: nats, bits per dimension, and of which dimensions.

    The density is that of the model's own input: the picture's latent (or its pixels, for a model without an
    autoencoder) with the noise of the training added under --seed. A row does not depend on the other pictures.
    """

    EXAMPLES: ClassVar[str] = """
        starflow likelihood photo.png --prompt "a red apple"
        starflow likelihood a.png b.png --prompt "a red apple" --prompt "a blue car"
        starflow likelihood *.png --json
    """

    images: Annotated[tuple[str, ...], Argument("picture files", "IMAGE")]
    prompt: Annotated[
        tuple[str, ...], Flag("what the pictures show; once for all, or once a picture in their order", "TEXT")
    ] = ()
    seed: Annotated[int, Flag("seed of the noise, the same for every picture", "S")] = 0
    size: Annotated[str, Flag("size that pictures are read at (default: the model's)", "WxH")] = ""
    model: Annotated[str, Flag("bundled name, folder, or hub repository")] = "glyphs"
    device: Annotated[Device, Flag("where to compute")] = "auto"
    json: Annotated[bool, Flag("print the rows as JSON")] = False

    def __post_init__(self) -> None:
        if len(self.prompt) not in (0, 1, len(self.images)):
            raise UserError(
                f"{len(self.prompt)} prompts for {len(self.images)} pictures: give one for all, or one each"
            )
        check_seed(self.seed)


@dataclass(frozen=True)
class Row:
    """One picture's result, as it is printed."""

    image: str
    prompt: str
    nats: float
    bits_per_dim: float
    dimensions: int
    space: str


def likelihood(options: LikelihoodOptions) -> None:
    """Run the command."""
    size = parse_size(options.size) if options.size else None
    pictures = [open_picture(name) for name in options.images]
    from starflow.pipeline import StarFlowPipeline

    pipeline = StarFlowPipeline.from_pretrained(options.model, pick_device(options.device))
    size = size or (pipeline.config.image_size, pipeline.config.image_size)
    pipeline.check_size(size)
    rows = list(_rows(pipeline, pictures, size, options))
    as_json = [dataclasses.asdict(row) for row in rows]
    print(json.dumps(as_json, indent=2, ensure_ascii=False) if options.json else _table(rows))


def open_picture(name: str) -> Image:
    """Decode a picture, upright, as RGB, transparency laid on white.

    Raises:
        UserError: missing, or no readable image.
    """
    from starflow.data.augment import on_background
    from starflow.data.records import open_image

    return on_background(open_image(Path(name)))


def fit_picture(image: Image, size: tuple[int, int], name: str) -> Image:
    """The picture at (width, height): its centre of that ratio, resized; a note on stderr says so where it changes."""
    if image.size == size:
        return image
    from PIL import Image, ImageOps

    width, height = image.size
    print(f"note: {name} is {width}x{height}: resized to {size[0]}x{size[1]}, its centre", file=sys.stderr)
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def _rows(
    pipeline: StarFlowPipeline, pictures: list[Image], size: tuple[int, int], options: LikelihoodOptions
) -> Iterator[Row]:
    from tqdm import tqdm

    prompts = options.prompt if len(options.prompt) == len(pictures) else (options.prompt or ("",)) * len(pictures)
    fitted = [fit_picture(one, size, name) for one, name in zip(pictures, options.images, strict=True)]
    rows = zip(options.images, fitted, prompts, strict=True)
    for name, image, prompt in tqdm(rows, total=len(fitted), unit="picture", disable=None):
        found: LogProb = pipeline.log_prob(image, prompt, seed=options.seed)
        yield Row(name, prompt, found.nats, found.bits_per_dim, found.dimensions, found.space)


def _table(rows: list[Row]) -> str:
    """Aligned columns, one picture a line."""
    heads = ("nats", "bits/dim", "dimensions", "of", "image", "prompt")
    cells = [heads] + [
        (f"{row.nats:.3f}", f"{row.bits_per_dim:.4f}", str(row.dimensions), row.space, row.image, row.prompt)
        for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )
