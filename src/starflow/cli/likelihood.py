"""`starflow likelihood` prints exact log-likelihoods of pictures, and draws where in a picture they lie."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from starflow.cli.options import Argument, Device, Flag, check_seed, collection_off, parse_size, pick_device
from starflow.errors import UserError
from starflow.io.files import check_output_folder

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from starflow.pipeline.likelihood import LogProb
    from starflow.pipeline.pipeline import StarFlowPipeline


DRAWS = 16
"""Of the noise, by default: a single one says little, as its nats vary by more than those of similar pictures."""


@dataclass(frozen=True)
class LikelihoodOptions:
    """Print the exact log-likelihood of pictures under a model: nats, bits per dimension, and of which dimensions.

    The density is that of the model's own input: the picture's latent (or its pixels, for a model without an
    autoencoder) with the noise of the training added under --seed, averaged over --draws of it with the standard error.
    All rows meet the same noise, so their differences to the first, which stderr gives, are surer than the rows.
    A model trained on evenly dequantised pixels gives a bound on the 8-bit picture's own log-probability. A row does
    not depend on the other pictures. --maps writes where in each picture the bits lie: blue is likely, red is not.
    """

    EXAMPLES: ClassVar[str] = """
        starflow likelihood photo.png --prompt "a red apple"
        starflow likelihood a.png b.png --prompt "a red apple" --prompt "a blue car"
        starflow likelihood *.png --draws 8 --json
        starflow likelihood photo.png --maps maps
    """

    images: Annotated[tuple[str, ...], Argument("picture files", "IMAGE")]
    prompt: Annotated[
        tuple[str, ...], Flag("what the pictures show; once for all, or once a picture in their order", "TEXT")
    ] = ()
    seed: Annotated[int, Flag("seed of the noise, the same for every picture", "S")] = 0
    draws: Annotated[int, Flag("draws of the noise to average over, with seeds from --seed on", "N")] = DRAWS
    maps: Annotated[str, Flag("write a heat map of each picture's bits/dim by token", "FOLDER")] = ""
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
        if self.draws < 1:
            raise UserError(f"--draws is {self.draws}, expected at least 1")


@dataclass(frozen=True)
class LikelihoodRow:
    """The likelihood of one image, as it is printed."""

    image: str
    prompt: str
    nats: float
    bits_per_dim: float
    dimensions: int
    space: str
    draws: int
    standard_error: float | None
    """Of nats, over the draws; None for one draw."""


def likelihood(options: LikelihoodOptions) -> None:
    """Run `starflow likelihood`."""
    size = parse_size(options.size) if options.size else None
    folder = check_output_folder(Path(options.maps).expanduser()) if options.maps else None
    for name in options.images:
        if not Path(name).expanduser().exists():
            raise UserError(f"no such file: {name}")
    from starflow.pipeline.config import check_size, default_size, untrained_size_warning

    with collection_off():
        from starflow.pipeline.pipeline import StarFlowPipeline

        pipeline = StarFlowPipeline.from_pretrained(options.model, pick_device(options.device))
    size = size or default_size(pipeline.config, pipeline.flow.config)
    check_size(pipeline.config, pipeline.flow.config, size)
    if note := untrained_size_warning(pipeline.config, pipeline.flow.config, size):
        warnings.warn(note, stacklevel=2)
    rows: list[LikelihoodRow] = []
    nats: list[LogProb] = []
    maps: list[Tensor] = []
    for name, image, prompt in _readable(options, size):
        found = pipeline.log_prob(image, prompt, seed=options.seed, draws=options.draws)
        values = (found.nats, found.bits_per_dim, found.dimensions, found.space, found.draws, found.standard_error)
        rows.append(LikelihoodRow(name, prompt, *values))
        nats.append(found)
        maps += [_bits_map(pipeline, image, prompt, options)] if folder is not None else []
    if not rows:
        raise UserError(f"not one of {len(options.images)} pictures can be read: give picture files")
    if folder is not None:
        _save_maps(rows, maps, size, folder)
    as_json = [dataclasses.asdict(row) for row in rows]
    print(json.dumps(as_json, indent=2, ensure_ascii=False, allow_nan=False) if options.json else _table(rows))
    for row, found in zip(rows[1:], nats[1:], strict=True):
        print(_compared(rows[0], row, found.minus(nats[0].values)), file=sys.stderr)


def _compared(first: LikelihoodRow, row: LikelihoodRow, difference: tuple[float, float | None]) -> str:
    """A row beside the first one: all meet the same noise, so most of it goes out of the difference."""
    names = (row.image, first.image) if row.image != first.image else (f"'{row.prompt}'", f"'{first.prompt}'")
    mean, error = difference
    sure = "of one draw, which says little" if error is None else f"± {error:.3f}"
    return f"note: {names[0]} less {names[1]}: {mean:+.3f} nats {sure}"


def _readable(options: LikelihoodOptions, size: tuple[int, int]) -> Iterator[tuple[str, Image, str]]:
    """Name, picture at that size and prompt, one picture in memory at a time; one that is broken is named and skipped.

    Raises:
        UserError: the only picture is broken.
    """
    from tqdm import tqdm

    pairs = zip(options.images, _prompts(options), strict=True)
    for name, prompt in tqdm(pairs, total=len(options.images), unit="picture", disable=None):
        try:
            image = open_rgb(name)
        except UserError as error:
            if len(options.images) == 1:
                raise
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            continue
        yield name, fit_image(image, size, name), prompt


def open_rgb(name: str) -> Image:
    """The image in a file, upright, as RGB, its transparency laid on white.

    Raises:
        UserError: missing, or no readable image.
    """
    from starflow.data.images import on_background, open_image

    return on_background(open_image(Path(name).expanduser()))


def fit_image(image: Image, size: tuple[int, int], name: str) -> Image:
    """The image at (width, height): its centre of that ratio, resized; a note on stderr says so where it changes."""
    if image.size == size:
        return image
    from PIL import Image, ImageOps

    width, height = image.size
    print(f"note: {name} is {width}x{height}: resized to {size[0]}x{size[1]}, its centre", file=sys.stderr)
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def _prompts(options: LikelihoodOptions) -> tuple[str, ...]:
    """The prompt of every image."""
    count = len(options.images)
    return options.prompt if len(options.prompt) == count else (options.prompt or ("",)) * count


def _bits_map(pipeline: StarFlowPipeline, image: Image, prompt: str, options: LikelihoodOptions) -> Tensor:
    """Bits/dim of each token (h, w), the mean over the draws."""
    from starflow.data.images import from_pil

    images = from_pil(image).to(pipeline.device)
    draws = [pipeline.log_prob_maps(images, [prompt], [options.seed + draw])[0] for draw in range(options.draws)]
    token = pipeline.flow.config.in_channels * pipeline.flow.config.patch_size**2
    return (-sum(draws[1:], draws[0]) / len(draws) / (token * math.log(2))).cpu()


def _save_maps(rows: list[LikelihoodRow], maps: list[Tensor], size: tuple[int, int], folder: Path) -> None:
    """Write a heat map of every image, on one scale for all of them, which each file's text tells."""
    from starflow.evaluate import save_heatmap

    low, high = (float(end) for end in (min(one.min() for one in maps), max(one.max() for one in maps)))
    for number, (row, values) in enumerate(zip(rows, maps, strict=True)):
        path = folder / f"{number:03d}-{Path(row.image).stem}.png"
        save_heatmap(path, values, size, low, high, "bits/dim")


def _table(rows: list[LikelihoodRow]) -> str:
    """Aligned columns, one picture a line."""
    several = any(row.standard_error is not None for row in rows)
    heads = (
        "nats",
        *(["± of the draws"] if several else []),
        "bits/dim",
        "dimensions",
        "of",
        "image",
        "prompt",
    )
    cells = [heads] + [
        (
            f"{row.nats:.3f}",
            *([f"{row.standard_error or 0:.3f}"] if several else []),
            f"{row.bits_per_dim:.4f}",
            str(row.dimensions),
            row.space,
            row.image,
            row.prompt,
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )
