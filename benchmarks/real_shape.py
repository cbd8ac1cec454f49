"""Time the 3.85 B parameter shape with random weights on a CPU, in every format of weights, and its memory.

    python benchmarks/real_shape.py make FOLDER                         # 7.7 GB of random bfloat16 weights
    python benchmarks/real_shape.py time FOLDER --weights int8          # tokens of every block; a picture extrapolated
    python benchmarks/real_shape.py time FOLDER --weights int8 --whole  # and once a whole guided picture of 256 px
    python benchmarks/real_shape.py table                               # the time that a memory bandwidth allows

Each prints a line of JSON. Anonymous memory is what the process holds beside mapped files, which the system may drop;
resident memory counts their pages as well while they are in use. Nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starflow.bench.limits import measure_limits, sampling_work
from starflow.bench.train import architecture
from starflow.flow.block import AutoregressiveBlock
from starflow.flow.config import config_to_dict
from starflow.flow.model import STARFlow, build
from starflow.flow.quantize import set_weight_format
from starflow.io import weights
from starflow.io.files import write_json
from starflow.nn.attention import CachePool
from starflow.nn.quantize import STORED_BYTES
from starflow.sampling.cpu.engine import cpu_engine_of
from starflow.sampling.policy import SampleSettings
from starflow.sampling.predictor import Predictor
from starflow.sampling.sampler import branch_conditions, noise_from_seeds, run

GUIDANCE, SECONDS_A_RUN = 3.0, 1.0

BANDWIDTHS = (10, 20, 40, 60, 100, 200)
"""GB/s of a large read: a laptop with one channel of memory has about 20, with two about 40 to 60, and up to 200."""


class MemoryWatch(threading.Thread):
    """A reader of this process's memory, ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous = self.resident = 0

    def run(self) -> None:
        while True:
            lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
            sizes = {line[0]: int(line[1]) * 1024 for line in lines if line[0] in ("RssAnon:", "VmRSS:")}
            self.anonymous = max(self.anonymous, sizes["RssAnon:"])
            self.resident = max(self.resident, sizes["VmRSS:"])
            time.sleep(0.1)


