"""The parts of benchmarks/gpu.sh: what a GPU session must answer, each part in a process of its own.

    benchmarks/gpu.sh --output results --seconds 530

In this order: the numerical tests and those marked gpu; recorded graphs against an eager loop in both precisions;
sampling of the 3.8 B shape against the limit of the run and the textbook decoder, with 8 and 4 bits, and within 8 GB by
offload; updates of training of the 3.8 B and 1.4 B shapes; `bench sample` of the 57 M model and of the bundled flow;
and the bundled model's recipe for the minutes that are left, where its data and its text encoder are at hand. `--plan`
prints what each is expected to take and may take. A part that takes longer is stopped, and what it printed is kept.

Only torch, transformers, safetensors, numpy and the wheels of gpu.sh are used: the flow of the bundled model is timed
without its text encoder. Nothing needs a particular GPU but the 4 bits, which need compute capability 8.0 or more.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from starflow.bench.limits import DrawTask
    from starflow.nn.quantize import WeightFormat

ROOT = Path(__file__).parents[1]

LARGE, MEDIUM, SMALL = "starflow-t2i-3b", "57m", str(ROOT / "src" / "starflow" / "bundled" / "glyphs" / "flow")

OFFLOAD_BYTES = 8e9
"""Memory of a small GPU, which an offloaded model must fit."""

TAIL, TOLD = 4000, 1200
"""Last characters of a part's output that are kept, and of its result that are printed."""


@dataclass(frozen=True)
class Part:
    """One question, the command that answers it, and the seconds that it is expected to take and that it may take."""

    name: str
    expected: int
    limit: int
    command: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", "gpu-results")))
    parser.add_argument("--seconds", type=int, default=530, help="for all parts together")
    parser.add_argument("--data", type=Path, help="the prepared pictures of the recipe, if they are here")
    parser.add_argument("--parts", default="", help="only these, separated by commas")
    parser.add_argument("--plan", action="store_true", help="print the parts, their times and their commands alone")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--run", choices=sorted(FUNCTIONS), help="compute one part of this file, and print JSON")
    options = parser.parse_args()
    if options.run:
        print(json.dumps(FUNCTIONS[options.run](rehearse=options.rehearse)))
        return
    if options.plan:
        print("\n".join(plan(parts(options))))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + options.seconds
    wanted = options.parts.split(",") if options.parts else None
    failed = []
    for part in parts(options):
        if wanted is None or part.name in wanted:
            failed += [] if answer(part, options.output, ends) else [part.name]
    print(f"not answered: {', '.join(failed) or 'none'}")
    sys.exit(1 if failed else 0)


def plan(found: list[Part]) -> list[str]:
    """The parts as lines of text; the expected times are estimates for an H100, from bytes and launches."""
    lines = [
        f"{part.name:15} {part.expected:4} s, at most {part.limit:4} s: {' '.join(part.command)}" for part in found
    ]
    return [*lines, f"{'together':15} {sum(part.expected for part in found):4} s"]


def parts(options: argparse.Namespace) -> list[Part]:
    """The parts in their order; in a rehearsal the same commands at sizes for a CPU."""
    tiny = options.rehearse
    device = "cpu" if tiny else "cuda"
    python = [sys.executable, "-m"]
    tests = (
        ["tests/flow/test_block_offload.py"] if tiny else ["tests/test_conformance.py", "tests/flow", "tests/sampling"]
    )
    marks = "not slow and not gpu" if tiny else "gpu or not slow"
    pytest = [*python, "pytest", "-p", "no:cacheprovider", "-m", marks, "--device", device]

    def sample(model: str, batches: str) -> list[str]:
        size = ["--batches", "1", "--repeats", "1", "--compare-at", "1", "--threads", "1"]
        given = [SMALL, *size] if tiny else [model, "--batches", batches, "--dtype", "bfloat16"]
        return [*python, "starflow", "bench", "sample", *given, "--device", device, "--baselines", "none", "--json"]

    def own(name: str) -> list[str]:
        return [sys.executable, str(Path(__file__)), "--run", name, *(["--rehearse"] if tiny else [])]

    found = [
        Part("tests", 30, 60, [*pytest, *tests]),
        Part("graphs", 20, 40, own("graphs")),
        Part("large", 95, 150, own("large")),
        Part("offload", 25, 45, own("offload")),
        Part("train-3.8b", 50, 80, own("train-3.8b")),
        Part("large-int8", 50, 90, own("large-int8")),
        Part("large-int4", 35, 70, own("large-int4")),
        Part("train-1.4b", 35, 60, own("train-1.4b")),
        Part("sample-medium", 30, 60, sample(MEDIUM, "1,4,16")),
        Part("sample-small", 25, 45, sample(SMALL, "1,16,64")),
    ]
    if tiny:  # how long it takes says nothing
        found = [replace(part, limit=options.seconds) for part in found]
    data = options.data
    if data is not None:
        recipe = [*python, "starflow", "train", "recipes/glyphs-64.yaml", "--data.path", str(data)]
        recipe += ["--device", device, "--output", str(options.output.resolve() / "run")]
        found.append(Part("recipe", 60, options.seconds, recipe))
    return found


