"""The commands `starflow bench calibrate`, `bench sample` and `bench train`, and the tables that they print."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from starflow.cli.options import Argument, Device, Flag, Precision, WeightFormat, pick_device, pick_dtype
from starflow.errors import UserError

if TYPE_CHECKING:
    from starflow.bench.limits import Footprint
    from starflow.bench.sample import Speed, SpeedReport
    from starflow.bench.train import TrainSpeed
    from starflow.sampling.policy import BlockPolicy, Policy, Timing
    from starflow.train.settings import TrainSettings


@dataclass(frozen=True)
class BenchCalibrateOptions:
    """Measure how each block of a trained model converges, and choose the solver of each block.

    The result, policy.json, lies beside the flow's weights, where --solver auto finds it on this type of device (CPU
    or CUDA). A block gets one choice for all batches, which is slower than token by token at none of --batches: name
    those that you draw. Without policy.json --solver auto goes token by token.
    """

    EXAMPLES: ClassVar[str] = """
        starflow bench calibrate runs/tiny/model
        starflow bench calibrate glyphs --batches 1,16 --output policies
    """

    model: Annotated[str, Argument("bundled name, folder, or hub repository")] = "glyphs"
    batches: Annotated[str, Flag("pictures at once, separated by commas", "N,N")] = "1,4,16"
    guidance: Annotated[float | None, Flag("weight to measure with, beside none (default: the model's)", "W")] = None
    prompts: Annotated[str, Flag("a text file, one prompt a line (default: some of our own)", "FILE")] = ""
    tolerance: Annotated[float, Flag("bound on the residual of every block and picture")] = 1e-3
    repeats: Annotated[int, Flag("timed runs, of which the fastest counts", "N")] = 3
    output: Annotated[str, Flag("folder for policy.json (default: beside the weights)", "FOLDER")] = ""
    device: Annotated[Device, Flag("where to compute")] = "auto"
    dtype: Annotated[Precision, Flag("precision of the network")] = "float32"
    json: Annotated[bool, Flag("print the policy as JSON")] = False

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise UserError(
                f"--tolerance is {self.tolerance:g}, expected above 0: at 0 every block goes token by token"
            )
        if self.repeats < 1:
            raise UserError(f"--repeats is {self.repeats}, expected at least 1")
        parse_batches(self.batches)


def parse_batches(text: str) -> list[int]:
    """The numbers of a text such as "1,4,16".

    Raises:
        UserError: it holds anything else.

    >>> parse_batches("1,4,16")
    [1, 4, 16]
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--batches is '{text}', expected whole numbers above 0 separated by commas, e.g. 1,4,16")
    return [int(part) for part in parts]


def bench_calibrate(options: BenchCalibrateOptions) -> None:
    """Calibrate a model, write its policy.json, and print what was measured and chosen."""
    from starflow.bench.sample import calibrate_pipeline
    from starflow.cli.generate import read_prompt_file
    from starflow.config import to_dict
    from starflow.flow.checkpoint import write_policy
    from starflow.io.files import check_output_folder
    from starflow.pipeline.locate import find_pipeline
    from starflow.pipeline.pipeline import StarFlowPipeline

    prompts = read_prompt_file(Path(options.prompts)) if options.prompts else None
    folder = Path(options.output) if options.output else find_pipeline(options.model) / "flow"
    check_output_folder(folder)
    pipeline = StarFlowPipeline.from_pretrained(options.model, pick_device(options.device), pick_dtype(options.dtype))
    policy = calibrate_pipeline(
        pipeline,
        prompts,
        guidance=options.guidance,
        batches=parse_batches(options.batches),
        tolerance=options.tolerance,
        repeats=options.repeats,
        note=lambda text: print(text, file=sys.stderr),
    )
    written = write_policy(folder, to_dict(policy))
    if options.json:
        print(json.dumps({"path": str(written), **to_dict(policy)}, indent=2))
        return
    print("\n".join([*convergence_text(policy), *choices_text(policy)]))
    print(written)


def convergence_text(policy: Policy) -> list[str]:
    """One line a block, the hardest to iterate first."""
    ranked = sorted(enumerate(policy.convergence), key=lambda pair: -pair[1].contraction)
    lines = ["blocks by how hard they are to iterate:"]
    for number, known in ranked:
        distances = ", ".join(f"{name} {value:.2f}" for name, value in known.distances.items())
        best = known.converged[0] if known.converged else None
        found = f"{best.passes} passes after {best.drafts} drafts" if best else "token by token"
        lines.append(
            f"  block {number}: contraction {known.contraction:.2f}; distance of initial guesses: {distances}; {found}"
        )
    return lines


