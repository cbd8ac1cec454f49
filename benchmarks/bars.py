"""Hold sampling and training against the bars that they have to pass, in turn with what they are compared to.

    python benchmarks/bars.py --threads 2 --output benchmarks/results/bars.json

Formats of weights against each other, the textbook and the compiled decoder, token by token at an earlier commit, and a
training step in bfloat16 and float32, on the 57 M parameter model with random weights; drafts on a trained model. Every
part prints as soon as it is measured, with the load of the machine. Bars are for otherwise idle cores: on others only
the ratios mean something. `--parts` chooses.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from starflow.bench.limits import DrawTask, load_baselines, measure_limits, sampling_work
from starflow.bench.sample import load_model
from starflow.bench.train import architecture
from starflow.bench.train import measure as measure_training
from starflow.io.files import write_json
from starflow.nn.attention import CachePool
from starflow.sampling.calibrate import in_turn
from starflow.sampling.policy import BlockPolicy, SampleSettings, SolverChoice
from starflow.sampling.sampler import run
from starflow.sampling.solvers import relative_change
from starflow.train.distributed import join_world
from starflow.train.settings import TrainSettings

CPU = torch.device("cpu")

FORMATS: dict[str, tuple[torch.dtype, Any]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "int8": (torch.float32, "int8"),
    "int4": (torch.float32, "int4"),
}
"""Arithmetic and weights by name."""

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--model", default="57m", help="for formats, decoders and before")
    parser.add_argument("--trained", default="glyphs", help="for drafts")
    parser.add_argument("--before", default="HEAD~1", help="commit that token by token is compared with")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    found: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "threads": torch.get_num_threads()}
    for name in options.parts.split(","):
        print(f"\n{name} (load {os.getloadavg()[0]:.2f}, {torch.get_num_threads()} threads)", flush=True)
        found[name] = {**PARTS[name](options), "load": os.getloadavg()}
        if options.output:
            write_json(options.output, found)
    print(json.dumps(found))


def draw(task: DrawTask, solver: SolverChoice, pool: CachePool) -> torch.Tensor:
    settings = SampleSettings(task.guidance, solver)
    return run(task.model, task.noise, task.condition, task.null_condition, settings, caches=pool).x


def bar(what: str, value: float, least: float) -> str:
    return f"  {what}: {value:.2f}x, bar {least:g}x: {'met' if value >= least else 'NOT MET'}"


@torch.no_grad()
def formats(options: argparse.Namespace) -> dict[str, Any]:
    """Token by token with the weights in every format."""
    given = {name: load_model(options.model, CPU, *form) for name, form in FORMATS.items()}
    limits = measure_limits(CPU, torch.float32)
    found: dict[str, Any] = {}
    for batch in map(int, options.batches.split(",")):
        tasks = {name: one.task(batch, options.guidance) for name, one in given.items()}
        seconds, _ = time_in_turn({name: (task, "sequential") for name, task in tasks.items()}, options.repeats)
        for name, took in seconds.items():
            model = given[name].model
            work = sampling_work(model, batch, model.config.grid_side**2, guided=True)
            rate = f"{work.bytes / took / 1e9:5.1f} of {limits.bytes_per_second / 1e9:.1f} GB/s"
            print(f"  batch {batch} {name:9} {took:7.3f} s, {rate}, {work.flops / took / 1e9:5.0f} GFLOP/s")
        found[str(batch)] = seconds
    if "1" in found:
        print(bar("batch 1, int8 over bfloat16", found["1"]["bfloat16"] / found["1"]["int8"], 1.4))
    if "4" in found:
        best = min(found["4"]["bfloat16"], found["4"]["int8"])
        print(bar("batch 4, bfloat16 or int8 over float32", found["4"]["float32"] / best, 1.8))
    return found


def time_in_turn(
    ways: dict[str, tuple[DrawTask, SolverChoice]], repeats: int
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The fastest seconds of each way, from runs in turn after one that does not count, and what that one drew."""
    pools = {name: CachePool() for name in ways}
    actions = [functools.partial(draw, task, solver, pools[name]) for name, (task, solver) in ways.items()]
    drawn = {name: action().flatten(2) for name, action in zip(ways, actions, strict=True)}
    return dict(zip(ways, in_turn(actions, CPU, repeats), strict=True)), drawn


