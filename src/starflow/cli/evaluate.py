"""`starflow evaluate`: every measure of a model on a folder of pictures, as a table, JSON and a sheet."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from starflow.cli.options import Argument, Flag
from starflow.cli.values import Device, pick_device
from starflow.errors import UserError
from starflow.files import check_output_folder, write_json

if TYPE_CHECKING:
    from starflow.measure import Report

COLUMNS = 8


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a model on pictures: reconstruction, likelihood of both splits, kernel distance of samples, retrieval.

    DATA is the glyph set or any folder of pictures; 5 % are held out where it does not say. Writes report.json,
    grid.png (the prompts' pictures) and nearest.png (the nearest training picture of each).
    """

    EXAMPLES: ClassVar[str] = """
        starflow evaluate glyphs data/glyphs --prompts recipes/prompts.txt
        starflow evaluate runs/mine/model photos --samples 500 --output report
    """

    model: Annotated[str, Argument("bundled name, folder, or hub repository", "MODEL")]
    data: Annotated[str, Argument("a folder of pictures", "DATA")]
    output: Annotated[str, Flag("the report's folder", "PATH")] = "evaluation"
    samples: Annotated[int, Flag("samples for the kernel distance", "N")] = 1000
    tuning_samples: Annotated[int, Flag("samples per guidance weight when the best is chosen", "N")] = 250
    guidance: Annotated[tuple[float, ...], Flag("a weight to try; may be repeated (default: 0 to 4)", "W")] = ()
    prompts: Annotated[str, Flag("prompts of the grid, one a line", "FILE")] = ""
    device: Annotated[Device, Flag("where to compute")] = "auto"
    json: Annotated[bool, Flag("print the report as JSON")] = False

    def __post_init__(self) -> None:
        for name, value in (("--samples", self.samples), ("--tuning-samples", self.tuning_samples)):
            if value < 2:
                raise UserError(f"{name} is {value}, expected at least 2")


def evaluate(options: EvaluateOptions) -> None:
    """Run the command."""
    folder = check_output_folder(Path(options.output).expanduser())
    from starflow.cli.generate import read_prompt_file
    from starflow.data.records import read_folder
    from starflow.evaluate import save_sheet
    from starflow.measure import Plan, measure
    from starflow.pipeline import StarFlowPipeline

    prompts = tuple(read_prompt_file(Path(options.prompts))) if options.prompts else ()
    records = read_folder(Path(options.data).expanduser())
    pipeline = StarFlowPipeline.from_pretrained(options.model, pick_device(options.device))
    weights = {"guidance": options.guidance} if options.guidance else {}
    plan = Plan(options.samples, options.tuning_samples, prompts=prompts, **weights)
    report = measure(pipeline, records, plan, lambda text: print(f"{text} ...", file=sys.stderr, flush=True))
    write_json(folder / "report.json", {"model": options.model, "data": options.data, **report.as_json()})
    if prompts:
        save_sheet(folder / "grid.png", report.grid, prompts, COLUMNS)
        save_sheet(folder / "nearest.png", report.nearest, prompts, COLUMNS)
    print(json.dumps(report.as_json(), indent=2) if options.json else table(report))


def table(report: Report) -> str:
    """The report as lines of text."""
    rows = [(f"reconstruction, {noise} (dB)", f"{value:.2f}") for noise, value in report.reconstruction.items()]
    rows += [
        (f"{split}, {found.count} pictures (nats/dim of the noised latent)", f"{found.nats_per_dim:.4f}")
        for split, found in report.likelihood.items()
    ]
    rows.append(("guidance", f"{report.guidance:g}"))
    rows += [
        (f"kid_mobilenetv2 x 1000, {name}", f"{1000 * value:.1f}") for name, value in report.kid_mobilenetv2.items()
    ]
    rows += [(f"retrieval, {name}", f"{100 * value:.0f} %") for name, value in report.retrieval.items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value:>8}" for name, value in rows)