def make(folder: Path, name: str) -> dict[str, Any]:
    """Write a model of random weights, small enough that nothing overflows."""
    config = architecture(name)
    with torch.device("meta"):
        shapes = {name: held.shape for name, held in build(config).state_dict().items()}
    pool = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    def values(shape: torch.Size) -> Tensor:
        if len(shape) == 1:
            return torch.zeros(shape, dtype=torch.bfloat16)
        count, scale = shape.numel(), 0.02
        return (scale * pool.repeat(-(-count // len(pool)))[:count]).view(shape)

    weights.write(folder, ((name, values(shape)) for name, shape in shapes.items()), 2**30)
    write_json(folder / "config.json", config_to_dict(config))
    return {"folder": str(folder), "parameters": sum(shape.numel() for shape in shapes.values())}


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of tokens near both ends of each kind of block, and what a picture takes."""
    watch = MemoryWatch()
    watch.start()
    began = time.perf_counter()
    model = STARFlow.from_pretrained(folder).requires_grad_(False).eval()
    assert model.network_dtype == torch.bfloat16
    if options.weights != "bfloat16":
        set_weight_format(model, options.weights)
    engine = cpu_engine_of(model)
    engine.build()
    loaded = time.perf_counter()
    blocks = list(model.iter_blocks())
    for block in blocks:
        engine.packed(block)
    packed = time.perf_counter()
    conditions = torch.randn(2, 1, model.config.txt_size, model.config.txt_dim, generator=torch.Generator())
    found: dict[str, Any] = {
        "weights": options.weights,
        "load_seconds": loaded - began,
        "pack_seconds": packed - loaded,
    }
    pool, total = CachePool(), 0.0
    for number in (0, len(blocks) - 1):  # the shallow blocks are alike
        timed = time_block(model, blocks[number], number, conditions, pool)
        found["deep" if number else "shallow"] = timed
        total += timed["block_seconds"] * (1 if number else len(blocks) - 1)
    found["picture_seconds_extrapolated"] = total
    if options.whole:
        noise = noise_from_seeds([0], (model.config.in_channels, model.config.img_size, model.config.img_size))
        began = time.perf_counter()
        x = run(model, noise, conditions[0], conditions[1], SampleSettings(GUIDANCE), caches=pool).x
        found["picture_seconds"] = time.perf_counter() - began
        assert bool(x.isfinite().all())
    found |= {"packed_bytes": engine.bytes, "cache_bytes": pool.bytes}
    found |= {"anonymous_bytes": watch.anonymous, "resident_bytes": watch.resident}
    limits = measure_limits(torch.device("cpu"), torch.float32)
    work = sampling_work(model, 1, model.config.grid_side**2, guided=True)
    return found | {
        "read_bytes_a_picture": work.bytes,
        "limit_seconds": work.bytes / limits.bytes_per_second,
        "bytes_per_second": limits.bytes_per_second,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
    }


@torch.no_grad()
def time_block(
    model: STARFlow, block: AutoregressiveBlock, number: int, conditions: Tensor, pool: CachePool
) -> dict[str, float]:
    """Seconds of the condition's pass and of a token at both ends of a block; between them it is linear."""
    shape = (model.config.in_channels, model.config.img_size, model.config.img_size)
    whole, grid = model.to_tokens(noise_from_seeds([0], shape))
    noise_BNC = whole.contiguous()
    guidance = SampleSettings(GUIDANCE).guidance_for(noise_BNC) if model.guided_blocks[number] else None
    given = branch_conditions(model, conditions[0], conditions[1], 1, guidance)
    table = model.block_rotary(block, model.rotary(grid))
    engine = cpu_engine_of(model)
    predictor = Predictor.of(block, 1, noise_BNC.shape[1], given, table, guidance, pool, engine)
    began = time.perf_counter()
    predictor.prefill()
    prefix, ends = time.perf_counter() - began, []
    x_BNC = noise_BNC.clone()
    for start in (predictor.first, predictor.tokens - 64):
        began, count = time.perf_counter(), 0
        while count < 2 or (time.perf_counter() - began < SECONDS_A_RUN and count < 32):
            engine.solve_tokens(predictor, x_BNC, noise_BNC, range(start + count, start + count + 1))
            count += 1
        ends.append((time.perf_counter() - began) / count)
    tokens = predictor.tokens - predictor.first
    return {
        "prefix_seconds": prefix,
        "first_token_seconds": ends[0],
        "last_token_seconds": ends[1],
        "block_seconds": prefix + tokens * sum(ends) / 2,
    }


def table(name: str) -> dict[str, Any]:
    """Minutes of a guided picture of 256 px, from the bytes that have to be read, at each bandwidth."""
    config = architecture(name)
    with torch.device("meta"):
        model = build(config).to(torch.bfloat16)
    found: dict[str, Any] = {}
    for form in ("bfloat16", "int8", "int4"):
        if form != "bfloat16":
            set_weight_format(model, form)
        read = sampling_work(model, 1, config.grid_side**2, guided=True).bytes
        found[form] = {"bytes": read, **{f"{rate} GB/s": read / rate / 60e9 for rate in BANDWIDTHS}}
        if form == "int8":
            with torch.device("meta"):
                model = build(config).to(torch.bfloat16)
    return found | {"stored_bytes_a_weight": STORED_BYTES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("make", "time", "table"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--shape", default="starflow-t2i-3b", help="the name of a preset, or 57m, to make")
    parser.add_argument("--weights", choices=("bfloat16", "int8", "int4"), default="int8")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--whole", action="store_true", help="draw a whole picture as well")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.stage == "table":
        print(json.dumps(table(options.shape)))
        return
    if options.folder is None:
        sys.exit("name the folder of the model")
    print(
        json.dumps(make(options.folder, options.shape) if options.stage == "make" else measure(options.folder, options))
    )


if __name__ == "__main__":
    main()
