"""The stages of a recipe, each a folder of the run; a stage whose result is there is not run again.

RUN/recipe.json     the recipe as it was run       RUN/index/ or views.safetensors   the pictures
RUN/autoencoder/    log, samples, model            RUN/latents/            the latent cache
RUN/log.jsonl, samples/, checkpoints/, best/, model/   the flow; model/ is what from_pretrained reads
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from starflow import files
from starflow.conditioning import Conditioner
from starflow.config import to_dict
from starflow.data.latent_cache import read_cache
from starflow.data.pictures import from_pil, save_grid
from starflow.errors import UserError
from starflow.flow.model import Flow, STARFlow, TarFlow, build
from starflow.latents import Autoencoder, AutoencoderSpec
from starflow.model_config import config_from_dict
from starflow.pipeline import Cleaning, PipelineConfig, StarFlowPipeline
from starflow.train.distributed.initial import initialise
from starflow.train.distributed.world import World
from starflow.train.flow import FlowTask
from starflow.train.init_from import fill, read_initial
from starflow.train.joint import JointTask, joint_latents
from starflow.train.live import LiveFlowTask, LiveLatents
from starflow.train.loop import Task, fit
from starflow.train.prepare import (
    feed_settings,
    first_autoencoder,
    prepare_autoencoder,
    prepare_conditioner,
    prepare_latents,
    prepare_pictures,
)
from starflow.train.recipe import Objective, Recipe

USUAL_PROMPTS = ("a red apple", "a blue car", "a green tree", "a dog")


@dataclass(frozen=True)
class Run:
    """A recipe, its folder and where it computes."""

    recipe: Recipe
    folder: Path
    device: torch.device
    progress: bool = True
    world: World = field(default_factory=World)

    def say(self, text: str) -> None:
        """One line about what happens next."""
        if self.progress:
            tqdm.write(text)


def start(recipe: Recipe, folder: Path, device: torch.device, progress: bool = True, world: World | None = None) -> Run:
    """Prepare the run's folder; `world` is the processes that train together, None this one alone.

    Raises:
        UserError: it cannot be written, or holds a run whose finished stages this recipe would have made otherwise.
    """
    files.check_output_folder(folder)
    path = folder / "recipe.json"
    if path.is_file():
        _check_same_stages(files.read_json(path), to_dict(recipe), folder)
    world = world or World(device=device)
    if world.main:
        files.write_json(path, to_dict(recipe))
    return Run(recipe, folder, world.device, progress and world.main, world)


_MAY_CHANGE = frozenset({"train", "workers", "window", "latents"})
"""Keys of those sections that change no stage's result."""


