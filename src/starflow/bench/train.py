"""Benchmark of training: whole updates of a flow, beside a large matrix product of the same machine.

An update is what `starflow train` does, without waiting for pictures: forward, backward, gradient norm, clipping, AdamW
and the averaged weights. A product is timed before and after every update, and the update's share is of the mean of the
two: other work on the machine then slows both.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from starflow.errors import UserError
from starflow.flow.config import PRESETS, ModelConfig, STARFlowConfig, preset
from starflow.flow.model import STARFlow, TarFlow, build
from starflow.train.checkpoint import TrainState
from starflow.train.distributed import World
from starflow.train.run import MatrixProduct, peak_memory, synchronise, training_flops
from starflow.train.settings import TrainSettings, network_dtype, network_precision
from starflow.train.tasks.flow import FlowLoss

MODEL_57M = STARFlowConfig(
    in_channels=4,
    img_size=16,
    channels=512,
    num_blocks=6,
    layers_per_block=(2, 2, 2, 2, 2, 8),
    txt_size=32,
    txt_dim=384,
)
"""A model of 57 M parameters: width 512, 256 tokens, 32 condition tokens of width 384."""
PRODUCT_SIDE = 2048
"""Side of the matrices on a CPU: large enough for the best rate, small enough to run beside every update."""


@dataclass(frozen=True)
class TrainSpeed:
    """What `measure` found; times are seconds of one update, rates are of all processes together."""

    parameters: int
    device: str
    precision: str
    processes: int
    threads: int
    batch: int
    updates: int
    flops_per_picture: float
    """Counted, forward and backward; see `starflow.train.run`."""
    first_update: float
    """With compilation, where there is any."""
    update: float
    """Median; so are the next three, which it consists of."""
    forward: float
    backward: float
    optimiser: float
    pictures_per_second: float
    flops_per_second: float
    """Of one process."""
    product_flops_per_second: float
    """Of one process: median of the products beside the updates."""
    share: float
    """Median over the updates of their operations a second to their products'."""
    best_share: float
    memory_gib: float
    """The most that one process held."""


def architecture(name: str) -> ModelConfig:
    """The configuration of "57m" or of a preset.

    Raises:
        UserError: no such name.

    >>> architecture("57m").channels
    512
    """
    if name == "57m":
        return MODEL_57M
    if name not in PRESETS:
        raise UserError(f"no architecture '{name}': expected 57m or one of {', '.join(PRESETS)}")
    return preset(name).config


def measure(config: ModelConfig, settings: TrainSettings, world: World) -> TrainSpeed:
    """Time `settings.steps` updates on random data, after one that is not counted; collective.

    Raises:
        UserError: the batch or the layout does not fit these processes.
    """
    (rows,) = settings.rows(world.rank, world.size) if settings.parallel.accumulate == 1 else (None,)
    if rows is None:
        raise UserError("a speed is measured without accumulated parts: set --batch to what a part has")
    with torch.device("meta"):
        flow = build(config)
    parameters = sum(parameter.numel() for parameter in flow.parameters())
    flops = training_flops(flow)
    state = TrainState(FlowLoss(flow, latent_penalty=1e-4), settings, world)
    batch = _random_batch(flow, len(rows), world.device)
    precision = network_dtype(settings, world.device)
    product = MatrixProduct(world.device, precision, PRODUCT_SIDE if world.device.type == "cpu" else 0)
    first = sum(_update(state, batch, 0))
    product.rate()
    times, products = [], [product.rate()]
    for step in range(1, settings.steps + 1):
        times.append(_update(state, batch, step))
        products.append(product.rate())
    work = flops * len(rows)
    shares = [work / sum(t) / ((products[i] + products[i + 1]) / 2) for i, t in enumerate(times)]
    update = statistics.median(sum(t) for t in times)
    forward, backward, optimiser = (statistics.median(t[part] for t in times) for part in range(3))
    return TrainSpeed(
        parameters=parameters,
        device=_name(world.device),
        precision=str(precision).removeprefix("torch."),
        processes=world.size,
        threads=torch.get_num_threads(),
        batch=settings.batch,
        updates=settings.steps,
        flops_per_picture=flops,
        first_update=first,
        update=update,
        forward=forward,
        backward=backward,
        optimiser=optimiser,
        pictures_per_second=settings.batch / update,
        flops_per_second=work / update,
        product_flops_per_second=statistics.median(products),
        share=statistics.median(shares),
        best_share=max(shares),
        memory_gib=peak_memory(world.device) / 2**30,
    )


def _update(state: TrainState, batch: tuple[Tensor, Tensor | None], step: int) -> tuple[float, float, float]:
    """Seconds of forward, backward, and all the rest of an update."""
    device = state.world.device
    synchronise(device)
    started = time.perf_counter()
    state.begin_micro_batch(last=True)
    with network_precision(state.settings, device):
        loss = state.model(*batch)[0]
    synchronise(device)
    forward = time.perf_counter()
    loss.backward()
    synchronise(device)
    backward = time.perf_counter()
    state.update(float(state.gradient_norm()), step)
    state.zero_grad()
    synchronise(device)
    return forward - started, backward - forward, time.perf_counter() - backward


def _random_batch(flow: STARFlow | TarFlow, count: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    config = flow.config
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(count, config.in_channels, config.img_size, config.img_size, generator=draw).to(device)
    if isinstance(config, STARFlowConfig):
        if not config.txt_size:
            return x, None
        return x, torch.randn(count, config.txt_size, config.txt_dim, generator=draw).to(device)
    if not config.num_classes:
        return x, None
    return x, torch.randint(config.num_classes, (count,), generator=draw).to(device)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