def choices_text(policy: Policy) -> list[str]:
    """One line a block, and one of whole samples where any block is iterated."""
    guided = "guided" if policy.guided else "unguided"
    lines = [f"choices for {policy.device}, {policy.tokens} tokens, {guided}, {policy.dtype}, {policy.machine}:"]
    for number, choice in enumerate(policy.choices):
        lines.append(f"  block {number}: {policy_text(choice.policy)}; {timings_text(choice.timings)}")
    if policy.samples:
        lines.append(f"  whole samples: {timings_text(policy.samples)}")
    return lines


def policy_text(policy: BlockPolicy) -> str:
    """A policy in words."""
    if policy.solver == "sequential":
        return "token by token"
    length = f"segments of {policy.segment}" if policy.segment else "whole sequence"
    return f"{length} from {policy.guess}{', drafted in bfloat16' if policy.draft else ''}"


def timings_text(timings: Sequence[Timing]) -> str:
    """Seconds at each batch size, and of going token by token where that is another way."""
    return ", ".join(
        f"batch {one.batch} {one.seconds:.4f} s"
        + (f" (token by token {one.sequential_seconds:.4f}, off by {one.error:.0e})" if one.error else "")
        for one in timings
    )


TRUSTED_LIMITS = 12.0
"""Multiple of the limit that the textbook decoder may take: a slower one is no fair baseline."""


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
    weights: Annotated[WeightFormat | None, Flag("format of the layers' weights (default: --dtype)", "FORMAT")] = None
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
    """Time sampling, print the table or JSON, and write JSON where a file is named."""
    import torch

    from starflow.bench.limits import find_baselines_folder
    from starflow.bench.sample import SamplingBenchmark, load_model, measure
    from starflow.config import to_dict
    from starflow.io.files import check_output_folder, write_json

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.output:
        check_output_folder(Path(options.output).parent)
    folder = find_baselines_folder() if not options.baselines else Path(options.baselines)
    benchmark = SamplingBenchmark(
        tuple(parse_batches(options.batches)),
        options.guidance,
        options.compare_at,
        options.repeats,
        None if options.baselines == "none" else folder,
    )
    given = load_model(options.model, pick_device(options.device), pick_dtype(options.dtype), options.weights)
    report = measure(given, benchmark, lambda text: print(text, file=sys.stderr))
    values = {"command": command_of(options), **to_dict(report)}
    if options.output:
        write_json(Path(options.output), values)
    print(json.dumps(values, indent=2) if options.json else "\n".join(sample_table(report)))


def command_of(options: BenchSampleOptions) -> str:
    """The command line that measures this again."""
    flags = [f"--batches {options.batches}", f"--guidance {options.guidance:g}", f"--compare-at {options.compare_at}"]
    flags += [f"--repeats {options.repeats}", f"--device {options.device}", f"--dtype {options.dtype}"]
    flags += [f"--threads {options.threads}"] if options.threads else []
    flags += [f"--weights {options.weights}"] if options.weights else []
    return " ".join(["starflow bench sample", options.model, *flags])


