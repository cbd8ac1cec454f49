"""The parts of benchmarks/gpu.sh: what a GPU session must answer, each part in a process of its own.

    benchmarks/gpu.sh --output results --seconds 530

In this order: the numerical tests and those marked gpu; recorded graphs against an eager loop in both precisions;
`bench sample` of the 3.8 B shape, of the 57 M model and of the bundled one, with 8 bits, and within 8 GB by offload;
`bench train` of the 1.4 B and 3.8 B shapes; and the bundled model's recipe for the minutes that are left, where
its data are at hand. A part that takes longer than it may is stopped, and what it printed is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

LARGE, MEDIUM, SMALL = "starflow-t2i-3b", "57m", "glyphs"

OFFLOAD_BYTES = 8e9
"""Memory of a small GPU, which an offloaded model must fit."""

TAIL = 4000
"""Characters of a part's output that are kept."""


@dataclass(frozen=True)
class Part:
    """One question, the command that answers it, and the seconds that it may take."""

    name: str
    limit: int
    command: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", "gpu-results")))
    parser.add_argument("--seconds", type=int, default=530, help="for all parts together")
    parser.add_argument("--data", type=Path, help="the prepared pictures of the recipe, if they are here")
    parser.add_argument("--parts", default="", help="only these, separated by commas")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--run", choices=sorted(FUNCTIONS), help="compute one part of this file, and print JSON")
    options = parser.parse_args()
    if options.run:
        print(json.dumps(FUNCTIONS[options.run](rehearse=options.rehearse)))
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


def parts(options: argparse.Namespace) -> list[Part]:
    """The parts in their order; in a rehearsal the same commands at sizes for a CPU."""
    tiny, out = options.rehearse, options.output.resolve()
    device = "cpu" if tiny else "cuda"
    python = [sys.executable, "-m"]
    tests = (
        ["tests/test_conformance.py", "tests/flow", "tests/nn", "tests/sampling"]
        if not tiny
        else ["tests/nn/test_rope.py"]
    )
    pytest = [*python, "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu or not slow", "--device", device]

    def sample(name: str, model: str, batches: str, *more: str) -> list[str]:
        size = (
            ["--batches", "1", "--repeats", "1", "--compare-at", "1", "--threads", "1"]
            if tiny
            else ["--batches", batches]
        )
        given = [*python, "starflow", "bench", "sample", SMALL if tiny else model, *size]
        return [*given, "--device", device, *more, "--output", str(out / f"{name}-bench.json")]

    def train(name: str, batch: int) -> list[str]:
        size = (
            ["57m", "--batch", "1", "--updates", "1", "--threads", "1"]
            if tiny
            else [name, "--batch", str(batch), "--updates", "5"]
        )
        return [
            *python,
            "starflow",
            "bench",
            "train",
            *size,
            "--device",
            device,
            "--recompute",
            "--precision",
            "bfloat16",
            "--json",
        ]

    def own(name: str) -> list[str]:
        return [sys.executable, str(Path(__file__)), "--run", name, *(["--rehearse"] if tiny else [])]

    half, alone = ("--dtype", "bfloat16"), ("--baselines", "none", "--guidance", "3")
    found = [
        Part("tests", 80, [*pytest, *tests]),
        Part("graphs", 40, own("graphs")),
        Part("sample-large", 150, sample("sample-large", LARGE, "1,4,16,32", *half, *alone, "--repeats", "1")),
        Part("textbook-large", 40, own("textbook")),
        Part("sample-medium", 40, sample("sample-medium", MEDIUM, "1,4,16", *half, *alone)),
        Part("sample-small", 25, sample("sample-small", SMALL, "1,16,64", *alone)),
        Part(
            "sample-int8", 60, sample("sample-int8", LARGE, "1,4", *half, "--weights", "int8", *alone, "--repeats", "1")
        ),
        Part("offload", 40, own("offload")),
        Part("train-1.4b", 45, train("starflow-xl", 16)),
        Part("train-3.8b", 60, train("starflow-t2i-3b", 8)),
    ]
    if tiny:  # how long it takes says nothing
        found = [replace(part, limit=options.seconds) for part in found]
    data = options.data
    if data is not None:
        recipe = [*python, "starflow", "train", "recipes/glyphs-64.yaml", "--data.path", str(data)]
        found.append(Part("recipe", options.seconds, [*recipe, "--device", device, "--output", str(out / "run")]))
    return found


