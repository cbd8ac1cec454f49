"""Measure and draw how the cost of sampling grows with tokens, batch and width.

    python benchmarks/growth.py
    python benchmarks/document.py benchmarks/results/growth.json

The first writes benchmarks/results/growth.json and docs/images/growth.png. Random weights: only costs are measured,
token by token and of one pass over the whole sequence (what an iteration of a parallel solver takes); how many passes
a model needs is not asked here. Beside the measured seconds stand the three things that going token by token cannot do
without, at the ceilings of the same run: one read of the weights a token, one of the keys and values before it, and
the arithmetic. A curve bends where another of the three takes over.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from starflow.bench.limits import MachineLimits, measure_limits, sampling_work
from starflow.flow.config import STARFlowConfig
from starflow.flow.memory import BYTES, cache_bytes
from starflow.flow.model import build
from starflow.io.files import write_bytes, write_json
from starflow.nn.attention import CachePool
from starflow.sampling.calibrate import machine_of, synchronize
from starflow.sampling.cpu.engine import cpu_engine_of
from starflow.sampling.predictor import Predictor, SolverOptions
from starflow.sampling.solvers import Span, fixed_point_step, solve_sequential

ROOT = Path(__file__).parents[1]
LAYERS = 4
SWEEPS = {
    "tokens": (64, 144, 256, 576, 1024, 2304, 4096),
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "width": (128, 256, 512, 1024),
}
BASE = {"tokens": 256, "batch": 4, "width": 256}
NEEDS = {
    "weights": "reading the weights once a token",
    "cache": "reading the cache once a token",
    "arithmetic": "arithmetic",
}


def main() -> None:
    """Measure, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/growth.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/images/growth.png")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the fastest counts")
    options = parser.parse_args()
    device, load = torch.device(options.device), os.getloadavg()
    ceilings = measure_limits(device, torch.float32)
    sweeps = {
        name: [measure({**BASE, name: value}, device, ceilings, options.repeats) for value in values]
        for name, values in SWEEPS.items()
    }
    for name, rows in sweeps.items():
        add_exponents(name, rows)
    result = {
        "machine": machine_of(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "load": [list(load), list(os.getloadavg())],
        "command": f"python benchmarks/growth.py --device {options.device} --repeats {options.repeats}",
        "block": f"one block of {LAYERS} layers, float32, without guidance",
        "bytes_per_second": ceilings.bytes_per_second,
        "flops_per_second": ceilings.flops_per_second,
        "sweeps": sweeps,
    }
    write_json(options.output, result)
    write_bytes(options.plot, draw(result))
    print(json.dumps({key: value for key, value in result.items() if key != "sweeps"}))


def measure(sizes: dict[str, int], device: torch.device, ceilings: MachineLimits, repeats: int) -> dict[str, Any]:
    """Seconds of one block, and of what it cannot do without."""
    side, batch = math.isqrt(sizes["tokens"]), sizes["batch"]
    config = STARFlowConfig(
        in_channels=4, img_size=side, channels=sizes["width"], num_blocks=1, layers_per_block=LAYERS, txt_size=0
    )
    model = build(config).to(device).requires_grad_(False)
    block, noise = next(model.iter_blocks()), torch.randn(batch, side * side, 4, device=device)
    table, engine = model.block_rotary(block, model.rotary((side, side))), cpu_engine_of(model)
    if device.type == "cpu":
        engine.build()
    predictor = Predictor.of(block, batch, side * side, [None], table, None, CachePool(), engine)
    with torch.no_grad():
        one_by_one = fastest(
            lambda: solve_sequential(predictor, noise, SolverOptions(), lambda _: None), device, repeats
        )
        whole = fastest(lambda: fixed_point_step(predictor, noise, noise, Span(0, side * side)), device, repeats)
    work = sampling_work(model, batch, side * side, guided=False)
    cache = cache_bytes(config, batch, side * side, "float32", guided=False) * (side * side + 1) / 2  # the mean is read
    needs = {
        "weights": (work.bytes - cache) / ceilings.bytes_per_second,
        "cache": cache / ceilings.bytes_per_second,
        "arithmetic": work.flops / ceilings.flops_per_second,
    }
    return {
        **sizes,
        "sequential_seconds": one_by_one,
        "pass_seconds": whole,
        "seconds_a_picture": one_by_one / batch,
        "milliseconds_a_token": 1e3 * one_by_one / side**2,
        "needs": needs,
        "most": max(needs, key=lambda name: needs[name]),
        "passes_that_cost_as_much": one_by_one / whole,
        "weight_mebibytes": BYTES["float32"] * sum(one.numel() for one in model.parameters()) / 2**20,
    }


def fastest(action: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds, after one run that does not count."""
    found = []
    for _ in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        action()
        synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found[1:])


def add_exponents(name: str, rows: list[dict[str, Any]]) -> None:
    """Slope of log seconds over log size from the row before: 1 is linear, 2 quadratic, 0 free."""
    for before, row in itertools.pairwise(rows):
        ratio = math.log(row["sequential_seconds"] / before["sequential_seconds"])
        row["exponent"] = round(ratio / math.log(row[name] / before[name]), 2)


def draw(result: dict[str, Any]) -> bytes:
    """Three panels, logarithmic both ways."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, rows) in zip(figure.subplots(1, 3), result["sweeps"].items(), strict=True):
        sizes = [row[name] for row in rows]
        axes.loglog(sizes, [row["sequential_seconds"] for row in rows], "o-", label="token by token")
        axes.loglog(sizes, [row["pass_seconds"] for row in rows], "s-", label="one pass over all tokens")
        for (need, label), style in zip(NEEDS.items(), ("--", ":", "-."), strict=True):
            axes.loglog(sizes, [row["needs"][need] for row in rows], style, label=label)
        fixed = ", ".join(f"{key} {value}" for key, value in BASE.items() if key != name)
        axes.set(xlabel=name, ylabel="seconds a batch", title=f"against {name} ({fixed})")
        axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(visible=True, alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(f"{result['block']}; {result['machine']}")
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=110)
    return target.getvalue()


if __name__ == "__main__":
    main()
