"""`starflow bench sample`: seconds a picture, against the limits of the machine and against other ways to draw one."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from starflow.cli.bench_calibrate import parse_batches
from starflow.cli.options import Argument, Flag
from starflow.cli.values import Device, Precision, pick_device, pick_dtype
from starflow.errors import UserError

if TYPE_CHECKING:
    from starflow.bench.footprint import Footprint
    from starflow.bench.sample import Report, Speed

TRUST = 12.0
"""Limits that the textbook decoder may take: a slower one is no baseline."""


@dataclass(frozen=True)
class BenchSampleOptions:
    """Time sampling: seconds a picture, tokens a second, and what they are of the machine's limits.

    MODEL is a trained pipeline (a folder, a bundled name, a hub repository), or 57m or the name of a preset for random
    weights, which serve the sequential solver alone: how many passes a parallel one needs hangs on what was learned.
    Times are of the flow, from noise and an encoded condition to latents. Baselines are files of a folder, by default
    benchmarks/ of the source tree where there is one.
    """

    EXAMPLES: ClassVar[str] = """
        starflow bench sample
        starflow bench sample glyphs --batches 1,4 --json
        STARFLOW_CACHE=$(mktemp -d) starflow bench sample runs/57m/model --output sample.json
        starflow bench sample starflow-t2i-3b --device cuda --dtype bfloat16 --batches 1,32
    """

    model: Annotated[str, Argument("a trained model, or 57m or a preset with random weights", "MODEL")] = "57m"
    batches: Annotated[str, Flag("pictures at once, separated by commas", "N,N")] = "1,2,4,8,16"
    guidance: Annotated[float, Flag("weight; each batch is timed with it and without", "W")] = 3.0
    compare_at: Annotated[int, Flag("pictures at once against the baselines", "N")] = 4
    baselines: Annotated[str, Flag("folder of baselines, or none", "FOLDER")] = ""
    repeats: Annotated[int, Flag("timed runs, of which the fastest counts", "N")] = 3
    threads: Annotated[int, Flag("of a CPU; 0 leaves torch its choice", "N")] = 0
    device: Annotated[Device, Flag("where to compute")] = "auto"
    dtype: Annotated[Precision, Flag("precision of the network")] = "float32"
    output: Annotated[str, Flag("write the JSON to a file as well", "FILE")] = ""
    json: Annotated[bool, Flag("print JSON alone")] = False

    def __post_init__(self) -> None:
        parse_batches(self.batches)
        for name, value in (("--repeats", self.repeats), ("--compare-at", self.compare_at)):
            if value < 1:
                raise UserError(f"{name} is {value}, expected at least 1")
        if not self.guidance >= 0:
            raise UserError(f"--guidance is {self.guidance:g}, expected at least 0 (0 is unguided)")


def bench_sample(options: BenchSampleOptions) -> None:
    """Run the command."""
    import torch

    from starflow.bench.baselines import tree_folder
    from starflow.bench.sample import Plan, measure, subject
    from starflow.config import to_dict
    from starflow.files import check_output_folder, write_json

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.output:
        check_output_folder(Path(options.output).parent)
    folder = tree_folder() if not options.baselines else Path(options.baselines)
    plan = Plan(
        tuple(parse_batches(options.batches)),
        options.guidance,
        options.compare_at,
        options.repeats,
        None if options.baselines == "none" else folder,
    )
    given = subject(options.model, pick_device(options.device), pick_dtype(options.dtype))
    report = measure(given, plan, lambda text: print(text, file=sys.stderr))
    values = {"command": command_of(options), **to_dict(report)}
    if options.output:
        write_json(Path(options.output), values)
    print(json.dumps(values, indent=2) if options.json else "\n".join(table(report)))


def command_of(options: BenchSampleOptions) -> str:
    """The command line that measures this again."""
    flags = [f"--batches {options.batches}", f"--guidance {options.guidance:g}", f"--compare-at {options.compare_at}"]
    flags += [f"--repeats {options.repeats}", f"--device {options.device}", f"--dtype {options.dtype}"]
    flags += [f"--threads {options.threads}"] if options.threads else []
    return " ".join(["starflow bench sample", options.model, *flags])


def table(report: Report) -> list[str]:
    """What to read of it; the last line is the comparison to quote."""
    ceilings, once = report.ceilings, report.once
    weights = "trained weights" if report.trained else "random weights: token by token only, as no parallel solver can"
    built = (
        f"compiled in {once.build_seconds:.2f} s" if once.compiled else f"found, loaded in {once.build_seconds:.3f} s"
    )
    loop = f"{built}; weights packed in {once.pack_seconds:.3f} s, {once.packed_bytes / 2**20:.0f} MiB"
    load = " to ".join("/".join(f"{one:.2f}" for one in loads) for loads in report.load)
    rows = [
        ("model", f"{report.model}: {report.parameters / 1e6:.1f} M parameters, {report.tokens} tokens, {weights}"),
        ("machine", f"{report.machine}, {report.dtype}, torch {report.torch}; load {load}"),
        ("ceilings", f"{ceilings.bytes_per_second / 1e9:.1f} GB/s (large read), "
                     f"{ceilings.flops_per_second / 1e9:.1f} GFLOP/s (large product)"),
        ("compiled loop", loop if once.packed_bytes else "none"),
        ("first picture", f"{once.first_picture_seconds:.3f} s, all that is paid once included"),
        ("memory", memory_text(report.memory)),
    ]  # fmt: skip
    lines = [f"{name:15} {value}" for name, value in rows]
    lines += [
        "",
        f"{'solver':11} batch guid.   s/batch s/picture pictures/s tokens/s   GB/s GFLOP/s   limit  share  off by",
    ]
    lines += [speed_text(one) for one in report.speeds]
    return [*lines, *others_text(report)]


def memory_text(memory: Footprint) -> str:
    """Measured, and what `starflow info --memory` predicts, in MiB."""
    predicted = memory.predicted
    parts = [("weights", memory.weights, predicted.weights)]
    parts += [("packed", memory.packed, predicted.packed)] if memory.packed else []
    parts += [("cache", memory.cache, predicted.cache), ("autoencoder", memory.autoencoder, predicted.autoencoder)]
    parts += [("at most", memory.peak, memory.predicted_peak)] if memory.peak is not None else []
    found = ", ".join(f"{name} {ours / 2**20:.1f} ({foreseen / 2**20:.1f})" for name, ours, foreseen in parts)
    return f"MiB at batch {memory.batch}, predicted in brackets: {found}"


def speed_text(one: Speed) -> str:
    """A row of the table."""
    return (
        f"{one.solver:11} {one.batch:5} {one.guidance:5g} {one.seconds:9.3f} {one.seconds_per_picture:9.3f} "
        f"{one.pictures_per_second:10.2f} {one.tokens_per_second:8.0f} {one.bytes_per_second / 1e9:6.1f} "
        f"{one.flops_per_second / 1e9:7.1f} {one.limit_seconds:7.3f} {one.share_of_limit:6.0%} {one.deviation:7.0e}"
    )


def others_text(report: Report) -> list[str]:
    """Ours against each baseline, from runs that took turns."""
    if not report.others:
        return ["", "no baselines: a source tree has them in benchmarks/ (--baselines FOLDER)"]
    lines = ["", f"others, batch {report.compare_at}, guidance {report.guidance:g}:"]
    for one in report.others:
        ours = ", ".join(f"{solver} {factor:.2f}x as fast" for solver, factor in one.speedup.items())
        lines.append(f"  {one.name}: {one.seconds:.3f} s, {one.limits:.1f} limits; ours: {ours} ({one.note})")
        if one.name.startswith("textbook") and one.limits > TRUST:
            lines.append(f"  it takes over {TRUST:g} limits: too slow a baseline for the comparison to count")
    return lines