def answer(part: Part, folder: Path, ends: float) -> bool:
    """Run a part unless its result is there, within its time and what is left of all; whether it went well."""
    file = folder / f"{part.name}.json"
    if file.is_file() and json.loads(file.read_text())["rc"] == 0:
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
    made = folder / f"{part.name}-bench.json"
    found = {
        "part": part.name,
        "rc": rc,
        "seconds": seconds,
        "command": part.command,
        "date": time.strftime("%Y-%m-%d"),
    }
    found |= {"result": json.loads(made.read_text()) if made.is_file() else last_json(out), "output": out[-TAIL:]}
    found |= {"errors": err[-TAIL:]}
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(found, indent=2))
    temporary.replace(file)
    print(f"{part.name}: rc {rc}, {seconds:.1f} s" + ("" if rc == 0 else f"\n{(err or out)[-600:]}"), flush=True)
    return rc == 0


def _text(given: str | bytes | None) -> str:
    return given.decode(errors="replace") if isinstance(given, bytes) else given or ""


def last_json(text: str) -> Any:
    """The JSON object on the last line, or what pytest counted there; None where there is neither."""
    lines = text.strip().splitlines()
    try:
        return json.loads(lines[-1]) if lines else None
    except ValueError:
        counted = re.findall(r"(\d+) (passed|failed|error|skipped|deselected)", lines[-1])
        return {kind: int(count) for count, kind in counted} or None


def graphs(*, rehearse: bool) -> dict[str, Any]:
    """Recorded graphs against the textbook decoder, in both precisions, guided and not: how far samples are apart."""
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
    assert max(apart for name, apart in found.items() if name.startswith("float32")) < 1e-3, found
    return found


def textbook(*, rehearse: bool) -> dict[str, Any]:
    """The textbook decoder on the large shape for one picture, in turn with ours."""
    import torch

    from benchmarks.textbook import decode
    from starflow.bench.sample import load_model
    from starflow.sampling.calibrate import in_turn
    from starflow.sampling.sampler import sample

    device = torch.device("cpu" if rehearse else "cuda")
    task = load_model(SMALL if rehearse else LARGE, device, torch.bfloat16).task(1, 3.0)

    def ours() -> object:
        return sample(task.model, task.noise, task.condition, task.null_condition, 3.0)

    ours()
    seconds = in_turn([ours, lambda: decode(task)], device, 1)
    return {"ours": seconds[0], "textbook": seconds[1], "factor": seconds[1] / seconds[0]}


def offload(*, rehearse: bool) -> dict[str, Any]:
    """One guided picture of the large shape with its blocks on the CPU, and the most memory of the GPU."""
    import torch

    from starflow.bench.sample import load_model
    from starflow.sampling.sampler import sample

    device = torch.device("cpu" if rehearse else "cuda")
    given = load_model(SMALL if rehearse else LARGE, torch.device("cpu"), torch.bfloat16)
    if not rehearse:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(OFFLOAD_BYTES / total)
    given.model.offload(device)
    task = given.task(1, 3.0)
    condition, null = (None if one is None else one.to(device) for one in (task.condition, task.null_condition))
    began = time.perf_counter()
    x = sample(task.model, task.noise.to(device), condition, null, 3.0)
    assert bool(x.isfinite().all())
    peak = None if rehearse else torch.cuda.max_memory_allocated()
    return {"seconds": time.perf_counter() - began, "peak_bytes": peak, "allowed_bytes": OFFLOAD_BYTES}


FUNCTIONS: dict[str, Callable[..., dict[str, Any]]] = {"graphs": graphs, "textbook": textbook, "offload": offload}

if __name__ == "__main__":
    main()
