"""`starflow inpaint` paints a part of a picture anew; `starflow edit` makes another picture of one, variations too."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from starflow.cli.options import Argument, Device, Flag, OutputTarget, check_seed, pick_device, slug
from starflow.errors import UserError

if TYPE_CHECKING:
    from starflow.pipeline.editing import Edited

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starflow.pipeline.editing import Edited
    from starflow.pipeline.pipeline import StarFlowPipeline


@dataclass(frozen=True)
class InpaintOptions:
    """Paint a part of a picture anew, so that the whole is likely under the model, and write PNG files.

    The mask is white where to repaint, or transparent (alpha 0); without a mask or a box the picture's own transparency
    counts. All other pixels come back as they are. Each filling comes with its log-likelihood.
    """

    EXAMPLES: ClassVar[str] = """
        starflow inpaint photo.png --mask mask.png --prompt "a red apple" --num-images 4
        starflow inpaint photo.png --box 16,16,32,32 --prompt "a red apple" --output filled.png
        starflow inpaint photo.png --mask mask.png --invert-mask --json
        starflow inpaint photo.png --mask mask.png --method resample --keep likeliest --candidates 16
    """

    image: Annotated[str, Argument("picture file, of any size", "IMAGE")]
    mask: Annotated[str, Flag("picture file: white, or alpha 0, is repainted", "FILE")] = ""
    box: Annotated[str, Flag("a rectangle in pixels instead of a mask", "X,Y,W,H")] = ""
    invert_mask: Annotated[bool, Flag("keep what the mask would repaint, and repaint the rest")] = False
    prompt: Annotated[str, Flag("what the whole picture shows", "TEXT")] = ""
    num_images: Annotated[int, Flag("fillings", "N")] = 1
    seed: Annotated[int, Flag("seed of the first filling; the others count from it", "S")] = 0
    method: Annotated[Literal["auto", "resample", "chain", "hmc", "paper"], Flag("how the hole is filled")] = "auto"
    guidance: Annotated[
        float | None, Flag("how strongly to follow the prompt; 0 is unguided (default: the model's)", "W")
    ] = None
    temperature: Annotated[
        float | None, Flag("of the density: 1 is as it was trained, less is simpler (default: the model's)", "T")
    ] = None
    candidates: Annotated[int, Flag("draws that a filling starts from", "K")] = 16
    steps: Annotated[int, Flag("of a chain", "N")] = 20
    spread: Annotated[float, Flag("how freely the known part moves while a chain draws", "S")] = 0.3
    keep: Annotated[Literal["weighted", "likeliest"], Flag("which draw 'resample' keeps")] = "weighted"
    feather: Annotated[int, Flag("pixels inside the hole over which its edge is blended", "N")] = 2
    model: Annotated[str, Flag("bundled name, folder, or hub repository")] = "glyphs"
    output: Annotated[str, Flag("a folder, or a name ending in .png for one picture", "PATH")] = "out"
    device: Annotated[Device, Flag("where to compute")] = "auto"
    json: Annotated[bool, Flag("print paths, log p, acceptance and seconds as JSON")] = False

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.mask and self.box:
            raise UserError("both --mask and --box are given: choose one")
        check_edit(self.num_images, self.guidance, self.feather)


def inpaint(options: InpaintOptions) -> None:
    """Run the command."""
    from starflow.data.images import open_image
    from starflow.edit.masks import parse_box
    from starflow.pipeline.editing import filling_density
    from starflow.pipeline.pipeline import StarFlowPipeline

    box = parse_box(options.box) if options.box else None
    target = OutputTarget.of(options.output, options.num_images)
    image = open_image(Path(options.image))
    mask = open_mask(options.mask) if options.mask else None
    pipeline = StarFlowPipeline.from_pretrained(options.model, pick_device(options.device))
    guidance, temperature = filling_density(pipeline.config, options.prompt, options.guidance, options.temperature)
    started = time.perf_counter()
    with progress_bar("fillings", options.num_images) as progress:
        made = pipeline.inpaint(
            image,
            mask,
            options.prompt,
            num_images=options.num_images,
            method=options.method,
            seed=options.seed,
            box=box,
            invert_mask=options.invert_mask,
            guidance=guidance,
            temperature=temperature,
            candidates=options.candidates,
            steps=options.steps,
            spread=options.spread,
            keep=options.keep,
            feather=options.feather,
            progress=progress,
        )
    known = {
        "command": "inpaint",
        "image": options.image,
        "mask": options.mask,
        "box": options.box,
        "invert_mask": str(options.invert_mask).lower(),
        "prompt": options.prompt,
        "method": options.method,
        "guidance": f"{guidance:g}",
        "temperature": f"{temperature:g}",
        "candidates": f"{options.candidates}",
        "steps": f"{options.steps}",
        "spread": f"{options.spread:g}",
        "keep": options.keep,
        "feather": f"{options.feather}",
        "model": options.model,
    }
    stem = slug(options.prompt) or "inpainted"
    rows = write_edited(made, target, stem, known)
    report(rows, made.notes, time.perf_counter() - started, as_json=options.json)


def check_edit(num_images: int, guidance: float | None, feather: int) -> None:
    """Raises UserError: a value that no edit can have."""
    if num_images < 1:
        raise UserError(f"--num-images is {num_images}, expected at least 1")
    if feather < 0:
        raise UserError(f"--feather is {feather}, expected 0 pixels or more")
    if guidance is not None and not (guidance >= 0 and math.isfinite(guidance)):
        raise UserError(f"--guidance is {guidance:g}, expected at least 0 (0 is unguided)")


def open_mask(name: str) -> Any:
    """A mask's file as a picture, its greys and its alpha as they are.

    Raises:
        UserError: missing, or no readable image.
    """
    from starflow.data.images import open_image

    return open_image(Path(name))


@contextmanager
def progress_bar(unit: str, count: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, and what to call with (done, in all)."""
    from tqdm import tqdm

    form = "{l_bar}{bar}| {n:.1f}/{total} " + unit + " [{elapsed}<{remaining}]"
    with tqdm(total=count, bar_format=form, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.update(count * done / total - bar.n)

        yield progress


def write_edited(made: Edited, target: OutputTarget, stem: str, known: dict[str, str]) -> list[dict[str, Any]]:
    """Write every picture with its settings in its text, and return a row each for the report."""
    from starflow.data.images import save_png

    rows: list[dict[str, Any]] = []
    numbers = zip(made.log_prob, made.acceptance, made.effective_samples, strict=True)
    for number, (image, seed, found) in enumerate(zip(made.images, made.seeds, numbers, strict=True)):
        last = f"{number:02d}" if len(set(made.seeds)) < len(made.seeds) else f"{seed:04d}"
        path = target.file or target.folder / f"{stem}-{last}.png"
        nats, acceptance, effective = (round(value, 4) if math.isfinite(value) else None for value in found)
        row = {"path": str(path), "seed": seed, "nats": nats, "acceptance": acceptance, "effective_samples": effective}
        row["nats_per_dim"] = None if nats is None else round(nats / made.dimensions, 4)
        save_png(image, path, {**known, "seed": str(seed), "nats": str(nats), "acceptance": str(acceptance)})
        rows.append(row)
    return rows


def report(rows: list[dict[str, Any]], notes: list[str], seconds: float, *, as_json: bool) -> None:
    """Print what was written; what was done with mask and size goes to stderr, or into the JSON."""
    if as_json:
        result = {"images": rows, "notes": notes, "seconds": round(seconds, 3)}
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    for row in rows:
        accepted = "" if row["acceptance"] is None else f", acceptance {row['acceptance']:.2f}"
        print(f"{row['path']}  log p {row['nats']} nats, {row['nats_per_dim']} a dimension{accepted}")


@dataclass(frozen=True)
class EditOptions:
    """Encode a picture under one prompt and decode it under another, and write PNG files.

    --variations N writes N pictures like it, --interpolate OTHER the way from it to another one. The encoding is
    unguided: with --guidance above 0 even an unchanged prompt changes the picture.
    """

    EXAMPLES: ClassVar[str] = """
        starflow edit apple.png --from "a red apple" --to "a green apple"
        starflow edit apple.png --from "a red apple" --to "a green apple" --strength 0.5 --guidance 1
        starflow edit apple.png --from "a red apple" --to "a green apple" --mask mask.png
        starflow edit apple.png --from "a red apple" --variations 4 --strength 0.3
        starflow edit apple.png --from "a red apple" --interpolate car.png --to "a blue car" --steps 8
    """

    image: Annotated[str, Argument("picture file, of any size", "IMAGE")]
    shown: Annotated[str, Flag("what the picture shows", "TEXT", "from")] = ""
    wanted: Annotated[str | None, Flag("what it shall show (default: the same)", "TEXT", "to")] = None
    strength: Annotated[
        float | None, Flag("share of new noise, 0 to 1 (default: 0 for an edit, 0.3 for variations)", "S")
    ] = None
    variations: Annotated[int, Flag("write so many pictures like it", "N")] = 0
    interpolate: Annotated[str, Flag("another picture: write the way to it", "OTHER")] = ""
    steps: Annotated[int, Flag("pictures on that way, both ends among them", "N")] = 8
    mask: Annotated[str, Flag("change only what is white, or alpha 0, here", "FILE")] = ""
    box: Annotated[str, Flag("change only this rectangle, in pixels", "X,Y,W,H")] = ""
    invert_mask: Annotated[bool, Flag("change the rest instead")] = False
    num_images: Annotated[int, Flag("pictures", "N")] = 1
    seed: Annotated[int, Flag("seed of the first picture; the others count from it", "S")] = 0
    guidance: Annotated[float, Flag("how strongly the new prompt is followed; 0 is unguided", "W")] = 0.0
    feather: Annotated[int, Flag("pixels inside the mask over which its edge is blended", "N")] = 2
    model: Annotated[str, Flag("bundled name, folder, or hub repository")] = "glyphs"
    output: Annotated[str, Flag("a folder, or a name ending in .png for one picture", "PATH")] = "out"
    device: Annotated[Device, Flag("where to compute")] = "auto"
    json: Annotated[bool, Flag("print paths, log p and seconds as JSON")] = False

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_edit(self.num_images, self.guidance, self.feather)
        if self.variations < 0:
            raise UserError(f"--variations is {self.variations}, expected at least 1")
        if self.variations and self.interpolate:
            raise UserError("both --variations and --interpolate are given: choose one")
        if self.variations and self.num_images > 1:
            raise UserError("both --variations and --num-images are given: --variations says how many")
        if self.variations and self.wanted is not None:
            raise UserError("--variations keep the prompt: give --from alone, or leave --variations out")
        if self.mask and self.box:
            raise UserError("both --mask and --box are given: choose one")
        if self.interpolate and (self.mask or self.box or self.strength is not None or self.num_images > 1):
            raise UserError("--interpolate takes no --mask, --box, --strength or --num-images: leave them out")
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise UserError(f"--strength is {self.strength:g}, expected 0 (the same picture) to 1 (a new one)")
        if self.interpolate and self.steps < 2:
            raise UserError(f"--steps is {self.steps}, expected at least 2: both ends are among them")

    @property
    def count(self) -> int:
        """Pictures that are written."""
        return self.steps if self.interpolate else self.variations or self.num_images

    @property
    def share(self) -> float:
        """The strength that counts."""
        return (0.3 if self.variations else 0.0) if self.strength is None else self.strength


def edit(options: EditOptions) -> None:
    """Run the command."""
    from starflow.pipeline.pipeline import StarFlowPipeline

    target = OutputTarget.of(options.output, options.count)
    pipeline = StarFlowPipeline.from_pretrained(options.model, pick_device(options.device))
    started = time.perf_counter()
    made = _interpolated(pipeline, options) if options.interpolate else _edited(pipeline, options)
    wanted = options.shown if options.wanted is None else options.wanted
    known = {
        "command": "edit",
        "image": options.image,
        "from": options.shown,
        "to": wanted,
        "strength": f"{options.share:g}",
        "variations": f"{options.variations}",
        "interpolate": options.interpolate,
        "mask": options.mask,
        "box": options.box,
        "invert_mask": str(options.invert_mask).lower(),
        "guidance": f"{options.guidance:g}",
        "feather": f"{options.feather}",
        "model": options.model,
    }
    rows = write_edited(made, target, slug(wanted) or "edited", known)
    report(rows, made.notes, time.perf_counter() - started, as_json=options.json)


def _edited(pipeline: StarFlowPipeline, options: EditOptions) -> Edited:
    from starflow.data.images import open_image
    from starflow.edit.masks import parse_box

    with progress_bar("pictures", options.count) as progress:
        return pipeline.edit(
            open_image(Path(options.image)),
            options.shown,
            options.shown if options.wanted is None else options.wanted,
            options.share,
            mask=open_mask(options.mask) if options.mask else None,
            box=parse_box(options.box) if options.box else None,
            invert_mask=options.invert_mask,
            num_images=options.count,
            seed=options.seed,
            guidance=options.guidance,
            feather=options.feather,
            progress=progress,
        )


def _interpolated(pipeline: StarFlowPipeline, options: EditOptions) -> Edited:
    from starflow.data.images import open_image

    first, second = (open_image(Path(name)) for name in (options.image, options.interpolate))
    return pipeline.interpolate(
        first,
        second,
        options.shown,
        options.wanted,
        steps=options.steps,
        seed=options.seed,
        guidance=options.guidance,
    )