def _check_same_stages(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with results that the recipe no longer describes; how long to train may change."""
    for section in ("data", "autoencoder", "conditioning"):
        old, new = dict(before.get(section, {})), dict(now[section])
        changed = [key for key in new if key not in _MAY_CHANGE and key in old and old[key] != new[key]]
        if changed:
            raise UserError(
                f"{folder} was started with another {section}.{changed[0]}: choose another --output, or undo the change"
            )


def train_flow(run: Run) -> Path:
    """Run every missing stage, then train the flow; returns the folder of the finished pipeline. Collective."""
    if run.recipe.autoencoder.joint:
        task: Task = _joint_task(run)
    elif run.recipe.data.latents == "live":
        task = _live_task(run)
    else:
        task = _cached_task(run)
    count, told = sum(parameter.numel() for parameter in task.model.parameters()), run.recipe.train
    run.say(f"flow: {count / 1e6:.1f} M parameters, {told.steps} steps of {told.batch} pictures")
    try:
        fit(task, run.recipe.train, run.folder, run.progress, run.world)
    finally:
        if isinstance(task, LiveFlowTask):
            task.feed.close()
    return run.folder / "model"


def _cached_task(run: Run) -> FlowTask:
    prepare_latents(run)
    cache = read_cache(run.folder / "latents")
    autoencoder = prepare_autoencoder(run)
    conditioner = prepare_conditioner(run, None)
    flow = _first_flow(run, autoencoder.spec, conditioner, cache.side)
    config = _pipeline_config(run, autoencoder.spec, conditioner, int(cache.info["image_size"]))
    return FlowTask(
        flow,
        cache,
        run.recipe.objective,
        run.recipe.train,
        draw=lambda trained, path: _draw_samples(
            run.recipe, _pipeline(trained, autoencoder, conditioner, config), path
        ),
        save=lambda trained, folder: _pipeline(trained, autoencoder, conditioner, config).save_pretrained(folder),
        world=run.world,
        window=run.recipe.data.window,
    )


def _live_task(run: Run) -> LiveFlowTask:
    pictures = prepare_pictures(run)
    conditioner = prepare_conditioner(run, pictures)
    autoencoder = prepare_autoencoder(run)
    latents = LiveLatents(pictures, autoencoder, conditioner)
    flow = _first_flow(run, autoencoder.spec, conditioner, latents.side)
    config = _pipeline_config(run, autoencoder.spec, conditioner, pictures.buckets.side)
    return LiveFlowTask(
        flow,
        latents,
        run.recipe.objective,
        run.recipe.train,
        draw=lambda trained, path: _draw_samples(
            run.recipe, _pipeline(trained, autoencoder, conditioner, config), path
        ),
        save=lambda trained, folder: _pipeline(trained, autoencoder, conditioner, config).save_pretrained(folder),
        world=run.world,
        how=feed_settings(run),
    )


def _joint_task(run: Run) -> JointTask:
    """Both networks real and equal in every process: drawn from the recipe's seeds."""
    recipe = run.recipe
    pictures = prepare_pictures(run)
    conditioner = prepare_conditioner(run, pictures)
    autoencoder = first_autoencoder(recipe.autoencoder).to(run.device)
    if run.world.size > 1:  # FSDP2 takes no other
        autoencoder.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    spec = joint_latents(copy.deepcopy(autoencoder), recipe.objective).spec
    flow = _first_flow(run, spec, conditioner, pictures.buckets.side // spec.factor)
    if next(flow.parameters()).is_meta:
        flow.to_empty(device=run.device)
        initialise(flow, recipe.train.seed)
    config = _pipeline_config(run, spec, conditioner, pictures.buckets.side)
    return JointTask(
        autoencoder,
        flow.to(run.device),
        pictures,
        conditioner,
        recipe.objective,
        recipe.autoencoder,
        recipe.train,
        draw=lambda coder, trained, path: _draw_samples(recipe, _pipeline(trained, coder, conditioner, config), path),
        save=lambda coder, trained, folder: _pipeline(trained, coder, conditioner, config).save_pretrained(folder),
        world=run.world,
        how=feed_settings(run),
    )


def _pipeline(
    trained: Flow, autoencoder: Autoencoder, conditioner: Conditioner | None, config: PipelineConfig
) -> StarFlowPipeline:
    assert isinstance(trained, (STARFlow, TarFlow))
    return StarFlowPipeline(trained, autoencoder, conditioner, config)


def _first_flow(run: Run, latents: AutoencoderSpec, conditioner: Conditioner | None, side: int) -> STARFlow | TarFlow:
    """The recipe's flow: on the meta device, or with the weights that `train.init_from` names."""
    recipe, source = run.recipe, run.recipe.train.init_from
    initial = read_initial(source, recipe.flow) if source else None
    with torch.device("meta"):  # the engine gives every process its part of the first weights
        flow = build_flow(initial.options if initial else recipe.flow, latents, conditioner, side)
    if initial is not None:
        # Several processes may share the weights of a model that one of them cannot hold.
        device = run.device if run.world.size == 1 else torch.device("cpu")
        fresh = fill(flow, initial, recipe.train.seed, device)
        run.say(f"first weights from {source}" + (f"; {len(fresh)} start anew, {fresh[0]} first" if fresh else ""))
    return flow


def build_flow(
    own: Mapping[str, Any], latents: AutoencoderSpec, conditioner: Conditioner | None, side: int
) -> STARFlow | TarFlow:
    """A new flow of these options for these latents of `side` x `side` and this condition.

    Raises:
        UserError: an unknown option, or options that do not fit.
    """
    options: dict[str, Any] = {"in_channels": latents.channels, "img_size": side, **own}
    if options.get("kind") == "tarflow":
        return build(config_from_dict({"num_classes": _classes(conditioner), **options}))
    layers = options.get("layers_per_block")
    if "num_blocks" not in options and isinstance(layers, (list, tuple)):
        options["num_blocks"] = len(layers)
    if conditioner:
        options = {"txt_size": conditioner.spec.size, "txt_dim": conditioner.spec.dim, **options}
    return build(config_from_dict(options))


def _classes(conditioner: Conditioner | None) -> int:
    if conditioner and conditioner.spec.kind != "class":
        raise UserError("a TarFlow reads class labels, no text: set conditioning.kind to class or none")
    return len(conditioner.spec.names) if conditioner else 0


def _pipeline_config(run: Run, latents: AutoencoderSpec, conditioner: Conditioner | None, side: int) -> PipelineConfig:
    recipe = run.recipe
    return PipelineConfig(
        name=recipe.name,
        image_size=side,
        noise=recipe.objective.noise,
        noise_std=recipe.objective.noise_std if recipe.objective.noise == "gaussian" else 0.0,
        autoencoder=latents,
        conditioner=conditioner.spec if conditioner else None,
        guidance=recipe.guidance if conditioner else 0.0,
        temperature=recipe.temperature,
        candidates=recipe.candidates,
        cleaning=_cleaning(recipe.objective, latents),
        aspects=recipe.data.aspects if len(recipe.data.aspects) > 1 else (),
    )


def _cleaning(objective: Objective, latents: AutoencoderSpec) -> Cleaning:
    """The way out of the noise: none to leave, a decoder trained for it, or else a Tweedie step."""
    if objective.noise == "uniform":
        if latents.kind != "pixels":
            raise UserError(f"objective.noise is uniform, which is for pixels: the autoencoder is a '{latents.kind}'")
        return "none"
    return "decoder" if latents.noise_std > 0 else "tweedie"


def _grid_prompts(recipe: Recipe, conditioner: Conditioner | None) -> list[str]:
    """The recipe's prompts, or the first classes or our own where it has none, or without a conditioner none."""
    if conditioner is None:
        return [""] * 8
    return list(recipe.prompts or conditioner.spec.names[:8] or USUAL_PROMPTS)


def _draw_samples(recipe: Recipe, pipeline: StarFlowPipeline, path: Path) -> None:
    """One picture a prompt of the recipe, seeds counting from 0, one row a guidance weight (0 and the recipe's)."""
    prompts = _grid_prompts(recipe, pipeline.conditioner)
    weights = (0.0, recipe.guidance) if pipeline.conditioner else (0.0,)
    pictures = [picture for weight in weights for picture in pipeline(prompts, guidance=weight).images]
    save_grid(torch.cat([from_pil(picture) for picture in pictures]), path, columns=len(prompts))
    caption = json.dumps({"prompts": prompts, "guidance": weights}, ensure_ascii=False)
    files.write_text(path.with_suffix(".json"), caption + "\n")
