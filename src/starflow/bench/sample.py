"""Benchmark of sampling: our speed, the machine's limits, and other ways to draw a picture, all in one run.

What is timed is the flow: from noise and an encoded condition to latents, without text encoder and autoencoder. The
limit is the larger of two times, at the rates of the same run: that of reading weights and cache once a token, and that
of the arithmetic. A time is the fastest of a few runs. Those that are compared take turns, so that other work on the
machine slows all of them. Going token by token costs the same whatever the weights; how fast iterating is depends on
them, so that solver "auto" is timed for trained models only.

`calibrate_pipeline` measures, once, how each block of a pipeline is best solved on a device, and keeps the choice.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starflow.bench.limits import (
    Baseline,
    DrawTask,
    Footprint,
    MachineLimits,
    SamplingWork,
    load_baselines,
    measure_footprint,
    measure_limits,
    sampling_work,
)
from starflow.bench.train import architecture
from starflow.flow.config import PRESETS
from starflow.flow.model import Flow, STARFlow, TarFlow, build
from starflow.flow.quantize import set_weight_format, weight_format
from starflow.io import files
from starflow.latents import Autoencoder
from starflow.nn.attention import CachePool
from starflow.nn.quantize import WeightFormat
from starflow.pipeline.config import latent_shape
from starflow.pipeline.inputs import encode_prompts, example_prompts
from starflow.pipeline.locate import find_pipeline
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.sampling.calibrate import CalibrationData, calibrate, in_turn, machine_of, seconds_of
from starflow.sampling.cpu.engine import covers_block, cpu_engine_of
from starflow.sampling.policy import Policy, SampleSettings, SolverName, keep_policy
from starflow.sampling.sampler import SamplingResult, noise_from_seeds, run
from starflow.sampling.solvers import relative_change

PICTURES = 8
"""Pictures that are drawn to measure with, where no prompts are given."""


def calibrate_pipeline(
    pipeline: StarFlowPipeline,
    prompts: Sequence[str] | None = None,
    *,
    guidance: float | None = None,
    batches: Sequence[int] = (1, 4, 16),
    tolerance: float = 1e-3,
    repeats: int = 3,
    note: Callable[[str], None] = lambda _: None,
) -> Policy:
    """Choose by measuring how each block is solved here; `solver="auto"` and `save_pretrained` use it then.

    Args:
        pipeline: whose blocks are measured; its flow keeps the policy.
        prompts: of the kind that will be drawn; None is some of our own, or the model's classes.
        guidance: weight to measure with; by default the model's own.
        batches: sizes to time; each block gets one choice for all of them.
        tolerance: bound on the residual of every block and picture.
        repeats: timed runs, of which the fastest counts.
        note: told what is being measured.

    Raises:
        UserError: a prompt that the model cannot take.
    """
    data = calibration_data(pipeline, prompts, guidance=guidance, tolerance=tolerance)
    policy = calibrate(pipeline.flow, data, batches, repeats, note)
    keep_policy(pipeline.flow, policy)
    return policy


def calibration_data(
    pipeline: StarFlowPipeline,
    prompts: Sequence[str] | None = None,
    *,
    guidance: float | None = None,
    tolerance: float = 1e-3,
) -> CalibrationData:
    """Noise and encoded conditions to measure with, a picture a prompt; as for `calibrate_pipeline`."""
    config, flow = pipeline.config, pipeline.flow
    drawn = list(prompts or example_prompts(pipeline.conditioner, PICTURES))
    shape = latent_shape(config, flow.config)
    condition, null = encode_prompts(drawn, pipeline.conditioner, flow, config, shape)
    noise = config.temperature * noise_from_seeds(range(len(drawn)), shape).to(flow.device)
    weight = config.guidance if guidance is None else guidance
    return CalibrationData(noise, condition, null, SampleSettings(weight, tolerance=tolerance))


RANDOM_MODEL = "57m"
"""The model that is sampled by default: 57 M random parameters."""

Note = Callable[[str], None]


@dataclass(frozen=True)
class BenchmarkedModel:
    """The model that is timed, and the conditions that it is given."""

    name: str
    model: Flow
    trained: bool
    condition: Tensor | None
    """Of some pictures; larger batches repeat them."""
    null_condition: Tensor | None
    autoencoder: Autoencoder | None = None
    own_shape: tuple[int, int, int] | None = None
    """(C, h, w) of a latent at the model's default size; None is a square of the flow's own side."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a latent."""
        config = self.model.config
        return self.own_shape or (config.in_channels, config.img_size, config.img_size)

    @property
    def tokens(self) -> int:
        """Tokens of a picture."""
        _, height, width = self.shape
        return height * width // int(self.model.config.patch_size) ** 2

    def task(self, batch: int, guidance: float) -> DrawTask:
        """A batch of pictures of the seeds 0, 1, .."""
        noise = noise_from_seeds(range(batch), self.shape).to(device := next(self.model.parameters()).device)
        if self.condition is None:
            return DrawTask(self.model, noise, None, None, guidance)
        index = torch.arange(batch, device=device) % len(self.condition)
        null = None if self.null_condition is None else self.null_condition[index]
        return DrawTask(self.model, noise, self.condition[index], null, guidance)

    @property
    def can_guide(self) -> bool:
        """Whether there is a condition to guide with."""
        return self.condition is not None


