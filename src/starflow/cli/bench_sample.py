"""`starflow bench sample`: seconds a picture, against the limits of the machine and against other ways to draw one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from starflow.cli.options import Argument, Flag


@dataclass(frozen=True)
class BenchSampleOptions:
    """Time sampling: seconds a picture, tokens a second, and what they are of the machine's limits.

    MODEL is a flow's or a pipeline's folder or a bundled name; without one, 57 M random parameters.
    """

    EXAMPLES: ClassVar[str] = """
        starflow bench sample
        starflow bench sample glyphs --batches 1,4 --json
    """

    model: Annotated[str, Argument("bundled name or folder", "MODEL")] = ""
    json: Annotated[bool, Flag("print JSON alone")] = False


def bench_sample(options: BenchSampleOptions) -> None:
    """Run the command."""
    raise NotImplementedError(options)
