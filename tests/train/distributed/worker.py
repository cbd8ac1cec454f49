"""What each of two processes does for tests/train/test_distributed_sharding.py: `torchrun ... worker FOLDER`."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule

from starflow.errors import UserError
from starflow.flow.model import build
from starflow.train.checkpoint import TrainState
from starflow.train.distributed import World, join_world, local_shard
from starflow.train.recipe import load_recipe
from starflow.train.run import Run
from starflow.train.settings import network_precision
from starflow.train.stages import Stages
from starflow.train.tasks.flow import FlowLoss
from tests.train.distributed.scenario import CONFIG, Stopped, settings, train

LATE = """
name: late
data: {source: shapes, shapes: 60, views: {size: 8}}
autoencoder: {model: {widths: [8], channels: 2, encoder_pairs: 0, decoder_pairs: 0}, train: {steps: 1, batch: 4}}
conditioning: {kind: class}
train: {steps: 1}
"""


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with join_world(torch.device("cpu"), timeout=30) as world:
        late(folder / "late", world)
        train(folder / "replicated", settings(), world)
        train(folder / "sharded", settings(layout="sharded"), world)
        thrifty = settings(layout="sharded", accumulate=2, checkpoint_attention=True, checkpoint_mlp=True)
        train(folder / "thrifty", thrifty, world)
        train(folder / "parts", settings(accumulate=4), world)
        train(folder / "real", settings(layout="sharded"), world, real=True)
        train(folder / "bfloat16", replace(settings(layout="sharded"), precision="bfloat16"), world)
        (folder / f"rounded-{world.rank}.json").write_text(json.dumps(rounded(world)))
        (folder / f"reduced-{world.rank}.json").write_text(json.dumps(reduced(world)))
        (folder / f"bytes-{world.rank}.json").write_text(json.dumps(state_bytes(world)))
        for layout in ("replicated", "sharded"):
            stopped(folder / f"{layout}-resumed", layout, world)
            train(folder / f"{layout}-resumed", settings(layout=layout), world)
        train(folder / "one-to-two", settings(layout="sharded"), world)
        stopped(folder / "two-to-one", "sharded", world)
        stopped(folder / "across", "replicated", world)
        train(folder / "across", settings(layout="sharded"), world)
        try:
            train(folder / "nan", settings(layout="sharded"), world, nan_at=5)
        except UserError as error:
            (folder / f"nan-{world.rank}.txt").write_text(str(error))


def late(folder: Path, world: World) -> None:
    """Every stage of a run, where the second process always comes when the first has done its part of it."""
    folder.mkdir(exist_ok=True)
    (folder / "late.yaml").write_text(LATE)
    run = Run(load_recipe(folder / "late.yaml"), folder, world.device, progress=False, world=world)
    stages = Stages(run)
    results: list[Callable[[], object]] = [
        lambda: stages.dataset,
        lambda: stages.autoencoder,
        lambda: stages.conditioner,
        stages.cache_latents,
    ]
    for result in results:
        time.sleep(2 * world.rank)
        result()
        seen = world.all_reduce(torch.tensor([1.0]))
        (folder / f"seen-{world.rank}.json").write_text(json.dumps(seen))


def rounded(world: World) -> list[tuple[str, float]]:
    """Precision of what each block of a bfloat16 model gives, and the share of its z that bfloat16 can hold."""
    with torch.device("meta"):
        flow = build(CONFIG)
    told = replace(settings(layout="sharded"), precision="bfloat16")
    state = TrainState(FlowLoss(flow, 0.0), told, world)
    found: list[tuple[str, float]] = []

    def look(block: torch.nn.Module, inputs: object, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        z, log_sigma = outputs
        found.append((f"{z.dtype} {log_sigma.dtype}", float((z == z.bfloat16().float()).float().mean())))

    for block in flow.blocks:
        block.register_forward_hook(look)
    with network_precision(told, world.device):
        state.model(torch.randn(4, 2, 4, 4), torch.randn(4, 1, 4))
    return found


def reduced(world: World) -> dict[str, object]:
    """How a bfloat16 model is split, and the share of its gradients' entries that bfloat16 can hold.

    Each process's gradients are of bfloat16 weights; their mean keeps those digits only if it was taken in bfloat16.
    """
    with torch.device("meta"):
        flow = build(CONFIG)
    told = replace(settings(layout="sharded"), precision="bfloat16")
    state = TrainState(FlowLoss(flow, 0.0), told, world)
    with torch.no_grad():
        for block in flow.iter_blocks():  # a new model is the identity, which has few gradients
            local_shard(block.proj_out.weight).normal_(std=0.1)
    draw = torch.Generator().manual_seed(world.rank)
    with network_precision(told, world.device):
        loss = state.model(torch.randn(4, 2, 4, 4, generator=draw), torch.randn(4, 1, 4, generator=draw))[0]
    loss.backward()
    gradients = [local_shard(weight.grad).flatten() for weight in state.model.parameters() if weight.grad is not None]
    entries = torch.cat(gradients)
    entries = entries[entries != 0]
    units = [module for module in state.model.modules() if isinstance(module, FSDPModule)]
    return {
        "units": sorted(type(unit).__name__.removeprefix("FSDP") for unit in units),
        "dtypes": sorted({str(gradient.dtype) for gradient in gradients}),
        "rounded": float((entries == entries.bfloat16().float()).float().mean()),
        "entries": len(entries),
    }


def state_bytes(world: World) -> dict[str, int]:
    """What this process holds of a sharded model after an update, without activations."""
    with torch.device("meta"):
        flow = build(CONFIG)
    state = TrainState(FlowLoss(flow, 0.0), settings(layout="sharded"), world)
    state.model(torch.randn(4, 2, 4, 4), torch.randn(4, 1, 4))[0].backward()
    state.update(1.0, 0)
    weights = list(state.model.parameters())
    moments = [state.optimiser.state[weight][name] for weight in weights for name in ("exp_avg", "exp_avg_sq")]
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    average = list(state.average.state.values())
    held: dict[str, list[torch.Tensor]] = {"parameters": [*weights], "gradients": gradients, "moments": moments}
    held["average"] = average
    return {name: sum(local_shard(one).nbytes for one in tensors) for name, tensors in held.items()}


def stopped(folder: Path, layout: str, world: World) -> None:
    """A run that ends after update 5 with its last checkpoint after update 3."""
    with contextlib.suppress(Stopped):
        train(folder, settings(layout=layout), world, stop_at=5)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
