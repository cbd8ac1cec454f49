"""How the cost of sampling grows with tokens, batch and width, measured and drawn.

    python benchmarks/growth.py --output benchmarks/results/growth

writes growth.json and growth.png. Random weights: only costs are measured, token by token and of one pass over the
whole sequence (what an iteration of a parallel solver takes); how many iterations a model needs is not asked here.
Beside the measured seconds stand those that reading weights and cache once a token would take at the bandwidth of a
large read of the same run: where the cache overtakes the weights, and where a machine is slower than both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from starflow.files import write_bytes, write_json
from starflow.flow.model import build
from starflow.memory import BYTES, layer_shape
from starflow.model_config import STARFlowConfig
from starflow.nn.cache import CachePool
from starflow.sampling.jacobi import Span, step
from starflow.sampling.plan import machine_of
from starflow.sampling.predictor import Effort, Predictor
from starflow.sampling.sequential import solve_sequential
from starflow.sampling.timing import wait

LAYERS = 4
TOKENS, BATCHES, WIDTHS = (64, 144, 256, 576, 1024, 2304, 4096), (1, 2, 4, 8, 16, 32, 64), (128, 256, 512, 1024)
BASE = {"tokens": 256, "batch": 4, "width": 256}
LARGE_READ = 256 * 2**20


def main() -> None:
    """Measure, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/growth"), help="path without suffix")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the fastest counts")
    options = parser.parse_args()
    device = torch.device(options.device)
    bandwidth = read_bandwidth(device)
    sweeps = {
        name: [measure({**BASE, name: value}, device, bandwidth, options.repeats) for value in values]
        for name, values in (("tokens", TOKENS), ("batch", BATCHES), ("width", WIDTHS))
    }
    result = {
        "machine": machine_of(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "load": list(os.getloadavg()),
        "command": f"python benchmarks/growth.py --device {options.device} --repeats {options.repeats}",
        "block": f"one block of {LAYERS} layers, float32, without guidance",
        "read_gigabytes_a_second": bandwidth / 1e9,
        "exponents": {name: exponents(name, rows) for name, rows in sweeps.items()},
        "sweeps": sweeps,
    }
    write_json(options.output.with_suffix(".json"), result)
    write_bytes(options.output.with_suffix(".png"), draw(result))
    print(json.dumps({key: value for key, value in result.items() if key != "sweeps"}))


def measure(sizes: dict[str, int], device: torch.device, bandwidth: float, repeats: int) -> dict[str, Any]:
    """Seconds of one block, and what its reads alone would take."""
    side = round(sizes["tokens"] ** 0.5)
    config = STARFlowConfig(
        in_channels=4, img_size=side, channels=sizes["width"], num_blocks=1, layers_per_block=LAYERS, txt_size=0
    )
    model = build(config).to(device).requires_grad_(False)
    block, noise = next(model.stack()), torch.randn(sizes["batch"], side * side, 4, device=device)
    table = model.block_rotary(block, model.rotary((side, side)))
    predictor = Predictor.of(block, sizes["batch"], side * side, [None], table, None, CachePool())
    with torch.no_grad():
        one_by_one = fastest(lambda: solve_sequential(predictor, noise, Effort(), lambda _: None), device, repeats)
        whole = fastest(lambda: step(predictor, noise, noise, Span(0, side * side)), device, repeats)
    shape = layer_shape(config, 0)
    weights = LAYERS * shape.linear * BYTES["float32"]
    cache = LAYERS * 2 * sizes["batch"] * shape.kv * BYTES["float32"] * (side * side + 1) // 2  # the mean over tokens
    return {
        **sizes,
        "sequential_seconds": one_by_one,
        "pass_seconds": whole,
        "microseconds_a_token": 1e6 * one_by_one / side**2,
        "seconds_a_picture": one_by_one / sizes["batch"],
        "weights_read_seconds": side**2 * weights / bandwidth,
        "cache_read_seconds": side**2 * cache / bandwidth,
        "passes_that_cost_as_much": one_by_one / whole,
    }


def fastest(action: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds, after one run that does not count."""
    found = []
    for _ in range(repeats + 1):
        wait(device)
        started = time.perf_counter()
        action()
        wait(device)
        found.append(time.perf_counter() - started)
    return min(found[1:])


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second of summing a large tensor."""
    large = torch.ones(LARGE_READ // 4, device=device)
    return LARGE_READ / fastest(lambda: large.sum(), device, 5)


def exponents(name: str, rows: list[dict[str, Any]]) -> list[float]:
    """Slope of log seconds over log size between neighbours: 1 is linear, 2 quadratic, 0 free."""
    pairs = itertools.pairwise(rows)
    ratio = torch.tensor([(b["sequential_seconds"] / a["sequential_seconds"], b[name] / a[name]) for a, b in pairs])
    return [round(float(slope), 2) for slope in ratio[:, 0].log() / ratio[:, 1].log()]


def draw(result: dict[str, Any]) -> bytes:
    """Three panels, logarithmic both ways."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    lines = (
        ("sequential_seconds", "o-", "token by token"),
        ("pass_seconds", "s-", "one pass over all tokens"),
        ("weights_read_seconds", "--", "reading the weights once a token"),
        ("cache_read_seconds", ":", "reading the cache once a token"),
    )
    for axes, (name, rows) in zip(figure.subplots(1, 3), result["sweeps"].items(), strict=True):
        for key, style, label in lines:
            axes.loglog([row[name] for row in rows], [row[key] for row in rows], style, label=label)
        fixed = ", ".join(f"{key} {value}" for key, value in BASE.items() if key != name)
        axes.set(xlabel=name, ylabel="seconds a batch", title=f"against {name} ({fixed})")
        axes.set_xticks([row[name] for row in rows], [str(row[name]) for row in rows], minor=False)
        axes.grid(visible=True, alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(f"{result['block']}; {result['machine']}")
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=110)
    return target.getvalue()


if __name__ == "__main__":
    main()