@dataclass(frozen=True)
class SamplingBenchmark:
    """What to measure: batches, guidance, baselines, and how often."""

    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    guidance: float = 3.0
    compare_at: int = 4
    """The batch size at which the baselines are timed."""
    repeats: int = 3
    """Runs of which the fastest counts."""
    baselines: Path | None = None
    """Folder; see `starflow.bench.limits`."""


@dataclass(frozen=True)
class Speed:
    """The speed of one solver at one batch size."""

    solver: SolverName
    batch: int
    guidance: float
    seconds: float
    """Of the whole batch."""
    seconds_per_picture: float
    pictures_per_second: float
    tokens_per_second: float
    bytes_per_second: float
    """Weights and cache read once a token, over the time that it took."""
    flops_per_second: float
    limit_seconds: float
    limited_by: str
    share_of_limit: float
    deviation: float
    """||x - x_sequential|| / ||x_sequential||, the largest of the batch."""


@dataclass(frozen=True)
class BaselineSpeed:
    """The speed of a baseline at `SamplingBenchmark.compare_at`."""

    name: str
    seconds: float
    """Of the whole batch, scaled up where a part of the way was timed."""
    limits: float
    """Its time over our model's limit."""
    speedup: dict[str, float]
    """Its time over that of each of our solvers, from runs that took turns."""
    note: str


@dataclass(frozen=True)
class OneTimeCosts:
    """Seconds and memory that are spent once a process."""

    first_picture_seconds: float
    """The first picture of the process, with the model in memory, and all that is built and packed for it."""
    build_seconds: float
    """Of the compiled loop: compiling it, or loading it where it was there already. 0 where there is none."""
    compiled: bool
    """Whether it was compiled in this run."""
    pack_seconds: float
    packed_bytes: int


@dataclass(frozen=True)
class SpeedReport:
    """All that one run measured; `starflow bench sample --json` prints it by these names."""

    model: str
    trained: bool
    parameters: int
    tokens: int
    dtype: str
    weights: str
    """Format of the layers' weights."""
    machine: str
    torch: str
    date: str
    load: tuple[tuple[float, ...], tuple[float, ...]]
    """Of the machine, averaged over 1, 5 and 15 minutes, before and after the run."""
    ceilings: MachineLimits
    once: OneTimeCosts
    speeds: tuple[Speed, ...]
    compare_at: int
    guidance: float
    others: tuple[BaselineSpeed, ...]
    memory: Footprint
    """Of the largest batch, with guidance, token by token."""


def load_model(
    name: str, device: torch.device, dtype: torch.dtype, weights: WeightFormat | None = None
) -> BenchmarkedModel:
    """Load a trained model by its folder, bundled name or hub id, or build "57m" or a preset with random weights.

    Raises:
        UserError: no such model.
    """
    if name in (RANDOM_MODEL, *PRESETS):
        model = _random_model(name, device).to(dtype)
        if weights is not None:
            set_weight_format(model, weights, device)
        return _with_random_conditions(name, model.to(device), trained=False)
    folder = find_pipeline(name)
    values: Any = files.read_json(folder / "config.json")
    if isinstance(values, dict) and "autoencoder" in values:
        pipeline = StarFlowPipeline.from_pretrained(folder, device, dtype, weights=weights)
        data, shape = calibration_data(pipeline), latent_shape(pipeline.config, pipeline.flow.config)
        parts = (data.condition, data.null_condition, pipeline.autoencoder)
        return BenchmarkedModel(name, pipeline.flow, True, *parts, shape)
    kind = TarFlow if isinstance(values, dict) and values.get("kind") == "tarflow" else STARFlow
    flow = kind.from_pretrained(folder).requires_grad_(False).to(dtype)
    if weights is not None:
        set_weight_format(flow, weights, device)
    return _with_random_conditions(name, flow.to(device), trained=False)


