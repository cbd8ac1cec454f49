"""The student experiment compares a flow's student with the flow: seconds, distances of samples, and the same noise.

The model's folder holds a student (`starflow train-student` writes one, RUN/pipeline). All ways of drawing get the same
prompts and seeds. All are timed in turn within one run, so that ratios hold where the seconds do not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.results import Measurements, Result, Table, check_budget, measure_once
from starflow.data.images import from_pil, to_float
from starflow.data.views import TrainingViews
from starflow.errors import UserError
from starflow.evaluate import FeatureExtractor, extract_features, kernel_distance, load_extractor
from starflow.evaluate.dataset import evenly_spaced, open_evaluation_set, select_rows
from starflow.flow.tokens import in_order
from starflow.pipeline.config import default_size
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.sampling.policy import SampleSettings
from starflow.sampling.predictor import Predictor, SolverResult
from starflow.sampling.sampler import noise_from_seeds, sample, solve_blocks
from starflow.sampling.solvers import Span, StoppingRule, iterate
from starflow.train.run import LOG_NAME

NAME = "student"
CLAIM = (
    "A bidirectional network that is aligned with a flow's states draws in one pass what the flow draws token by "
    "token, at no loss in FID (BiFlow, arXiv 2512.10953, ImageNet-256)."
)
BATCH = 16


@dataclass(frozen=True)
class Budget:
    """How much is computed."""

    samples: int = 160
    """Of each way of drawing."""
    references: int = 320
    """Held-out pictures, and as many training ones, at most."""
    repeats: int = 5
    """Times of each way and batch, whose median counts."""


QUICK = Budget(samples=8, references=16, repeats=1)


def ways(pipeline: StarFlowPipeline) -> dict[str, dict[str, Any]]:
    """The ways of drawing by name, as options of a call."""
    assert pipeline.student is not None
    temperature, own = pipeline.student.config.temperature, pipeline.config.temperature
    return {
        f"flow, best of {pipeline.config.candidates}, temperature {own:g}": {},
        f"flow, one draw, temperature {own:g}": {"candidates": 1},
        f"flow, one draw, the student's temperature, {temperature:g}": {"candidates": 1, "temperature": temperature},
        f"student, temperature {temperature:g}": {"sampler": "student"},
        "student, best of 16 under the flow": {"sampler": "student", "candidates": 16},
    }


def run(folder: Path, budget: Budget, log: Callable[[str], None], command: str, model: str, data: Path) -> Result:
    """Measure what is missing, and draw a sheet of all ways.

    Raises:
        UserError: no such model or pictures, or a model without a student.
    """
    check_budget(folder, budget)
    pipeline = StarFlowPipeline.from_pretrained(model)
    if pipeline.student is None:
        raise UserError(f"'{model}' holds no student: train one by `starflow train-student`")
    dataset = open_evaluation_set(str(data), default_size(pipeline.config, pipeline.flow.config))
    heldout, train = (
        select_rows(views, evenly_spaced(len(views), budget.references)) for views in (dataset.heldout, dataset.train)
    )
    extractor = load_extractor()
    references = features_of(extractor, to_float(heldout.images))

    def distance(images: Tensor) -> Measurements:
        return {"kid": 1000 * kernel_distance(features_of(extractor, images), references).value}

    found = {
        "floor: training pictures": measure_once(folder, "floor", lambda: distance(to_float(train.images)), log),
        "reconstructions": measure_once(folder, "coded", lambda: distance(reconstructed(pipeline, heldout)), log),
    }
    for number, (name, options) in enumerate(ways(pipeline).items()):
        samples = partial(draw, pipeline, heldout, budget, options)
        found[name] = dict(measure_once(folder, f"way-{number}", lambda: distance(samples()), log))  # noqa: B023
    times = measure_once(folder, "times", lambda: time_all(pipeline, heldout, budget), log)
    for name, own in times["ways"].items():
        found[name] |= own
    draw_plot(folder, pipeline, heldout, Path(model).expanduser().parent / LOG_NAME)
    title = "A student against its flow"
    passes = [[name, f"{value:.3g}"] for name, value in times["passes"].items()]
    guesses = measure_once(folder, "guesses", lambda: dict(guess_passes(pipeline, heldout.captions[:4], 1.0)), log)
    blocks = [f"block {number}" for number in range(len(pipeline.flow.blocks))]
    by_guess = [["passes from", *blocks], *([name, *map(str, counts)] for name, counts in guesses.items())]
    tables = [table(found), [["measure", "value"], *passes], by_guess]
    values = {"measures": found, "passes": times["passes"], "guesses": guesses}
    return Result(NAME, title, CLAIM, tables, command, values)


def features_of(extractor: FeatureExtractor, images: Tensor) -> Tensor:
    """Features of pictures (N, 3, H, W) in [-1, 1], those that are finite."""
    return extract_features(extractor, images.split(BATCH)).finite_rows().features


def draw(pipeline: StarFlowPipeline, views: TrainingViews, budget: Budget, options: dict[str, Any]) -> Tensor:
    """Samples of the held-out prompts in turn, (N, 3, H, W)."""
    prompts = [views.captions[number % len(views)] for number in range(budget.samples)]
    return torch.cat([from_pil(image) for image in pipeline(prompts, batch_size=BATCH, **options).images])


@torch.no_grad()
def reconstructed(pipeline: StarFlowPipeline, views: TrainingViews) -> Tensor:
    """Held-out pictures through the autoencoder."""
    code = pipeline.autoencoder
    return torch.cat([code.decode(code.encode(to_float(images))) for images in views.images.split(BATCH)])


@torch.no_grad()
def time_all(pipeline: StarFlowPipeline, views: TrainingViews, budget: Budget) -> Measurements:
    """Milliseconds a picture of whole calls, and of the passes to latents alone at batch 4 with guidance."""
    student = pipeline.student
    assert student is not None
    prompts = views.captions
    calls: dict[Any, Callable[[], object]] = {
        (name, batch): partial(pipeline, prompts[:batch], batch_size=64, **options)
        for name, options in ways(pipeline).items()
        for batch in (1, BATCH)
    }
    seconds = medians(calls, budget.repeats)
    of_ways = {
        name: {f"ms_{batch}": 1000 * seconds[name, batch] / batch for batch in (1, BATCH)} for name in ways(pipeline)
    }
    z = noise_from_seeds(range(4), (pipeline.flow.config.in_channels, *[pipeline.flow.config.img_size] * 2))
    condition, null = pipeline._condition(prompts[:4], z.shape)
    weight = torch.full((4,), min(pipeline.config.guidance, student.config.largest_guidance))
    own = float(weight[0])
    passes: dict[Any, Callable[[], object]] = {
        "flow": lambda: sample(pipeline.flow, z, condition, null, own, solver="auto"),
        "student": lambda: student(z, condition, weight),
        "decoder": lambda: pipeline.autoencoder.decode(z),
    }
    each = medians(passes, 2 * budget.repeats)
    exact, drawn = sample(pipeline.flow, z, condition, null, own, solver="auto"), student(z, condition, weight).clean
    one, other = pipeline.autoencoder.decode(exact), pipeline.autoencoder.decode(drawn)
    facts = {f"ms of the {name}, 4 pictures, guided": 1000 * value for name, value in each.items()}
    facts["flow / student"] = each["flow"] / each["student"]
    facts["root mean square between their pictures of the same noise"] = float((one - other).square().mean().sqrt())
    different = (one - one.roll(1, 0)).square().mean().sqrt()
    facts["the same between the flow's pictures of different noise"] = float(different)
    return {"ways": of_ways, "passes": facts}


GUESSES = ("noise", "zero", "student")


@torch.no_grad()
def guess_passes(pipeline: StarFlowPipeline, prompts: list[str], guidance: float) -> dict[str, list[int]]:
    """Passes that Jacobi iteration takes to a residual of 1e-3 in each block, from the data on, by its first guess.

    "student" starts each block at the student's own estimate of that block's input.
    """
    assert pipeline.student is not None
    config = pipeline.flow.config
    z = noise_from_seeds(range(len(prompts)), (config.in_channels, config.img_size, config.img_size))
    condition, null = pipeline._condition(prompts, z.shape)
    states = pipeline.student(z, condition, torch.full((len(z),), guidance)).states
    found: dict[str, list[int]] = {}
    for guess in GUESSES:
        counts = [0] * len(states)

        def solve(number: int, predictor: Predictor, noise_BNC: Tensor) -> SolverResult:
            start = {"zero": 0 * noise_BNC, "student": states[number].to(noise_BNC)}.get(guess, noise_BNC)  # noqa: B023
            backwards = guess == "student" and predictor.block.spec.backwards  # noqa: B023
            x_BNC = in_order(start, backwards=backwards).clone()
            predictor.prefill()
            span = Span(predictor.first, predictor.tokens)
            solved = iterate(predictor, x_BNC, noise_BNC, span, StoppingRule(1e-3, span.count))
            counts[number] = solved.passes  # noqa: B023
            return SolverResult(x_BNC, solved.passes, solved.residual_B)

        solve_blocks(pipeline.flow, z, condition, null, SampleSettings(guidance), solve)
        found[guess] = counts
    return found


def medians(calls: dict[Any, Callable[[], object]], repeats: int) -> dict[Any, float]:
    """The median seconds of each call, after one that is not counted; the calls take turns."""
    taken: dict[Any, list[float]] = {name: [] for name in calls}
    for turn in range(1 + repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if turn:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in taken.items()}


def table(found: dict[str, Measurements]) -> Table:
    """A row a set of pictures."""
    rows = [["pictures", "kid_mobilenetv2 x 1000", "ms each, batch 1", "batch 16"]]
    for name, one in found.items():
        shown = [f"{one[key]:.0f}" if key in one else "" for key in ("ms_1", "ms_16")]
        rows.append([name, f"{one['kid']:.1f}", *shown])
    return rows


def draw_plot(folder: Path, pipeline: StarFlowPipeline, views: TrainingViews, log: Path) -> None:
    """The same prompts and seeds in every way, a row each, and the student's training where its log is beside it."""
    from experiments.plots import draw_curves, save, sheet

    prompts = [views.captions[row] for row in evenly_spaced(len(views), 8)]
    rows = {
        name: torch.cat([from_pil(image) for image in pipeline(prompts, **options).images])
        for name, options in ways(pipeline).items()
    }
    found = log.is_file()
    drawn, axes = sheet(rows, below=2 if found else 0)
    if found:
        blocks = len(pipeline.flow.blocks)
        ends = {0: ", next to the picture", blocks - 1: ", next to the noise"}
        states = {f"state_{number}": f"state {number}{ends.get(number, '')}" for number in range(blocks)}
        draw_curves(axes[0], log, {"clean": "clean latents", **states})
        axes[0].set_title("distance, in units of the target's mean square", fontsize=8)
        draw_curves(axes[1], log, {"perceptual": "distance of decoded pictures"})
    save(drawn, folder / f"{NAME}.png")