def answer(part: Part, folder: Path, ends: float) -> bool:
    """Run a part unless its result is there, within its time and what is left of all; whether it went well.

    All results are in one file, which is written whole after each part: of many a session may not get all back.
    """
    file = folder / "results.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if part.name in known and known[part.name]["rc"] == 0:
        print(f"{part.name}: there already")
        return True
    limit = min(part.limit, int(ends - time.monotonic()))
    if limit < 5:
        print(f"{part.name}: no time left")
        return False
    began = time.monotonic()
    try:
        done = subprocess.run(part.command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
        rc, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as stopped:
        rc, out, err = 124, _text(stopped.stdout), _text(stopped.stderr)
    seconds = time.monotonic() - began
    found = {"rc": rc, "seconds": seconds, "command": part.command, "date": time.strftime("%Y-%m-%d")}
    found |= {"result": results_in(out), "output": out[-TAIL:], "errors": err[-TAIL:]}
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps({**known, part.name: found}, indent=2))
    temporary.replace(file)
    told = json.dumps(found["result"]) if rc == 0 else (err or out)
    print(f"{part.name}: rc {rc}, {seconds:.1f} s\n{told[-TOLD:]}", flush=True)
    return rc == 0


def _text(given: str | bytes | None) -> str:
    return given.decode(errors="replace") if isinstance(given, bytes) else given or ""


def results_in(text: str) -> Any:
    """The JSON of a text, or that of its lines in one, or what pytest counted; None where there is none of it."""
    with contextlib.suppress(ValueError):
        return json.loads(text)
    found: dict[str, Any] = {}
    for line in text.splitlines():
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                found |= json.loads(line)
    counted = re.findall(r"(\d+) (passed|failed|error|skipped|deselected)", text)
    return found or {kind: int(count) for count, kind in counted} or None


def graphs(*, rehearse: bool) -> dict[str, Any]:
    """Recorded graphs against the textbook decoder, in both precisions, guided and not: how far samples are apart.

    The flow of the rehearsal is trained, and so rough under random conditions that with guidance rounding is seen.
    """
    import torch

    from benchmarks.textbook import decode
    from starflow.bench.sample import load_model
    from starflow.sampling.sampler import sample
    from starflow.sampling.solvers import relative_change

    device, found = torch.device("cpu" if rehearse else "cuda"), {}
    for dtype in (torch.float32, torch.bfloat16):
        given = load_model(SMALL if rehearse else MEDIUM, device, dtype)
        for guidance in (0.0, 3.0):
            task = given.task(2, guidance)
            ours = sample(task.model, task.noise, task.condition, task.null_condition, guidance)
            apart = relative_change(ours.flatten(2), decode(task).flatten(2)).max()
            found[f"{str(dtype)[6:]}, guidance {guidance:g}"] = float(apart)
    exact = [
        apart for name, apart in found.items() if name.startswith("float32") and not (rehearse and name[-1] == "3")
    ]
    assert max(exact) < 1e-3, found
    return found