def _random_model(name: str, device: torch.device) -> STARFlow | TarFlow:
    """Drawn on the device itself: a CPU draws 3.85 B numbers in half a minute."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad(), device:
        torch.manual_seed(0)
        model = build(architecture(name)).requires_grad_(False)
        for block in model.iter_blocks():
            torch.nn.init.normal_(block.proj_out.weight, std=0.02)  # a new model is the identity
    return model


def _with_random_conditions(name: str, model: STARFlow | TarFlow, *, trained: bool) -> BenchmarkedModel:
    """A flow without its conditioner, with random conditions; a trained one does not behave as trained on them."""
    parameter, draw = next(model.parameters()), torch.Generator().manual_seed(0)
    if isinstance(model, TarFlow):
        classes = model.config.num_classes
        labels = torch.randint(classes, (16,), generator=draw).to(parameter.device) if classes else None
        return BenchmarkedModel(name, model, trained, labels, None)
    if not model.config.txt_size:
        return BenchmarkedModel(name, model, trained, None, None)
    condition = torch.randn(16, model.config.txt_size, model.config.txt_dim, generator=draw).to(parameter.device)
    return BenchmarkedModel(name, model, trained, condition, torch.zeros_like(condition))


@torch.no_grad()
def measure(given: BenchmarkedModel, benchmark: SamplingBenchmark, note: Note = lambda _: None) -> SpeedReport:
    """Time everything that the benchmark names.

    Args:
        given: the model and its conditions.
        benchmark: batches, guidance and baselines.
        note: told of every step.

    Raises:
        UserError: a folder without baselines.
    """
    model, parameter = given.model, next(given.model.parameters())
    load = os.getloadavg()
    guidance = benchmark.guidance if given.can_guide else 0.0
    solvers: tuple[SolverName, ...] = ("sequential", "auto") if given.trained else ("sequential",)
    note("the first picture")
    once = _measure_one_time_costs(
        model, seconds_of(lambda: _draw(given.task(1, guidance), solvers[-1]), parameter.device)
    )
    note("ceilings")
    ceilings = measure_limits(parameter.device, parameter.dtype)
    times: list[_Timed] = []
    for weight in dict.fromkeys((guidance, 0.0)):
        for batch in benchmark.batches:
            note(f"batch {batch}, guidance {weight:g}")
            times += _time(given.task(batch, weight), solvers, (), benchmark.repeats)[0]
    task = given.task(benchmark.compare_at, guidance)
    baselines = load_baselines(benchmark.baselines, task) if benchmark.baselines else []
    note(f"batch {benchmark.compare_at} again, in turn with {', '.join(one.name for one in baselines) or 'nothing'}")
    compared, theirs = _time(task, solvers, baselines, benchmark.repeats)
    ceilings = ceilings.better(measure_limits(parameter.device, parameter.dtype))
    note("memory")
    footprint = _footprint(given, max(*benchmark.batches, benchmark.compare_at), guidance)
    return SpeedReport(
        model=given.name,
        trained=given.trained,
        parameters=sum(one.numel() for one in model.parameters()),
        tokens=given.tokens,
        dtype=str(parameter.dtype).removeprefix("torch."),
        weights=weight_format(model),
        machine=machine_of(parameter.device),
        torch=torch.__version__,
        date=time.strftime("%Y-%m-%d"),
        load=(load, os.getloadavg()),
        ceilings=ceilings,
        once=once,
        speeds=tuple(_speed(timed, given, ceilings) for timed in _best(times + compared)),
        compare_at=benchmark.compare_at,
        guidance=guidance,
        others=tuple(
            _other(one, found, compared, given, ceilings) for one, found in zip(baselines, theirs, strict=True)
        ),
        memory=footprint,
    )


def _footprint(given: BenchmarkedModel, batch: int, guidance: float) -> Footprint:
    task = given.task(batch, guidance)
    return measure_footprint(
        given.model,
        given.autoencoder,
        batch,
        lambda caches: _draw(task, "sequential", caches).x,
        guided=guidance > 0,
    )


@dataclass(frozen=True)
class _Timed:
    solver: SolverName
    batch: int
    guidance: float
    seconds: float
    deviation: float


def _time(
    task: DrawTask, solvers: Sequence[SolverName], baselines: Sequence[Baseline], repeats: int
) -> tuple[list[_Timed], list[float]]:
    """Time our solvers and the baselines in turn; a run of each before that does not count."""
    drawn = {solver: _draw(task, solver).x.flatten(2) for solver in solvers}
    for one in baselines:
        one.action()
    pool, batch = CachePool(), len(task.noise)
    actions: list[Callable[[], object]] = [functools.partial(_draw, task, solver, pool) for solver in solvers]
    times = in_turn([*actions, *(one.action for one in baselines)], task.noise.device, repeats)
    ours = [
        _Timed(solver, batch, task.guidance, found, float(relative_change(drawn["sequential"], drawn[solver]).max()))
        for solver, found in zip(solvers, times[: len(solvers)], strict=True)
    ]
    return ours, [one.scale * found for one, found in zip(baselines, times[len(solvers) :], strict=True)]


def _best(times: Sequence[_Timed]) -> list[_Timed]:
    """The fastest of each solver, batch and guidance."""
    found: dict[tuple[str, int, float], _Timed] = {}
    for one in times:
        key = (one.solver, one.batch, one.guidance)
        if key not in found or one.seconds < found[key].seconds:
            found[key] = one
    return list(found.values())


def _speed(timed: _Timed, given: BenchmarkedModel, ceilings: MachineLimits) -> Speed:
    work = sampling_work(given.model, timed.batch, given.tokens, guided=timed.guidance > 0)
    limit, by = _limit(work, ceilings)
    return Speed(
        solver=timed.solver,
        batch=timed.batch,
        guidance=timed.guidance,
        seconds=timed.seconds,
        seconds_per_picture=timed.seconds / timed.batch,
        pictures_per_second=timed.batch / timed.seconds,
        tokens_per_second=timed.batch * given.tokens / timed.seconds,
        bytes_per_second=work.bytes / timed.seconds,
        flops_per_second=work.flops / timed.seconds,
        limit_seconds=limit,
        limited_by=by,
        share_of_limit=limit / timed.seconds,
        deviation=timed.deviation,
    )


def _limit(work: SamplingWork, ceilings: MachineLimits) -> tuple[float, str]:
    reads, arithmetic = ceilings.seconds(work.bytes, work.flops)
    return max((reads, "reads"), (arithmetic, "arithmetic"))


def _other(
    one: Baseline, seconds: float, ours: Sequence[_Timed], given: BenchmarkedModel, ceilings: MachineLimits
) -> BaselineSpeed:
    work = sampling_work(given.model, ours[0].batch, given.tokens, guided=ours[0].guidance > 0)
    speedup = {str(timed.solver): seconds / timed.seconds for timed in ours}
    return BaselineSpeed(one.name, seconds, seconds / _limit(work, ceilings)[0], speedup, one.note)


def _draw(task: DrawTask, solver: SolverName, caches: CachePool | None = None) -> SamplingResult:
    settings = SampleSettings(task.guidance, solver)
    return run(task.model, task.noise, task.condition, task.null_condition, settings, caches=caches)


def _measure_one_time_costs(model: Flow, first: float) -> OneTimeCosts:
    """Build the compiled loop, whether or not it pays for this model, and pack weights anew; each timed apart."""
    engine = cpu_engine_of(model)
    if next(model.parameters()).device.type == "cpu":
        engine.build()
    if engine.library is None:
        return OneTimeCosts(first, 0.0, compiled=False, pack_seconds=0.0, packed_bytes=0)
    fresh = model.runtime_cache["engine"] = engine.without_packed()
    started = time.perf_counter()
    for block in model.iter_blocks():
        if covers_block(block):
            fresh.packed(block)
    return OneTimeCosts(first, engine.build_seconds, engine.compiled, time.perf_counter() - started, fresh.bytes)