@torch.no_grad()
def decoders(options: argparse.Namespace) -> dict[str, Any]:
    """Token by token against what others would write."""
    task = load_model(options.model, CPU, torch.float32).task(4, options.guidance)
    pool = CachePool()
    theirs = [one for one in load_baselines(Path(__file__).parent, task) if "decoder" in one.name]
    actions: list[Callable[[], object]] = [lambda: draw(task, "sequential", pool), *(one.action for one in theirs)]
    for action in actions:
        action()
    ours, *others = in_turn(actions, CPU, options.repeats)
    print(f"  ours, float32, batch 4: {ours:.3f} s")
    for one, took in zip(theirs, others, strict=True):
        print(f"  {one.name}: {took:.3f} s, {took / ours:.2f} times as long")
    return {"ours": ours, **{one.name: took for one, took in zip(theirs, others, strict=True)}}


BEFORE = """
import json, sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
from starflow.bench.sample import load_model
from starflow.sampling.cpu.engine import cpu_engine_of
from starflow.sampling.policy import SampleSettings
from starflow.sampling.sampler import run
given = load_model(sys.argv[2], torch.device("cpu"), torch.float32)
cpu_engine_of(given.model).build()
best = {}
for batch in json.loads(sys.argv[3]):
    task = given.task(batch, float(sys.argv[4]))
    for turn in range(3):
        began = time.perf_counter()
        run(given.model, task.noise, task.condition, task.null_condition, SampleSettings(task.guidance))
        best[batch] = min(best.get(batch, 1e9), time.perf_counter() - began)
print(json.dumps(best))
"""
"""A program that this version of the package and an earlier one run, each in a process of its own."""


def before(options: argparse.Namespace) -> dict[str, Any]:
    """Token by token in float32 now and at an earlier commit."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), options.before], cwd=ROOT, check=True)
        try:
            best: dict[str, dict[str, float]] = {"now": {}, "before": {}}
            for _ in range(options.repeats):
                for name, source in (("now", ROOT / "src"), ("before", tree / "src")):
                    for batch, took in _run_before(source, options).items():
                        best[name][batch] = min(best[name].get(batch, 1e9), took)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    for batch, took in best["now"].items():
        print(bar(f"batch {batch}, {took:.3f} s against {best['before'][batch]:.3f}", best["before"][batch] / took, 1))
    return best


def _run_before(source: Path, options: argparse.Namespace) -> dict[str, float]:
    batches = json.dumps([int(one) for one in options.batches.split(",")])
    words = [str(torch.get_num_threads()), options.model, batches, str(options.guidance)]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    done = subprocess.run(
        [sys.executable, "-c", BEFORE, *words], env=environment, capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def training(options: argparse.Namespace) -> dict[str, Any]:
    """An update in bfloat16 and in float32, in turn."""
    best: dict[str, float] = {}
    with join_world(CPU, 60.0) as world:
        for _ in range(options.repeats):
            for precision in ("float32", "bfloat16"):
                settings = TrainSettings(steps=3, batch=4, precision=precision)
                took = measure_training(architecture("57m"), settings, world).update
                best[precision] = min(best.get(precision, 1e9), took)
    print(f"  float32 {best['float32']:.3f} s, bfloat16 {best['bfloat16']:.3f} s an update of 4 pictures")
    print(bar("training in bfloat16 over float32", best["float32"] / best["bfloat16"], 1.5))
    return dict(best)


@torch.no_grad()
def drafts(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens one by one with rounded weights, then exact passes until every block is within a residual of 1e-3.

    "int8 alone" is the model with weights of 8 bits, which nothing verifies: what the guess takes of "int8".
    """
    given, rounded = (load_model(options.trained, CPU, torch.float32, form) for form in (None, "int8"))
    found: dict[str, Any] = {}
    for batch in (1, 2, 4, 8):
        task = given.task(batch, options.guidance)
        blocks = len(given.model.blocks)
        ways: dict[str, tuple[DrawTask, SolverChoice]] = {"sequential": (task, "sequential")}
        ways["int8 alone"] = rounded.task(batch, options.guidance), "sequential"
        ways |= {guess: (task, [BlockPolicy("jacobi", guess=guess)] * blocks) for guess in ("bfloat16", "int8", "int4")}
        seconds, drawn = time_in_turn(ways, options.repeats)
        for name, took in seconds.items():
            apart = float(relative_change(drawn[name], drawn["sequential"]).max())
            factor = seconds["sequential"] / took
            print(f"  batch {batch} {name:10} {took:7.3f} s, {factor:.2f}x sequential, off by {apart:.1e}")
            found[f"{batch} {name}"] = {"seconds": took, "apart": apart}
    return found


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "formats": formats,
    "decoders": decoders,
    "before": before,
    "training": training,
    "drafts": drafts,
}

if __name__ == "__main__":
    main()
