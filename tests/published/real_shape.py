"""The released model at its real size with random weights: made, converted, loaded, run forward and sampled, in stages.

    python -m tests.published.real_shape STAGE FOLDER        a line of JSON: seconds, and the most memory at any time

Stages, in their order: generate (a float32 checkpoint in the published layout, 15.4 GB), convert, forward, sample. Each
is a process of its own, so that its memory is its own. Anonymous memory is what the process holds beside mapped files,
which the system may drop at any time.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from starflow.flow.config import preset

NAME = "starflow-t2i-3b"
STEPS = 16
GUIDANCE = 2.5
POOL = 2**25
FILE, MODEL = "starflow_3B_t2i_256x256.pth", "model"


class EnoughTokens(Exception):
    """Raised to end a draw after the first tokens."""


class MemoryWatch(threading.Thread):
    """Reads this process's memory ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous = self.resident = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.1):
            self.look()

    def look(self) -> None:
        lines = Path("/proc/self/status").read_text().splitlines()
        values = {
            line.split()[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "VmRSS"))
        }
        self.anonymous = max(self.anonymous, values["RssAnon:"])
        self.resident = max(self.resident, values["VmRSS:"])


def generate(folder: Path) -> dict[str, Any]:
    """Write the checkpoint in place, tensor by tensor, so that no more than one page of it need be in memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from starflow.flow.model import build

    with FakeTensorMode():
        state = build(preset(NAME).config).state_dict()
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(state, folder / FILE)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        tensors = torch.load(folder / FILE, mmap=True, weights_only=True)
    draw = torch.Generator().manual_seed(0)
    pool = torch.randn(POOL, generator=draw).mul_(0.02)
    for name, tensor in tensors.items():
        _fill(tensor.view(-1), pool, int(torch.randint(POOL // 2, (), generator=draw)))
        if "norm.weight" in name and "final_norm" not in name:
            tensor.add_(1.0)
    return {"bytes": (folder / FILE).stat().st_size}


def _fill(flat: torch.Tensor, pool: torch.Tensor, start: int) -> None:
    """Fill a tensor from a pool of random numbers: to draw every tensor anew would take minutes."""
    for part in flat.split(POOL // 2):
        part.copy_(pool[start : start + len(part)])
        start = (start + 1) % (POOL // 2)


def convert(folder: Path) -> dict[str, Any]:
    """Convert the checkpoint to bfloat16 shards."""
    from starflow.pipeline.from_published import convert as convert_published
    from starflow.published.convert import RELEASES

    done = convert_published(folder / FILE, RELEASES["apple/starflow"].options, folder / MODEL)
    shards = [path.stat().st_size for path in (folder / MODEL / "flow").glob("*.safetensors")]
    return {"bytes": done.bytes, "parameters": done.parameters, "largest_shard": max(shards), "shards": len(shards)}


def forward(folder: Path) -> dict[str, Any]:
    """Map one latent with its condition, data to noise."""
    model, latent, condition, _ = _subject(folder)
    started = time.perf_counter()
    with torch.no_grad():
        z, logdet = model(latent, condition)
    assert z.isfinite().all()
    assert logdet.isfinite().all()
    return {"forward_seconds": time.perf_counter() - started, "nats": float(logdet), "z_std": float(z.std())}


def sample(folder: Path) -> dict[str, Any]:
    """Draw the first tokens of an image of 256 px, then all tokens of one of 32 px: every block, with guidance."""
    from starflow.sampling.sampler import sample as draw

    model, noise, condition, null = _subject(folder)
    times: list[float] = []

    def progress(done: int, _total: int) -> None:
        times.append(time.perf_counter())
        if done >= STEPS:
            raise EnoughTokens

    started = time.perf_counter()
    with contextlib.suppress(EnoughTokens):
        draw(model, noise, condition, null, GUIDANCE, progress=progress)
    first, deep = times[1] - started, (times[-1] - times[1]) / (len(times) - 2)
    small = noise[:, :, :4, :4].contiguous()
    assert small[0, 0].numel() == STEPS
    seen: list[tuple[int, float]] = []
    x = draw(model, small, condition, null, GUIDANCE, progress=lambda done, _: seen.append((done, time.perf_counter())))
    assert x.isfinite().all()
    shallow = sum(_seconds_a_token(seen, block) for block in range(1, 6)) / 5
    return {
        "first_token_seconds": first,
        "deep_token_seconds": deep,
        "shallow_token_seconds": shallow,
        "picture_hours": 1024 * (deep + 5 * shallow) / 3600,
    }


def _seconds_a_token(seen: list[tuple[int, float]], block: int) -> float:
    """Seconds per token of a block, between the first and the last time that its progress was told."""
    own = [(done, at) for done, at in seen if block * STEPS < done <= (block + 1) * STEPS]
    (first, began), (last, ended) = own[0], own[-1]
    return (ended - began) / max(1, last - first)


def _subject(folder: Path) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The converted model, a latent, a condition and a null condition."""
    from starflow.flow.model import STARFlow

    model = STARFlow.from_pretrained(folder / MODEL).requires_grad_(False)
    draw = torch.Generator().manual_seed(1)
    latent, condition, null = (torch.randn(shape, generator=draw) for shape in ((1, 4, 32, 32), *((1, 128, 2048),) * 2))
    return model, latent, condition, null


STAGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "generate": generate, "convert": convert, "forward": forward, "sample": sample,
}  # fmt: skip


def main(stage: str, folder: Path) -> None:
    watch = MemoryWatch()
    watch.start()
    started = time.perf_counter()
    facts = STAGES[stage](folder)
    watch.look()
    watch.over.set()
    facts |= {"seconds": time.perf_counter() - started, "anonymous": watch.anonymous, "resident": watch.resident}
    print(json.dumps({"stage": stage, "threads": torch.get_num_threads(), **facts}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
