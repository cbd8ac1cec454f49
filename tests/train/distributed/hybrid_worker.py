"""What each of four processes does for tests/train/test_distributed_hybrid.py: `torchrun ... hybrid_worker FOLDER`."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path

import torch

from starflow.train.distributed import join_world
from tests.train.distributed.scenario import Stopped, settings, train


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with join_world(torch.device("cpu"), timeout=120) as world:
        hybrid = settings(layout="hybrid", shard_size=2)
        train(folder / "hybrid", hybrid, world)
        train(folder / "hybrid-parts", replace(hybrid, parallel=replace(hybrid.parallel, accumulate=2)), world)
        train(folder / "replicated", settings(), world)
        with contextlib.suppress(Stopped):
            train(folder / "hybrid-resumed", hybrid, world, stop_at=5)
        train(folder / "hybrid-resumed", hybrid, world)
        compiled = settings(layout="sharded", checkpoint_attention=True, checkpoint_mlp=True)
        train(folder / "compiled", replace(compiled, compile=True), world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
