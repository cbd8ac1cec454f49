"""Runs that are killed again and again, and end as if they had not been.

    python -m tests.train.distributed.kills --kills 20 --inside 5 --folder /tmp/kills

For every layout: one run without a stop, and one that is killed (SIGKILL) `kills` times, the first ones while a
checkpoint is being written, until `inside` of them left one half written, the others at a random moment; every other
kill takes one process alone, as if it had run out of memory, and every other one all of them, as if the machine had
gone down. After each kill the newest complete checkpoint must be no older than before, and no more than one interval
older than the last logged update. In the end the two logs must hold the same losses, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.train.distributed.launch import ROOT

RECIPE = """
name: kills
data: {source: shapes, shapes: 60, views: {size: 8}}
autoencoder: {kind: pixels}
conditioning: {kind: class}
flow: {channels: 64, layers_per_block: [1, 2], patch_size: 4, head_dim: 16}
objective: {noise_std: 0.1}
train: {batch: 4, warmup: 5, evaluate_every: 100000, sample_every: 100000, checkpoint_every: 10}
prompts: [circle, star]
"""
INTERVAL = 10
LAYOUTS = {"alone": 1, "replicated": 2, "sharded": 2, "hybrid": 4}


def command(layout: str, recipe: Path, run: Path, steps: int) -> list[str]:
    """A training run of that layout."""
    words = ["train", str(recipe), "--output", str(run), "--train.steps", str(steps), "--device", "cpu"]
    if LAYOUTS[layout] == 1:
        return [sys.executable, "-m", "starflow", *words]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={LAYOUTS[layout]}"]
    parallel = ["--train.parallel.layout", layout, "--train.parallel.shard_size", "2"]
    return [*launcher, "-m", "starflow", *words, *parallel]


def launch(words: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )


def workers(parent: int) -> list[int]:
    """The processes that torchrun started, lowest rank first."""
    text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return [int(pid) for pid in text.split()]


def logged(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of the updates whose line is whole."""
    path = run / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(line["step"], line["loss"]) for line in found if "loss" in line]


def newest(run: Path) -> int:
    """Step of the newest complete checkpoint."""
    return max((int(path.parent.name[5:]) for path in run.glob("checkpoints/step_*/index.json")), default=0)


@contextlib.contextmanager
def started(layout: str, recipe: Path, run: Path, steps: int) -> Iterator[subprocess.Popen[str]]:
    process = launch(command(layout, recipe, run, steps))
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def kill(process: subprocess.Popen[str], everything: bool) -> None:
    """All at once, or the last process alone; then wait until none is left."""
    children = workers(process.pid)
    victims = [process.pid, *children] if everything or not children else children[-1:]
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        time.sleep(0.01)


def wait_until_worth_killing(process: subprocess.Popen[str], run: Path, draw: random.Random, inside: bool) -> None:
    """Until a checkpoint is being written, or until some random work has been done."""
    before = newest(run)
    target = before + draw.randint(1, 3 * INTERVAL)
    size = draw.random() * 60_000
    while process.poll() is None:
        if inside:
            # Some of the files are there, or the index is next: a different moment each time.
            for folder in run.glob("checkpoints/.step_*.tmp"):
                with contextlib.suppress(OSError):
                    if sum(path.stat().st_size for path in folder.iterdir()) >= size:
                        return
        elif (steps := logged(run)) and steps[-1][0] >= target:
            time.sleep(draw.random() * 0.05)
            return
        time.sleep(0 if inside else 0.002)
    raise AssertionError(f"ended before it was killed: {process.communicate()[0]}")


def torture(layout: str, folder: Path, kills: int, inside: int, seed: int = 0) -> dict[str, int]:
    """The two runs of a layout; returns what was killed and how."""
    recipe = folder / "kills.yaml"
    recipe.write_text(RECIPE)
    steps = (kills + 2) * 4 * INTERVAL  # a kill comes within about three intervals
    whole, run = folder / f"{layout}-whole", folder / f"{layout}-killed"
    with started(layout, recipe, whole, steps) as process:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
    draw, count = random.Random(seed), {"kills": 0, "inside": 0, "lost": 0}
    for number in range(kills):
        before = newest(run)
        with started(layout, recipe, run, steps) as process:
            wait_until_worth_killing(process, run, draw, count["inside"] < inside)
            kill(process, everything=number % 2 == 0)
        half = bool(list(run.glob("checkpoints/.step_*.tmp")))
        after, reached = newest(run), logged(run)[-1][0] if logged(run) else 0
        assert after >= before, f"lost checkpoint {before}"
        assert reached - after <= INTERVAL, f"logged {reached}, kept {after}"
        count = {"kills": count["kills"] + 1, "inside": count["inside"] + half, "lost": count["lost"] + reached - after}
    with started(layout, recipe, run, steps) as process:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
    assert logged(run) == logged(whole)
    assert len(logged(run)) == steps
    weights = "model/flow/model.safetensors"
    assert (run / weights).read_bytes() == (whole / weights).read_bytes()
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--inside", type=int, default=5)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS))
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for layout in options.layouts:
        began = time.monotonic()
        count = torture(layout, options.folder, options.kills, options.inside)
        print(json.dumps({"layout": layout, **count, "seconds": round(time.monotonic() - began)}), flush=True)


if __name__ == "__main__":
    main()
