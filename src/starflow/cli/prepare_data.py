"""`starflow prepare-data` builds a data set."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from starflow.cli.options import Argument, Flag
from starflow.errors import UserError

ONLY = {
    "glyphs": ("tarballs", "include"),
    "glyphs2": ("packages", "model_views", "leave_out_style", "sheets", "workers"),
}
"""Options that only one of the sets knows."""


@dataclass(frozen=True)
class PrepareDataOptions:
    """Build a set of captioned pictures from packages: "glyphs" or "glyphs2".

    "glyphs" has about 4,000 emoji in four styles; 28 MB are fetched from npm. "glyphs2" has about 33,000 pictures: more
    emoji, people, 3D models, clip art and icons; 170 MB are fetched from npm and Debian (by apt-get), and the models
    need the package vtk. Every package is checked. Pictures that are there already are kept, so a broken run goes on.
    """

    EXAMPLES: ClassVar[str] = """
        starflow prepare-data glyphs
        starflow prepare-data glyphs --output data/glyphs --tarballs ~/tarballs --include all
        starflow prepare-data glyphs2 --packages ~/packages
        starflow prepare-data glyphs2 --model-views leave-out --leave-out-style fxemoji
    """

    data: Annotated[Literal["glyphs", "glyphs2"], Argument("the data set's name: glyphs or glyphs2", "DATA")]
    output: Annotated[str, Flag("folder to fill (default: data/DATA)", "FOLDER")] = ""
    size: Annotated[int, Flag("side of the pictures", "PIXELS")] = 256
    tarballs: Annotated[str, Flag("glyphs: folder with its six tarballs of npm pack (default: fetch)", "FOLDER")] = ""
    include: Annotated[Literal["things", "all"], Flag("glyphs: leave out people and symbols, or not")] = "things"
    packages: Annotated[str, Flag("glyphs2: folder with all its packages (default: fetch them)", "FOLDER")] = ""
    model_views: Annotated[
        Literal["draw", "leave-out"], Flag("glyphs2: draw 3D models from twelve sides by VTK, or not")
    ] = "draw"
    leave_out_style: Annotated[str, Flag("glyphs2: hold a whole style out of training", "STYLE")] = ""
    sheets: Annotated[int, Flag("glyphs2: contact sheets to look at, for each style at most", "N")] = 2
    workers: Annotated[int, Flag("glyphs2: processes that draw (default: one a CPU)", "N")] = 0


def prepare_data(options: PrepareDataOptions) -> None:
    """Run `starflow prepare-data`."""
    for name in (name for data, names in ONLY.items() if data != options.data for name in names):
        if getattr(options, name) != PrepareDataOptions.__dataclass_fields__[name].default:
            raise UserError(f"--{name.replace('_', '-')} does nothing for {options.data}: leave it away")
    output = Path(options.output or f"data/{options.data}").expanduser()
    (_glyphs if options.data == "glyphs" else _glyphs2)(options, output)


def _glyphs(options: PrepareDataOptions, output: Path) -> None:
    from starflow.data.sets.glyphs.prepare import prepare_glyphs

    tarballs = Path(options.tarballs).expanduser() if options.tarballs else None
    summary = prepare_glyphs(output, tarballs, size=options.size, include=options.include)
    count = sum(summary.pictures.values())
    print(f"{count} pictures of {summary.concepts} concepts in {output}, {summary.heldout} held out")
    for one in summary.skipped:
        print(f"skipped {one.name}: {one.reason}")


def _glyphs2(options: PrepareDataOptions, output: Path) -> None:
    from starflow.data.sets.glyphs2.prepare import prepare_glyphs2

    summary = prepare_glyphs2(
        output,
        Path(options.packages).expanduser() if options.packages else None,
        size=options.size,
        models=options.model_views == "draw",
        held_out_style=options.leave_out_style,
        sheets=options.sheets,
        workers=options.workers or os.cpu_count() or 1,
    )
    count, heldout = sum(summary.pictures.values()), sum(summary.heldout.values())
    print(f"{count} pictures of {summary.concepts} concepts in {output}, {heldout} held out; by sampling group:")
    for group, pictures in summary.groups.items():
        print(f"  {group:8} {pictures}")
    left_out = sum(summary.left_out.values()) + len(summary.skipped)
    print(f"{left_out} pictures of the packages are not in it, named in {output / 'skipped.jsonl'}")
