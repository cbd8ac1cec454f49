"""The cleaning experiment takes the noise off latents in every way there is, on one data set and one flow.

The flow is trained on noised latents of an autoencoder whose decoder knows no noise. Its samples, and the latents of
held-out pictures with the same noise, are cleaned by nothing, by a Tweedie step through the flow, by a denoiser that
has learned that step, and by a decoder that was fine-tuned on noisy latents; then they are decoded and compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from experiments.results import Measurements, Result, Table, check_budget, measure_once
from starflow.data.images import from_pil, to_float
from starflow.data.views import TrainingViews, load_views
from starflow.evaluate import extract_features, kernel_distance, load_extractor, psnr
from starflow.evaluate.dataset import evenly_spaced
from starflow.latents import load_trainable
from starflow.pipeline.config import Cleaning
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.sampling.sampler import noise_from_seeds
from starflow.train.distributed import World
from starflow.train.recipe import NetworkSizes, load_recipe
from starflow.train.run import LOG_NAME, start_run
from starflow.train.settings import TrainSettings
from starflow.train.stages import train_flow
from starflow.train.tasks.decoder_run import DecoderSettings, run_decoder
from starflow.train.tasks.denoiser import DenoiserRecipe, train_denoiser

NAME = "cleaning"
RECIPE = Path("recipes/claims/cleaning.yaml")
CLAIM = (
    "There are three ways out of the noise: a Tweedie step, which blurs; a decoder fine-tuned on noisy latents "
    "(STARFlow, arXiv 2506.06276, section 3.3); and a network that learns the flow's own score, 26.7 dB on video where "
    "the Tweedie step gives 22.1 (STARFlow-V, arXiv 2511.20462)."
)
WAYS: dict[str, str] = {
    "none": "none",
    "tweedie": "Tweedie step",
    "denoiser": "learned denoiser",
    "decoder": "decoder for noise",
}
CLEAN = "clean"
"""Latents that never had the noise, decoded as they are: what a way out could reach."""

BATCH = 16
SHOWN = 8
"""Held-out pictures of the sheet."""


@dataclass(frozen=True)
class Budget:
    """How much is computed: about half an hour of one core, so that it can be rerun beside other work.

    An update takes 0.36 s (flow), 0.46 s (decoder) and 0.74 s (denoiser) of a busy core with AVX-512, encoding the
    pictures five minutes.
    """

    flow: int = 1000
    """Updates of the flow."""
    decoder: int = 320
    """Updates of the decoder."""
    denoiser: int = 600
    """Updates of the denoiser."""
    pictures: int = 96
    """Held-out pictures whose noised latents are cleaned."""
    samples: int = 96
    """Samples of the flow that are cleaned."""


QUICK = Budget(flow=2, decoder=2, denoiser=2, pictures=4, samples=4)


def run(
    folder: Path,
    budget: Budget,
    log: Callable[[str], None],
    command: str,
    autoencoder: str,
    data: Path,
    device: torch.device,
) -> Result:
    """Train what is missing, measure every way, and draw the pictures.

    Raises:
        UserError: no such autoencoder or glyphs, or the folder was started with another budget.
    """
    check_budget(folder, budget)
    pipeline = train_all(folder, budget, log, autoencoder, data, device)
    views = load_views(folder / "flow" / "views.safetensors")
    rows = [row for row, split in enumerate(views.splits) if split == "heldout"]
    rows = [rows[place] for place in evenly_spaced(len(rows), budget.pictures)]
    found = {
        way: measure_once(folder, way, lambda way=way: measure(pipeline, views, rows, budget, way), log)  # type: ignore[misc]
        for way in (*WAYS, CLEAN)
    }
    draw_plot(folder, pipeline, views, [rows[place] for place in evenly_spaced(len(rows), SHOWN)])
    title = "The ways out of the noise"
    return Result(NAME, title, CLAIM, [table(found)], command, {"measures": found, "budget": vars(budget)})


def train_all(
    folder: Path, budget: Budget, log: Callable[[str], None], autoencoder: str, data: Path, device: torch.device
) -> StarFlowPipeline:
    """The flow's pipeline with its denoiser, and with the decoder for noise as its other decoder."""
    model = folder / "flow" / "model"
    if not (model / "config.json").is_file():
        log("the flow")
        values = {"train.steps": f"{budget.flow}", "data.path": str(data), "autoencoder.source": autoencoder}
        train_flow(start_run(load_recipe(RECIPE, values), folder / "flow", device))
    log("the decoder for noise")
    run_decoder(decoder_settings(budget, str(model), data), folder / "decoder", device)
    log("the denoiser")
    recipe = denoiser_recipe(budget, str(model), str(folder / "flow" / "latents"))
    pipeline = StarFlowPipeline.from_pretrained(
        train_denoiser(recipe, folder / "denoiser", World(device=device)), device
    )
    pipeline.decoder = load_trainable(str(folder / "decoder" / "model"))
    return pipeline