def sample_table(report: SpeedReport) -> list[str]:
    """The report as lines of text; the last line is the comparison to quote."""
    ceilings, once = report.ceilings, report.once
    weights = "trained weights" if report.trained else "random weights: token by token only, as no parallel solver can"
    built = (
        f"compiled in {once.build_seconds:.2f} s" if once.compiled else f"found, loaded in {once.build_seconds:.3f} s"
    )
    loop = f"{built}; weights packed in {once.pack_seconds:.3f} s, {once.packed_bytes / 2**20:.0f} MiB"
    load = " to ".join("/".join(f"{one:.2f}" for one in loads) for loads in report.load)
    rows = [
        ("model", f"{report.model}: {report.parameters / 1e6:.1f} M parameters, {report.tokens} tokens, {weights}"),
        ("machine", f"{report.machine}, {report.dtype}, weights {report.weights}, torch {report.torch}; load {load}"),
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
    """Memory as measured, and in brackets as `starflow info --memory` predicts it, in MiB."""
    predicted = memory.predicted
    parts = [("weights", memory.weights, predicted.weights)]
    parts += [("packed", memory.packed, predicted.packed)] if memory.packed else []
    parts += [("cache", memory.cache, predicted.cache), ("autoencoder", memory.autoencoder, predicted.autoencoder)]
    parts += [("at most", memory.peak, memory.predicted_peak)] if memory.peak is not None else []
    found = ", ".join(f"{name} {ours / 2**20:.1f} ({foreseen / 2**20:.1f})" for name, ours, foreseen in parts)
    return f"MiB at batch {memory.batch}, predicted in brackets: {found}"


def speed_text(one: Speed) -> str:
    """One row of the table of speeds."""
    return (
        f"{one.solver:11} {one.batch:5} {one.guidance:5g} {one.seconds:9.3f} {one.seconds_per_picture:9.3f} "
        f"{one.pictures_per_second:10.2f} {one.tokens_per_second:8.0f} {one.bytes_per_second / 1e9:6.1f} "
        f"{one.flops_per_second / 1e9:7.1f} {one.limit_seconds:7.3f} {one.share_of_limit:6.0%} {one.deviation:7.0e}"
    )


def others_text(report: SpeedReport) -> list[str]:
    """One line a baseline: its time, and how much faster ours are in runs that took turns."""
    if not report.others:
        return ["", "no baselines: a source tree has them in benchmarks/ (--baselines FOLDER)"]
    lines = ["", f"others, batch {report.compare_at}, guidance {report.guidance:g}:"]
    for one in report.others:
        ours = ", ".join(f"{solver} {factor:.2f}x as fast" for solver, factor in one.speedup.items())
        lines.append(f"  {one.name}: {one.seconds:.3f} s, {one.limits:.1f} limits; ours: {ours} ({one.note})")
        if one.name.startswith("textbook") and one.limits > TRUSTED_LIMITS:
            lines.append(f"  it takes over {TRUSTED_LIMITS:g} limits: too slow a baseline for the comparison to count")
    return lines


@dataclass(frozen=True)
class BenchTrainOptions:
    """Time whole updates of training, without waiting for pictures, and set them against a large matrix product.

    ARCHITECTURE is 57m (width 512, 256 tokens, 32 condition tokens) or a preset such as starflow-xl or
    starflow-t2i-3b. Operations are those that the model needs: 2 per weight and token, attention over the tokens that
    are seen, three times for forward and backward; what is computed again counts nothing. Under torchrun all processes
    measure together.
    """

    EXAMPLES: ClassVar[str] = """
        starflow bench train
        starflow bench train starflow-xl --batch 16 --compile --recompute --json
        torchrun --nproc-per-node 8 -m starflow bench train starflow-t2i-3b --batch 64 --layout sharded --compile
    """

    architecture: Annotated[str, Argument("57m, or the name of a preset", "ARCHITECTURE")] = "57m"
    batch: Annotated[int, Flag("pictures an update, over all processes", "N")] = 4
    updates: Annotated[int, Flag("timed updates, after one that is not", "N")] = 10
    precision: Annotated[
        Precision | Literal["auto"], Flag("of the network; auto is bfloat16 where the device multiplies it")
    ] = "auto"
    compile: Annotated[bool, Flag("compile every Transformer layer")] = False
    recompute: Annotated[bool, Flag("keep no activations of attention and MLPs")] = False
    layout: Annotated[Literal["replicated", "sharded", "hybrid"], Flag("of the weights, under torchrun")] = "replicated"
    threads: Annotated[int, Flag("of a CPU; 0 leaves torch its choice", "N")] = 0
    device: Annotated[Device, Flag("where to compute")] = "auto"
    json: Annotated[bool, Flag("print JSON alone")] = False


def bench_train(options: BenchTrainOptions) -> None:
    """Time training and print the figures, in one process of a group."""
    import torch

    from starflow.bench.train import architecture, measure
    from starflow.train.distributed import join_world

    config, settings = architecture(options.architecture), _train_settings(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    with join_world(pick_device(options.device), settings.parallel.timeout) as world:
        speed = measure(config, settings, world)
        if world.is_main:
            print(json.dumps(dataclasses.asdict(speed)) if options.json else train_table(speed))


def _train_settings(options: BenchTrainOptions) -> TrainSettings:
    from starflow.train.settings import ParallelSettings, TrainSettings

    parallel = ParallelSettings(
        layout=options.layout, checkpoint_attention=options.recompute, checkpoint_mlp=options.recompute
    )
    return TrainSettings(
        steps=options.updates,
        batch=options.batch,
        precision=options.precision,
        compile=options.compile,
        parallel=parallel,
    )


def train_table(speed: TrainSpeed) -> str:
    """The figures, one a line; the last line is the share of the matrix product, which is the one to quote."""
    where = f"{speed.device}, {speed.precision}, {speed.processes} processes"
    threads = f" of {speed.threads} threads" if speed.device == "cpu" else ""
    parts = f"forward {speed.forward:.4f}, backward {speed.backward:.4f}, optimiser {speed.optimiser:.4f}"
    rows = [
        ("model", f"{speed.parameters / 1e6:.1f} M parameters, batch {speed.batch}"),
        ("machine", where + threads),
        ("first update", f"{speed.first_update:.2f} s"),
        ("update", f"{speed.update:.4f} s, median of {speed.updates} ({parts})"),
        ("memory", f"{speed.memory_gib:.2f} GiB at most in one process"),
        ("counted", f"{speed.flops_per_picture / 1e9:.1f} GFLOP a picture, forward and backward"),
        ("pictures", f"{speed.pictures_per_second:.3f} a second"),
        ("training", f"{speed.flops_per_second / 1e12:.4f} TFLOP/s a process"),
        ("matrix product", f"{speed.product_flops_per_second / 1e12:.4f} TFLOP/s"),
        ("share", f"{speed.share:.1%} of the matrix product (best update {speed.best_share:.1%})"),
    ]
    return "\n".join(f"{name:15} {value}" for name, value in rows)
