"""`starflow bench train`: pictures a second, and the share of the machine's own matrix product."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from starflow.cli.options import Argument, Flag
from starflow.cli.values import Device, Precision, pick_device

if TYPE_CHECKING:
    from starflow.bench.train import TrainSpeed
    from starflow.train.settings import TrainSettings


@dataclass(frozen=True)
class BenchTrainOptions:
    """Time whole updates of training, without waiting for pictures, and set them against a large matrix product.

    ARCHITECTURE is 57m (width 512, 256 tokens, 32 condition tokens) or a preset such as starflow-xl or
    starflow-t2i-3b. Operations are those that the model needs: 2 per weight and token, attention over the tokens that
    are seen, three times for forward and backward; what is computed again counts nothing. Under torchrun all processes
    measure together.
    """

    EXAMPLES: ClassVar[str] = """
        starflow bench train
        starflow bench train starflow-xl --batch 16 --compile --recompute --json
        torchrun --nproc-per-node 8 -m starflow bench train starflow-t2i-3b --batch 64 --layout sharded --compile
    """

    architecture: Annotated[str, Argument("57m, or the name of a preset", "ARCHITECTURE")] = "57m"
    batch: Annotated[int, Flag("pictures an update, over all processes", "N")] = 4
    updates: Annotated[int, Flag("timed updates, after one that is not", "N")] = 10
    precision: Annotated[Precision | Literal["auto"], Flag("of the network; auto is bfloat16 where a GPU has it")] = (
        "auto"
    )
    compile: Annotated[bool, Flag("compile every Transformer layer")] = False
    recompute: Annotated[bool, Flag("keep no activations of attention and MLPs")] = False
    layout: Annotated[Literal["replicated", "sharded", "hybrid"], Flag("of the weights, under torchrun")] = "replicated"
    threads: Annotated[int, Flag("of a CPU; 0 leaves torch its choice", "N")] = 0
    device: Annotated[Device, Flag("where to compute")] = "auto"
    json: Annotated[bool, Flag("print JSON alone")] = False


def bench_train(options: BenchTrainOptions) -> None:
    """Run the command."""
    import torch

    from starflow.bench.train import architecture, measure
    from starflow.train.distributed.world import join

    config, settings = architecture(options.architecture), _settings(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    with join(pick_device(options.device), settings.parallel.timeout) as world:
        speed = measure(config, settings, world)
        if world.main:
            print(json.dumps(dataclasses.asdict(speed)) if options.json else table(speed))


def _settings(options: BenchTrainOptions) -> TrainSettings:
    from starflow.train.settings import ParallelSettings, TrainSettings

    parallel = ParallelSettings(
        layout=options.layout, checkpoint_attention=options.recompute, checkpoint_mlp=options.recompute
    )
    return TrainSettings(
        steps=options.updates,
        batch=options.batch,
        precision=options.precision,
        compile=options.compile,
        parallel=parallel,
    )


def table(speed: TrainSpeed) -> str:
    """The figures, one a line; the last line is the one to quote."""
    where = f"{speed.device}, {speed.precision}, {speed.processes} processes"
    threads = f" of {speed.threads} threads" if speed.device == "cpu" else ""
    parts = f"forward {speed.forward:.4f}, backward {speed.backward:.4f}, optimiser {speed.optimiser:.4f}"
    rows = [
        ("model", f"{speed.parameters / 1e6:.1f} M parameters, batch {speed.batch}"),
        ("machine", where + threads),
        ("first update", f"{speed.first_update:.2f} s"),
        ("update", f"{speed.update:.4f} s, median of {speed.updates} ({parts})"),
        ("memory", f"{speed.memory_gib:.2f} GiB at most in one process"),
        ("counted", f"{speed.flops_per_picture / 1e9:.1f} GFLOP a picture, forward and backward"),
        ("pictures", f"{speed.pictures_per_second:.3f} a second"),
        ("training", f"{speed.flops_per_second / 1e12:.4f} TFLOP/s a process"),
        ("matrix product", f"{speed.product_flops_per_second / 1e12:.4f} TFLOP/s"),
        ("share", f"{speed.share:.1%} of the matrix product (best update {speed.best_share:.1%})"),
    ]
    return "\n".join(f"{name:15} {value}" for name, value in rows)