def decoder_settings(budget: Budget, model: str, data: Path) -> DecoderSettings:
    """The decoder's training, of whole pictures by the full loss, whose critic starts half-way."""
    from starflow.train.tasks.decoder import DecoderLoss

    return DecoderSettings(
        model=model,
        data=str(data),
        size=64,
        crop=64,
        pictures=800,
        report=budget.pictures,
        heldout=16,
        loss=DecoderLoss(adversarial_from=budget.decoder // 2),
        train=_settings(budget.decoder, batch=8, lr=1e-3),
    )


def denoiser_recipe(budget: Budget, model: str, latents: str) -> DenoiserRecipe:
    """The denoiser's training, from the flow's own latents."""
    sizes = NetworkSizes(channels=128, layers=8, head_dim=32)
    train = _settings(budget.denoiser, batch=32, lr=1e-3)
    return DenoiserRecipe("claims-denoiser", model, train, latents=latents, network=sizes)


def _settings(steps: int, batch: int, lr: float) -> TrainSettings:
    return TrainSettings(
        steps=steps,
        batch=batch,
        lr=lr,
        warmup=min(100, steps // 10),
        average=max(0.0, min(0.995, 1 - 20 / steps)),
        evaluate_every=max(1, steps // 6),
        evaluate_pictures=96,
        sample_every=max(1, steps // 2),
        checkpoint_every=50,
    )


def measure(
    pipeline: StarFlowPipeline, views: TrainingViews, rows: list[int], budget: Budget, way: str
) -> Measurements:
    """dB with their standard error, kernel distances of held-out pictures and of samples, seconds a picture.

    The seconds are those of the way and the decoder. Of clean latents there are no samples.
    """
    images, batches = to_float(views.images[rows]), [rows[at : at + BATCH] for at in range(0, len(rows), BATCH)]
    noised = [noised_latents(pipeline, views, batch, noise=way != CLEAN) for batch in batches]
    started = time.perf_counter()
    cleaned = torch.cat([clean(pipeline, *one, way) for one in noised])
    seconds = (time.perf_counter() - started) / len(rows)
    extractor = load_extractor()

    def distance(pictures: Tensor) -> float:
        own, heldout = (extract_features(extractor, some.split(BATCH)).features for some in (pictures, images))
        return 1000 * kernel_distance(own, heldout).value

    each = psnr(cleaned, images)
    found = {"psnr": float(each.mean()), "psnr_error": float(each.std()) / len(rows) ** 0.5, "kid": distance(cleaned)}
    if way != CLEAN:
        prompts = [views.captions[rows[number % len(rows)]] for number in range(budget.samples)]
        found["kid_samples"] = distance(torch.cat([from_pil(image) for image in samples(pipeline, prompts, way)]))
    return {**found, "seconds": seconds}


@torch.no_grad()
def noised_latents(
    pipeline: StarFlowPipeline, views: TrainingViews, rows: list[int], *, noise: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Latents (B, C, h, w) of held-out pictures with the flow's noise, a seed a row, or without; their condition."""
    latents = pipeline.autoencoder.encode(to_float(views.images[rows]).to(pipeline.device))
    condition, _ = pipeline._condition([views.captions[row] for row in rows], latents.shape)
    added = noise_from_seeds(rows, tuple(latents.shape[1:])).to(latents)
    return latents + (pipeline.config.noise_std if noise else 0.0) * added, condition


@torch.no_grad()
def clean(pipeline: StarFlowPipeline, latents: Tensor, condition: Tensor | None, way: str) -> Tensor:
    """Latents cleaned and decoded: (B, 3, H, W)."""
    with _decoder_of(pipeline, way):
        return pipeline._decode_clean(latents, condition, cast(Cleaning, "none" if way == CLEAN else way)).cpu()


def samples(pipeline: StarFlowPipeline, prompts: list[str], way: str) -> list[Any]:
    """Pictures of these prompts, the same latents whatever the way."""
    with _decoder_of(pipeline, way):
        return list(pipeline(prompts, cleaning=cast(Cleaning, way), batch_size=BATCH).images)


@contextmanager
def _decoder_of(pipeline: StarFlowPipeline, way: str) -> Iterator[None]:
    """A context in which the decoder for noise decodes for the way of that name alone."""
    for_noise = pipeline.decoder
    pipeline.decoder = for_noise if way == "decoder" else None
    try:
        yield
    finally:
        pipeline.decoder = for_noise


def table(found: dict[str, Measurements]) -> Table:
    """A row a way."""
    heads = ["way", "dB", "kid_mobilenetv2 x 1000", "of samples", "ms a picture"]
    rows = [
        [
            WAYS.get(way, "clean latents, for comparison"),
            f"{one['psnr']:.2f} ± {one['psnr_error']:.2f}",
            f"{one['kid']:.1f}",
            f"{one['kid_samples']:.1f}" if "kid_samples" in one else "",
            f"{1000 * one['seconds']:.0f}",
        ]
        for way, one in found.items()
    ]
    return [heads, *rows]


def draw_plot(folder: Path, pipeline: StarFlowPipeline, views: TrainingViews, rows: list[int]) -> None:
    """Held-out pictures, what each way makes of their noised latents, a row each, and the denoiser's training."""
    from experiments.plots import draw_curves, save, sheet

    pictures = {"held-out pictures": to_float(views.images[rows])}
    noised = noised_latents(pipeline, views, rows)
    pictures |= {label: clean(pipeline, *noised, way) for way, label in WAYS.items()}
    drawn, (left, right) = sheet(pictures, below=2)
    log = folder / "denoiser" / LOG_NAME
    draw_curves(left, log, {"unexplained": "share of the flow's score that is missed"})
    errors = {"error": "denoiser", "error_tweedie": "Tweedie step", "error_noised": "noised latents"}
    draw_curves(right, log, errors)
    right.set_title("mean square to clean latents, held out", fontsize=8)
    save(drawn, folder / f"{NAME}.png")
