"""Time the 3.85 B parameter shape with random weights on a CPU, in every format of weights, and its memory.

    python benchmarks/real_shape.py make FOLDER                         # 7.7 GB of random bfloat16 weights
    python benchmarks/real_shape.py pack FOLDER --weights int8          # once: what a second start finds in the cache
    python benchmarks/real_shape.py time FOLDER --weights int8          # tokens of every block; a picture extrapolated
    python benchmarks/real_shape.py time FOLDER --weights int8 --whole  # and once a whole guided picture of 256 px
    python benchmarks/real_shape.py table                               # the time that a memory bandwidth allows

Each prints what was found as text, and a line of JSON. Packed files go to STARFLOW_CACHE. Anonymous memory is what the
process holds beside mapped files, which the system may drop; resident memory counts their pages as well while they are
in use. Seconds are of the clock, so that nothing else may run on the machine; processor seconds, of all threads
together, are printed beside them for one that is busy.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starflow.bench.limits import sampling_work
from starflow.bench.train import architecture
from starflow.flow.block import AutoregressiveBlock
from starflow.flow.config import config_to_dict
from starflow.flow.model import STARFlow, build
from starflow.flow.quantize import set_weight_format
from starflow.io import weights
from starflow.io.files import write_json
from starflow.nn.attention import CachePool
from starflow.nn.quantize import STORED_BYTES, WeightFormat
from starflow.sampling.cpu.engine import cpu_engine_of
from starflow.sampling.policy import SampleSettings
from starflow.sampling.predictor import Predictor
from starflow.sampling.sampler import branch_conditions, noise_from_seeds, run

GUIDANCE, SECONDS_A_RUN = 3.0, 1.0

REFERENCE = 20e9
"""Bytes a second of a large read that measured times are scaled to, as if reading were all that they do."""

BANDWIDTHS = (10, 20, 40, 60, 100, 200)
"""GB/s of a large read: a laptop with one channel of memory has about 20, with two about 40 to 60, and up to 200."""


class MemoryWatch(threading.Thread):
    """A reader of this process's memory, ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous = self.resident = 0

    @staticmethod
    def started() -> MemoryWatch:
        """One that reads already."""
        watch = MemoryWatch()
        watch.start()
        return watch

    def peaks(self) -> dict[str, int]:
        """The most so far."""
        return {"anonymous_bytes": self.anonymous, "resident_bytes": self.resident}

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

    def values(number: int, shape: torch.Size) -> Tensor:
        if len(shape) == 1:
            return torch.zeros(shape, dtype=torch.bfloat16)
        count, scale = shape.numel(), 0.02
        own = pool.roll(7919 * number)  # no two blocks are alike, or they would share a packed file
        return (scale * own.repeat(-(-count // len(own)))[:count]).view(shape)

    named = enumerate(shapes.items())
    weights.write(folder, ((name, values(number, shape)) for number, (name, shape) in named), 2**30)
    write_json(folder / "config.json", config_to_dict(config))
    return {"folder": str(folder), "parameters": sum(shape.numel() for shape in shapes.values())}


@dataclass
class Clock:
    """Seconds since it was made: of the clock, and of all processors of this process together."""

    began: float = field(default_factory=time.perf_counter)
    worked: float = field(default_factory=time.process_time)

    def read(self) -> dict[str, float]:
        """Both, by name."""
        return {"seconds": time.perf_counter() - self.began, "processor_seconds": time.process_time() - self.worked}


def read_rate() -> dict[str, float]:
    """Bytes of a large read in a second of the clock, and in one of the processors; the best of a few reads."""
    large, best = torch.ones(2**28), {"seconds": 0.0, "processor_seconds": 0.0}
    for _ in range(8):
        clock = Clock()
        large.sum()
        best = {name: max(best[name], large.nbytes / taken) for name, taken in clock.read().items()}
    return best


def packed_model(folder: Path, form: WeightFormat) -> tuple[STARFlow, dict[str, Any]]:
    """The model with the packed weights of every block, and what loading and packing took."""
    clock = Clock()
    model = STARFlow.from_pretrained(folder).requires_grad_(False).eval()
    assert model.network_dtype == torch.bfloat16
    if form != "bfloat16":
        set_weight_format(model, form)
    engine = cpu_engine_of(model)
    engine.build()
    found, clock = {"loading": clock.read()}, Clock()
    for block in model.iter_blocks():
        engine.packed(block)
    return model, found | {"packing": clock.read(), "packed_bytes": engine.bytes}


def pack(folder: Path, form: WeightFormat) -> dict[str, Any]:
    """Pack all weights, or find them packed; with the memory that it takes."""
    watch = MemoryWatch.started()
    return {"weights": form, **packed_model(folder, form)[1], **watch.peaks()}


def measure(folder: Path, form: WeightFormat, *, whole: bool) -> dict[str, Any]:
    """Seconds of tokens near both ends of each kind of block, and what a picture takes."""
    before = read_rate()
    watch = MemoryWatch.started()
    model, found = packed_model(folder, form)
    blocks, pool = list(model.iter_blocks()), CachePool()
    conditions = torch.randn(2, 1, model.config.txt_size, model.config.txt_dim, generator=torch.Generator())
    total = {"seconds": 0.0, "processor_seconds": 0.0}
    for number in (0, len(blocks) - 1):  # the shallow blocks are alike
        found["deep" if number else "shallow"] = timed = time_block(model, blocks[number], number, conditions, pool)
        alike = 1 if number else len(blocks) - 1
        total = {name: given + alike * timed["block"][name] for name, given in total.items()}
    found["picture_extrapolated"] = total
    if whole:
        noise = noise_from_seeds([0], (model.config.in_channels, model.config.img_size, model.config.img_size))
        clock = Clock()
        x = run(model, noise, conditions[0], conditions[1], SampleSettings(GUIDANCE), caches=pool).x
        found["picture"] = clock.read()
        assert bool(x.isfinite().all())
    found |= {"cache_bytes": pool.bytes, **watch.peaks()}
    after = read_rate()
    return found | {
        "weights": form,
        "read_bytes_a_picture": sampling_work(model, 1, model.config.grid_side**2, guided=True).bytes,
        "read_rate": {name: max(before[name], after[name]) for name in before},
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
    }


def describe(found: dict[str, Any]) -> str:
    """What `measure` found, as a person reads it."""
    rate, taken = found["read_rate"]["seconds"], found.get("picture", found["picture_extrapolated"])
    read = found["read_bytes_a_picture"]
    kind = "drawn whole" if "picture" in found else "extrapolated from tokens"
    lines = [
        f"{found['weights']} weights, {found['threads']} threads, load {found['load'][0]:.1f}, "
        f"a large read reaches {rate / 1e9:.1f} GB/s in this run "
        f"({found['read_rate']['processor_seconds'] / 1e9:.1f} GB a processor second)"
    ]
    for name in ("shallow", "deep"):
        token, prefix = found[name]["token"], found[name]["prefix"]["seconds"]
        lines.append(
            f"  {name} block: condition {prefix:.2f} s, a token {token['seconds']:.4f} s "
            f"({token['processor_seconds']:.4f} processor seconds)"
        )
    return "\n".join(
        [
            *lines,
            f"  a guided picture, {kind}: {taken['seconds']:.1f} s ({taken['processor_seconds']:.1f} processor s)",
            f"  reading {read / 1e12:.2f} TB takes {read / rate:.1f} s at that rate, "
            f"which is {read / rate / taken['seconds']:.0%} of it",
            f"  scaled to a read of {REFERENCE / 1e9:g} GB/s: {taken['seconds'] * rate / REFERENCE:.1f} s",
            f"  memory: at most {found['resident_bytes'] / 1e9:.2f} GB resident, "
            f"{found['anonymous_bytes'] / 1e9:.2f} GB of it beside mapped files; "
            f"packed {found['packed_bytes'] / 1e9:.2f} GB, cache {found['cache_bytes'] / 1e9:.2f} GB",
        ]
    )


@torch.no_grad()
def time_block(
    model: STARFlow, block: AutoregressiveBlock, number: int, conditions: Tensor, pool: CachePool
) -> dict[str, dict[str, float]]:
    """Seconds of the condition's pass and of a token at both ends of a block; between them it is linear."""
    shape = (model.config.in_channels, model.config.img_size, model.config.img_size)
    whole, grid = model.to_tokens(noise_from_seeds([0], shape))
    noise_BNC = whole.contiguous()
    guidance = SampleSettings(GUIDANCE).guidance_for(noise_BNC) if model.guided_blocks[number] else None
    given = branch_conditions(model, conditions[0], conditions[1], 1, guidance)
    table = model.block_rotary(block, model.rotary(grid))
    engine = cpu_engine_of(model)
    predictor = Predictor.of(block, 1, noise_BNC.shape[1], given, table, guidance, pool, engine)
    clock = Clock()
    predictor.prefill()
    prefix, ends = clock.read(), []
    x_BNC = noise_BNC.clone()
    for start in (predictor.first, predictor.tokens - 64):
        clock, count = Clock(), 0
        while count < 4 or (clock.read()["processor_seconds"] < SECONDS_A_RUN and count < 64):
            engine.solve_tokens(predictor, x_BNC, noise_BNC, range(start + count, start + count + 4))
            count += 4
        ends.append({name: value / count for name, value in clock.read().items()})
    first, last = ends
    token = {name: (first[name] + last[name]) / 2 for name in first}
    tokens = predictor.tokens - predictor.first
    block_seconds = {name: prefix[name] + tokens * token[name] for name in token}
    return {"prefix": prefix, "first_token": first, "last_token": last, "token": token, "block": block_seconds}


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
    parser.add_argument("stage", choices=("make", "pack", "time", "table"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--shape", default="starflow-t2i-3b", help="the name of a preset, or 57m, to make")
    parser.add_argument("--weights", choices=("bfloat16", "int8", "int4"), default="int8")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--whole", action="store_true", help="draw a whole picture as well")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.stage == "table":
        found = table(options.shape)
    elif options.folder is None:
        sys.exit("name the folder of the model")
    elif options.stage == "make":
        found = make(options.folder, options.shape)
    elif options.stage == "pack":
        found = pack(options.folder, options.weights)
    else:
        found = measure(options.folder, options.weights, whole=options.whole)
        print(describe(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
