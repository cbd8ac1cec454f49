"""`starflow edit`: one picture into another by way of the flow's noise; variations and interpolation too."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from starflow.cli.inpaint import check_edit, open_mask, progress_bar, report, write_edited
from starflow.cli.options import Argument, Device, Flag, OutputTarget, check_seed, pick_device, slug
from starflow.errors import UserError

if TYPE_CHECKING:
    from starflow.pipeline.editing import Edited
    from starflow.pipeline.pipeline import StarFlowPipeline


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