def large(form: WeightFormat | None, *, rehearse: bool) -> dict[str, Any]:
    """Guided batches of the large shape, each printed as soon as it is timed, and at one picture the textbook decoder.

    Of weights that torchao rounds, only what a CPU can pack is rehearsed: 8 bits, where torchao is.
    """
    import torch

    from benchmarks.textbook import decode
    from starflow.bench.limits import measure_limits, sampling_work
    from starflow.bench.sample import load_model
    from starflow.flow.quantize import set_weight_format
    from starflow.nn.quantize import stored_bytes
    from starflow.sampling.calibrate import in_turn, machine_of
    from starflow.sampling.sampler import sample

    device = torch.device("cpu" if rehearse else "cuda")
    began = time.perf_counter()
    given = load_model(SMALL if rehearse else LARGE, device, torch.bfloat16, None if rehearse else form)
    if rehearse and form == "int8" and importlib.util.find_spec("torchao"):
        set_weight_format(given.model, form, "cuda")
    loaded, limits = time.perf_counter() - began, measure_limits(device, torch.bfloat16)
    say({"load_seconds": loaded, "torch": torch.__version__, "machine": machine_of(device), "ceilings": asdict(limits)})
    say({"weight_bytes": sum(map(stored_bytes, given.model.parameters()))})
    for batch in (1,) if rehearse else (1, 4) if form else (1, 4, 16, 32):
        task = given.task(batch, 3.0)
        work = sampling_work(given.model, batch, given.model.config.grid_side**2, guided=True)

        def ours(task: DrawTask = task) -> Tensor:
            return sample(task.model, task.noise, task.condition, task.null_condition, task.guidance)

        assert bool(ours().isfinite().all())
        others = [functools.partial(decode, task)] if batch == 1 and form is None else []
        seconds, *theirs = in_turn([ours, *others], device, 1)
        reads, arithmetic = limits.seconds(work.bytes, work.flops)
        found = {"seconds": seconds, "textbook_seconds": theirs, "reads": reads, "arithmetic": arithmetic}
        say({f"batch {batch}": found | {"peak_bytes": None if rehearse else torch.cuda.max_memory_allocated()}})
    return {"whole": True}


def say(found: dict[str, Any]) -> None:
    """Print a result at once, for a part that may be stopped."""
    print(json.dumps(found), flush=True)


def offload(*, rehearse: bool) -> dict[str, Any]:
    """One guided picture of the large shape with its blocks on the CPU, and the most memory of the GPU."""
    import torch

    from starflow.bench.sample import load_model
    from starflow.sampling.sampler import sample

    device = torch.device("cpu" if rehearse else "cuda")
    given = load_model(SMALL if rehearse else LARGE, device, torch.bfloat16)  # a CPU draws so many numbers slowly
    given.model.to("cpu").offload(device)
    if not rehearse:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(OFFLOAD_BYTES / total)
    task = given.task(1, 3.0)
    condition, null = (None if one is None else one.to(device) for one in (task.condition, task.null_condition))
    began = time.perf_counter()
    x = sample(task.model, task.noise.to(device), condition, null, 3.0)
    assert bool(x.isfinite().all())
    peak = None if rehearse else torch.cuda.max_memory_allocated()
    return {"seconds": time.perf_counter() - began, "peak_bytes": peak, "allowed_bytes": OFFLOAD_BYTES}


def train(name: str, batch: int, *, rehearse: bool) -> dict[str, Any]:
    """Updates in bfloat16 that keep no activations of layers, and their memory beside what is predicted.

    With its optimiser and its averaged weights the 3.8 B shape takes 90 GB: of a smaller GPU the answer is that.
    """
    import torch

    from starflow.bench.train import architecture, measure
    from starflow.flow.memory import training_memory
    from starflow.train.distributed import join_world
    from starflow.train.settings import ParallelSettings, TrainSettings

    device, config = torch.device("cpu" if rehearse else "cuda"), architecture(MEDIUM if rehearse else name)
    parallel = ParallelSettings(checkpoint_attention=True, checkpoint_mlp=True)
    settings = TrainSettings(
        steps=1 if rehearse else 5, batch=1 if rehearse else batch, precision="bfloat16", parallel=parallel
    )
    predicted = training_memory(config, settings.batch, checkpointing=True).peak
    free = None if rehearse else torch.cuda.mem_get_info()[0]
    found = {"predicted_bytes": predicted, "free_bytes": free, "fits": free is None or predicted < free}
    if not found["fits"]:
        return found
    with join_world(device, 60.0) as world:
        return found | asdict(measure(config, settings, world))


FUNCTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "graphs": graphs,
    "large": functools.partial(large, None),
    "large-int8": functools.partial(large, "int8"),
    "large-int4": functools.partial(large, "int4"),
    "offload": offload,
    "train-3.8b": functools.partial(train, LARGE, 8),
    "train-1.4b": functools.partial(train, "starflow-xl", 16),
}

if __name__ == "__main__":
    main()
