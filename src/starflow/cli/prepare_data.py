"""`starflow prepare-data` builds a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from starflow.cli.options import Argument, Flag


@dataclass(frozen=True)
class PrepareDataOptions:
    """Build the glyph set: about 4,000 captioned pictures in four styles, from packages of the npm registry.

    About 28 MB are fetched and checked, unless --tarballs names a folder that holds them. Pictures that are there
    already are kept.
    """

    EXAMPLES: ClassVar[str] = """
        starflow prepare-data glyphs
        starflow prepare-data glyphs --output data/glyphs --tarballs ~/tarballs --include all
    """

    data: Annotated[Literal["glyphs"], Argument("the data set's name: glyphs", "DATA")]
    output: Annotated[str, Flag("folder to fill", "FOLDER")] = "data/glyphs"
    tarballs: Annotated[str, Flag("folder with the six tarballs of npm pack (default: fetch them)", "FOLDER")] = ""
    include: Annotated[Literal["things", "all"], Flag("leave out people and symbols, or not")] = "things"
    size: Annotated[int, Flag("side of the pictures", "PIXELS")] = 256


def prepare_data(options: PrepareDataOptions) -> None:
    """Run `starflow prepare-data`."""
    from starflow.data.sets.glyphs.prepare import prepare_glyphs

    summary = prepare_glyphs(
        Path(options.output).expanduser(),
        Path(options.tarballs).expanduser() if options.tarballs else None,
        size=options.size,
        include=options.include,
    )
    count = sum(summary.pictures.values())
    print(f"{count} pictures of {summary.concepts} concepts in {options.output}, {summary.heldout} held out")
    for one in summary.skipped:
        print(f"skipped {one.name}: {one.reason}")
